"""Fixtures of the data layer's tests."""

from types import SimpleNamespace

import pytest
import templates


@pytest.fixture(params=[f"{t}-{kind}" for t in templates.TEMPLATES for kind in templates.KINDS])
def chat(request):
    """A processor with each chat template and each kind of tokenizer, and the token that ends its answers."""
    template, kind = request.param.split("-")
    processor = templates.processor(template, kind)
    end = templates.END_OF_TURN[template]

    def decode(ids) -> str:
        return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return SimpleNamespace(template=template, kind=kind, processor=processor, end=end, decode=decode)
