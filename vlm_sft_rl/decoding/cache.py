"""A key/value cache in which every row has its own length, so that a rewind is one integer and costs nothing.

Slot i of a row holds the i-th token of that row's live sequence. Rewinding a row makes its length smaller; the
slots beyond are overwritten by what comes next. There are no holes, nothing is ever compacted, and the causal mask
of any ragged forward is `slot <= slot of the query`, for sliding windows `and slot > slot of the query - window`.
Rows that several answers share are laid out otherwise, see `shared_prefix`.
"""

import torch
from transformers import Cache
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
