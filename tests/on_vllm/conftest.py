"""vLLM's settings for tests, and one checkpoint on both engines."""

import os
import shutil
from functools import cache

import families
import pytest
from decoded import sharp

from vlm_sft_rl.demos.frame import VERIFIER

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

HIDDEN = 128  # heads of 32 numbers: vLLM's attention on a CPU has none of 8


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Family (and sizes) -> the folder of a model of random weights with tags."""

    @cache
    def saved(family: str, **sizes):
        folder = tmp_path_factory.mktemp("models") / family
        return families.save(*sharp(family, hidden=HIDDEN, **sizes), folder)

    return saved


@pytest.fixture(scope="session")
def verifier(tmp_path_factory):
    """A copy of the shipped model that verifies itself: what vLLM reads is made beside it."""
    return shutil.copytree(VERIFIER, tmp_path_factory.mktemp("shipped") / "verifier")
