"""A tiny random Gemma 3: layers with a sliding window between layers without, image tokens that see each other."""

import families
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>"
    "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<start_of_image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
IMAGE_TOKENS = {
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def gemma3(*, window: int = 12, seed: int = 0):
    """Two layers with a window of `window` tokens before every one with full attention."""
    specials = [*IMAGE_TOKENS.values(), "<start_of_turn>", "<end_of_turn>"]
    tokenizer = families.byte_tokenizer(specials, bos="<bos>", eos="<end_of_turn>", pad="<pad>")
    tokenizer.padding_side = "left"
    for name, token in IMAGE_TOKENS.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3Config(
        vision_config={**families.SMALL, "image_size": 28, "patch_size": 7},
        text_config={
            **families.SMALL,
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 3,
            "layer_types": kinds,
            "sliding_window": window,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 2048,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    torch.manual_seed(seed)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    image_processor = Gemma3ImageProcessor(size={"height": 28, "width": 28}, do_pan_and_scan=False)
    return model, Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=TEMPLATE)
