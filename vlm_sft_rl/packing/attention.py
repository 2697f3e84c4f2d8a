"""Packed batches in front of a model: attention and positions from a table of segments.

`enable_packing(model)` makes a vision-language model understand the extra input `segments`, an int64 table (segments, 4)
of `start, end, prefix_start, prefix_end`: the tokens `[start, end)` of the one sequence in the batch attend, causally,
to themselves and to the prefix; where there is none, `prefix_start == prefix_end == start`. What the model then sees
depends on its attention implementation:

- `sdpa` (the default) becomes `segmented_sdpa`: one call of PyTorch's attention for each segment. No (length, length)
  tensor exists, and no score outside of the segments is computed, on a CPU or a GPU. Sliding windows are respected.
- `flash_attention_*`: no mask; positions that restart tell the kernel where rows end. Cannot express prefixes.
- `flex_attention`: a `BlockMask`.
- `eager`: a dense (1, 1, length, length) mask.
"""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..errors import UserError
from .layout import SEGMENTS, Table, as_table, rows_of

SEGMENTED = "segmented_sdpa"


def enable_packing(model, *, prefixes: bool = False) -> None:
    """Make a transformers model (not the PEFT wrapper) understand `segments`; other calls are as before.

    Args:
        prefixes: whether segments will have prefixes.

    Raises UserError: the attention implementation cannot express packs of this kind.
    """
    text = model.config.get_text_config()
    implementation = text._attn_implementation
    if implementation == "sdpa":
        keys = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
        model.set_attn_implementation(dict.fromkeys(keys, SEGMENTED) if keys else SEGMENTED)
        implementation = text._attn_implementation
    flash = is_flash(implementation)
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    chunk = getattr(text, "attention_chunk_size", None)
    setting, refused = f"`attn_implementation: {implementation}`", None
    if not flash and implementation not in (SEGMENTED, "flex_attention", "eager"):
        refused = f"Packing knows no way to restrict {setting}. Set `attn_implementation: sdpa`."
    elif flash and prefixes:
        refused = (
            f"{setting} cannot share an image between rows. Set `attn_implementation: sdpa` or `flex_attention`, or "
            "`vision_packing: rows`."
        )
    elif chunk:
        refused = (
            f"{type(model).__name__} attends in chunks of {chunk} tokens, which packed rows would cut in other places. Set "
            "`vision_packing: none`."
        )
    elif window is not None and implementation in ("flex_attention", "eager"):
        refused = (
            f"{type(model).__name__} has a sliding window of {window} tokens, which {setting} cannot apply to packed "
            "rows. Set `attn_implementation: sdpa`."
        )
    if refused:
        raise UserError(refused)
    backbone = model.base_model
    if not any(hook is unpack_inputs for hook in backbone._forward_pre_hooks.values()):
        backbone.register_forward_pre_hook(unpack_inputs, with_kwargs=True)


def is_flash(implementation: str) -> bool:
    return "flash" in implementation


