"""Configs of the published sizes over the small processors of `families`: what `--dry-run` reads, and no weight."""

from pathlib import Path

import families
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MllamaConfig
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

TAGS = ["<SPAN>", "</CN>", "</UN>"]
QWEN_VISION = {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2_5_VISION = {
    **QWEN_VISION,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
ROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
QWEN2_7B = {
    "rope_parameters": ROPE,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
QWEN2_3B = {
    "rope_parameters": ROPE,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
QWEN3 = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5000000.0,
        "mrope_section": [24, 20, 20],
        "mrope_interleaved": True,
    },
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
LLAMA3 = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# what a recipe starts from -> which size it is
CHECKPOINTS = {
    "checkpoints/llava-1.5-7b-verify": "llava_1_5_7b",
    "llava-hf/llava-1.5-7b-hf": "llava_1_5_7b",
    "checkpoints/llava-more-8b-verify": "llava_more_8b",
    "checkpoints/qwen2.5-vl-3b-verify": "qwen2_5_vl_3b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl_3b",
    "runs/reverse-qwen": "qwen2_5_vl_3b",
    "checkpoints/qwen2.5-vl-7b-verify": "qwen2_5_vl_7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl_7b",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl_7b",
    "checkpoints/qwen3-vl-4b-verify": "qwen3_vl_4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl_8b",
    "Xkev/Llama-3.2V-11B-cot": "llama_3_2v_11b",
    "meta-llama/Llama-3.2-11B-Vision-Instruct": "llama_3_2v_11b",
}


def checkpoint(name: str, folder: Path) -> Path:
    """`config.json` and processor files of a checkpoint that a recipe names, with verification tokens."""
    size = CHECKPOINTS[name]
    family, config = SIZES[size]
    model, processor = getattr(families, family)()
    processor.tokenizer.add_tokens(TAGS)
    if family in ("llava", "llava_more"):
        config = llava_config(LlamaConfig(**config), model.config.image_token_id)
        processor.image_processor = CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        )
    elif family == "mllama":
        config = MllamaConfig(image_token_index=model.config.image_token_index)  # its defaults are the 11B
    else:
        given = model.config.to_dict()
        for part, changes in config.items():
            given[part] |= changes
        given["text_config"].pop("layer_types", None)
        given["tie_word_embeddings"] = given["text_config"]["tie_word_embeddings"]
        config = type(model.config)(**given)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def llava_config(text: LlamaConfig, image_token: int = 32000) -> LlavaConfig:
    """LLaVA-1.5's tower and projector before a language model."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
            projection_dim=768,
        ),
        text_config=text,
        image_token_index=image_token,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


VICUNA = {"vocab_size": 32064}  # for the rest LlamaConfig's defaults are the 7B
SIZES = {
    "llava_1_5_7b": ("llava", VICUNA),
    "llava_more_8b": ("llava_more", LLAMA3),
    "qwen2_5_vl_3b": (
        "qwen2_5_vl",
        {"text_config": QWEN2_3B, "vision_config": {**QWEN2_5_VISION, "out_hidden_size": 2048}},
    ),
    "qwen2_5_vl_7b": (
        "qwen2_5_vl",
        {"text_config": QWEN2_7B, "vision_config": {**QWEN2_5_VISION, "out_hidden_size": 3584}},
    ),
    "qwen2_vl_7b": (
        "qwen2_vl",
        {
            "text_config": QWEN2_7B,
            "vision_config": {
                **QWEN_VISION,
                "embed_dim": 1280,
                "hidden_size": 3584,
                "num_heads": 16,
                "mlp_ratio": 4,
            },
        },
    ),
    "qwen3_vl_4b": (
        "qwen3_vl",
        {
            "text_config": {
                **QWEN3,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "vocab_size": 151936,
                "tie_word_embeddings": True,
            },
            "vision_config": {
                "depth": 24,
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_heads": 16,
                "out_hidden_size": 2560,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
    ),
    "qwen3_vl_8b": (
        "qwen3_vl",
        {
            "text_config": {
                **QWEN3,
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "vocab_size": 151936,
                "tie_word_embeddings": False,
            },
            "vision_config": {
                "depth": 27,
                "hidden_size": 1152,
                "intermediate_size": 4304,
                "num_heads": 16,
                "out_hidden_size": 4096,
                "num_position_embeddings": 2304,
                "deepstack_visual_indexes": [8, 16, 24],
            },
        },
    ),
    "llama_3_2v_11b": ("mllama", None),
}
