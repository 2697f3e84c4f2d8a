"""Further tiny random models, see `families`: Qwen3-VL, Llama-3.2-Vision (Mllama), InternVL, LLaVA-MORE."""

import torch
from family_parts import CHATML_TEMPLATE, SMALL, byte_tokenizer
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

# Llama 3.2's: typed content, images where they stand, no trimming of the answers' inside
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
LLAMA3_SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_SPECIALS += ["<|eot_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"]


def _llama3_tokenizer(*more: str):
    tokenizer = byte_tokenizer(
        [*LLAMA3_SPECIALS, *more],
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        pad="<|finetune_right_pad_id|>",
    )
    tokenizer.padding_side = "left"
    return tokenizer


def _finished(model, tokenizer):
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


def qwen3_vl(*, tie: bool = True, seed: int = 0):
    """Qwen3-VL: deep-stacked vision features, interleaved mRoPE, patches of 16 pixels."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.padding_side = "left"
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in specials}
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 32,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            "vocab_size": len(tokenizer) + 7,
            **SMALL,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            },
            "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": tie,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    model = _finished(Qwen3VLForConditionalGeneration(config), tokenizer)
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            min_pixels=32 * 32 * 4, max_pixels=32 * 32 * 16, patch_size=16, merge_size=2
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHATML_TEMPLATE,
    )
    return model, processor


def mllama(*, seed: int = 0):
    """Llama-3.2-Vision: images enter through cross-attention layers; the image token has no output row."""
    tokenizer = _llama3_tokenizer()
    vocabulary = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image|>"]})
    config = MllamaConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
        },
        text_config={
            "vocab_size": vocabulary,
            **SMALL,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "cross_attention_layers": [1, 3],
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    torch.manual_seed(seed)
    model = _finished(MllamaForConditionalGeneration(config), tokenizer)
    with torch.no_grad():  # closed gates at the start would hide the image
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.7)
    processor = MllamaProcessor(
        image_processor=MllamaImageProcessor(size={"height": 28, "width": 28}, max_image_tiles=4),
        tokenizer=tokenizer,
        chat_template=LLAMA3_TEMPLATE.replace("IMAGE", "<|image|>"),
    )
    return model, processor


def internvl(*, seed: int = 0):
    """InternVL (the transformers form): BEiT-like tower, pixel shuffle, Qwen2 LM."""
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named=marks,
    )
    tokenizer.padding_side = "left"
    config = InternVLConfig(
        vision_config={
            **SMALL,
            "image_size": [28, 28],
            "patch_size": [7, 7],
            "use_absolute_position_embeddings": True,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer) + 7,
            **SMALL,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = _finished(InternVLForConditionalGeneration(config), tokenizer)
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=3
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=CHATML_TEMPLATE.replace(
            "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n"
        ),
    )
    return model, processor


def llava_more(*, seed: int = 0):
    """LLaVA-MORE: LLaVA around Llama 3.1, with its chat template; CLIP tower at two patches a side."""
    tokenizer = _llama3_tokenizer("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=28, patch_size=14),
        text_config=LlamaConfig(
            **SMALL,
            vocab_size=len(tokenizer),
            num_key_value_heads=2,
            max_position_embeddings=2048,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = _finished(LlavaForConditionalGeneration(config), tokenizer)
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAMA3_TEMPLATE.replace("IMAGE", "<image>\n"),
    )
    return model, processor
