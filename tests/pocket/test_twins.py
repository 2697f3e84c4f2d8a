import random
from collections import Counter

import pytest

from vlm_sft_rl.data.collators import RegionCollator
from vlm_sft_rl.data.rows import read_regions, read_rows
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.pocket.regions import LOCATE, build_regions, scenes_of, thing_in
from vlm_sft_rl.pocket.world import (
    CELLS,
    caption_expression,
    cell_box,
    draw_twins,
    expressions,
    fits,
    picks_out,
    shortest_expression,
)
from vlm_sft_rl.rewards.regions import iou

SCENES = [draw_twins(random.Random(seed)) for seed in range(120)]
THINGS = [(thing, scene) for scene in SCENES for thing in scene.objects]


def test_nouns_repeat_and_colour_and_noun_always_tell_things_apart():
    for scene in SCENES:
        nouns = Counter(item.noun for item in scene.objects)
        assert 5 <= len(scene.objects) <= 6 and max(nouns.values()) >= 2
        assert len({(item.noun, item.colour) for item in scene.objects}) == len(scene.objects)
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
    for thing, scene in THINGS:
        assert picks_out(f"{thing.colour} {thing.noun}", thing, scene)


def test_the_plain_noun_is_mostly_ambiguous_and_the_shortest_expression_never():
    plain = sum(picks_out(thing.noun, thing, scene) for thing, scene in THINGS) / len(THINGS)
    assert plain < 0.25
    for thing, scene in THINGS:
        said = shortest_expression(thing, scene)
        assert picks_out(said, thing, scene)
        shorter = expressions(thing)[: expressions(thing).index(said)]
        assert not any(picks_out(text, thing, scene) for text in shorter)


def test_captions_are_true_and_mostly_the_noun():
    rng = random.Random(0)
    said = [(caption_expression(thing, rng), thing) for thing, _ in THINGS]
    assert all(fits(text, thing) for text, thing in said)
    assert 0.4 < sum(text == thing.noun for text, thing in said) / len(said) < 0.6


@pytest.mark.parametrize(
    "said, right",
    [
        ("red star", True),
        ("The red star.", True),
        ("star", True),
        ("blue star", False),
        ("red", False),
        ("", False),
    ],
)
def test_fits_needs_the_noun_and_no_word_that_is_false(said, right):
    thing = next(t for t, _ in THINGS)
    said = said.replace("star", thing.noun).replace("red", thing.colour)
    said = said.replace("blue", "blue" if thing.colour != "blue" else "red")
    assert fits(said, thing) is right


def test_boxes_are_the_cells_of_the_pocket_convention():
    for cell in CELLS:
        assert CONVENTIONS["pocket"].format(cell_box(cell), (128, 128)) == cell
        assert CONVENTIONS["pocket"].parse(cell, (128, 128)) == [tuple(map(float, cell_box(cell)))]
    for thing, _ in THINGS:
        x1, y1, x2, y2 = thing.box
        assert iou(cell_box(thing.cell), thing.box) == pytest.approx((x2 - x1) * (y2 - y1) / 32**2)


def test_files_hold_what_they_say(tmp_path):
    sizes = {"warmup": 6, "train": 5, "val": 2, "test": 3}
    folder = build_regions(tmp_path / "regions", seed=3, sizes=sizes)
    scenes = scenes_of(folder)
    train, test = read_regions(folder / "train.jsonl"), read_regions(folder / "test.jsonl")
    assert not any("expressions" in row or "category" in row for row in train)
    for row in test:
        scene = scenes[row["image"]]
        assert picks_out(row["expressions"][0], thing_in(row, scene), scene)
    RegionCollator(folder)(train[:4])
    rows = list(read_rows(folder / "warmup.jsonl"))
    kinds = Counter(row["id"].rsplit("-", 1)[1] for row in rows)
    assert (
        kinds["describe"]
        == kinds["locate"]
        == sum(len(s.objects) for p, s in scenes.items() if "/warmup/" in p)
    )
    asked = {row["messages"][0]["content"] for row in rows if row["id"].endswith("locate")}
    annotated = read_regions(folder / "annotated.jsonl")
    assert len(annotated) == kinds["locate"]
    for row in annotated:
        assert picks_out(row["expressions"][0], thing_in(row, scenes[row["image"]]), scenes[row["image"]])
        assert LOCATE.replace("{description}", row["expressions"][0]) in asked
    before = (folder / "test.jsonl").read_bytes()
    build_regions(folder, seed=3, sizes=sizes)
    assert (folder / "test.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="other settings"):
        build_regions(folder, seed=4, sizes=sizes)
