"""The checkpoint of the evaluation's tests; each file has its own copy."""

import pytest
from worlds import write_checkpoint


@pytest.fixture(scope="module")
def tagged(tmp_path_factory):
    """A tiny LLaVA that knows the tags."""
    return write_checkpoint(tmp_path_factory.mktemp("tagged"))
