import copy

import families
import pytest
import torch
from image_rows import mixed_rows, picture, row, tagged_rows
from torch.utils.data import DataLoader

from vlm_sft_rl.data import collators
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.packing.collator import PackedCollator
from vlm_sft_rl.packing.plan import PackedDataset

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
    bad = {**row("q", "a", id="gone"), "images": ["gone.png"]}
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
        rows = [row("q", "one"), row("q", "two words")]
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
