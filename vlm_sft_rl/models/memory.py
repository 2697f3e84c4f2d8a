"""How much memory one GPU needs for a training step, in bytes: facts about a model, and formulas over them.

The facts are counted on torch's meta device, where a model has shapes and no weights. Counted: what persists (weights,
gradients, optimizer states) and what a step adds at its peak (activations, gathered or copied weights, buckets, the output
head's tiles). Not counted: the CUDA context and the allocator's loss, about 1-2 GiB.
Sources: ZeRO (arXiv 1910.02054, section 3) for who holds what; the rest is how torch, accelerate, DeepSpeed and TRL
allocate, as noted at each formula.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForImageTextToText

from ..errors import UserError
from .load import VLMModelConfig, load_config
from .lora import build_peft_config, finish_peft
from .parts import LANGUAGE, part_of, set_trainable, unwrap
from .tokens import is_tied, row_count

HALF, FULL = 2, 4
# bits a weight: 4, and one absmax per 64 weights: float32, or 8 bits and a float32 per 256 of them (double quantisation)
NF4_BITS, NF4_NESTED_BITS = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)
INT8_BITS = 8 + 32 / 1024
# TRL's fused output head works on tiles of tokens x vocabulary, in float32
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# what follows `optim:`
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
ADAM = ("adamw", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", *EIGHT_BIT)
# bytes per token and width that autocast over float32 weights keeps more than bfloat16 weights do, in each layer: two
# norms' outputs in float32 (2 x 2), two more inputs of q, k, v (2 x 2), one more of the gated MLP (2)
AUTOCAST_EXTRA = 10


@dataclass(frozen=True)
class Strategy:
    """Who holds what: each of the three is whole on every GPU, or cut into as many parts as there are GPUs."""

    name: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False
    deepspeed: bool = False
    fsdp: bool = False


STRATEGIES = {
    strategy.name: strategy
    for strategy in (
        Strategy("ddp"),
        Strategy("zero2", gradients=True, optimizer=True, deepspeed=True),
        Strategy("zero3", weights=True, gradients=True, optimizer=True, deepspeed=True),
        Strategy("fsdp2", weights=True, gradients=True, optimizer=True, fsdp=True),
    )
}


@dataclass(frozen=True)
class Facts:
    """What a run holds, before any is cut. Numbers are of weights unless bytes are named.

    Attributes:
        frozen: how many weights do not train, by their stored bytes each: `{4: n, 2: m}`; trained: how many do.
        quantised_bytes: stored bytes of quantised weights, which `frozen` leaves out.
        block: weights of the largest repeated layer; root: weights outside of every such layer.
        head: weights of the output embedding if it trains as a whole, else 0.
        activations: bytes that a forward pass keeps for the backward pass, without gradient checkpointing.
        checkpoints: the same with it: the inputs of every layer.
        recomputed: bytes that one layer keeps while it is recomputed.
        supervised: tokens with loss in a micro-batch; vocabulary: rows of the output embedding.
        copies: how many further copies of what trains are held (SC-Tune's frozen copy), never cut.
        tiled: whether the output head works on tiles (TRL's fused loss), or on all supervised tokens at once.
    """

    frozen: Mapping[int, int]
    trained: Mapping[int, int]
    quantised_bytes: int = 0
    block: int = 0
    root: int = 0
    head: int = 0
    activations: int = 0
    checkpoints: int = 0
    recomputed: int = 0
    supervised: int = 0
    vocabulary: int = 0
    copies: int = 0
    tiled: bool = True


@dataclass(frozen=True)
class Estimate:
    """Bytes on one GPU; `activations_otherwise` with gradient checkpointing turned the other way."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    activations_otherwise: float
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.working


def estimate(
    facts: Facts,
    strategy: Strategy,
    gpus: int,
    *,
    optimizer: str = "adamw_torch",
    checkpointing: bool = True,
    mixed_precision: bool = True,
) -> Estimate:
    """The memory of one training step on one of `gpus` GPUs.

    Args:
        optimizer: transformers' name of it (`optim:`).
        mixed_precision: bfloat16 computation over whatever the weights are stored in.
    """
    if gpus < 1:
        raise UserError(f"The number of GPUs must be at least 1, not {gpus}.")
    frozen, trained = dict(facts.frozen), dict(facts.trained)
    if strategy.deepspeed and mixed_precision:  # the model itself is kept in bfloat16
        frozen, trained = ({HALF: sum(numbers.values())} for numbers in (frozen, trained))
    elif strategy.fsdp and mixed_precision and HALF in trained:  # accelerate raises what trains to float32
        trained = {FULL: sum(trained.values())}
    frozen_bytes = sum(size * n for size, n in frozen.items()) + facts.quantised_bytes
    trained_bytes = sum(size * n for size, n in trained.items())

    # Adam keeps two moments a weight: of the weight's own dtype, or of one byte each
    if strategy.deepspeed and mixed_precision:  # and DeepSpeed float32 copies, with moments of that dtype
        moments = 2 if optimizer in EIGHT_BIT else 2 * FULL
        states = sum(trained.values()) * (FULL + moments)
    else:
        states = sum((2 if optimizer in EIGHT_BIT else 2 * size) * n for size, n in trained.items())

    if facts.tiled:  # logits and their gradient on one tile, and a float32 gradient of the head if it trains
        tile = min(facts.supervised, TILE_TOKENS) * min(facts.vocabulary, TILE_VOCABULARY)
        working = 2 * tile * FULL + facts.head * FULL
    else:  # the logits as computed, in float32, and their gradient
        working = facts.supervised * facts.vocabulary * (HALF + 2 * FULL)
    if strategy.weights:
        # two layers at a time are gathered in the dtype of computation, and what lies outside of the layers
        working += (2 * facts.block + facts.root) * (HALF if mixed_precision else FULL) if gpus > 1 else 0
    elif mixed_precision and not strategy.deepspeed:
        # autocast keeps a bfloat16 copy of every float32 weight during the step
        working += (frozen.get(FULL, 0) + trained.get(FULL, 0)) * HALF
    if gpus > 1 and not strategy.gradients:
        working += trained_bytes  # DDP's buckets are a second copy of the gradients

    with_checkpoints = facts.checkpoints + facts.recomputed
    parts = {True: gpus, False: 1}
    return Estimate(
        weights=(frozen_bytes + trained_bytes) / parts[strategy.weights] + facts.copies * trained_bytes,
        gradients=trained_bytes / parts[strategy.gradients],
        optimizer=states / parts[strategy.optimizer],
        activations=with_checkpoints if checkpointing else facts.activations,
        working=working,
        activations_otherwise=facts.activations if checkpointing else with_checkpoints,
        notes=() if optimizer in ADAM else (f"`{optimizer}` is counted as Adam",),
    )


def quantised_bytes(weights: int, *, bits: int, nested: bool) -> float:
    """Stored bytes of weights that bitsandbytes quantises to 4 or 8 bits."""
    if bits == 8:
        return weights * INT8_BITS / 8
    return weights * (NF4_NESTED_BITS if nested else NF4_BITS) / 8


def gib(value: float) -> str:
    return f"{value / 2**30:.1f}"


def meta_model(args: VLMModelConfig, token_ids: Sequence[int]):
    """The model of a recipe on the meta device: parts frozen, LoRA on it, no weight in memory."""
    path = args.model_name_or_path
    config = load_config(path, args.model_revision)
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
    if peft_config is not None:
        from peft import get_peft_model

        model = finish_peft(get_peft_model(model, peft_config, low_cpu_mem_usage=True))
    return model.train()


def facts(
    model, args: VLMModelConfig, batch: int, length: int, supervised: int, *, mixed_precision: bool = True
) -> Facts:
    """What one micro-batch of training needs. Call it last: it changes the model's dtype.

    Args:
        model: of `meta_model`.
        batch, length: rows of a micro-batch and their tokens, images included.
        supervised: tokens with loss in the micro-batch.
        mixed_precision: whether the activations are bfloat16 whatever the weights are.
    """
    plain = unwrap(model)
    quantised = quantised_names(plain) if args.load_in_4bit or args.load_in_8bit else set()
    bits = 4 if args.load_in_4bit else 8
    frozen, trained, packed = Counter(), Counter(), 0.0
    for name, parameter in plain.named_parameters():
        if name in quantised:
            packed += quantised_bytes(parameter.numel(), bits=bits, nested=args.use_bnb_nested_quant)
        else:
            numbers = trained if parameter.requires_grad else frozen
            numbers[parameter.element_size()] += parameter.numel()
    # the layers that frameworks shard as one
    kinds = set(getattr(plain, "_no_split_modules", None) or ())
    layers = [weights_of(module) for module in plain.modules() if type(module).__name__ in kinds]
    head = plain.get_output_embeddings().weight
    whole, checkpoints, recomputed = activations(model, batch, length, mixed_precision)
    return Facts(
        frozen=dict(frozen),
        trained=dict(trained),
        quantised_bytes=int(packed),
        block=max(layers, default=0),
        root=weights_of(plain) - sum(layers),
        head=head.numel() if head.requires_grad else 0,
        activations=whole,
        checkpoints=checkpoints,
        recomputed=recomputed,
        supervised=supervised,
        vocabulary=row_count(head),
    )


def weights_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def quantised_names(model) -> set[str]:
    """Names of the weights that QLoRA quantises: the language model's linear layers, never the head."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and part_of(name) == LANGUAGE
        and not {"lm_head", "lora_A", "lora_B"} & set(name.split("."))
    }


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
    text = decoder.config.get_text_config()
    dtype = next(p.dtype for p in decoder.parameters() if p.ndim >= 2)
    upcast = mixed_precision and dtype == torch.float32
    if mixed_precision:  # autocast does not know the meta device
        dtype = torch.bfloat16
        decoder.to(dtype)
    x = torch.empty(batch, length, text.hidden_size, device="meta", dtype=dtype, requires_grad=True)
    mask = torch.empty(batch, 1, length, length, device="meta", dtype=torch.bool)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return tensor

    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(COUNTING)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            decoder(inputs_embeds=x, attention_mask=mask, use_cache=False)
    finally:
        decoder.set_attn_implementation(before)
    layers = text.num_hidden_layers
    # layers that attend to images only do not run on text alone; they are as large as the others
    ran = layers - len(getattr(text, "cross_attention_layers", None) or ())
    total = sum(storage.nbytes() for storage in saved.values()) * layers // ran
    elements = layers * x.numel()
    inputs = elements * dtype.itemsize
    if upcast:  # the residual stream is float32, and every projection keeps its own bfloat16 input
        inputs *= 2
        total += elements * AUTOCAST_EXTRA
    return total, inputs, total // layers


class _FusedAttention(torch.autograd.Function):
    """What flash and memory-efficient kernels keep for the backward pass: q, k, v, the output, one float a query."""

    @staticmethod
    def forward(ctx, query, key, value):
        output = torch.empty_like(query)
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        raise NotImplementedError("models on the meta device are counted, never trained")


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _FusedAttention.apply(query, key, value).transpose(1, 2), None


COUNTING = "memory_count"
AttentionInterface.register(COUNTING, _attention)
