"""The certificate's way through vLLM, family by family: rewinds there read what transformers reads.

The column of docs/parity.md is what is found here. An engine takes half a minute to start, so most families are run only
where `WRITE_TABLE=yes` writes it.
"""

import os
from functools import partial

import parity_table
import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.parity import certificate as parity
from vlm_sft_rl.parity.readings import by_generate

FAMILIES = ["llava", "qwen2_5_vl"]
if os.environ.get("WRITE_TABLE"):
    FAMILIES += ["llava_mistral", "llava_more", "llava_next", "qwen2_vl", "qwen3_vl", "idefics3", "internvl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_says_what_vllm_reads(checkpoint, family):
    folder = checkpoint(family, **parity_table.SIZES.get(family, {}))
    model, processor, _ = load_for_inference(folder, "cpu", "float32")
    rows = parity_table.rows_for(family)
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


def test_llama_3_2_vision_is_refused(checkpoint):
    with pytest.raises(UserError, match="vLLM cannot run this checkpoint"):
        parity.by_vllm(checkpoint("mllama"), "float32", [])
    parity_table.check("mllama", {-1: "refused"}, "")
