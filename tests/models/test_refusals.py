"""What cannot work is refused before weights are read."""

import json

import families
import pytest
from tagged_rows import prepared

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import prepare
from vlm_sft_rl.models.load import VLMModelConfig, load_for_training, load_model

QWEN_VL_CHAT = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen",
    "visual": {"image_size": 448},
}
CASES = [
    (QWEN_VL_CHAT, "Use Qwen2-VL or newer"),
    (
        {"model_type": "internvl_chat", "auto_map": {"AutoModel": "modeling.InternVLChatModel"}},
        "InternVL3-8B-hf",
    ),
    (
        {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        "vlm-sft-rl model convert",
    ),
    (
        {"model_type": "my_vlm", "auto_map": {"AutoModel": "modeling.MyVLM"}},
        "code from the checkpoint, which is never run",
    ),
    ({"model_type": "nothing_known"}, "'nothing_known' is unknown"),
    ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "not a vision-language model"),
]


@pytest.mark.parametrize("config, cure", CASES, ids=[config["model_type"] for config, _ in CASES])
@pytest.mark.parametrize("start", ["load", "train", "prepare"])
def test_refused_by_the_config_alone(tmp_path, config, cure, start):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=cure):
        if start == "load":
            load_model(tmp_path / "model")
        elif start == "train":
            load_for_training(VLMModelConfig(model_name_or_path=str(tmp_path / "model")))
        else:
            prepare(tmp_path / "model", tmp_path / "prepared")


def test_a_bidirectional_prompt_decodes_but_does_not_train(tmp_path):
    folder = prepared(tmp_path, "paligemma")
    assert load_model(folder).config.model_type == "paligemma"
    with pytest.raises(UserError, match="an answer could see itself"):
        load_for_training(VLMModelConfig(model_name_or_path=str(folder)))


def test_an_encoder_decoder_model_does_not_train(tmp_path):
    folder = families.save(*families.llava(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(UserError, match="encoder-decoder"):
        load_for_training(VLMModelConfig(model_name_or_path=str(folder)))
