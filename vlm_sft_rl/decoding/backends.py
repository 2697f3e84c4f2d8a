"""Where the keys and values of the live sequences are kept: rewound in place, or recomputed after every rewind.

Both backends have the same four operations; rows are numbered 0..n and a removed row is replaced by the last one. A
third one, for copies that are never rewound, is in `shared_prefix`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from .cache import visible
from .cached import CachedModel
from .prefill import Prefill, prefill


@dataclass
class Chunk:
    """Tokens to append to one row; the first `prompt_part` of them belong to the prompt (hint and header)."""

    row: int
    tokens: list[int]
    prompt_part: int = 0


class RewindBackend(CachedModel):
    """Per-row rewinds on cached keys; every layer must be full or sliding-window attention."""

    def __init__(self, model, layer_windows: list[int | None], headroom: int = 96):
        super().__init__(model, layer_windows, headroom)
        self.lengths: list[int] = []
        self.offsets: list[int] = []

    def add(self, start: Prefill, inputs: dict[str, Any] | None = None) -> None:
        """Append the rows of a prefill."""
        self._take(start, len(self.lengths))
        self.lengths += map(len, start.prompts)
        self.offsets += start.offsets

    def remove(self, row: int) -> None:
        last = len(self.lengths) - 1
        if row != last:
            self.cache.copy_row(last, row, 0, self.lengths[last])
            self.lengths[row], self.offsets[row] = self.lengths[last], self.offsets[last]
        self.lengths.pop()
        self.offsets.pop()

    def reserve(self, rows: int) -> None:
        """Make room for `rows` rows at once; forks would otherwise grow the cache one by one."""
        self.cache.reserve(rows, self.cache.slots)

    def fork(self, row: int) -> int:
        """A copy of `row` as a new last row; returns its number."""
        length = self.lengths[row]
        self.cache.reserve(len(self.lengths) + 1, self.cache.slots)
        self.lengths.append(length)
        self.offsets.append(self.offsets[row])
        self.cache.copy_row(row, len(self.lengths) - 1, 0, length)
        return len(self.lengths) - 1

    def adopt(self, source: int, row: int, start: int) -> None:
        """Make `row` equal to its fork `source`; they share the first `start` slots."""
        self.cache.copy_row(source, row, start, self.lengths[source])
        self.lengths[row] = self.lengths[source]

    def rewind(self, row: int, length: int) -> None:
        self.lengths[row] = length

    def decode(self, tokens: list[int | None]) -> torch.Tensor:
        """One token a row (None: the row waits); logits `(rows, vocabulary)`, arbitrary where it waits."""
        lengths = self.lengths
        slots = [[n] if t is not None else [-1] for n, t in zip(lengths, tokens, strict=True)]
        logits = self._forward(None, [[t or 0] for t in tokens], slots)[:, -1]
        for row, token in enumerate(tokens):
            if token is not None:
                lengths[row] += 1
        return logits

    def extend(self, chunks: list[Chunk]) -> torch.Tensor:
        """Several tokens a row; logits `(chunks, vocabulary)` after the last token of each."""
        return self.extend_keeping(chunks, 1)[:, -1]

    def extend_keeping(self, chunks: list[Chunk], keep: int) -> torch.Tensor:
        """`extend` with the logits after each of the last `keep` tokens: `(chunks, keep, vocabulary)`."""
        width = max(len(c.tokens) for c in chunks)
        ids, slots, rows = [], [], []
        for chunk in chunks:
            n, start = len(chunk.tokens), self.lengths[chunk.row]
            ids.append([0] * (width - n) + chunk.tokens)
            slots.append([-1] * (width - n) + list(range(start, start + n)))
            rows.append(chunk.row)
        everyone = rows == list(range(len(self.lengths)))
        logits = self._forward(None if everyone else rows, ids, slots, keep)
        for chunk in chunks:
            self.lengths[chunk.row] += len(chunk.tokens)
        return logits

    def _forward(
        self, rows: list[int] | None, ids: list[list[int]], slots: list[list[int]], keep: int = 1
    ) -> torch.Tensor:
        used = max(row[-1] for row in slots) + 1
        plan = self.cache.plan_forward(len(self.lengths), rows, slots, used, self.device)
        offsets = self.offsets if rows is None else [self.offsets[r] for r in rows]
        positions = [[s + o if s >= 0 else 0 for s in row] for row, o in zip(slots, offsets, strict=True)]
        return self._run(ids, positions, lambda window: visible(plan, self.device, window), keep)


@dataclass
class _Replay:
    """One sequence of the recompute backend: the prompt as prepared, then tokens; `start` is None when stale."""

    inputs: dict[str, Any]
    prompt: list[int]
    base: int
    tokens: list[int]
    start: Prefill | None
    ids: torch.Tensor
    fed: int = 0


class RecomputeBackend:
    """For families whose cache cannot be rewound: prompt and kept tokens are computed again after a rewind.

    Batch 1, one token at a time: slow, and right for every architecture that `generate` can run.
    """

    def __init__(self, model):
        self.model = model
        self.rows: list[_Replay] = []

    @property
    def lengths(self) -> list[int]:
        return [len(row.tokens) for row in self.rows]

    def add(self, start: Prefill, inputs: dict[str, Any]) -> None:
        prompt = start.prompts[0]
        ids = torch.tensor([prompt], device=self.model.device)
        self.rows.append(_Replay(inputs, prompt, len(prompt), list(prompt), start, ids, len(prompt)))

    def remove(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def rewind(self, row: int, length: int) -> None:
        state = self.rows[row]
        del state.tokens[length:]
        state.start = None
        state.base = min(state.base, length)

    def decode(self, tokens: list[int | None]) -> torch.Tensor:
        live = [(row, token) for row, token in enumerate(tokens) if token is not None]
        part = self.extend([Chunk(row, [token]) for row, token in live])
        logits = part.new_zeros(len(tokens), part.shape[1])
        logits[[row for row, _ in live]] = part
        return logits

    def extend(self, chunks: list[Chunk]) -> torch.Tensor:
        return torch.cat([self._run(self.rows[c.row], c) for c in chunks])

    def _run(self, row: _Replay, chunk: Chunk) -> torch.Tensor:
        row.tokens += chunk.tokens
        row.base += chunk.prompt_part
        if row.start is None:
            row.start = prefill(self.model, self._inputs(row), own_cache=False)
            row.ids = torch.tensor([row.tokens[: row.base]], device=self.model.device)
            row.fed = row.base
        logits = row.start.logits
        for token in row.tokens[row.fed :]:
            logits = self._step(row, token)
        row.fed = len(row.tokens)
        return logits

    def _inputs(self, row: _Replay) -> dict[str, Any]:
        prompt = row.tokens[: row.base]
        inputs = dict(row.inputs)
        inputs["input_ids"] = torch.tensor([prompt], device=self.model.device)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:
                old = inputs[name]
                longer = old.new_zeros(1, len(prompt))
                n = min(old.shape[1], len(prompt))
                longer[:, :n] = old[:, :n]
                inputs[name] = longer
        if (mask := inputs.get("cross_attention_mask")) is not None:
            # (rows, tokens, images, tiles): whatever follows the images sees them as the last token does
            more = max(len(prompt) - mask.shape[1], 0)
            mask = mask[:, : len(prompt)]
            inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].repeat(1, more, 1, 1)], 1)
        return inputs

    def _step(self, row: _Replay, token: int) -> torch.Tensor:
        row.ids = torch.cat([row.ids, row.ids.new_tensor([[token]])], 1)
        return row.start.step(self.model, row.ids)