def unpack_inputs(backbone, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook: replaces `segments` and the 2-D attention mask by what the implementation takes."""
    segments = kwargs.get(SEGMENTS)
    if segments is None:
        return None
    # some models pass their backbone's inputs by position
    kwargs = dict(zip(inspect.signature(backbone.forward).parameters, args, strict=False)) | kwargs
    del kwargs[SEGMENTS]
    # the segments steer Python code: on the CPU, read once and not in every layer
    segments = segments.cpu()
    table = as_table(segments)
    ids = kwargs["input_ids"]
    positions = rope_positions(backbone, ids, table, kwargs)
    implementation = backbone.config.get_text_config()._attn_implementation
    if implementation == SEGMENTED:
        mask = segments[None, None]
    elif implementation == "flex_attention":
        mask = block_mask(table, ids.device)
    elif is_flash(implementation):
        mask = None
        if positions.dim() == 3:
            # row 0 is what the kernel finds the rows by; the other three turn the keys
            positions = torch.cat([row_positions(table).to(ids.device)[None], positions])
    else:
        attends = dense_mask(table).to(ids.device)
        mask = torch.zeros(attends.shape, dtype=backbone.dtype, device=ids.device)
        mask.masked_fill_(~attends, torch.finfo(backbone.dtype).min)
    return (), {**kwargs, "attention_mask": mask, "position_ids": positions}


def row_positions(table: Table) -> Tensor:
    """(1, length): the place of each token in its own row."""
    return torch.cat([torch.arange(q - p, q - p + end - start) for start, end, p, q in table])[None]


def rope_positions(backbone, ids: Tensor, table: Table, kwargs: dict) -> Tensor:
    """Position ids: (1, length), or (3, 1, length) by the model's own `get_rope_index` (M-RoPE), row by row.

    Args:
        kwargs: the inputs of the batch; of these `*_grid_thw` hold one row for each image, in the order of the pack.
    """
    plain = row_positions(table).to(ids.device)
    if not hasattr(backbone, "get_rope_index"):
        return plain
    types, grids = kwargs.get("mm_token_type_ids"), kwargs.get("image_grid_thw")
    if types is None or grids is None:
        return plain.expand(3, 1, -1)
    device = ids.device
    # the model's function is Python: on a GPU each of its steps would wait for the device
    ids, types, grids = ids.cpu(), types.cpu(), grids.cpu()
    counts = []
    for start, end, _, _ in table:
        on = types[0, start:end] == 1
        # an image begins where a token of type 1 follows one of another type
        counts.append(int(on[:1].sum() + (on[1:] & ~on[:-1]).sum()))
    images = {s[:2]: piece for s, piece in zip(table, grids.split(counts), strict=True)}
    accepted = inspect.signature(backbone.get_rope_index).parameters
    out = torch.empty(3, 1, ids.shape[1], dtype=torch.long)
    for start, end, p, q in rows_of(table):
        spans = [(start, end)] if p == q else [(p, q), (start, end)]
        at = torch.cat([torch.arange(*span) for span in spans])
        inputs = {
            "input_ids": ids[:, at],
            "mm_token_type_ids": types[:, at],
            "image_grid_thw": torch.cat([images[span] for span in spans]),
            "attention_mask": torch.ones_like(ids[:, at]),
        }
        known = {name: value for name, value in inputs.items() if name in accepted}
        out[:, :, at] = backbone.get_rope_index(**known)[0][-3:]
    return out.to(device)


def mask_function(table: Table, device) -> Callable:
    """`(batch, head, query, key) -> attends` as flex attention takes it."""
    length = table[-1][1]
    start, p, q = (torch.empty(length, dtype=torch.long) for _ in range(3))
    for first, end, prefix, prefix_end in table:
        start[first:end], p[first:end], q[first:end] = first, prefix, prefix_end
    start, p, q = start.to(device), p.to(device), q.to(device)

    def attends(_batch, _head, query, key):
        segment = (key >= start[query]) & (key <= query)
        return segment | ((key >= p[query]) & (key < q[query]))

    return attends


def block_mask(table: Table, device):
    """The mask as flex attention's `BlockMask`."""
    length = table[-1][1]
    return create_block_mask(mask_function(table, device), None, None, length, length, device=device)


def dense_mask(table: Table) -> Tensor:
    """(1, 1, length, length), True where a token attends."""
    index = torch.arange(table[-1][1])
    return mask_function(table, "cpu")(None, None, index[:, None], index[None])[None, None]


def segmented_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """PyTorch's attention segment by segment; anything but a table as the mask goes to transformers' own `sdpa`.

    Args:
        query, key, value: (1, heads, length, width).
        attention_mask: (1, 1, segments, 4), int64.

    Returns:
        (1, length, heads, width), and None in the place of the weights.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None:
        raise UserError(f"{type(module).__name__} changes the attention scores; packing with `sdpa` cannot.")
    table = as_table(attention_mask[0, 0])
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    # one split, not many slices: the backward of a slice is a tensor of the whole length
    sizes = [end - start for start, end, _, _ in table]
    queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
    number = {(start, end): i for i, (start, end, _, _) in enumerate(table)}
    outputs = []
    for i, (_, _, p, q) in enumerate(table):
        k, v = keys[i], values[i]
        if p != q:
            prefix = number[p, q]
            k, v = torch.cat([keys[prefix], k], dim=2), torch.cat([values[prefix], v], dim=2)
        mask = _lower_right(sizes[i], k.shape[2], sliding_window, query.device)
        outputs.append(
            F.scaled_dot_product_attention(
                queries[i], k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _lower_right(queries: int, keys: int, window: int | None, device) -> Tensor | None:
    """The last query sees the last key; None where the kernel's own causal mask says the same."""
    within = window is None or keys <= window
    if queries == keys and within:
        return None
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return mask if within else mask.triu(keys - queries - window + 1)


AttentionInterface.register(SEGMENTED, segmented_attention)
AttentionMaskInterface.register(SEGMENTED, sdpa_mask)
