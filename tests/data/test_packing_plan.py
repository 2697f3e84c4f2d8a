"""Which rows share a pack, and how many tokens a row takes."""

import io
import os
import random

import families
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from image_rows import mixed_rows, picture, row, tagged_rows

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import RowError
from vlm_sft_rl.packing.plan import PackedDataset, Size, TokenCounter, count_tokens, image_keys, plan_packs


def taken(pack, keys, sizes):
    """What the rows of a pack take when those of one key share."""
    seen, total = set(), 0
    for i in pack:
        total += sizes[i].total - (sizes[i].shared if keys[i] in seen and keys[i] is not None else 0)
        seen.add(keys[i])
    return total


rows_of_a_case = st.lists(
    st.tuples(st.one_of(st.none(), st.integers(0, 4)), st.integers(1, 9), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


@given(rows_of_a_case, st.integers(1, 20), st.integers(0, 5))
def test_every_row_is_in_one_pack_and_packs_fit(rows, capacity, seed):
    keys = [key for key, _, _ in rows]
    sizes = [Size(total, 0 if key is None else min(shared, total)) for key, total, shared in rows]
    plan = plan_packs(keys, sizes, capacity, seed)
    assert sorted(i for pack in plan for i in pack) == list(range(len(keys)))
    assert plan == plan_packs(keys, sizes, capacity, seed)
    assert all(taken(pack, keys, sizes) <= capacity or len(pack) == 1 for pack in plan)


def test_rows_of_one_image_stay_together_and_packs_are_full():
    keys = [i // 4 for i in range(400)]
    plan = plan_packs(keys, [Size(1)] * 400, 8, seed=3)
    assert len(plan) == 50 and all(len({keys[i] for i in pack}) == 2 for pack in plan)
    assert plan != plan_packs(keys, [Size(1)] * 400, 8, seed=4)


def test_an_image_with_too_many_rows_goes_to_several_packs():
    plan = plan_packs(["x"] * 7, [Size(10, 6)] * 7, 18, seed=0)
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
@pytest.mark.parametrize(
    "make", [lambda n: f"{n}.png", picture, encoded], ids=["paths", "pictures", "encoded"]
)
def test_keys_tell_images_apart_however_they_are_stored(column, make):
    numbers = [[0], [1], [0], [0, 1], []] if column == "images" else [[0], [1], [0]]
    values = [[make(n) for n in row] if column == "images" else make(row[0]) for row in numbers]
    rows = [{"id": str(i), column: value, "question": "q", "answer": "a"} for i, value in enumerate(values)]
    for dataset in (rows, Dataset.from_list(rows)):
        keys = image_keys(dataset)
        assert [key is None for key in keys] == [not row for row in numbers]
        same = [[one == other for other in numbers] for one in numbers]
        assert [[one == other for other in keys] for one in keys] == same


def test_images_inside_of_messages_count():
    part = {"type": "image", "image": "a.png"}
    inside = {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "x"}]}
    assert image_keys([inside, row("q", "a")]) == [("a.png",), None]


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_counts_are_the_collators(family):
    _, processor = getattr(families, family)()
    collator = VisionCollator(processor)
    counter, images = TokenCounter(collator), set(processor.image_token_ids)
    for one in mixed_rows():
        ids, size = collator.encode(one).input_ids, counter(one)
        last = max((i + 1 for i, token in enumerate(ids) if token in images), default=0)
        assert size.total == len(ids)
        # what the processor writes around an image (a closing token) may still belong to it
        assert last <= size.shared <= last + 2 if one["images"] else size.shared == 0


def test_hints_count_too_and_images_stay_closed(tmp_path, monkeypatch):
    _, processor = families.llava()
    picture(0).save(tmp_path / "0.png")
    hinted = row("What?", "A", hint="a dog", answer_type="general_answer") | {"images": ["0.png"]}
    collator = VisionCollator(processor, tmp_path, hint_probability=1.0)
    expected = len(collator.encode(hinted).input_ids)
    monkeypatch.setattr("vlm_sft_rl.data.collators.open_image", None)
    assert TokenCounter(collator)(hinted).total == expected
    assert expected > len(processor.tokenizer("What?").input_ids) + 40


def test_bad_rows_are_errors_or_left_to_the_collator(tmp_path):
    _, processor = families.llava()
    gone = {"id": "gone", "question": "q", "answer": "a", "images": ["gone.png"]}
    with pytest.raises(RowError, match=r"gone\.png"):
        TokenCounter(VisionCollator(processor, tmp_path))(gone)
    skipping = VisionCollator(processor, tmp_path, rejects_path=tmp_path / "r.jsonl")
    assert TokenCounter(skipping)(gone).total == 1


def test_counting_a_dataset_in_parallel_gives_the_same(tmp_path):
    _, processor = families.qwen2_5_vl()
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{**one, "images": [f"{one['id'][0]}.png"]} for one in tagged_rows(2, 4)]
    counter = TokenCounter(VisionCollator(processor, tmp_path))
    alone = count_tokens(rows, counter)
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    stored = Dataset.load_from_disk(tmp_path / "set")
    environment, before = os.environ, dict(os.environ)
    assert count_tokens(stored, counter, processes=2) == alone == count_tokens(stored, counter)
    assert os.environ is environment and dict(environment) == before
    other = TokenCounter(VisionCollator(processor, tmp_path, hint_probability=0.5))
    assert other.fingerprint("x") != counter.fingerprint("x")
