"""Tiny random vision-language models of real families, built in code: nothing is downloaded.

Every function returns `(model, processor)` with real chat templates (short forms of the published ones), a byte-level
tokenizer, and weights drawn from a fixed seed. Further families: `families_more`.
"""

from pathlib import Path

import torch
from families_more import internvl, llava_more, mllama, qwen3_vl  # noqa: F401 - `families.mllama()`
from family_parts import CHATML_TEMPLATE, SMALL, VICUNA_TEMPLATE, byte_tokenizer
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor


def llava(*, tie: bool = False, hidden: int = 32, layers: int = 2, seed: int = 0):
    """LLaVA-1.5: CLIP tower (4 patches of 14 px), two-layer projector, Llama LM, Vicuna template."""
    tokenizer = byte_tokenizer(["<image>"], bos="<s>", eos="</s>", pad="<pad>")
    tokenizer.padding_side = "left"
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=28,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=tie,
        ),
        image_token_index=image_id,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    return model, processor


def qwen2_5_vl(*, tie: bool = True, hidden: int = 32, layers: int = 2, seed: int = 0):
    """Qwen2.5-VL: windowed ViT, mRoPE LM with tied embeddings, ChatML template with vision tokens."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials, bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    tokenizer.padding_side = "left"
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in specials}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        text_config={
            # a few padding rows beyond the tokenizer, as the published checkpoints have
            "vocab_size": len(tokenizer) + 7,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
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
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHATML_TEMPLATE,
    )
    return model, processor


def with_tags(pair, *, seed: int = 1):
    """Add the three verification tokens to a tiny model, with fresh rows of the usual scale."""
    model, processor = pair
    processor.tokenizer.add_tokens(["<SPAN>", "</CN>", "</UN>"])
    torch.manual_seed(seed)
    size = max(len(processor.tokenizer), model.config.get_text_config().vocab_size)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval(), processor


def _llava_like(text_config, *, seed: int = 0):
    """A LLaVA-1.5 around another language model's configuration."""
    model, processor = llava(seed=seed)
    text_config.vocab_size = len(processor.tokenizer)
    config = LlavaConfig(
        vision_config=model.config.vision_config,
        text_config=text_config,
        image_token_index=model.config.image_token_id,
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    other = LlavaForConditionalGeneration(config).eval()
    other.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    other.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return other, processor


def llava_mistral(*, window: int = 12, seed: int = 0):
    """LLaVA around Mistral with sliding-window attention in every layer."""
    text = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        sliding_window=window,
    )
    return _llava_like(text, seed=seed)


def llava_next(*, seed: int = 0):
    """LLaVA-NeXT: several tiles an image, unpadded features, Llama LM."""
    base, old = llava(seed=seed)
    config = LlavaNextConfig(
        vision_config=base.config.vision_config,
        text_config=base.config.text_config,
        image_token_index=base.config.image_token_id,
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = old.tokenizer.pad_token_id
    model.generation_config.eos_token_id = old.tokenizer.eos_token_id
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        ),
        tokenizer=old.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    return model, processor


def qwen2_vl(*, seed: int = 0):
    """Qwen2-VL: ViT without windows, mRoPE LM, ChatML template."""
    base, old = qwen2_5_vl(seed=seed)
    text = base.config.text_config.to_dict()
    text = {k: text[k] for k in text if k not in ("model_type", "architectures", "layer_types", "dtype")}
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=text,
        image_token_id=base.config.image_token_id,
        video_token_id=base.config.video_token_id,
        vision_start_token_id=base.config.vision_start_token_id,
        vision_end_token_id=base.config.vision_end_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = Qwen2VLForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = base.generation_config.pad_token_id
    model.generation_config.eos_token_id = base.generation_config.eos_token_id
    processor = Qwen2VLProcessor(
        image_processor=old.image_processor,
        tokenizer=old.tokenizer,
        video_processor=old.video_processor,
        chat_template=CHATML_TEMPLATE,
    )
    return model, processor


IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def _idefics(config_class, model_class, image_processor, *, seed: int):
    specials = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    specials += [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    tokenizer = byte_tokenizer(specials, bos="<|im_start|>", eos="<end_of_utterance>", pad="<|im_end|>")
    tokenizer.padding_side = "left"
    config = config_class(
        vision_config={**SMALL, "image_size": 28, "patch_size": 7},
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            **SMALL,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = Idefics3Processor(
        image_processor=image_processor(
            size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return model, processor


def idefics3(*, seed: int = 0):
    """Idefics3: SigLIP-style tower, pixel shuffle, Llama LM."""
    return _idefics(Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor, seed=seed)


def smolvlm(*, seed: int = 0):
    """SmolVLM, with the processor of Idefics3 (same layout; SmolVLM's own needs the package num2words)."""
    return _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor, seed=seed)


def paligemma(*, seed: int = 0):
    """PaliGemma: the prompt is attended to in both directions, so rewinding it is impossible."""
    tokenizer = byte_tokenizer(["<image>"], bos="<bos>", eos="<eos>", pad="<pad>")
    tokenizer.padding_side = "left"
    config = PaliGemmaConfig(
        vision_config={**SMALL, "image_size": 28, "patch_size": 14, "projection_dim": 32},
        text_config={
            "model_type": "gemma",
            "vocab_size": len(tokenizer) + 1027,
            **SMALL,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    model = PaliGemmaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    template = (
        "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
        "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
    )
    processor = PaliGemmaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=template
    )
    return model, processor


def save(model, processor, folder: str | Path) -> Path:
    """Write an ordinary checkpoint directory."""
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
