"""A tiny LLaVA written in its authors' format, converted, and compared with where it came from."""

import copy
import json
import os

import families
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, LlamaForCausalLM

from vlm_sft_rl.decoding import generate_retrospective
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import convert, prepare
from vlm_sft_rl.models.load import load_for_inference, load_model


def authors_names(state: dict, tower: bool) -> dict:
    """transformers' names of a LLaVA's weights -> those of its authors."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith("model.vision_tower."):
            if not tower:
                continue
            name = name.replace("model.vision_tower.", "model.vision_tower.vision_tower.vision_model.")
        name = name.replace("model.language_model.", "model.")
        name = name.replace("multi_modal_projector.linear_1", "mm_projector.0")
        renamed[name.replace("multi_modal_projector.linear_2", "mm_projector.2")] = tensor.clone()
    return renamed


@pytest.fixture
def original(tmp_path):
    """Writes an authors' folder of a family; returns it and the model it holds."""

    def write(family: str, *, files: str = "safetensors", trained_tower: bool = False, **config):
        model, processor = getattr(families, family)()
        tokenizer = processor.tokenizer
        rows = tokenizer.convert_tokens_to_ids(
            "<image>"
        )  # theirs has no image token: it is the last one here
        assert rows == len(tokenizer) - 1
        state = model.state_dict()
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            state[name] = state[name][:rows]
        folder, tower = tmp_path / "authors", tmp_path / "tower"
        folder.mkdir()
        settings = {
            **model.config.text_config.to_dict(),
            "vocab_size": rows,
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaForCausalLM"],
            "mm_vision_tower": str(tower),
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": 32,
            **config,
        }
        (folder / "config.json").write_text(json.dumps(settings))
        weights = authors_names(state, trained_tower)
        projector = {name: weights.pop(name) for name in list(weights) if "mm_projector" in name}
        if files == "apart":
            torch.save(projector, tmp_path / "mm_projector.bin")
        else:
            weights |= projector
        if files == "bin":
            torch.save(weights, folder / "pytorch_model.bin")
        else:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        specials = [t for t in tokenizer.all_special_tokens if t != "<image>"]
        ends = {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token}
        families.byte_tokenizer(specials, **ends).save_pretrained(folder)
        vision = copy.deepcopy(model.model.vision_tower)
        if trained_tower:  # what lies in the tower's own folder is older
            for parameter in vision.parameters():
                parameter.data += 1
        vision.save_pretrained(tower)
        side = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
        CLIPImageProcessor(**side).save_pretrained(tower)
        return folder, model

    return write


CASES = [
    ("llava", {}),
    ("llava", {"files": "bin"}),
    ("llava", {"files": "apart"}),
    ("llava", {"trained_tower": True}),
    ("llava", {"model_type": "llava"}),
    ("llava_more", {}),
]


@pytest.mark.parametrize("family, how", CASES)
def test_logits_are_those_of_the_model_it_was(tmp_path, original, family, how):
    folder, model = original(family, **how)
    projector = tmp_path / "mm_projector.bin" if how.get("files") == "apart" else None
    report = convert(folder, tmp_path / "converted", projector=projector)
    assert report.template == {"llava": "vicuna", "llava_more": "llama3"}[family]
    again, processor, _ = load_for_inference(tmp_path / "converted", device="cpu")
    assert type(again).__name__ == "LlavaForConditionalGeneration"
    image = Image.linear_gradient("L").convert("RGB").resize((28, 28))
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is there?"}]}
    text = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[image], return_tensors="pt")
    assert (inputs["input_ids"] == report.image_token_id).sum() == 4
    with torch.no_grad():
        logits, expected = (m(**inputs).logits[..., : report.image_token_id] for m in (again, model))
    assert torch.allclose(logits, expected, atol=1e-6) and expected.abs().max() > 0.1


def test_converted_prepared_and_decoded(tmp_path, original, caplog):
    folder, _ = original("llava_more", image_aspect_ratio="pad")
    convert(folder, tmp_path / "converted")
    assert not [record for record in caplog.records if "not used" in record.getMessage()]
    prepare(tmp_path / "converted", tmp_path / "prepared")
    model, processor, _ = load_for_inference(tmp_path / "prepared", device="cpu")
    assert processor.image_processor.do_pad  # as the authors trained it
    wide = Image.linear_gradient("L").convert("RGB").resize((84, 28))
    (answer,) = generate_retrospective(
        model, processor, [wide], ["What?"], RetrospectiveConfig(max_new_tokens=5)
    )
    assert answer.counts.image_encodes == 1


def test_the_authors_folder_itself_is_refused_with_the_command(original):
    folder, _ = original("llava", model_type="llava")
    with pytest.raises(UserError, match="vlm-sft-rl model convert"):
        load_model(folder)


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("/tmp/unpickled-by-convert",))


