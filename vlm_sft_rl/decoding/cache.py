"""Where the keys and values of live rows are kept. A backend starts rows from prefilled prompts and decodes them.

In `RewindBackend` every row has its own length, so that a rewind is one integer and costs nothing: slot i of a row holds
the i-th token of that row's live sequence, and slots beyond its length are overwritten by what comes next. There are
no holes, nothing is ever compacted, and the causal mask of any ragged pass is `slot <= slot of the query`, for sliding
windows `and slot > slot of the query - window`. `SharedPrefixBackend` (`shared_prefix`) lays out a row that several
answers share. `RecomputeBackend` keeps no keys beyond a rewind, and is right for every architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from ..models.parts import unwrap
from ..models.versions import CACHE

GROWTH = 1.25


@dataclass
class Prefill:
    """State after the prompts.

    Attributes:
        cache: keys and values, left padded as the prompts were.
        logits: `(rows, vocabulary)` for the first answer token.
        prompts: token ids of each row without padding, image tokens included.
        offsets: per row, position id minus index for every token that follows the prompt.
        planes: 0 for `(rows, width)` position ids, otherwise the number of planes of multimodal rotary positions.
        forwarded: tokens of each row that were computed for it; the rest was in a cache.
        inputs: what was prefilled, for backends that do so again.
        model_kwargs: what `generate` has prepared for the next step.
    """

    cache: Cache
    logits: torch.Tensor
    prompts: list[list[int]]
    offsets: list[int]
    planes: int
    forwarded: list[int]
    inputs: dict[str, Any] = field(default_factory=dict)
    model_kwargs: dict[str, Any] = field(default_factory=dict)

    def step(self, model, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the last token of `input_ids` `(rows, whole width)` as `generate` would; logits `(rows, vocabulary)`."""
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        outputs = model(**inputs, return_dict=True)
        self.model_kwargs = _next_kwargs(model, outputs, self.model_kwargs)
        return outputs.logits[:, -1].to(torch.float32)


def prefill(model, inputs: dict[str, Any], *, own_cache: bool = True) -> Prefill:
    """One pass over the prompts, through `model.generate`'s own preparation, so that no family needs code here.

    Args:
        inputs: a processor's tensors, left padded.
        own_cache: False keeps the cache that `generate` makes for the family.
    """

    def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return prefill_prepared(model, input_ids, model_kwargs, own_cache=own_cache)

    # what is not said here is filled in from the checkpoint's own settings, which may make several rows of each
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, pad_token_id=0, num_beams=1, num_return_sequences=1
    )
    start = model.generate(**inputs, generation_config=config, custom_generate=capture)
    start.inputs = inputs
    return start


def prefill_prepared(
    model, input_ids: torch.Tensor, model_kwargs: dict[str, Any], *, own_cache: bool = True
) -> Prefill:
    """`prefill` of what a `custom_generate` callable receives."""
    kwargs = {**model_kwargs, "use_cache": True}
    if own_cache:
        # the cache that is made for sliding windows forgets keys by slot count
        kwargs[CACHE] = DynamicCache()
    prompts, mask = input_ids.tolist(), kwargs.get("attention_mask")
    if mask is not None:
        prompts = [ids[seen:] for ids, seen in zip(prompts, (mask == 0).sum(-1).tolist(), strict=True)]
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
    outputs = model(**inputs, return_dict=True)
    positions, planes, offsets = inputs.get("position_ids"), 0, [0] * len(prompts)
    if positions is not None:
        if positions.ndim == 3:
            planes = min(positions.shape[0], 3)
            positions = positions[-3:].amax(0)
        following = (positions.amax(-1) + 1).tolist()
        following = following * len(prompts) if len(following) == 1 else following
        offsets = [position - len(ids) for position, ids in zip(following, prompts, strict=True)]
    logits, kwargs = outputs.logits[:, -1].to(torch.float32), _next_kwargs(model, outputs, kwargs)
    forwarded = [len(ids) for ids in prompts]
    return Prefill(outputs[CACHE], logits, prompts, offsets, planes, forwarded, model_kwargs=kwargs)


def _next_kwargs(model, outputs, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    # some families demand the argument that others leave out
    return model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )


class Plan:
    """Where the current pass writes and what it reads; shared by all layers.

    Attributes:
        rows: the rows that take part: a slice, or their indices; column: the same as `(rows, 1)`.
        slots: where the new tokens go: a slice where it is the same in all rows, else `(rows, width)`.
        width: new tokens a row.
        used: slots that attention may look at, the new ones included.
    """

    rows: slice | torch.Tensor
    slots: slice | torch.Tensor
    column: torch.Tensor
    width: int = 1
    used: int = 0

    def visible(self, device: torch.device, window: int | None = None) -> torch.Tensor | None:
        """The boolean mask `(rows, 1, width, used)`; None where one token a row sees everything."""
        if isinstance(self.slots, slice):
            if self.width == 1 and (window is None or self.used <= window):
                return None
            query = torch.arange(self.slots.start, self.slots.stop, device=device).view(1, 1, -1, 1)
        else:
            query = self.slots[:, None, :, None]
        key = torch.arange(self.used, device=device)
        mask = key <= query
        if window is not None:
            mask = mask & (key > query - window)
            mask = mask | (query >= self.used)  # padding must see something, or its softmax is not a number
        return mask


class RewindLayer(DynamicLayer):
    """Preallocated keys and values `(rows, heads, slots + 1, head_dim)`; the last slot takes padding."""

    is_croppable = False

    def __init__(self, plan: Plan):
        super().__init__()
        self.plan = plan

    def resize(self, rows: int, slots: int, source) -> None:
        """New tensors in shape and type as in the layer `source`; with what it has in them where that is this layer."""
        for name in ("keys", "values"):
            old = getattr(source, name)
            new = old.new_zeros(rows, old.shape[1], slots + 1, old.shape[3])
            if source is self:
                kept = min(slots, old.shape[2] - 1)
                new[: old.shape[0], :, :kept] = old[:, :, :kept]
            setattr(self, name, new)
        self.dtype, self.device, self.is_initialized = self.keys.dtype, self.keys.device, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        plan, keys, values = self.plan, self.keys, self.values
        # under autocast over float32 weights keys are float32 and values 16 bit; the prefill's cache made both float32
        key_states, value_states = key_states.to(keys.dtype), value_states.to(values.dtype)
        if isinstance(plan.slots, slice):
            keys[plan.rows, :, plan.slots] = key_states
            values[plan.rows, :, plan.slots] = value_states
        else:
            keys[plan.column, :, plan.slots] = key_states.transpose(1, 2)
            values[plan.column, :, plan.slots] = value_states.transpose(1, 2)
        keys, values = keys[:, :, : plan.used], values[:, :, : plan.used]
        if isinstance(plan.rows, slice):
            return keys[plan.rows], values[plan.rows]
        # index_select on the short view: only live slots are copied
        return keys.index_select(0, plan.rows), values.index_select(0, plan.rows)

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
        """Make room for `rows` rows of `slots` slots; contents are kept. The first time, tensors are made as in `like`."""
        source = self if self.rows else like
        if self.rows:
            slots = max(slots, int(self.slots * GROWTH)) if slots > self.slots else self.slots
            rows = max(rows, self.rows)
        if (rows, slots) != (self.rows, self.slots):
            for layer, other in zip(self.layers, source.layers, strict=True):
                layer.resize(rows, slots, other)
            self.rows, self.slots = rows, slots

    def copy(
        self, row: int, start: int, source: Cache, source_row: int, source_start: int, length: int
    ) -> None:
        """Fill slots `start`... of a row from a row of `source`, which may be this cache."""
        here, there = slice(start, start + length), slice(source_start, source_start + length)
        for layer, other in zip(self.layers, source.layers, strict=True):
            layer.keys[row, :, here] = other.keys[source_row, :, there]
            layer.values[row, :, here] = other.values[source_row, :, there]

    def copy_row(self, source: int, row: int, start: int, end: int) -> None:
        """Copy slots start..end of one row to another."""
        self.copy(row, start, self, source, start, end - start)

    def select(self, rows: list[int], slots: int, device) -> None:
        """Row i becomes what row `rows[i]` was, in its first `slots` slots."""
        self.reserve(len(rows), self.slots)
        indices = torch.tensor(rows, device=device)
        for layer in self.layers:
            layer.keys[: len(rows), :, :slots] = layer.keys[:, :, :slots].index_select(0, indices)
            layer.values[: len(rows), :, :slots] = layer.values[:, :, :slots].index_select(0, indices)

    def plan_forward(
        self, batch: int, rows: list[int] | None, slots: list[list[int]], used: int, device
    ) -> Plan:
        """Prepare the next pass; the cache grows where it needs more slots.

        Args:
            batch: rows 0..batch are in use.
            rows: those of them that take part; None: all.
            slots: per row taking part, the slots of its new tokens; -1 = padding.
            used: slots that may be read, those of this pass included.
        """
        self.reserve(0, used)
        plan, first = self.plan, slots[0]
        plan.used, plan.width = used, len(first)
        indices = None
        if rows is None:
            plan.rows = slice(0, batch)
        elif len(rows) == 1:
            plan.rows = slice(rows[0], rows[0] + 1)
        else:
            plan.rows = indices = torch.tensor(rows, device=device)
        contiguous = first[0] >= 0 and first == list(range(first[0], first[0] + plan.width))
        if contiguous and all(row == first for row in slots):
            plan.slots = slice(first[0], first[0] + plan.width)
            return plan
        if indices is None:
            indices = torch.arange(plan.rows.start, plan.rows.stop, device=device)
        plan.slots = torch.tensor(slots, device=device)
        plan.slots.masked_fill_(plan.slots < 0, self.slots)
        plan.column = indices.unsqueeze(1)
        return plan


