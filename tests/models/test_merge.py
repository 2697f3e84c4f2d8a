import json
import shutil

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tagged_rows import prepared

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import TOLERANCE, logits, merge, probe
from vlm_sft_rl.models.load import VLMModelConfig, adapter_base, load_for_inference, load_for_training
from vlm_sft_rl.models.lora import build_peft_config, finish_peft
from vlm_sft_rl.models.sidecar import read_sidecar, write_sidecar

CASES = [(family, tie) for family in ("llava", "qwen2_5_vl") for tie in (False, True)]


def adapter(folder, family="llava", tie=False, scale=0.02, dtype="float32"):
    """An adapter with random weights in every part, on a prepared base."""
    base = prepared(folder, family, tie=tie)
    args = VLMModelConfig(model_name_or_path=str(base), use_peft=True, lora_r=4, dtype=dtype)
    model, processor, ids, sidecar = load_for_training(args)
    model = finish_peft(get_peft_model(model, build_peft_config(model, args, ids)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * scale)
    out = folder / "adapter"
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_sidecar(out, sidecar)
    return model.eval(), processor, out


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_merged_logits_are_the_adapters(tmp_path, family, tie):
    model, processor, folder = adapter(tmp_path, family, tie)
    inputs = probe(processor)
    wanted = logits(model, inputs)
    report = merge(folder, tmp_path / "merged")
    assert report.effect > 0.05 and report.error < 1e-5
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert read_sidecar(tmp_path / "merged") == read_sidecar(folder)
    for path in (tmp_path / "merged", folder):
        again, _, _ = load_for_inference(path, device="cpu")
        assert torch.allclose(logits(again, inputs), wanted, atol=1e-5)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert not [
        name for name in stored if "lora" in name or "token_adapter" in name or "modules_to_save" in name
    ]


def test_bfloat16_stays_bfloat16_and_close(tmp_path):
    _, _, folder = adapter(tmp_path, "qwen2_5_vl", True, scale=0.05)
    report = merge(folder, tmp_path / "merged", dtype="bfloat16")
    assert report.dtype == "bfloat16" and 0 < report.error < report.tolerance < report.effect
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_an_adapter_without_effect_is_refused(tmp_path):
    _, _, folder = adapter(tmp_path, scale=0.0)
    with pytest.raises(UserError, match="changes no logit"):
        merge(folder, tmp_path / "merged")


def test_only_a_proved_checkpoint_appears(tmp_path, monkeypatch):
    _, _, folder = adapter(tmp_path)
    target, left = tmp_path / "merged", sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setitem(TOLERANCE, torch.float32, -1.0)
    with pytest.raises(UserError, match="does not reproduce the adapter"):
        merge(folder, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    monkeypatch.undo()
    merge(folder, target)
    weights = (target / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="merged: exists already"):
        merge(folder, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == weights


@pytest.mark.parametrize("part", ["layers.1.", "lora", "token_adapter", "projector"])
def test_weights_that_do_not_load_are_noticed(tmp_path, part):
    _, _, folder = adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    assert any(part in name for name in weights)
    renamed = {n.replace("language_model", "text_model") if part in n else n: v for n, v in weights.items()}
    renamed = {n: v for n, v in renamed.items() if not (part == "projector" and part in n)}
    save_file(renamed, path)
    with pytest.raises(UserError, match="does not fit its base"):
        merge(folder, tmp_path / "merged")


def test_whole_checkpoints_need_no_merge(tmp_path):
    with pytest.raises(UserError, match="nothing to merge"):
        merge(prepared(tmp_path), tmp_path / "merged")


def test_the_base_may_move(tmp_path):
    _, _, folder = adapter(tmp_path)
    shutil.move(tmp_path / "prepared", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--base"):
        merge(folder, tmp_path / "merged")
    assert merge(folder, tmp_path / "merged", base=tmp_path / "elsewhere").effect > 0
    # a base named relative to the adapter, as in an archive of both
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "../elsewhere"})
    )
    assert adapter_base(folder).endswith("elsewhere")
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="empty"):
        adapter_base(folder)
