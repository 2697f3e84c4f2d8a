"""Configs of the published sizes over the small processors of `families`: what `--dry-run` reads, and no weight."""

from pathlib import Path

import families
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, MllamaConfig
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

TAGS = ["<SPAN>", "</CN>", "</UN>"]
# what a recipe starts from -> which size it is
CHECKPOINTS = {
    "checkpoints/llava-1.5-7b-verify": "llava_1_5_7b",
    "llava-hf/llava-1.5-7b-hf": "llava_1_5_7b",
    "checkpoints/llava-more-8b-verify": "llava_more_8b",
    "checkpoints/qwen2.5-vl-3b-verify": "qwen2_5_vl_3b",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl_3b",
    "runs/reverse-qwen": "qwen2_5_vl_3b",
    "runs/reverse-llava": "llava_1_5_7b",
    "checkpoints/qwen2.5-vl-7b-verify": "qwen2_5_vl_7b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl_7b",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2_vl_7b",
    "checkpoints/qwen3-vl-4b-verify": "qwen3_vl_4b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3_vl_8b",
    "Xkev/Llama-3.2V-11B-cot": "llama_3_2v_11b",
    "meta-llama/Llama-3.2-11B-Vision-Instruct": "llama_3_2v_11b",
}


def language(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, words: int, **more) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": words,
        "tie_word_embeddings": False,
        **more,
    }


ROPE = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
ROPE3 = {**ROPE, "rope_theta": 5000000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
VICUNA = {"vocab_size": 32064}  # for the rest LlamaConfig's defaults are the 7B
LLAMA3 = language(4096, 14336, 32, 32, 8, 128256)
QWEN2_3B = language(2048, 11008, 36, 16, 2, 151936, rope_parameters=ROPE, tie_word_embeddings=True)
QWEN2_7B = language(3584, 18944, 28, 28, 4, 152064, rope_parameters=ROPE)
QWEN3 = {"rope_parameters": ROPE3, "head_dim": 128}
QWEN3_4B = language(2560, 9728, 36, 32, 8, 151936, **QWEN3, tie_word_embeddings=True)
QWEN3_8B = language(4096, 12288, 36, 32, 8, 151936, **QWEN3)

QWEN_TOWER = {"depth": 32, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2_TOWER = {**QWEN_TOWER, "embed_dim": 1280, "hidden_size": 3584, "num_heads": 16, "mlp_ratio": 4}
QWEN2_5_TOWER = {**QWEN_TOWER, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
QWEN2_5_TOWER |= {"window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
QWEN3_TOWER = {"num_heads": 16, "num_position_embeddings": 2304}
QWEN3_4B_TOWER = {**QWEN3_TOWER, "depth": 24, "hidden_size": 1024, "intermediate_size": 4096}
QWEN3_8B_TOWER = {**QWEN3_TOWER, "depth": 27, "hidden_size": 1152, "intermediate_size": 4304}
# size -> family, language model, vision tower
SIZES = {
    "llava_1_5_7b": ("llava", VICUNA, None),
    "llava_more_8b": ("llava_more", LLAMA3, None),
    "qwen2_5_vl_3b": ("qwen2_5_vl", QWEN2_3B, {**QWEN2_5_TOWER, "out_hidden_size": 2048}),
    "qwen2_5_vl_7b": ("qwen2_5_vl", QWEN2_7B, {**QWEN2_5_TOWER, "out_hidden_size": 3584}),
    "qwen2_vl_7b": ("qwen2_vl", QWEN2_7B, QWEN2_TOWER),
    "qwen3_vl_4b": (
        "qwen3_vl",
        QWEN3_4B,
        {**QWEN3_4B_TOWER, "out_hidden_size": 2560, "deepstack_visual_indexes": [5, 11, 17]},
    ),
    "qwen3_vl_8b": (
        "qwen3_vl",
        QWEN3_8B,
        {**QWEN3_8B_TOWER, "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24]},
    ),
    "llama_3_2v_11b": ("mllama", None, None),
}


def checkpoint(name: str, folder: Path) -> Path:
    """`config.json` and processor files of a checkpoint that a recipe names, with verification tokens."""
    family, text, tower = SIZES[CHECKPOINTS[name]]
    model, processor = getattr(families, family)()
    processor.tokenizer.add_tokens(TAGS)
    if family in ("llava", "llava_more"):
        config = llava_config(LlamaConfig(**text), model.config.image_token_id)
        side = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
        processor.image_processor = CLIPImageProcessor(**side)
    elif family == "mllama":
        config = MllamaConfig(image_token_index=model.config.image_token_index)  # its defaults are the 11B
        side = config.vision_config.image_size
        processor.image_processor.size = {"height": side, "width": side}
    else:
        small = model.config.to_dict()
        small["text_config"] |= text
        small["vision_config"] |= tower
        small["text_config"].pop("layer_types", None)
        small["tie_word_embeddings"] = text["tie_word_embeddings"]
        config = type(model.config)(**small)
    processor.save_pretrained(folder)
    config.save_pretrained(folder)
    return folder


def llava_config(text: LlamaConfig, image_token: int = 32000) -> LlavaConfig:
    """LLaVA-1.5's tower and projector before a language model."""
    tower = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