def layer_windows(model) -> list[int | None]:
    """Per layer of the language model: None = full attention, otherwise the sliding window in tokens."""
    layers = DynamicCache(config=unwrap(model).config).layers
    return [getattr(layer, "sliding_window", None) for layer in layers]


class CachedModel:
    """A model with a `RewindCache`: what the backends that keep keys have in common.

    Every layer must be full or sliding-window attention, all windows of one size.

    Args:
        headroom: slots that a new row gets behind its prompt.
    """

    keeps_keys = True

    def __init__(self, model, headroom: int):
        self.model, self.headroom, self.device = model, headroom, model.device
        windows = layer_windows(model)
        self.cache = RewindCache(len(windows))
        self.planes = 0
        self.window = next((window for window in windows if window is not None), None)
        self.hybrid = len(set(windows)) > 1
        self.eager = model.config._attn_implementation == "eager"

    def _take(self, start: Prefill, first: int) -> None:
        """Copy the rows of a prefill into rows `first`... of the cache."""
        longest, width = max(map(len, start.prompts)), start.cache.layers[0].keys.shape[2]
        self.cache.reserve(first + len(start.prompts), longest + self.headroom, like=start.cache)
        self.planes = start.planes
        for i, prompt in enumerate(start.prompts):
            self.cache.copy(first + i, 0, start.cache, i, width - len(prompt), len(prompt))

    def _run(
        self,
        ids: list[list[int]],
        positions: list[list[int]],
        visible: Callable[[int | None], torch.Tensor | None],
        keep: int,
    ) -> torch.Tensor:
        """The pass that `RewindCache.plan_forward` planned; logits `(rows, keep, vocabulary)`, float32.

        Args:
            ids: `(rows, width)` new tokens; positions: theirs.
            visible: window -> the boolean mask `(rows, 1, width, used)`, or None where everything is seen.
            keep: logits after each of the last `keep` tokens.
        """
        position_ids = torch.tensor(positions, device=self.device)
        if self.planes:
            position_ids = position_ids.expand(self.planes, -1, -1)
        mask: Any = self._additive(visible(self.window))
        if self.hybrid:
            # a dict replaces the model's own masks, so both entries must be there
            mask = {"full_attention": self._additive(visible(None)), "sliding_attention": mask}
        out = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            position_ids=position_ids,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=keep,
            **{CACHE: self.cache},
        )
        return out.logits[:, -keep:].float()

    def _additive(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        """Eager attention adds its mask to the scores: a boolean one would be silently wrong."""
        if mask is None or not self.eager:
            return mask
        lowest = torch.finfo(self.model.dtype).min
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=self.device).masked_fill_(~mask, lowest)


@dataclass
class Chunk:
    """Tokens to append to one row; the first `prompt_part` of them belong to the prompt (hint and header)."""

    row: int
    tokens: list[int]
    prompt_part: int = 0


