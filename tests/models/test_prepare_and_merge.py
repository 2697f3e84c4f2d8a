"""`prepare` adds verification tokens to a checkpoint, `merge` folds an adapter into its base."""

import json
import shutil

import families
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tagged_rows import prepared
from transformers import AutoModelForImageTextToText, GenerationConfig

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import (
    TOLERANCE,
    cure_generation_config,
    logits,
    merge,
    prepare,
    probe,
)
from vlm_sft_rl.models.load import VLMModelConfig, adapter_base, load_for_inference, load_for_training
from vlm_sft_rl.models.lora import build_peft_config, finish_peft
from vlm_sft_rl.models.sidecar import read_sidecar, write_sidecar

FILES = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vlm_sft_rl.json"}


@pytest.mark.parametrize(("family", "threshold"), [("llava", 0.003), ("qwen2_5_vl", 0.01)])
def test_prepare_writes_an_ordinary_directory(tmp_path, family, threshold):
    source = families.save(*getattr(families, family)(), tmp_path / "base")
    ids = prepare(source, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= FILES and not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    model, processor, sidecar = load_for_inference(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"]) == ids
    assert sidecar.threshold == threshold and sidecar.recipe is None
    assert processor.tokenizer.padding_side == "left" and not model.training
    # the directory is readable without this package, and the old logits are the same
    x = torch.arange(20).unsqueeze(0)
    folders = (tmp_path / "out", source)
    new, old = (AutoModelForImageTextToText.from_pretrained(f)(input_ids=x).logits for f in folders)
    assert torch.equal(new[..., :260], old[..., :260])


def test_preparing_twice_gives_the_same(tmp_path):
    first = prepared(tmp_path)
    prepare(first, tmp_path / "again", init="semantic")
    a, b = (AutoModelForImageTextToText.from_pretrained(d).state_dict() for d in (first, tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_is_prepared_appears_whole_and_replaces_nothing(tmp_path, monkeypatch):
    source = families.save(*families.llava(), tmp_path / "base")
    target = tmp_path / "out"
    prepare(source, target)
    stamp = (target / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="out: exists already"):
        prepare(source, target)
    assert (target / "model.safetensors").stat().st_mtime_ns == stamp

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    # between the weights and the rest, where a folder looks whole and is not
    monkeypatch.setattr(type(families.llava()[1]), "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]


def test_invalid_sampling_flags_are_cured_and_valid_ones_kept(tmp_path):
    source = families.save(*families.llava(), tmp_path / "base")
    path = source / "generation_config.json"
    invalid = {"temperature": 0.9, "top_p": 0.6, "do_sample": False}
    path.write_text(json.dumps({**json.loads(path.read_text()), **invalid}))
    prepare(source, tmp_path / "out")
    GenerationConfig.from_pretrained(tmp_path / "out").validate(strict=True)
    config = GenerationConfig(do_sample=True, temperature=0.2, top_p=0.9)
    cure_generation_config(config)
    assert (config.temperature, config.top_p) == (0.2, 0.9)


def test_errors_of_prepare_name_the_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    source = families.save(*families.llava(), tmp_path / "base")
    with pytest.raises(UserError, match="same folder"):
        prepare(source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        prepare(source, tmp_path / "file" / "out")
    assert read_sidecar(source) is None


def adapter(folder, family="llava", tie=False, scale=0.02):
    """An adapter with random weights in every part, on a prepared base."""
    base = prepared(folder, family, tie=tie)
    args = VLMModelConfig(model_name_or_path=str(base), use_peft=True, lora_r=4, dtype="float32")
    model, processor, ids, sidecar = load_for_training(args)
    model = finish_peft(get_peft_model(model, build_peft_config(model, args, ids)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * scale
    out = folder / "adapter"
    model.save_pretrained(out)
    processor.save_pretrained(out)
    write_sidecar(out, sidecar)
    return model.eval(), processor, out


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("tie", [False, True])
def test_merged_logits_are_the_adapters(tmp_path, family, tie):
    model, processor, folder = adapter(tmp_path, family, tie)
    inputs = probe(processor)
    expected = logits(model, inputs)
    report = merge(folder, tmp_path / "merged")
    assert report.effect > 0.05 and report.error < 1e-5
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert read_sidecar(tmp_path / "merged") == read_sidecar(folder)
    for path in (tmp_path / "merged", folder):
        again, _, _ = load_for_inference(path, device="cpu")
        assert torch.allclose(logits(again, inputs), expected, atol=1e-5)
    names = " ".join(load_file(tmp_path / "merged" / "model.safetensors"))
    assert not any(word in names for word in ("lora", "token_adapter", "modules_to_save"))


def test_bfloat16_stays_bfloat16_and_close(tmp_path):
    _, _, folder = adapter(tmp_path, "qwen2_5_vl", True, scale=0.05)
    report = merge(folder, tmp_path / "merged", dtype="bfloat16")
    assert report.dtype == "bfloat16" and 0 < report.error < report.tolerance < report.effect
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_what_has_nothing_to_merge_is_refused(tmp_path):
    _, _, folder = adapter(tmp_path, scale=0.0)
    with pytest.raises(UserError, match="changes no logit"):
        merge(folder, tmp_path / "merged")
    with pytest.raises(UserError, match="nothing to merge"):
        merge(tmp_path / "prepared", tmp_path / "merged")


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


def test_the_base_may_move(tmp_path):
    _, _, folder = adapter(tmp_path)
    shutil.move(tmp_path / "prepared", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--base"):
        merge(folder, tmp_path / "merged")
    assert merge(folder, tmp_path / "merged", base=tmp_path / "elsewhere").effect > 0
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    # a base named relative to the adapter, as in an archive of both
    path.write_text(json.dumps({**config, "base_model_name_or_path": "../elsewhere"}))
    assert adapter_base(folder).endswith("elsewhere")
    path.write_text(json.dumps({**config, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="empty"):
        adapter_base(folder)
