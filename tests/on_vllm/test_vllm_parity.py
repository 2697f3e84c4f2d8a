"""The certificate's way through vLLM: rewinds there read what transformers reads."""

from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.parity import certificate as parity
from vlm_sft_rl.parity.options import CertifyOptions
from vlm_sft_rl.parity.readings import by_generate
from vlm_sft_rl.parity.rows import sample_rows

GUIDE = Path(__file__).parents[2] / "docs" / "parity.md"
FAMILIES = ("llava", "qwen2_5_vl")


@pytest.mark.parametrize("family", FAMILIES)
def test_rewinds_on_vllm_are_certified(checkpoint, family):
    folder = checkpoint(family)
    model, processor, _ = load_for_inference(folder, "cpu", "float32")
    rows = [row for row in sample_rows(tagged=True) if row["id"] in ("short", "two pictures", "no picture")]
    certificate = parity.begin(model, processor, rows, VisionCollator(processor), name=family)
    ways = {
        parity.GENERATE: partial(by_generate, model, processor, certificate.cases, [[0], [1], [2]]),
        parity.VLLM: partial(parity.by_vllm, folder, CertifyOptions(), certificate.cases),
    }
    for name, way in ways.items():
        parity.attempt(certificate, name, way, print)
    assert certificate.comparisons.keys() == {parity.VLLM}, certificate.failures
    assert certificate.certified, certificate.failures


def test_the_guide_names_what_is_tested():
    names = ", ".join(f"`{family}`" for family in FAMILIES)
    assert f"The way through vLLM is tested with {names}" in " ".join(
        GUIDE.read_text(encoding="utf-8").split()
    )
