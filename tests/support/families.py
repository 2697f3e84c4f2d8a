"""Tiny random vision-language models of real families, built in code: nothing is downloaded.

Every function returns `(model, processor)` with real chat templates (short forms of the published ones), a byte-level
tokenizer, and weights drawn from a fixed seed.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.mllama.image_processing_mllama import MllamaImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor
from transformers.models.smolvlm.image_processing_smolvlm import SmolVLMImageProcessor

VICUNA_TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an assistant. "
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% else %}ASSISTANT: {% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 3.2's: typed content, images where they stand, no trimming of the answers' inside
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% endif %}"
)
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
PALIGEMMA_TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<start_of_image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 2048}
QWEN_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
LLAMA3_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_TOKENS += ["<|eot_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>"]


def byte_tokenizer(
    specials: list[str], *, bos: str | None, eos: str, pad: str, named: dict[str, str] | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 byte symbols, no merges, then `specials`.

    Args:
        named: special tokens that a processor looks up as attributes of the tokenizer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad, extra_special_tokens=named or {}
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [s for s in specials if s not in (bos, eos, pad)]}
    )
    return tokenizer


def _width(hidden: int) -> dict:
    """Sizes of a text config; its heads are of `hidden` / 4 numbers, of which vLLM takes 32 and more."""
    return {"hidden_size": hidden, "intermediate_size": 2 * hidden}


def _left_padding(specials: list[str], **tokens) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer(specials, **tokens)
    tokenizer.padding_side = "left"
    return tokenizer


def _ends(tokenizer) -> dict:
    """What a text config says about the tokenizer."""
    return {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _built(model_class, config, tokenizer, seed: int):
    torch.manual_seed(seed)
    model = model_class(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def with_tags(pair, *, seed: int = 1):
    """Add the three verification tokens to a tiny model, with fresh rows of the usual scale."""
    model, processor = pair
    processor.tokenizer.add_tokens(["<SPAN>", "</CN>", "</UN>"])
    torch.manual_seed(seed)
    size = max(len(processor.tokenizer), model.config.get_text_config().vocab_size)
    model.resize_token_embeddings(size, mean_resizing=False)
    return model.eval(), processor


def save(model, processor, folder: str | Path) -> Path:
    """Write an ordinary checkpoint directory."""
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _llava_around(tokenizer, text_config, template: str = VICUNA_TEMPLATE, *, tie=False, seed=0):
    """A LLaVA-1.5 (CLIP tower with 4 patches of 14 px, two-layer projector) around a language model."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SMALL, image_size=28, patch_size=14),
        text_config=text_config,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=tie,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return _built(LlavaForConditionalGeneration, config, tokenizer, seed), processor


def _llava_tokenizer():
    return _left_padding(["<image>"], bos="<s>", eos="</s>", pad="<pad>")


def llava(*, tie: bool = False, hidden: int = 32, layers: int = 2, seed: int = 0):
    """LLaVA-1.5: Llama LM, Vicuna template."""
    tokenizer = _llava_tokenizer()
    size = _width(hidden) | {"num_hidden_layers": layers} | _ends(tokenizer)
    text = LlamaConfig(**(TEXT | size), vocab_size=len(tokenizer), tie_word_embeddings=tie)
    return _llava_around(tokenizer, text, tie=tie, seed=seed)


def llava_mistral(*, window: int = 12, hidden: int = 32, seed: int = 0):
    """LLaVA around Mistral with sliding-window attention in every layer."""
    tokenizer = _llava_tokenizer()
    text = MistralConfig(**(TEXT | _width(hidden)), vocab_size=len(tokenizer), sliding_window=window)
    return _llava_around(tokenizer, text, seed=seed)


def _llama3_tokenizer(*more: str):
    return _left_padding(
        [*LLAMA3_TOKENS, *more], bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<|finetune_right_pad_id|>"
    )


def llava_more(*, hidden: int = 32, seed: int = 0):
    """LLaVA-MORE: LLaVA around Llama 3.1, with its chat template."""
    tokenizer = _llama3_tokenizer("<image>")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    text = LlamaConfig(
        **(TEXT | _width(hidden)), **_ends(tokenizer), vocab_size=len(tokenizer), rope_parameters=rope
    )
    return _llava_around(tokenizer, text, LLAMA3_TEMPLATE.replace("IMAGE", "<image>\n"), seed=seed)


