"""The pocket VLM's parts: a LLaVA of some two million parameters, its processor, tokenizer and chat template."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

from .language import corpus
from .world import CELL_PIXELS, GRID, IMAGE_PIXELS

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %} ASSISTANT: "
    "{% else %}USER: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def build_tokenizer(vocabulary: int = 640) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the world's words: each is one token, and any other text still encodes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(), trainer)
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def build_processor(tokenizer: PreTrainedTokenizerFast | None = None) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_PIXELS}, crop_size={"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
        ),
        tokenizer=tokenizer or build_tokenizer(),
        patch_size=CELL_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: LlavaProcessor, *, hidden: int = 192, layers: int = 4, tower: int = 96, seed: int = 0
) -> LlavaForConditionalGeneration:
    """Random weights; tied embeddings, as small published VLMs have."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower,
            intermediate_size=2 * tower,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_PIXELS,
            patch_size=CELL_PIXELS,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=int(hidden * 2.5),
            num_hidden_layers=layers,
            num_attention_heads=6,
            num_key_value_heads=6,
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # the default deviation of 0.02 leaves the words' directions too short beside the layers' updates
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=hidden**-0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


# Mimetic initialisation of self-attention (Trockman and Kolter 2023, arXiv 2305.09828), adapted to many heads.
@torch.no_grad()
def initialise_attention(model, *, query_key: float = 1.2, output: float = 0.1, seed: int = 0) -> None:
    """Add to every attention layer of the language model `q = k = query_key · Q` and `v = Q`, `o = output · Qᵀ`.

    `Q` is a random orthogonal matrix of its own for each layer, so each head compares and copies its own part of
    the residual stream.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        width = attention.q_proj.weight.shape[1]
        basis, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
        attention.q_proj.weight.add_(query_key * basis)
        attention.k_proj.weight.add_(query_key * basis)
        attention.v_proj.weight.add_(basis)
        attention.o_proj.weight.add_(output * basis.T)
