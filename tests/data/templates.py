"""Chat templates and merging tokenizers for the collator tests; nothing is downloaded."""

from functools import cache

import families
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] "
    "}}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# the published LLaVA-1.5 template: typed content only, images first, no end-of-sequence token
LLAVA_1_5 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% "
    "endif %}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' "
    "}}{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% "
    "endif %}"
)
VICUNA = families.VICUNA_TEMPLATE
CHATML = families.CHATML_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
KINDS = ("bytes", "bpe", "metaspace")  # of tokenizers
TEMPLATES = {"vicuna": VICUNA, "chatml": CHATML, "llama3": LLAMA3, "llava_1_5": LLAVA_1_5}
END_OF_TURN = {"vicuna": "</s>", "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "llava_1_5": "</s>"}
SPECIALS = ["<s>", "</s>", "<pad>", "<image>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
SPECIALS += ["<|start_header_id|>", "<|end_header_id|>"]
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "A chat between a curious user and an assistant. USER: What is in the picture? ASSISTANT: There is a "
    "cat and a dog.",
    "user assistant system There is a blue kettle next to a toaster. Yes No\n\nThe cat sat on the mat.\n\n "
    "ASSISTANT: Yes",
] * 4


@cache
def _byte_bpe() -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    return core.to_str()


@cache
def _metaspace_bpe() -> str:
    """As Llama 2: a blank is prepended and becomes `▁`, unknown bytes fall back, `<s>` is added in front."""
    core = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *bytes_]))
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return core.to_str()


def tokenizer(kind: str, eos: str = "</s>") -> PreTrainedTokenizerFast:
    if kind == "bytes":
        made = families.byte_tokenizer(SPECIALS, bos="<s>", eos=eos, pad="<pad>")
    else:
        core = Tokenizer.from_str(_byte_bpe() if kind == "bpe" else _metaspace_bpe())
        made = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token=eos, pad_token="<pad>"
        )
        made.add_special_tokens(
            {"additional_special_tokens": [s for s in SPECIALS if s not in ("<s>", eos, "<pad>")]}
        )
    made.add_tokens(["<SPAN>", "</CN>", "</UN>"])
    return made


def processor(template: str, kind: str, eos: str | None = None) -> LlavaProcessor:
    """A LLaVA processor (4 tokens an image) with one of the templates and one of bytes, bpe, metaspace."""
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer=tokenizer(kind, eos or END_OF_TURN[template]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[template],
    )


IDEFICS3 = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ item['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def llava_next() -> tuple[LlavaNextProcessor, str]:
    """Tiles: the number of image tokens depends on the image."""
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
    )
    made = LlavaNextProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer("bpe"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return made, "</s>"


def idefics3() -> tuple[Idefics3Processor, str]:
    """One placeholder becomes many tokens of several kinds, line breaks among them."""
    image_processor = Idefics3ImageProcessor(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    end = "<end_of_utterance>"
    made = Idefics3Processor(image_processor, tokenizer("bpe", end), image_seq_len=4, chat_template=IDEFICS3)
    return made, end


def gemma3() -> tuple[Gemma3Processor, str]:
    """The placeholder is another token than the image tokens, and line breaks are put round it."""
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    made = tokenizer("bpe", "<end_of_turn>")
    made.add_special_tokens({"additional_special_tokens": [*names.values(), "<start_of_turn>"]})
    for name, token in names.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", made.convert_tokens_to_ids(token))
    image_processor = Gemma3ImageProcessor(size={"height": 28, "width": 28})
    return Gemma3Processor(image_processor, made, image_seq_length=4, chat_template=GEMMA3), "<end_of_turn>"
