"""Forward passes of a model over a `RewindCache`: what every backend that keeps keys has in common."""

from collections.abc import Callable
from typing import Any

import torch

from .cache import RewindCache
from .prefill import Prefill


class CachedModel:
    """A model with its cache; every layer must be full or sliding-window attention.

    Args:
        layer_windows: per layer the sliding window in tokens, None = full attention; at most one size of window.
        headroom: slots that a new row gets behind its prompt.
    """

    def __init__(self, model, layer_windows: list[int | None], headroom: int):
        self.model = model
        self.headroom = headroom
        self.cache = RewindCache(len(layer_windows))
        self.planes = 0
        windows = set(layer_windows)
        self.window = layer_windows[0] if len(windows) == 1 else None
        self.hybrid = next((w for w in layer_windows if w is not None), None) if len(windows) > 1 else None
        self.eager = model.config._attn_implementation == "eager"
        self.device = model.device

    def _take(self, start: Prefill, first: int) -> None:
        """Copy the rows of a prefill into rows `first`... of the cache."""
        count, longest = len(start.prompts), max(map(len, start.prompts))
        self.cache.reserve(first + count, longest + self.headroom, like=start.cache)
        self.planes = start.planes
        for i, prompt in enumerate(start.prompts):
            self.cache.take(start.cache, i, len(prompt), first + i)

    def _run(
        self,
        ids: list[list[int]],
        positions: list[list[int]],
        see: Callable[[int | None], torch.Tensor | None],
        keep: int,
    ) -> torch.Tensor:
        """The pass that `RewindCache.plan_forward` planned; logits `(rows, keep, vocabulary)`, float32.

        Args:
            ids: `(rows, width)` new tokens, and positions: theirs.
            see: window -> the boolean mask `(rows, 1, width, used)`, or None where everything is seen.
            keep: logits after each of the last `keep` tokens.
        """
        places = torch.tensor(positions, device=self.device)
        if self.planes:
            places = places.expand(self.planes, -1, -1)
        out = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            position_ids=places,
            attention_mask=self._mask(see),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return out.logits[:, -keep:].float()

    def _mask(self, see: Callable[[int | None], torch.Tensor | None]) -> Any:
        if self.hybrid is None:
            return self._additive(see(self.window))
        # a dict mask replaces the model's own, so both entries must be there
        return {
            "full_attention": self._additive(see(None)),
            "sliding_attention": self._additive(see(self.hybrid)),
        }

    def _additive(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None or not self.eager:
            return mask
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill_(~mask, lowest)
