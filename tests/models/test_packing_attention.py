import copy
from types import SimpleNamespace

import families
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from image_rows import tagged_rows
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.packing.attention import (
    SEGMENTED,
    block_mask,
    dense_mask,
    enable_packing,
    row_positions,
    segmented_attention,
)
from vlm_sft_rl.packing.collator import PackedCollator
from vlm_sft_rl.packing.layout import as_table, rows_of


@st.composite
def tables(draw):
    """Segments of random lengths: rows of their own, and prefixes with branches."""
    table, at = [], 0

    def add(prefix=None):
        nonlocal at
        end = at + draw(st.integers(1, 7))
        table.append((at, end, *(prefix or (at, at))))
        at = end
        return table[-1][:2]

    for branches in draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)):
        first = add()
        for _ in range(branches):
            add(first)
    return table


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}


def slow_mask(table, window=None):
    """Who attends to whom, row by row and token by token."""
    length = table[-1][1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end, p, q in table:
        tokens = [*range(p, q), *range(start, end)]
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens[: i + 1]):
                mask[query, key] = window is None or i - j < window
    return mask


@given(tables())
@settings(deadline=None)
def test_masks_equal_a_slow_reference(table):
    expected, blocks, length = slow_mask(table), block_mask(table, "cpu"), table[-1][1]
    index = torch.arange(length)
    assert torch.equal(dense_mask(table)[0, 0], expected)
    assert torch.equal(blocks.mask_mod(0, 0, index[:, None], index[None]), expected)
    assert blocks.shape[-2:] == (length, length)


@given(tables(), st.sampled_from([1, 2]), st.sampled_from([None, 3, 50]), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_segmented_attention_equals_the_dense_mask(table, groups, window, seed):
    torch.manual_seed(seed)
    length = table[-1][1]
    query = torch.randn(1, 4, length, 8, requires_grad=True)
    key, value = (torch.randn(1, 4 // groups, length, 8, requires_grad=True) for _ in range(2))
    upstream = torch.randn(1, length, 4, 8)
    segments = torch.tensor(table)[None, None]
    settings = {"scaling": 0.3, "sliding_window": window}
    ours, weights = segmented_attention(SimpleNamespace(), query, key, value, segments, **settings)
    wide = [x.repeat_interleave(groups, dim=1) for x in (key, value)]
    theirs = F.scaled_dot_product_attention(query, *wide, attn_mask=slow_mask(table, window), scale=0.3)
    theirs = theirs.transpose(1, 2)
    assert weights is None and torch.allclose(ours, theirs, atol=1e-6)
    gradients = (torch.autograd.grad(output, (query, key, value), upstream) for output in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


def test_without_a_table_it_is_transformers_own_attention():
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    module = SimpleNamespace(is_causal=True, num_key_value_groups=1)
    for given_mask in (None, mask):
        ours, _ = segmented_attention(module, query, key, value, given_mask, scaling=0.5)
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
        assert torch.allclose(ours, causal.transpose(1, 2), atol=1e-6)


@given(st.lists(st.integers(1, 9), min_size=2, max_size=5))
@settings(deadline=None)
def test_flash_attention_reads_the_rows_off_the_positions(lengths):
    ends = torch.tensor(lengths).cumsum(0).tolist()
    table = [(e - n, e, e - n, e - n) for n, e in zip(lengths, ends, strict=True)]
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(row_positions(table))
    assert starts.tolist() == [0, *ends] and longest == max(lengths)


def test_positions_go_on_after_the_prefix_in_every_branch():
    table = as_table(torch.tensor([[0, 3, 0, 0], [3, 5, 0, 3], [5, 8, 0, 3], [8, 10, 8, 8]]))
    assert row_positions(table).tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1]]
    assert list(rows_of(table)) == table[1:]


@pytest.mark.parametrize("implementation, prefixes", [("eager", False), ("sdpa", True)])
def test_the_language_model_alone_is_given_segments(implementation, prefixes):
    model, _ = families.llava()
    model.config.text_config._attn_implementation_internal = implementation
    enable_packing(model, prefixes=prefixes)
    assert model.config.vision_config._attn_implementation == "sdpa"
    expected = SEGMENTED if implementation == "sdpa" else implementation
    assert model.config.text_config._attn_implementation == expected


@pytest.mark.parametrize(
    "family, settings, prefixes, complaint",
    [
        (
            families.llava,
            {"_attn_implementation_internal": "flash_attention_2"},
            True,
            "cannot share an image",
        ),
        (families.llava, {"_attn_implementation_internal": "paged|sdpa"}, False, "no way to restrict"),
        (families.llava, {"attention_chunk_size": 8192}, False, "chunks of 8192"),
        # a dense mask would ignore it
        (families.llava_mistral, {"_attn_implementation_internal": "eager"}, False, "sliding window of 12"),
    ],
)
def test_what_cannot_express_a_pack_is_refused(family, settings, prefixes, complaint):
    model, _ = family()
    for name, value in settings.items():
        setattr(model.config.text_config, name, value)
    with pytest.raises(UserError, match=complaint):
        enable_packing(model, prefixes=prefixes)


def test_the_checkpoint_does_not_remember_the_implementation(tmp_path):
    model, _ = families.llava()
    enable_packing(model)
    enable_packing(model)
    assert len(model.base_model._forward_pre_hooks) == 1
    model.save_pretrained(tmp_path)
    assert SEGMENTED not in (tmp_path / "config.json").read_text()
    assert type(model).from_pretrained(tmp_path).config.text_config._attn_implementation == "sdpa"


@pytest.mark.slow
def test_flex_attention_follows_the_segments():
    """Compiled for the CPU, where it has no backward pass: the forward pass alone."""
    model, processor = families.llava(hidden=128)
    rows = tagged_rows(pictures=2, each=3)
    flex = copy.deepcopy(model)
    flex.set_attn_implementation({"text_config": "flex_attention"})
    enable_packing(flex, prefixes=True)
    packed = PackedCollator(processor, packing="image", pad_to_multiple_of=128)
    supervised = []
    for network, batch in ((model, VisionCollator(processor)(rows)), (flex, packed(rows))):
        with torch.no_grad():
            logits = network(**inputs_of(batch)).logits[:, :-1]
        supervised.append(logits[batch["labels"][:, 1:] != -100])
    assert torch.allclose(*supervised, atol=1e-5)


@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl, families.llava_mistral])
def test_generation_is_as_before(family):
    model, processor = family()
    packable = copy.deepcopy(model)
    enable_packing(packable, prefixes=True)
    inputs = inputs_of(VisionCollator(processor, padding_side="left")(tagged_rows(1, 3)))
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    before, after = model.generate(**inputs, **settings), packable.generate(**inputs, **settings)
    assert torch.equal(before.sequences, after.sequences)
    assert all(torch.equal(a, b) for a, b in zip(before.logits, after.logits, strict=True))