class RewindBackend(CachedModel):
    """Rows that are rewound, forked and extended on cached keys; a removed row is replaced by the last one."""

    def __init__(self, model, headroom: int = 96):
        super().__init__(model, headroom)
        self.lengths: list[int] = []
        self.offsets: list[int] = []

    def add(self, start: Prefill) -> None:
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
        self.reserve(len(self.lengths) + 1)
        self.cache.copy_row(row, len(self.lengths), 0, self.lengths[row])
        self.lengths.append(self.lengths[row])
        self.offsets.append(self.offsets[row])
        return len(self.lengths) - 1

    def select(self, rows: list[int]) -> None:
        """Row i becomes a copy of row `rows[i]`; what is not named is dropped."""
        self.cache.select(rows, max(self.lengths), self.device)
        self.lengths = [self.lengths[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]

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
        width = max(len(chunk.tokens) for chunk in chunks)
        ids, slots, rows = [], [], []
        for chunk in chunks:
            n, start = len(chunk.tokens), self.lengths[chunk.row]
            ids.append([0] * (width - n) + chunk.tokens)
            slots.append([-1] * (width - n) + list(range(start, start + n)))
            rows.append(chunk.row)
        all_rows = rows == list(range(len(self.lengths)))
        logits = self._forward(None if all_rows else rows, ids, slots, keep)
        for chunk in chunks:
            self.lengths[chunk.row] += len(chunk.tokens)
        return logits

    def _forward(
        self, rows: list[int] | None, ids: list[list[int]], slots: list[list[int]], keep: int = 1
    ) -> torch.Tensor:
        used = max(row[-1] for row in slots) + 1
        plan = self.cache.plan_forward(len(self.lengths), rows, slots, used, self.device)
        offsets = self.offsets if rows is None else [self.offsets[row] for row in rows]
        positions = [[s + o if s >= 0 else 0 for s in row] for row, o in zip(slots, offsets, strict=True)]
        return self._run(ids, positions, lambda window: plan.visible(self.device, window), keep)


@dataclass
class _Replay:
    """A row of `RecomputeBackend`: its tokens, the first `base` of which are prefilled with the images of `inputs`.

    `start` is None when stale; `ids` is what it has seen of the tokens.
    """

    inputs: dict[str, Any]
    base: int
    tokens: list[int]
    start: Prefill | None
    ids: torch.Tensor


class RecomputeBackend:
    """For families whose cache cannot be rewound: prompt and kept tokens are computed again after a rewind.

    Batch 1, one token at a time: slow, and right for every architecture that `generate` can run.
    """

    keeps_keys = False

    def __init__(self, model):
        self.model = model
        self.rows: list[_Replay] = []

    def add(self, start: Prefill) -> None:
        (prompt,) = start.prompts
        ids = torch.tensor([prompt], device=self.model.device)
        self.rows.append(_Replay(start.inputs, len(prompt), list(prompt), start, ids))

    def remove(self, row: int) -> None:
        self.rows[row] = self.rows[-1]
        self.rows.pop()

    def rewind(self, row: int, length: int) -> None:
        replay = self.rows[row]
        del replay.tokens[length:]
        replay.start = None
        replay.base = min(replay.base, length)

    def decode(self, tokens: list[int | None]) -> torch.Tensor:
        live = [(row, token) for row, token in enumerate(tokens) if token is not None]
        part = self.extend([Chunk(row, [token]) for row, token in live])
        logits = part.new_zeros(len(tokens), part.shape[1])
        logits[[row for row, _ in live]] = part
        return logits

    def extend(self, chunks: list[Chunk]) -> torch.Tensor:
        return torch.cat([self._extend_row(self.rows[chunk.row], chunk) for chunk in chunks])

    def _extend_row(self, row: _Replay, chunk: Chunk) -> torch.Tensor:
        row.tokens += chunk.tokens
        row.base += chunk.prompt_part
        if row.start is None:
            row.ids = torch.tensor([row.tokens[: row.base]], device=self.model.device)
            row.start = prefill(self.model, self._longer_inputs(row), own_cache=False)
        logits = row.start.logits
        for token in row.tokens[row.ids.shape[1] :]:
            row.ids = torch.cat([row.ids, row.ids.new_tensor([[token]])], 1)
            logits = row.start.step(self.model, row.ids)
        return logits

    def _longer_inputs(self, row: _Replay) -> dict[str, Any]:
        """The row's inputs with `row.ids` in place of the prompt."""
        inputs = {**row.inputs, "input_ids": row.ids, "attention_mask": torch.ones_like(row.ids)}
        length = row.ids.shape[1]
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in inputs:  # 0 = text
                kinds = inputs[name][:, :length]
                inputs[name] = torch.nn.functional.pad(kinds, (0, length - kinds.shape[1]))
        if (mask := inputs.get("cross_attention_mask")) is not None:
            # (rows, tokens, images, tiles): whatever follows the images sees them as the last token does
            mask = mask[:, :length]
            more = length - mask.shape[1]
            inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].repeat(1, more, 1, 1)], 1)
        return inputs
