"""Loading for inference and for training, what is refused before any weight is read, and the report before step 1."""

import json
import sys

import families
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tagged_rows import prepared, write_rows
from transformers import SmolVLMVideoProcessor
from transformers.models.smolvlm import processing_smolvlm

from vlm_sft_rl.data.chat import load_processor
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import prepare
from vlm_sft_rl.models.load import (
    VLMModelConfig,
    load_for_inference,
    load_for_training,
    load_model,
    training_dtype,
)
from vlm_sft_rl.models.parts import count_parameters
from vlm_sft_rl.models.report import print_report, startup_report
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, build_collator


def train(folder, **settings):
    return load_for_training(VLMModelConfig(model_name_or_path=str(folder), **settings))


def test_training_needs_tokens_and_inference_does_not(tmp_path):
    source = families.save(*families.llava(), tmp_path / "base")
    with pytest.raises(UserError, match=r"lacks the verification tokens.*vlm-sft-rl model prepare"):
        train(source)
    model, _, sidecar = load_for_inference(source, device="cpu")
    assert sidecar is None and model.dtype == torch.float32


@pytest.mark.parametrize(
    "settings", [{}, {"freeze_vision": False}, {"train_projector": False}, {"freeze_language": True}]
)
def test_freezing_by_recipe(tmp_path, settings):
    model, processor, ids, _ = train(prepared(tmp_path), **settings)
    counts = count_parameters(model)
    trains = {part: counts[part]["trainable"] == counts[part]["total"] for part in counts}
    args = VLMModelConfig(**settings)
    assert trains == {
        "vision": not args.freeze_vision,
        "projector": args.train_projector,
        "language": not args.freeze_language,
    }
    assert len(ids) == 3 and processor.tokenizer.padding_side == "right" and model.dtype == torch.float32


def test_dtype_auto(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    assert training_dtype(VLMModelConfig(dtype="float16")) == "float16"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert training_dtype(VLMModelConfig()) == "float32"
    assert training_dtype(VLMModelConfig(use_peft=True)) == "bfloat16"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert training_dtype(VLMModelConfig()) == "bfloat16"


def test_impossible_settings_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="model_name_or_path"):
        load_for_training(VLMModelConfig())
    with pytest.raises(UserError, match="use_peft"):
        train("x", load_in_4bit=True)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="vlm-sft-rl merge"):
        train(tmp_path)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # how `import` sees that it is not installed
    with pytest.raises(UserError, match=r"vlm-sft-rl\[quant\]"):
        train(prepared(tmp_path), use_peft=True, load_in_4bit=True)


def code(kind: str, name: str, **more) -> dict:
    """The config of a checkpoint with code of its own."""
    return {"model_type": kind, "auto_map": {"AutoModel": name}} | more


REFUSED = [
    (code("qwen", "modeling_qwen.QWenLMHeadModel", visual={"image_size": 448}), "Use Qwen2-VL or newer"),
    (code("internvl_chat", "modeling.InternVLChatModel"), "InternVL3-8B-hf"),
    ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, "vlm-sft-rl model convert"),
    (code("my_vlm", "modeling.MyVLM"), "code from the checkpoint, which is never run"),
    ({"model_type": "nothing_known"}, "'nothing_known' is unknown"),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "not a vision-language model"),
]


@pytest.mark.parametrize("config, cure", REFUSED, ids=[config["model_type"] for config, _ in REFUSED])
@pytest.mark.parametrize("start", [load_model, train, lambda folder: prepare(folder, folder / "prepared")])
def test_refused_by_the_config_alone(tmp_path, config, cure, start):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=cure):
        start(tmp_path)


def test_a_bidirectional_prompt_decodes_but_does_not_train(tmp_path):
    folder = prepared(tmp_path, "paligemma")
    assert load_model(folder).config.model_type == "paligemma"
    with pytest.raises(UserError, match="an answer could see itself"):
        train(folder)


def test_an_encoder_decoder_model_does_not_train(tmp_path):
    folder = families.save(*families.llava(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(UserError, match="encoder-decoder"):
        train(folder)


def test_what_is_no_processor_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}.*no loadable processor"):
        load_processor(tmp_path)
    families.llava()[1].tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not a processor for images|no loadable processor"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("runs/demo/models/prepared", "no such folder, and no name of a model on the Hub"),
        ("/absent", "no such folder, and no name of a model on the Hub"),
        ("owner/absent", "no such folder, and its config.json does not come from the Hub"),
        ("model.safetensors", "a file, expected the folder"),
    ],
)
@pytest.mark.parametrize("load", [load_processor, load_model, load_for_inference])
def test_a_model_that_is_nowhere_is_named(tmp_path, monkeypatch, load, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{name}: {reason}"):
        load(name)


def test_a_processor_that_lacks_a_package_names_it(tmp_path, monkeypatch):
    """SmolVLM's processor spells numbers out with a package that transformers does not bring."""
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    folder = families.save(*families.smolvlm(), tmp_path / "model")
    SmolVLMVideoProcessor().save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {"processor_class": "SmolVLMProcessor"}))
    with pytest.raises(UserError, match=r"num2words.*pip install vlm-sft-rl\[smolvlm\]"):
        load_processor(folder)


def test_pixel_limits_reach_the_processor(tmp_path):
    folder = prepared(tmp_path, "qwen2_5_vl")
    _, processor, _, _ = train(folder, min_pixels=28 * 28, max_pixels=28 * 28 * 2)
    assert processor.image_processor.size["longest_edge"] == 28 * 28 * 2
    features = processor(text=["<|image_pad|>"], images=[Image.new("RGB", (280, 280))], return_tensors="pt")
    assert features["image_grid_thw"].tolist() == [[1, 2, 2]]


def test_pixel_limits_are_refused_where_images_are_not_resized_by_area(tmp_path):
    with pytest.raises(
        UserError, match=r"CLIPImageProcessor does not resize by area\. Leave out `min_pixels`"
    ):
        train(prepared(tmp_path, "llava"), max_pixels=28 * 28 * 2)


def test_report_counts_what_is_there(tmp_path, capsys):
    model, processor, _, _ = train(prepared(tmp_path, "qwen2_5_vl"))
    rows = Dataset.from_list(list(read_rows(write_rows(tmp_path / "data"))))
    settings = VerificationSFTConfig(str(tmp_path), use_cpu=True)
    collator = build_collator(processor, settings, image_root=tmp_path / "data")
    report = startup_report(model, processor, rows, collator, rows=4)
    assert report["family"] == "qwen2_5_vl" and report["tied"] and report["token_rows"] == "all"
    assert report["image_tokens"] == 4 and report["rows_measured"] == 4  # 56 px = 2 x 2 merged patches
    assert report["longest_row"] == max(len(collator.encode(row).input_ids) for row in rows.select(range(4)))
    total = sum(p.numel() for p in model.parameters())
    assert sum(c["total"] for c in report["parameters"].values()) == total
    print_report(report)
    assert "longest row" in capsys.readouterr().out
