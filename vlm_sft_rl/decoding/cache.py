"""A key/value cache in which every row has its own length, so that a rewind is one integer and costs nothing.

Slot i of a row holds the i-th token of that row's live sequence. Rewinding a row makes its length smaller; the
slots beyond are overwritten by what comes next. There are no holes, nothing is ever compacted, and the causal mask
of any ragged forward is `slot <= slot of the query`, for sliding windows `and slot > slot of the query - window`.
Rows that several answers share are laid out otherwise, see `shared_prefix`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

GROWTH = 1.25


class Plan:
    """Where the current forward pass writes and what it reads; shared by all layers.

    Attributes:
        rows: None = all rows in order, or the indices of the rows that take part.
        slots: `(rows, width)` slot of each new token, or None when all rows write at the same place.
        start: the common slot when `slots` is None.
        width: new tokens per row.
        used: slots that attention may look at, the new ones included.
        batch: rows in use (0..batch), single: the row when only one takes part, column: rows as `(rows, 1)`.
    """

    rows: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    start: int = 0
    width: int = 1
    used: int = 0
    batch: int = 0
    single: int = 0
    column: torch.Tensor | None = None


class RewindLayer(DynamicLayer):
    """Preallocated keys and values `(capacity rows, heads, slots + 1, head_dim)`; the last slot takes padding."""

    is_croppable = False

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def allocate(self, keys: torch.Tensor, values: torch.Tensor, rows: int, slots: int) -> None:
        self.dtype, self.device = keys.dtype, keys.device
        self.keys = keys.new_zeros(rows, keys.shape[1], slots + 1, keys.shape[3])
        self.values = values.new_zeros(rows, values.shape[1], slots + 1, values.shape[3])
        self.is_initialized = True

    def grow(self, rows: int, slots: int) -> None:
        old_keys, old_values = self.keys, self.values
        n, kept = old_keys.shape[0], min(slots, old_keys.shape[2] - 1)
        self.allocate(old_keys, old_values, rows, slots)
        self.keys[:n, :, :kept] = old_keys[:, :, :kept]
        self.values[:n, :, :kept] = old_values[:, :, :kept]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        plan, keys, values = self.plan, self.keys, self.values
        # under autocast over float32 weights keys are float32 and values 16 bit; the prefill's cache made both float32
        key_states, value_states = key_states.to(keys.dtype), value_states.to(values.dtype)
        if plan.slots is None:
            end = plan.start + plan.width
            if plan.rows is None:
                keys, values = keys[: plan.batch], values[: plan.batch]
                keys[:, :, plan.start : end] = key_states
                values[:, :, plan.start : end] = value_states
                return keys[:, :, : plan.used], values[:, :, : plan.used]
            keys[plan.rows, :, plan.start : end] = key_states
            values[plan.rows, :, plan.start : end] = value_states
        else:
            keys[plan.column, :, plan.slots] = key_states.transpose(1, 2)
            values[plan.column, :, plan.slots] = value_states.transpose(1, 2)
            if plan.rows is None:
                return keys[: plan.batch, :, : plan.used], values[: plan.batch, :, : plan.used]
        if len(plan.rows) == 1:
            row = plan.single
            return keys[row : row + 1, :, : plan.used], values[row : row + 1, :, : plan.used]
        # index_select on the short view: only live slots are copied
        return (
            keys[:, :, : plan.used].index_select(0, plan.rows),
            values[:, :, : plan.used].index_select(0, plan.rows),
        )

    def get_seq_length(self) -> int:
        return self.plan.used - self.plan.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.plan.used, 0


class RewindCache(Cache):
    """All layers of one model, plus the operations on whole rows.

    Memory: `rows * (slots + 1) * 2 * sum over layers of (kv_heads * head_dim)` elements.
    """

    def __init__(self, layers: int):
        self.plan = Plan()
        super().__init__(layers=[RewindLayer(self.plan) for _ in range(layers)])
        self.rows = self.slots = 0

    def reserve(self, rows: int, slots: int, like: Cache | None = None) -> None:
        """Make room for `rows` rows of `slots` slots; contents are kept."""
        if not self.rows:
            for layer, source in zip(self.layers, like.layers, strict=True):
                layer.allocate(source.keys, source.values, rows, slots)
        elif rows > self.rows or slots > self.slots:
            rows = max(rows, self.rows)
            slots = max(slots, int(self.slots * GROWTH)) if slots > self.slots else self.slots
            for layer in self.layers:
                layer.grow(rows, slots)
        else:
            return
        self.rows, self.slots = rows, slots

    def take(self, source: Cache, source_row: int, length: int, row: int) -> None:
        """Copy the last `length` slots of a row of `source` (a left-padded prefill) into slots 0..length of `row`."""
        for layer, other in zip(self.layers, source.layers, strict=True):
            layer.keys[row, :, :length] = other.keys[source_row, :, other.keys.shape[2] - length :]
            layer.values[row, :, :length] = other.values[source_row, :, other.values.shape[2] - length :]

    def copy_row(self, source: int, target: int, start: int, end: int) -> None:
        """Copy slots start..end of one row to another."""
        for layer in self.layers:
            layer.keys[target, :, start:end] = layer.keys[source, :, start:end]
            layer.values[target, :, start:end] = layer.values[source, :, start:end]

    def plan_forward(
        self, batch: int, rows: list[int] | None, slots: list[list[int]], used: int, device
    ) -> Plan:
        """Prepare the next forward pass; the cache grows where it needs more slots.

        Args:
            batch: rows 0..batch are in use.
            rows: the rows that take part, or None for all of 0..batch.
            slots: per row taking part, the slots of its new tokens; -1 = padding.
            used: slots that may be read, those of this pass included.
        """
        self.reserve(0, used)
        plan = self.plan
        plan.batch, plan.used, plan.width = batch, used, len(slots[0])
        plan.rows = None
        if rows is not None:
            plan.rows = torch.tensor(rows, device=device)
            plan.single = rows[0]
        first = slots[0]
        contiguous = first[0] >= 0 and first == list(range(first[0], first[0] + plan.width))
        if contiguous and all(row == first for row in slots):
            plan.slots, plan.start = None, first[0]
            return plan
        plan.slots = torch.tensor(slots, device=device)
        plan.slots.masked_fill_(plan.slots < 0, self.slots)
        plan.column = (torch.arange(batch, device=device) if rows is None else plan.rows).unsqueeze(1)
        return plan


def visible(plan: Plan, device: torch.device, window: int | None = None) -> torch.Tensor | None:
    """The boolean mask `(rows, 1, width, used)` of a planned pass; None when one token per row sees everything."""
    if plan.slots is None:
        if plan.width == 1 and (window is None or plan.used <= window):
            return None
        query = torch.arange(plan.start, plan.start + plan.width, device=device).view(1, 1, -1, 1)
    else:
        query = plan.slots[:, None, :, None]
    key = torch.arange(plan.used, device=device)
    mask = key <= query
    if window is not None:
        mask = mask & (key > query - window)
        mask = mask | (query >= plan.used)  # padding must see something, or its softmax is not a number
    return mask


# One forward pass over the prompts, through `model.generate`'s own preparation, so that no family needs code here.
@dataclass
class Prefill:
    """State after the prompts.

    Attributes:
        cache: keys and values, left padded as the prompts were.
        logits: `(rows, vocabulary)` for the first answer token.
        prompts: token ids of each row without padding, image tokens included.
        offsets: per row, position id minus index for every token that follows the prompt.
        planes: 0 for `(rows, width)` position ids, otherwise the number of planes of multimodal rotary positions.
        model_kwargs: what `generate` had prepared (for backends that go on step by step).
        forwarded: tokens of each row that were really computed, where the rest was held already; None: all.
    """

    cache: Cache
    logits: torch.Tensor
    prompts: list[list[int]]
    offsets: list[int]
    planes: int
    model_kwargs: dict[str, Any]
    forwarded: list[int] | None = None

    def step(self, model, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the last token of `input_ids` `(rows, whole width)` as `generate` would; logits `(rows, vocabulary)`."""
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        outputs = model(**inputs, return_dict=True)
        self.model_kwargs = follow(model, outputs, self.model_kwargs)
        return outputs.logits[:, -1].to(torch.float32)


