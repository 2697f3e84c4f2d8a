"""How much memory one GPU needs for a training step: formulas, in bytes, over facts that `meta` counts.

Counted: what persists (weights, gradients, optimizer states) and what a step adds at its peak (activations, gathered or
copied weights, buckets, the output head's tiles). Not counted: the CUDA context and the allocator's loss, about 1-2 GiB.
Sources: ZeRO (arXiv 1910.02054, section 3) for who holds what; the rest is how torch, accelerate, DeepSpeed and TRL
allocate, as noted at each formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import UserError

HALF, FULL = 2, 4
# bits a weight: 4, and one absmax per 64 weights: float32, or 8 bits and a float32 per 256 of them (double quantisation)
NF4_BITS, NF4_NESTED_BITS = 4 + 32 / 64, 4 + 8 / 64 + 32 / (64 * 256)
INT8_BITS = 8 + 32 / 1024
# TRL's fused output head works on tiles of tokens x vocabulary, in float32
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# bytes of optimizer state per weight, by what follows `optim:`; Adam in torch keeps two states of the weight's dtype
EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
ADAM = ("adamw", "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", *EIGHT_BIT)


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
    """Bytes on one GPU."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    working: float
    notes: tuple[str, ...] = field(default=())

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

    Raises:
        UserError: fewer than one GPU.
    """
    if gpus < 1:
        raise UserError(f"The number of GPUs must be at least 1, not {gpus}.")
    frozen, trained, notes = dict(facts.frozen), dict(facts.trained), []
    if strategy.deepspeed and mixed_precision:  # the model itself is kept in bfloat16
        frozen, trained = ({HALF: sum(numbers.values())} for numbers in (frozen, trained))
    elif strategy.fsdp and mixed_precision and HALF in trained:  # accelerate raises what trains to float32
        trained = {FULL: sum(trained.values())}
    count = sum(trained.values())
    held = sum(size * n for size, n in frozen.items()) + facts.quantised_bytes
    stored = sum(size * n for size, n in trained.items())

    states = optimizer_bytes(trained, optimizer)
    if optimizer not in ADAM:
        notes.append(f"`{optimizer}` is counted as Adam")
    if strategy.deepspeed and mixed_precision:
        states = count * (FULL + (2 if optimizer in EIGHT_BIT else 2 * FULL))  # float32 copies, two moments
    cut = {True: gpus, False: 1}
    working = head_bytes(facts)
    if strategy.weights:
        # two layers at a time are gathered in the dtype of computation, and what lies outside of the layers
        working += (2 * facts.block + facts.root) * (HALF if mixed_precision else FULL) if gpus > 1 else 0
    elif mixed_precision and not strategy.deepspeed:
        # autocast keeps a bfloat16 copy of every float32 weight during the step
        working += (frozen.get(FULL, 0) + trained.get(FULL, 0)) * HALF
    if gpus > 1 and not strategy.gradients:
        working += stored  # DDP's buckets are a second copy of the gradients
    kept = facts.checkpoints + facts.recomputed if checkpointing else facts.activations
    return Estimate(
        weights=(held + stored) / cut[strategy.weights] + facts.copies * stored,
        gradients=stored / cut[strategy.gradients],
        optimizer=states / cut[strategy.optimizer],
        activations=kept,
        working=working,
        notes=tuple(notes),
    )


def optimizer_bytes(trained: Mapping[int, int], optimizer: str) -> float:
    """Two states a weight: of its own dtype, or of one byte each."""
    return sum((2 if optimizer in EIGHT_BIT else 2 * size) * n for size, n in trained.items())


def head_bytes(facts: Facts) -> float:
    """The output head: logits and their gradient on one tile, and a float32 gradient of the head if it trains.

    Without tiles: the logits as computed, in float32, and their gradient.
    """
    if not facts.tiled:
        return facts.supervised * facts.vocabulary * (HALF + 2 * FULL)
    tile = min(facts.supervised, TILE_TOKENS) * min(facts.vocabulary, TILE_VOCABULARY)
    return 2 * tile * FULL + facts.head * FULL


def quantised_bytes(weights: int, *, bits: int, nested: bool) -> float:
    """Stored bytes of weights that bitsandbytes quantises to 4 or 8 bits."""
    if bits == 8:
        return weights * INT8_BITS / 8
    return weights * (NF4_NESTED_BITS if nested else NF4_BITS) / 8


def gib(value: float) -> str:
    return f"{value / 2**30:.1f}"
