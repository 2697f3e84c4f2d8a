import io
import random

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from image_rows import picture, row

from vlm_sft_rl.packing.plan import PackedDataset, Size, image_keys, plan_packs


def taken(pack, keys, sizes):
    """What the rows of a pack take when those of one key share."""
    seen, total = set(), 0
    for i in pack:
        total += sizes[i].total - (sizes[i].shared if keys[i] in seen and keys[i] is not None else 0)
        seen.add(keys[i])
    return total


cases = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 4)), st.integers(1, 9), st.integers(0, 9)),
    min_size=1,
    max_size=40,
).map(
    lambda rows: ([k for k, _, _ in rows], [Size(t, min(s, t) if k is not None else 0) for k, t, s in rows])
)


@given(cases, st.integers(1, 20), st.integers(0, 5))
def test_every_row_is_in_one_pack_and_packs_fit(case, capacity, seed):
    keys, sizes = case
    plan = plan_packs(keys, sizes, capacity, seed)
    assert sorted(i for pack in plan for i in pack) == list(range(len(keys)))
    assert plan == plan_packs(keys, sizes, capacity, seed)
    for pack in plan:
        assert taken(pack, keys, sizes) <= capacity or len(pack) == 1


def test_rows_of_one_image_stay_together_and_packs_are_full():
    keys = [i // 4 for i in range(400)]
    plan = plan_packs(keys, [Size(1)] * 400, 8, seed=3)
    assert len(plan) == 50 and all(len({keys[i] for i in pack}) == 2 for pack in plan)
    assert plan != plan_packs(keys, [Size(1)] * 400, 8, seed=4)


def test_an_image_with_too_many_rows_goes_to_several_packs():
    sizes = [Size(10, 6)] * 7
    plan = plan_packs(["x"] * 7, sizes, 18, seed=0)
    assert sorted(map(len, plan)) == [1, 3, 3]  # 10 + 4 + 4


def test_little_capacity_is_left_over():
    draw = random.Random(0)
    sizes = [Size(round(draw.lognormvariate(5, 1))) for _ in range(3000)]
    plan = plan_packs([None] * len(sizes), sizes, 4096)
    assert sum(s.total for s in sizes) / (4096 * len(plan)) > 0.97


def test_a_pack_is_an_item():
    packs = PackedDataset(["a", "b", "c"], [[2, 0], [1]])
    assert len(packs) == 2 and packs[0] == {"rows": ["c", "a"]} and packs[1] == {"rows": ["b"]}


def encoded(number):
    data = io.BytesIO()
    picture(number).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": "image.png"}


@pytest.mark.parametrize("column", ["images", "image"])
@pytest.mark.parametrize("kind", ["paths", "pictures", "encoded"])
def test_keys_tell_images_apart_however_they_are_stored(column, kind):
    make = {"paths": lambda n: f"{n}.png", "pictures": picture, "encoded": encoded}[kind]
    numbers = [[0], [1], [0], [0, 1], []]
    if column == "image":
        numbers = [[0], [1], [0]]
    values = [[make(n) for n in row] if column == "images" else make(row[0]) for row in numbers]
    rows = [{"id": str(i), column: value, "question": "q", "answer": "a"} for i, value in enumerate(values)]
    expected = [(0, 0), (1, 1), (2, 0), (3, 3), (4, None)][: len(numbers)]
    for dataset in (rows, Dataset.from_list(rows)):
        keys = image_keys(dataset)
        for i, same in expected:
            assert keys[i] is None if same is None else keys[i] == keys[same]
        assert len(set(keys)) == len(set(map(tuple, numbers)))


def test_images_inside_of_messages_count():
    part = {"type": "image", "image": "a.png"}
    inside = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]}
    assert image_keys([inside, row("q", "a")]) == [("a.png",), None]
