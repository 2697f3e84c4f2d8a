import copy

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from image_rows import mixed_rows, picture, tagged_rows
from image_rows import row as image_row
from torch.utils.data import DataLoader

from vlm_sft_rl.data import collators
from vlm_sft_rl.data.marks import IGNORE, Example
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.packing.collator import PackedCollator
from vlm_sft_rl.packing.layout import SEGMENTS, Row, lay_out, row_lengths, shared_length
from vlm_sft_rl.packing.plan import PackedDataset

PAD = 99


def row(ids, labelled, types=None):
    labels = [i if on else IGNORE for i, on in zip(ids, labelled, strict=True)]
    weights = [0.5 + n if on else 0.0 for n, on in enumerate(labelled)]
    return Row(Example(list(ids), labels, weights, ()), {"types": list(types or [0] * len(ids))})


@st.composite
def families_of_rows(draw):
    """Rows that begin alike: a few ids only, so that they often go on alike too."""
    prefix = draw(st.lists(st.integers(0, 2), max_size=5))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        ids = prefix + draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        first = draw(st.integers(0, len(ids) - 1))
        labelled = [n == first or (n > first and draw(st.booleans())) for n in range(len(ids))]
        rows.append(row(ids, labelled, [i % 2 for i in ids]))
    return rows


def slow_shared(rows):
    if len(rows) == 1:
        return 0
    n = 0
    while True:
        column = {tuple(r.example.input_ids[: n + 1]) for r in rows}
        predicts = any(all(x == IGNORE for x in r.example.labels[: n + 2]) is False for r in rows)
        if len(column) > 1 or predicts or any(n + 1 >= len(r) for r in rows):
            return n
        n += 1


@given(families_of_rows())
def test_what_rows_share_equals_a_slow_reference(rows):
    assert shared_length(rows) == slow_shared(rows)


def test_rows_that_differ_only_in_an_aligned_value_share_less():
    one, two = row([1, 2, 3, 4], [0, 0, 0, 1], [0, 1, 0, 0]), row([1, 2, 3, 4], [0, 0, 0, 1], [0, 0, 0, 0])
    assert shared_length([one, two]) == 1 and shared_length([one, one]) == 2


@given(st.lists(families_of_rows(), min_size=1, max_size=3), st.sampled_from([None, 4, 16]))
def test_every_row_can_be_read_back_from_the_segments(groups, multiple):
    pack = lay_out(groups, PAD, multiple)
    length = pack["input_ids"].shape[1]
    segments = pack[SEGMENTS].tolist()
    assert [s[0] for s in segments] == [0, *(s[1] for s in segments[:-1])] and segments[-1][1] == length
    assert not multiple or length % multiple == 0
    padding = int((pack["attention_mask"] == 0).sum())
    assert (pack["input_ids"][0, length - padding :] == PAD).all()
    prefixes = {(p, q) for _, _, p, q in segments if p != q}
    found = []
    for start, end, p, q in segments:
        if (start, end) in prefixes or start >= length - padding:
            assert (pack["labels"][0, start:end] == IGNORE).all()
            continue
        at = torch.tensor([*range(p, q), *range(start, end)])
        found.append({k: pack[k][0, at].tolist() for k in ("input_ids", "labels", "loss_weights", "types")})
    rows = [one for group in groups for one in group]
    assert len(found) == len(rows)
    for one, read in zip(rows, found, strict=True):
        assert read["input_ids"] == one.example.input_ids and read["types"] == one.aligned["types"]
        # the first token of a row is predicted by nothing
        assert read["labels"] == [IGNORE, *one.example.labels[1:]]
        assert read["loss_weights"] == [0.0, *one.example.weights[1:]]
    lengths = [len(one) for one in rows]
    assert row_lengths(pack[SEGMENTS]) == lengths + ([padding] if padding else [])


def test_a_shared_beginning_stands_once():
    rows = [row([7, 8, 9, 1, 5], [0, 0, 0, 0, 1]), row([7, 8, 9, 2, 3, 6], [0, 0, 0, 0, 1, 1])]
    pack = lay_out([rows, [row([4, 5], [0, 1])]], PAD)
    assert pack["input_ids"].tolist() == [[7, 8, 9, 1, 5, 2, 3, 6, 4, 5]]
    assert pack[SEGMENTS].tolist() == [[0, 3, 0, 0], [3, 5, 0, 3], [5, 8, 0, 3], [8, 10, 8, 8]]


# --- The collator ---

_, PROCESSOR = families.llava()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_packs_are_taken_apart():
    rows = mixed_rows()
    packs = PackedDataset(rows, [[0, 1, 2], [3, 4, 5, 6, 7]])
    collator = PackedCollator(PROCESSOR, packing="image")
    assert equal(collator([packs[0], packs[1]]), collator(rows))


def test_workers_give_the_same():
    packs = PackedDataset(tagged_rows(4, 3), [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]])
    collator = PackedCollator(PROCESSOR, packing="image")
    batches = [
        list(DataLoader(packs, batch_size=1, collate_fn=collator, num_workers=workers)) for workers in (0, 2)
    ]
    assert len(batches[0]) == 4 and all(equal(a, b) for a, b in zip(*batches, strict=True))


def test_a_file_is_opened_once_and_equal_pictures_are_one(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(
        collators,
        "open_image",
        lambda item, root, real=collators.open_image: opened.append(item) or real(item, root),
    )
    picture(0).save(tmp_path / "0.png")
    rows = tagged_rows(1, 4)
    for kind in ("path", "picture", "bytes"):
        for one in rows:
            path = tmp_path / "0.png"
            item = {
                "path": "0.png",
                "picture": picture(0).copy(),
                "bytes": {"bytes": path.read_bytes(), "path": "x"},
            }
            one["images"] = [item[kind]]
        opened.clear()
        batch = PackedCollator(PROCESSOR, tmp_path, packing="image")(rows)
        assert len(opened) == 1 and batch["pixel_values"].shape[0] == 1, kind


def test_bad_rows_are_left_out(tmp_path):
    bad = {**image_row("q", "a", id="gone"), "images": ["gone.png"]}
    settings = {"packing": "image", "rejects_path": tmp_path / "rejects.jsonl"}
    collator = PackedCollator(PROCESSOR, tmp_path, **settings)
    rows = tagged_rows(2, 2)
    assert equal(collator([rows[0], bad, *rows[1:]]), PackedCollator(PROCESSOR, packing="image")(rows))
    assert sum(collator.rejected.values()) == 1
    alone = collator([bad])
    length = alone["labels"].shape[1]
    assert (alone["labels"] == -100).all() and alone["segments"].tolist() == [[0, length, 0, 0]]


def test_text_alone_gets_a_picture_without_loss_on_several_processes():
    for packing in ("rows", "image"):
        rows = [image_row("q", "one"), image_row("q", "two words")]
        alone = PackedCollator(PROCESSOR, packing=packing)(rows)
        batch = PackedCollator(PROCESSOR, packing=packing, always_image=True)(rows)
        length = alone["input_ids"].shape[1]
        assert "pixel_values" not in alone and batch["pixel_values"].shape[0] == 1
        assert torch.equal(batch["labels"][:, :length], alone["labels"])
        assert (batch["labels"][:, length:] == -100).all() and len(batch["segments"]) == 3


def test_what_cannot_be_packed_is_said():
    with pytest.raises(UserError, match="one of rows, image"):
        PackedCollator(PROCESSOR, packing="all")
    nameless = copy.copy(PROCESSOR)
    nameless.image_token = None
    with pytest.raises(UserError, match="names no image token"):
        PackedCollator(nameless, packing="image")
