"""Which models can rewind cached keys, and the proof by a small test run."""

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils import logging

from ..models.parts import tolerance, unwrap
from ..models.versions import CACHE
from .cache import Chunk, Prefill, RecomputeBackend, RewindBackend, layer_windows, prefill
from .sampling import not_finite
from .shared_prefix import SharedPrefixBackend

logger = logging.get_logger(__name__)
_VERDICTS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
SELF_TEST_LONGEST_WINDOW = 256
ATTENTION_KINDS = {"full_attention", "sliding_attention"}


@contextmanager
def backend_for(model, copies: int = 1) -> Iterator[RewindBackend | SharedPrefixBackend | RecomputeBackend]:
    """What the model decodes on, inside of inference mode and an attention that takes its masks."""
    with rewindable_attention(model), torch.inference_mode():
        yield choose_backend(model, copies)


@contextmanager
def rewindable_attention(model) -> Iterator[None]:
    """Ragged masks need a kernel that takes them: flash attention is exchanged for SDPA while decoding."""
    inner = unwrap(model)
    original = inner.config._attn_implementation
    if original in ("sdpa", "eager"):
        yield
        return
    logger.warning_once(
        f"Rewinding uses attention masks that {original} does not take: decoding with sdpa instead."
    )
    inner.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        inner.set_attn_implementation(original)


def choose_backend(model, copies: int = 1) -> RewindBackend | SharedPrefixBackend | RecomputeBackend:
    """The rewinding backend, or with one warning that names the reason the recomputing one.

    Args:
        copies: answers that share their prompt's row of the cache, where the model can do that, and cannot be rewound then;
            1: none do.
    """
    reason = rewind_obstacle(model)
    if reason is not None:
        logger.warning_once(
            f"{type(unwrap(model)).__name__} cannot rewind its cache: {reason}. Falling back to computing prompt and kept "
            "text again after every rewind: same answers, slower, one row at a time."
        )
        return RecomputeBackend(model)
    if copies > 1 and sharing_obstacle(model) is None:
        return SharedPrefixBackend(model, copies)
    return RewindBackend(model)


def rewind_obstacle(model) -> str | None:
    """Structural rules, then (once per model, attention kernel, device, dtype and autocast) the self-test."""
    return _verdict(model, "rewound", lambda: structural_obstacle(model) or self_test(model, _rewound))


def sharing_obstacle(model) -> str | None:
    """Why copies cannot share a row of the cache; None when they can."""
    return rewind_obstacle(model) or _verdict(model, "shared", lambda: self_test(model, _shared))


def _verdict(model, kind: str, find: Callable[[], str | None]) -> str | None:
    inner = unwrap(model)
    device = inner.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inner.dtype
    key = (kind, inner.config._attn_implementation, device, inner.dtype, computed)
    verdicts = _VERDICTS.setdefault(inner, {})
    if key not in verdicts:
        verdicts[key] = find()
    return verdicts[key]


def structural_obstacle(model) -> str | None:
    """Why this architecture cannot rewind its cache; None when nothing in its configuration speaks against it."""
    model = unwrap(model)
    if not {"position_ids", CACHE} <= set(inspect.signature(model.forward).parameters):
        return f"its forward takes no position_ids or no {CACHE}"
    return config_obstacle(model.config)


def config_obstacle(config) -> str | None:
    """As `structural_obstacle`, by what the configuration alone says: no weight is needed."""
    text = config.get_text_config(decoder=True)
    if getattr(text, "cross_attention_layers", None):
        return "it attends to the image through cross-attention layers"
    if config.model_type.startswith("paligemma") or getattr(text, "use_bidirectional_attention", False):
        return "its prompt is attended to in both directions, so no part of it can be replaced"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if other := set(getattr(text, "layer_types", None) or ()) - ATTENTION_KINDS:
        return f"it has layers of the kind {', '.join(sorted(other))}"
    layers = DynamicCache(config=config).layers
    if not layers:
        return "its cache layout is unknown"
    if other := {
        type(x).__name__ for x in layers if type(x) not in (DynamicLayer, DynamicSlidingWindowLayer)
    }:
        return f"its cache has layers of the type {', '.join(sorted(other))}"
    if len({getattr(layer, "sliding_window", None) for layer in layers} - {None}) > 1:
        return "its layers have windows of different sizes"
    return None


@torch.inference_mode()
def self_test(model, decode: Callable) -> str | None:
    """Ragged rows without images against a fresh pass of each; `decode` is `_rewound` or `_shared`. None = they agree.

    Raises NotFinite: the model says nothing even in a fresh pass.
    """
    window = max((w for w in layer_windows(model) if w), default=0)
    length = window + 6 if 0 < window <= SELF_TEST_LONGEST_WINDOW else 12
    ids = ordinary_ids(model, length + 8)
    try:
        for logits, sequence in decode(model, ids[:length], ids[3 : length - 1], ids):
            fresh = prefill_text(model, [sequence]).logits[0]
            if not fresh.max().isfinite():
                raise not_finite("self-test before decoding")
            error = float((logits - fresh).abs().max() / fresh.abs().max())
            if not error <= tolerance(model, 1e-3):
                return f"decoded and recomputed logits differ by {error:.2g} in the self-test"
    except (TypeError, ValueError, RuntimeError, KeyError, AttributeError, IndexError) as error:
        return f"the self-test failed ({type(error).__name__}: {error})"
    return None


def _rewound(model, first: list[int], second: list[int], ids: list[int]):
    """Pairs (logits, the sequence they follow) of two rows, the first of which was rewound."""
    backend = RewindBackend(model, headroom=4)
    backend.add(prefill_text(model, [first, second]))
    backend.decode([ids[-1], ids[-2]])
    backend.rewind(0, len(first) - 3)
    backend.extend([Chunk(0, ids[4:6])])
    logits = backend.decode([ids[-3], ids[-4]])
    return zip(logits, [first[:-3] + ids[4:6] + [ids[-3]], [*second, ids[-2], ids[-4]]], strict=True)


def _shared(model, first: list[int], second: list[int], ids: list[int]):
    """The same of the second copy of one prompt and the only one of another: one place of each pass is padding."""
    backend = SharedPrefixBackend(model, 2, headroom=4)
    backend.add(prefill_text(model, [first, second]))
    backend.fork(0)
    backend.decode(ids[-3:])
    logits = backend.decode(ids[-6:-3])
    return zip(logits[1:], [[*second, ids[-2], ids[-5]], [*first, ids[-1], ids[-4]]], strict=True)


def ordinary_ids(model, count: int) -> list[int]:
    """Token ids that are no image placeholder, spread over the vocabulary."""
    config = unwrap(model).config
    special = {
        v for k, v in vars(config).items() if k.endswith(("token_id", "token_index")) and isinstance(v, int)
    }
    size = config.get_text_config(decoder=True).vocab_size
    free = [i for i in range(min(size, 4096)) if i not in special][10:]
    return [free[(7 * i) % len(free)] for i in range(count)]


def prefill_text(model, rows: list[list[int]]) -> Prefill:
    """A prefill of token ids without images."""
    width = max(map(len, rows))
    ids = torch.tensor([[row[0]] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    return prefill(model, {"input_ids": ids, "attention_mask": mask})