@pytest.mark.parametrize(
    "broken, complaint",
    [
        ({"mm_projector_type": "linear"}, "only mlp2x_gelu"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({"mm_vision_tower": None}, "--vision-tower"),
        ({"mm_hidden_size": 32, "files": "apart"}, "--projector"),
        ({"num_hidden_layers": 3}, "weights of the language model are missing"),
    ],
)
def test_what_cannot_be_converted_is_named(tmp_path, original, broken, complaint):
    folder, _ = original("llava", **broken)
    with pytest.raises(UserError, match=complaint):
        convert(folder, tmp_path / "converted")
    assert not (tmp_path / "converted" / "config.json").exists()


def test_a_pickle_of_more_than_tensors_is_not_loaded(tmp_path, original):
    folder, _ = original("llava", files="apart")
    torch.save({"model.mm_projector.0.weight": Payload()}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="Pickles that hold other objects are never loaded"):
        convert(folder, tmp_path / "converted", projector=tmp_path / "mm_projector.bin")
    assert not os.path.exists("/tmp/unpickled-by-convert")


def test_a_projector_of_another_model_and_a_tower_of_another_kind(tmp_path, original):
    folder, model = original("llava")
    names = [f"model.mm_projector.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    wrong = dict.fromkeys(names, torch.zeros(3, 3))
    torch.save(wrong, tmp_path / "other.bin")
    with pytest.raises(UserError, match="do not fit"):
        convert(folder, tmp_path / "converted", projector=tmp_path / "other.bin")
    LlamaForCausalLM(model.config.text_config).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="CLIP or SigLIP"):
        convert(folder, tmp_path / "converted", vision_tower=tmp_path / "llama")
    with pytest.raises(UserError, match="vicuna"):
        convert(folder, tmp_path / "converted", chat_template="absent")


BROKEN = [
    ("authors/config.json", {"mm_vision_tower": 7}, "mm_vision_tower"),
    ("authors/config.json", {"mm_vision_select_layer": "abc"}, "mm_vision_select_layer"),
    ("authors/config.json", {"mm_vision_select_feature": "cls"}, "mm_vision_select_feature"),
    ("authors/config.json", {"hidden_size": -1}, "hidden_size"),
    ("authors/config.json", {"hidden_size": 64}, "parts do not fit|another shape"),
    ("authors/config.json", {"hidden_act": 7}, "hidden_act|parts do not fit"),
    ("authors/config.json", {"num_hidden_layers": 3}, "weights of the language model are missing"),
    (
        "authors/config.json",
        {"num_hidden_layers": 1},
        "9 weights are of layers that config.json does not have",
    ),
    ("authors/config.json", None, "not valid JSON"),
    ("authors/tokenizer.json", None, "not valid JSON"),
    ("authors/generation_config.json", None, "not valid JSON"),
    ("authors/model.safetensors", None, "not a file of tensors"),
    ("tower/config.json", {"image_size": 56}, "another shape"),
    ("tower/config.json", {"num_hidden_layers": 5}, "weights are missing"),
    ("tower/config.json", {"patch_size": 0}, "patch_size"),
    ("tower/config.json", None, "not valid JSON"),
    ("tower/preprocessor_config.json", {"size": -1}, "size"),
    (
        "tower/preprocessor_config.json",
        {"crop_size": {"height": 56, "width": 56}},
        "cannot encode|image tokens",
    ),
    ("tower/preprocessor_config.json", None, "not valid JSON|no loadable image processor"),
]


@pytest.mark.parametrize("file, changes, reason", BROKEN)
def test_what_is_broken_is_named_and_leaves_nothing(tmp_path, original, file, changes, reason):
    original("llava")
    path = tmp_path / file
    if not path.exists():
        path.write_text("{}")
    if changes is None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(UserError, match=reason):
        convert(tmp_path / "authors", tmp_path / "converted")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["authors", "tower"]


def test_weights_that_are_not_finite_are_not_converted(tmp_path, original):
    folder, _ = original("llava")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.mm_projector.0.bias"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: 1 tensors hold weights that are not finite"):
        convert(folder, tmp_path / "converted")


def test_an_index_of_the_authors_does_not_lead_out_of_its_folder(tmp_path, original):
    folder, _ = original("llava")
    (tmp_path / "other.bin").write_bytes(b"")
    index = {"metadata": {}, "weight_map": {"a": "../other.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="leads out of the folder"):
        convert(folder, tmp_path / "converted")


def test_what_is_converted_replaces_nothing(tmp_path, original):
    folder, _ = original("llava")
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        convert(folder, tmp_path / "converted")
