import json

import families
import pytest
import torch
from tagged_rows import prepared
from transformers import AutoModelForImageTextToText, GenerationConfig

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import cure_generation_config, prepare
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.models.sidecar import read_sidecar


@pytest.mark.parametrize(("family", "threshold"), [("llava", 0.003), ("qwen2_5_vl", 0.01)])
def test_prepare_writes_an_ordinary_directory(tmp_path, family, threshold):
    source = families.save(*getattr(families, family)(), tmp_path / "base")
    ids = prepare(source, tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "chat_template.jinja",
        "vlm_sft_rl.json",
    } <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    model, processor, sidecar = load_for_inference(tmp_path / "out")
    assert processor.tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"]) == ids
    assert sidecar.threshold == threshold and sidecar.recipe is None
    assert processor.tokenizer.padding_side == "left" and not model.training
    # the directory is readable without this package, and the old logits are the same
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    old = AutoModelForImageTextToText.from_pretrained(source)
    x = torch.arange(20).unsqueeze(0)
    assert torch.equal(plain(input_ids=x).logits[..., :260], old(input_ids=x).logits[..., :260])


def test_preparing_twice_gives_the_same(tmp_path):
    first = prepared(tmp_path)
    prepare(first, tmp_path / "again", init="semantic")
    a, b = (AutoModelForImageTextToText.from_pretrained(d).state_dict() for d in (first, tmp_path / "again"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_invalid_sampling_flags_are_cured(tmp_path):
    source = families.save(*families.llava(), tmp_path / "base")
    path = source / "generation_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "temperature": 0.9, "top_p": 0.6, "do_sample": False})
    )
    prepare(source, tmp_path / "out")
    GenerationConfig.from_pretrained(tmp_path / "out").validate(strict=True)


def test_valid_sampling_flags_are_kept():
    config = GenerationConfig(do_sample=True, temperature=0.2, top_p=0.9)
    assert cure_generation_config(config) == [] and config.temperature == 0.2


def test_errors_name_the_folder(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        prepare(tmp_path / "nowhere", tmp_path / "out")
    source = families.save(*families.llava(), tmp_path / "base")
    with pytest.raises(UserError, match="same folder"):
        prepare(source, source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        prepare(source, tmp_path / "file" / "out")
    assert read_sidecar(source) is None