def llava_next(*, hidden: int = 32, seed: int = 0):
    """LLaVA-NeXT: several tiles an image, unpadded features, Llama LM."""
    base, old = llava(hidden=hidden, seed=seed)
    tiles = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        vision_config=base.config.vision_config,
        text_config=base.config.text_config,
        image_token_index=base.config.image_token_id,
        image_grid_pinpoints=tiles,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28},
            crop_size={"height": 28, "width": 28},
            image_grid_pinpoints=tiles,
        ),
        tokenizer=old.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_TEMPLATE,
    )
    return _built(LlavaNextForConditionalGeneration, config, old.tokenizer, seed), processor


def _qwen_tokenizer():
    return _left_padding(QWEN_TOKENS, bos=None, eos="<|im_end|>", pad="<|endoftext|>")


def _qwen_ids(tokenizer, tie: bool) -> dict:
    """What the config of a Qwen-VL model says about the tokenizer."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, start, end = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    return {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": start,
        "vision_end_token_id": end,
        "tie_word_embeddings": tie,
    }


def _mrope(hidden: int, shares: tuple[int, int, int]) -> dict:
    """Rotary embeddings whose half head is shared by time, height and width in this proportion; four heads."""
    section = [share * hidden // 32 for share in shares]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}


def qwen2_5_vl(*, tie: bool = True, hidden: int = 32, layers: int = 2, seed: int = 0):
    """Qwen2.5-VL: windowed ViT, mRoPE LM with tied embeddings, ChatML template with vision tokens."""
    tokenizer = _qwen_tokenizer()
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
            **TEXT,
            **_width(hidden),
            # a few padding rows beyond the tokenizer, as the published checkpoints have
            "vocab_size": len(tokenizer) + 7,
            "num_hidden_layers": layers,
            "rope_parameters": _mrope(hidden, (1, 1, 2)),
            **_ends(tokenizer),
            "tie_word_embeddings": tie,
        },
        **_qwen_ids(tokenizer, tie),
    )
    processor = Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=28 * 28 * 4, max_pixels=28 * 28 * 16),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHATML_TEMPLATE,
    )
    return _built(Qwen2_5_VLForConditionalGeneration, config, tokenizer, seed), processor


def qwen2_vl(*, hidden: int = 32, seed: int = 0):
    """Qwen2-VL: ViT without windows, mRoPE LM, ChatML template."""
    base, old = qwen2_5_vl(hidden=hidden, seed=seed)
    text = base.config.text_config.to_dict()
    text = {k: text[k] for k in text if k not in ("model_type", "architectures", "layer_types", "dtype")}
    config = Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": hidden,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=text,
        **_qwen_ids(old.tokenizer, tie=True),
    )
    processor = Qwen2VLProcessor(
        image_processor=old.image_processor,
        tokenizer=old.tokenizer,
        video_processor=old.video_processor,
        chat_template=CHATML_TEMPLATE,
    )
    return _built(Qwen2VLForConditionalGeneration, config, old.tokenizer, seed), processor


def qwen3_vl(*, tie: bool = True, hidden: int = 32, seed: int = 0):
    """Qwen3-VL: deep-stacked vision features, interleaved mRoPE, patches of 16 pixels."""
    tokenizer = _qwen_tokenizer()
    config = Qwen3VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
        },
        text_config={
            **TEXT,
            **_width(hidden),
            "vocab_size": len(tokenizer) + 7,
            "head_dim": hidden // 4,
            "rope_parameters": _mrope(hidden, (2, 1, 1)) | {"mrope_interleaved": True},
            **_ends(tokenizer),
            "tie_word_embeddings": tie,
        },
        **_qwen_ids(tokenizer, tie),
    )
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(
            min_pixels=32 * 32 * 4, max_pixels=32 * 32 * 16, patch_size=16, merge_size=2
        ),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(),
        chat_template=CHATML_TEMPLATE,
    )
    return _built(Qwen3VLForConditionalGeneration, config, tokenizer, seed), processor


def mllama(*, hidden: int = 32, seed: int = 0):
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
            **TEXT,
            **_width(hidden),
            "vocab_size": vocabulary,
            "num_hidden_layers": 4,
            "cross_attention_layers": [1, 3],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **_ends(tokenizer),
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<|image|>"),
    )
    model = _built(MllamaForConditionalGeneration, config, tokenizer, seed)
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


def internvl(*, hidden: int = 32, seed: int = 0):
    """InternVL (the transformers form): BEiT-like tower, pixel shuffle, Qwen2 LM."""
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _left_padding(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        bos=None,
        eos="<|im_end|>",
        pad="<|endoftext|>",
        named=marks,
    )
    config = InternVLConfig(
        vision_config={
            **SMALL,
            "image_size": [28, 28],
            "patch_size": [7, 7],
            "use_absolute_position_embeddings": True,
        },
        text_config={
            **TEXT,
            **_width(hidden),
            "model_type": "qwen2",
            "vocab_size": len(tokenizer) + 7,
            **_ends(tokenizer),
            "tie_word_embeddings": False,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
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
    return _built(InternVLForConditionalGeneration, config, tokenizer, seed), processor


def _idefics(config_class, model_class, image_processor, *, hidden: int, seed: int):
    specials = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    specials += [f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)]
    tokenizer = _left_padding(specials, bos="<|im_start|>", eos="<end_of_utterance>", pad="<|im_end|>")
    config = config_class(
        vision_config={**SMALL, "image_size": 28, "patch_size": 7},
        text_config={
            **TEXT,
            **_width(hidden),
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            **_ends(tokenizer),
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = Idefics3Processor(
        image_processor=image_processor(
            size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False
        ),
        tokenizer=tokenizer,
        image_seq_len=4,
        chat_template=IDEFICS_TEMPLATE,
    )
    return _built(model_class, config, tokenizer, seed), processor


def idefics3(*, hidden: int = 32, seed: int = 0):
    """Idefics3: SigLIP-style tower, pixel shuffle, Llama LM."""
    classes = (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessor)
    return _idefics(*classes, hidden=hidden, seed=seed)


def smolvlm(*, hidden: int = 32, seed: int = 0):
    """SmolVLM, with the processor of Idefics3 (same layout; SmolVLM's own needs the package num2words)."""
    classes = (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor)
    return _idefics(*classes, hidden=hidden, seed=seed)


def paligemma(*, seed: int = 0):
    """PaliGemma: the prompt is attended to in both directions, so rewinding it is impossible."""
    tokenizer = _left_padding(["<image>"], bos="<bos>", eos="<eos>", pad="<pad>")
    config = PaliGemmaConfig(
        vision_config={**SMALL, "image_size": 28, "patch_size": 14, "projection_dim": 32},
        text_config={
            **TEXT,
            "model_type": "gemma",
            "vocab_size": len(tokenizer) + 1027,
            "head_dim": 8,
            **_ends(tokenizer),
        },
        projection_dim=32,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    image_processor = SiglipImageProcessor(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(
        image_processor=image_processor, tokenizer=tokenizer, chat_template=PALIGEMMA_TEMPLATE
    )
    return _built(PaliGemmaForConditionalGeneration, config, tokenizer, seed), processor


def gemma3(*, window: int = 12, seed: int = 0):
    """Gemma 3: two layers with a window of `window` tokens before every one with full attention; image tokens see each
    other."""
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    specials = [*marks.values(), "<start_of_turn>", "<end_of_turn>"]
    tokenizer = _left_padding(specials, bos="<bos>", eos="<end_of_turn>", pad="<pad>")
    for name, token in marks.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    config = Gemma3Config(
        vision_config={**SMALL, "image_size": 28, "patch_size": 7},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": window,
            "head_dim": 8,
            **_ends(tokenizer),
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    image_processor = Gemma3ImageProcessor(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    processor = Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=GEMMA_TEMPLATE)
    model = _built(Gemma3ForConditionalGeneration, config, tokenizer, seed)
    with torch.no_grad():  # zeros at the start would hide the image
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.2)
    return model, processor
