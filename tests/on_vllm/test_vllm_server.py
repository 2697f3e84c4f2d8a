"""Self-training samples from vLLM's own server, a LLaVA that it does not read by its names included."""

import sys

import families
import loops
import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

from json_lines import read_lines

from vlm_sft_rl.self_train import self_train

SERVE = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {{model}} --port {{port}} --dtype float32"


@pytest.mark.slow
def test_a_round_is_sampled_from_a_server_of_vllm(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "1")
    recipe = loops.write_loop(
        tmp_path,
        variant="zero_shot",
        sample_temperature=1.0,
        serve=SERVE + " --enforce-eager --block-size 32 --max-model-len 512 --max-num-seqs 8",
        serve_timeout=300.0,
    )
    families.save(*families.llava(hidden=128), tmp_path / "base")
    summary = self_train(recipe, accelerate_config="cpu")
    samples = read_lines(tmp_path / "run/round-0/test/samples/samples.jsonl")
    assert len(samples) == 24 and not any("error" in line for line in samples)
    assert len({line["answer"] for line in samples}) > 1
    assert summary["rounds"][0]["n"] == 8
    assert len(list((tmp_path / "base").glob("vllm-*"))) == 1  # what vLLM has loaded
