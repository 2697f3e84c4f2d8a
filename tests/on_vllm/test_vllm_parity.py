"""The certificate's way through vLLM, family by family: rewinds there read what transformers reads.

The column of docs/parity.md is what is found here: `WRITE_TABLE=yes` writes it.
"""

from functools import partial

import parity_table
import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

from training import OTHERS, QUICK

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.parity import certificate as parity
from vlm_sft_rl.parity.readings import by_generate
from vlm_sft_rl.parity.rows import sample_rows

# an engine takes about half a minute to start
FAMILIES = [
    pytest.param(name, marks=[] if name in ("llava", "qwen2_5_vl") else pytest.mark.slow)
    for name in [*QUICK, *OTHERS, "gemma3", "paligemma"]
]
ROWS = ("short", "two pictures", "no picture")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_vllm_reads(checkpoint, family):
    folder = checkpoint(family)
    model, processor, _ = load_for_inference(folder, "cpu", "float32")
    rows = [row for row in sample_rows(tagged=True) if row["id"] in ROWS]
    if family == "paligemma":
        rows = rows[:2]  # its processor takes none without a picture
    certificate = parity.begin(model, processor, rows, VisionCollator(processor), name=family)
    each = [[i] for i in range(len(rows))]
    ways = {
        parity.GENERATE: partial(by_generate, model, processor, certificate.cases, each),
        parity.VLLM: partial(parity.by_vllm, folder, "float32", certificate.cases),
    }
    for name, way in ways.items():
        parity.attempt(certificate, name, way, print)
    outcome = certificate.outcomes[parity.VLLM]
    verdict = outcome.status or certificate.comparisons[parity.VLLM].verdict(certificate.limits)
    parity_table.check(family, {-1: verdict}, (outcome.reason, certificate.failures))