def forward_prompt(
    model, input_ids: torch.Tensor, model_kwargs: dict[str, Any], cache: Cache | None = None
) -> Prefill:
    """Run the prompts. `model_kwargs` is what a `custom_generate` callable receives; its cache is replaced,
    because the one made for sliding windows forgets keys by slot count."""
    kwargs = dict(model_kwargs)
    kwargs["past_key_values"] = DynamicCache() if cache is None else cache
    kwargs["use_cache"] = True
    mask = kwargs.get("attention_mask")
    rows = input_ids.tolist()
    if mask is None:
        prompts = rows
    else:
        prompts = [
            [t for t, keep in zip(r, m, strict=True) if keep]
            for r, m in zip(rows, mask.tolist(), strict=True)
        ]
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
    outputs = model(**inputs, return_dict=True)
    positions = inputs.get("position_ids")
    planes, offsets = 0, [0] * len(prompts)
    if positions is not None:
        if positions.ndim == 3:
            planes = min(positions.shape[0], 3)
            positions = positions[-3:].amax(0)
        following = (positions.amax(-1) + 1).tolist()
        if len(following) == 1:
            following = following * len(prompts)
        offsets = [next_ - len(p) for next_, p in zip(following, prompts, strict=True)]
    logits = outputs.logits[:, -1].to(torch.float32)
    kwargs = follow(model, outputs, kwargs)
    return Prefill(outputs.past_key_values, logits, prompts, offsets, planes, kwargs)


def follow(model, outputs, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model_kwargs` for the next forward pass, as `generate` makes them."""
    # some families demand the argument that others leave out
    return model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )


def prefill(model, inputs: dict[str, Any], *, own_cache: bool = True) -> Prefill:
    """Prefill `inputs` (a processor's tensors, left padded). `own_cache=False` keeps the family's own cache."""

    def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        cache = None if own_cache else model_kwargs["past_key_values"]
        return forward_prompt(model, input_ids, model_kwargs, cache)

    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    return model.generate(**inputs, generation_config=config, custom_generate=capture)


# Forward passes of a model over a `RewindCache`: what every backend that keeps keys has in common.
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


# Where the keys and values of the live sequences are kept: rewound in place, or recomputed after every rewind.
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
