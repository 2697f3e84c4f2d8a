"""Self-training whose answers come from vLLM in its own process, against transformers: the same samples."""

import shutil

import families
import loops
import psutil
import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

from json_lines import read_lines
from peft import LoraConfig, get_peft_model

from vlm_sft_rl.decoding.config import engine_version
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import read_json, write_json
from vlm_sft_rl.self_train import self_train

CACHE = 2**30  # bytes that vLLM holds for keys, see conftest.py


@pytest.fixture
def recipe(tmp_path):
    """One whose model is an adapter, as that of a round is."""
    path = loops.write_loop(tmp_path, variant="zero_shot", sample_temperature=1.0, model_name_or_path="X")
    shutil.rmtree(tmp_path / "base")
    model, processor = families.llava(hidden=128)
    families.save(model, processor, tmp_path / "base")
    model.name_or_path = str(tmp_path / "base")
    adapter = get_peft_model(
        model, LoraConfig(r=4, target_modules=r".*language_model.*_proj", init_lora_weights=False)
    )
    families.save(adapter, processor, tmp_path / "adapter")
    path.write_text(
        path.read_text().replace("model_name_or_path: X", f"model_name_or_path: {tmp_path}/adapter")
    )
    return path


@pytest.mark.slow
def test_what_vllm_samples_is_what_transformers_samples(recipe, tmp_path):
    def answers(engine: str) -> dict[str, list[dict]]:
        run = tmp_path / engine
        summary = self_train(recipe, ["--engine", engine, "--output_dir", str(run)], accelerate_config="cpu")
        assert summary["engine"] == engine_version(engine)
        stores = {path.parent: read_lines(path) for path in run.rglob("samples.jsonl")}
        for folder in stores:
            assert {read_json(folder / name)["engine"] for name in ("run.json", "stage.json")} == {
                engine_version(engine)
            }
        return {str(folder.relative_to(run)): lines for folder, lines in stores.items()}

    expected, before = answers("hf"), psutil.Process().memory_info().rss
    assert answers("vllm") == expected and len(expected) == 5
    assert len({line["answer"] for line in expected["round-0/test/samples"]}) > 8
    shutil.rmtree(tmp_path / "vllm/round-0/test/refine")
    assert answers("vllm") == expected  # by another vLLM in the same process
    assert psutil.Process().memory_info().rss - before < CACHE
    with pytest.raises(UserError, match=r"hf/round-0/test/direct.*engine: 'transformers.*' -> 'vllm"):
        self_train(
            recipe, ["--engine", "vllm", "--output_dir", str(tmp_path / "hf")], accelerate_config="cpu"
        )


@pytest.mark.parametrize("family, reason", [("mllama", "MllamaProcessor"), (None, "NoSuchModel")])
def test_a_family_that_vllm_cannot_run_is_refused_before_anything_is_trained(
    recipe, tmp_path, family, reason
):
    if family:
        shutil.rmtree(tmp_path / "base")
        families.save(*getattr(families, family)(), tmp_path / "base")
    else:
        config = read_json(tmp_path / "base/config.json")
        write_json(tmp_path / "base/config.json", config | {"architectures": [reason]})
    with pytest.raises(UserError, match=rf"base: vLLM cannot run this checkpoint .*{reason}.*--engine hf"):
        self_train(recipe, ["--engine", "vllm"], accelerate_config="cpu")
    assert not list((tmp_path / "run").glob("round-*"))
