"""A model without memory: built on torch's meta device, to count what training it would take."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModelForImageTextToText

from ..errors import UserError
from .config import VLMModelConfig
from .freeze import LANGUAGE, part_of, set_trainable
from .memory import Facts, quantised_bytes
from .peft import build_peft_config, finish_peft
from .tokens import is_tied, row_count
from .unwrap import unwrap

COUNTING = "memory_count"
# bytes per token and width that autocast over float32 weights keeps more than bfloat16 weights do, in each layer: two
# norms' outputs in float32 (2 x 2), two more inputs of q, k, v (2 x 2), one more of the gated MLP (2)
AUTOCAST_EXTRA = 10


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient kernels keep for the backward pass: q, k, v, the output, one float a query."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("models on the meta device are counted, never trained")


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


AttentionInterface.register(COUNTING, _attention)


def meta_model(args: VLMModelConfig, token_ids: Sequence[int], *, wrap: bool = True):
    """The model of a recipe on the meta device: parts frozen, LoRA on it (with `wrap`), no weight in memory.

    Raises:
        UserError: as loading the real one would, but for the weights themselves.
    """
    path = args.model_name_or_path
    try:
        config = AutoConfig.from_pretrained(path, revision=args.model_revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable config.json ({str(error).splitlines()[0]}).") from error
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, dtype=getattr(torch, args.dtype))
    model.tie_weights()
    model.config.tie_word_embeddings = is_tied(model)
    model.name_or_path = str(path)
    set_trainable(
        model,
        vision=not args.freeze_vision,
        projector=args.train_projector,
        language=not args.freeze_language,
    )
    peft_config = build_peft_config(model, args, token_ids)
    if peft_config is not None and wrap:
        from peft import get_peft_model

        model = finish_peft(get_peft_model(model, peft_config, low_cpu_mem_usage=True))
    return model.train()


def facts(
    model, args: VLMModelConfig, batch: int, length: int, supervised: int, *, mixed_precision: bool = True
) -> Facts:
    """What one micro-batch of training needs, see `memory.Facts`. Call it last: it changes the model's dtype.

    Args:
        model: of `meta_model`.
        batch, length: rows of a micro-batch and their tokens, images included.
        supervised: tokens with loss in the micro-batch.
        mixed_precision: whether the activations are bfloat16 whatever the weights are.
    """
    plain = unwrap(model)
    quantised = quantised_names(plain) if args.load_in_4bit or args.load_in_8bit else set()
    numbers: dict[bool, Counter] = {True: Counter(), False: Counter()}
    packed = 0.0
    for name, parameter in plain.named_parameters():
        if name in quantised:
            packed += quantised_bytes(
                parameter.numel(), bits=4 if args.load_in_4bit else 8, nested=args.use_bnb_nested_quant
            )
        else:
            numbers[parameter.requires_grad][parameter.element_size()] += parameter.numel()
    block, root = blocks(plain)
    head = plain.get_output_embeddings().weight
    whole, checkpoints, recomputed = activations(model, batch, length, mixed_precision)
    return Facts(
        frozen=dict(numbers[False]),
        trained=dict(numbers[True]),
        quantised_bytes=int(packed),
        block=block,
        root=root,
        head=head.numel() if head.requires_grad else 0,
        activations=whole,
        checkpoints=checkpoints,
        recomputed=recomputed,
        supervised=supervised,
        vocabulary=row_count(head),
    )


def quantised_names(model) -> set[str]:
    """Names of the weights that QLoRA quantises: the language model's linear layers, never the head."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(name) == LANGUAGE
        and not {"lm_head", "lora_A", "lora_B"} & set(name.split("."))
    }


def blocks(model) -> tuple[int, int]:
    """Weights of the largest layer that frameworks shard as one, and of all that lies outside of such layers."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    largest, inside, total = 0, 0, sum(p.numel() for p in model.parameters())
    for module in model.modules():
        if type(module).__name__ in kinds:
            size = sum(p.numel() for p in module.parameters())
            largest, inside = max(largest, size), inside + size
    return largest, total - inside


def language_backbone(model) -> nn.Module:
    """The decoder that takes `inputs_embeds`."""
    inner = unwrap(model)
    embedding = inner.get_input_embeddings()
    for module in inner.modules():
        if getattr(module, "embed_tokens", None) is embedding:
            return module
    return inner.get_decoder()


def activations(model, batch: int, length: int, mixed_precision: bool) -> tuple[int, int, int]:
    """Bytes kept for the backward pass: without checkpointing; the layers' inputs; one layer while it is recomputed.

    The decoder runs on the meta device, with the autograd engine's own hooks counting each tensor it saves once. A
    frozen vision tower keeps nothing. A tower that trains is not counted.
    """
    decoder = language_backbone(model)
    width = decoder.config.get_text_config().hidden_size
    dtype = next(p.dtype for p in decoder.parameters() if p.ndim >= 2)
    upcast = mixed_precision and dtype == torch.float32
    if mixed_precision:  # autocast does not know the meta device
        dtype = torch.bfloat16
        decoder.to(dtype)
    x = torch.empty(batch, length, width, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.empty(batch, 1, length, length, device="meta", dtype=torch.bool)
    owned = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            kept[storage._cdata] = storage
        return tensor

    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(COUNTING)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(inputs_embeds=x, attention_mask=mask, use_cache=False)
    finally:
        decoder.set_attn_implementation(before)
    layers = decoder.config.get_text_config().num_hidden_layers
    # layers that attend to images only do not run on text alone; they are as large as the others
    ran = layers - len(getattr(decoder.config.get_text_config(), "cross_attention_layers", None) or ())
    total = sum(storage.nbytes() for storage in kept.values())
    inputs = layers * batch * length * width * dtype.itemsize
    total = total * layers // ran
    if (
        upcast
    ):  # float32 weights: the residual stream is float32, and every projection keeps its own bfloat16 input
        inputs *= 2
        total += layers * batch * length * width * AUTOCAST_EXTRA
    return total, inputs, total // layers
