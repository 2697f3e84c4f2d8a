import families
import pytest
from datasets import Dataset
from image_rows import mixed_rows, picture, tagged_rows

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.errors import RowError
from vlm_sft_rl.packing.plan import TokenCounter, count_tokens

NAMES = ["llava", "llava_next", "qwen2_5_vl", "idefics3"]


@pytest.mark.parametrize("family", NAMES)
def test_counts_are_the_collators(family):
    _, processor = getattr(families, family)()
    collator = VisionCollator(processor)
    counter = TokenCounter(collator)
    images = set(processor.image_token_ids)
    for one in mixed_rows():
        ids = collator.encode(one).input_ids
        last = max((i + 1 for i, token in enumerate(ids) if token in images), default=0)
        size = counter(one)
        assert size.total == len(ids)
        # what the processor writes around an image (a closing token) may still belong to it
        assert last <= size.shared <= last + 2 if one["images"] else size.shared == 0


def test_hints_count_too_and_images_stay_closed(tmp_path, monkeypatch):
    _, processor = families.llava()
    picture(0).save(tmp_path / "0.png")
    hinted = {
        "id": "h",
        "messages": [
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A", "hint": "a dog", "answer_type": "general_answer"},
        ],
        "images": ["0.png"],
    }
    collator = VisionCollator(processor, tmp_path, hint_probability=1.0)
    wanted = len(collator.encode(hinted).input_ids)
    monkeypatch.setattr("vlm_sft_rl.data.collators.open_image", None)
    assert TokenCounter(collator)(hinted).total == wanted
    assert wanted > len(processor.tokenizer("What?").input_ids) + 40


def test_bad_rows_are_errors_or_left_to_the_collator(tmp_path):
    _, processor = families.llava()
    gone = {"id": "gone", "question": "q", "answer": "a", "images": ["gone.png"]}
    with pytest.raises(RowError, match=r"gone\.png"):
        TokenCounter(VisionCollator(processor, tmp_path))(gone)
    skipping = VisionCollator(processor, tmp_path, rejects_path=tmp_path / "r.jsonl")
    assert TokenCounter(skipping)(gone).total == 1


def test_counting_a_dataset_in_parallel_gives_the_same(tmp_path):
    _, processor = families.qwen2_5_vl()
    rows = tagged_rows(2, 4)
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    rows = [{**one, "images": [f"{one['id'][0]}.png"]} for one in rows]
    collator = VisionCollator(processor, tmp_path)
    alone = count_tokens(rows, TokenCounter(collator))
    Dataset.from_list(rows).save_to_disk(tmp_path / "set")
    stored = Dataset.load_from_disk(tmp_path / "set")
    assert count_tokens(stored, TokenCounter(collator), processes=2) == alone
    assert count_tokens(stored, TokenCounter(collator)) == alone
    other = TokenCounter(VisionCollator(processor, tmp_path, hint_probability=0.5))
    assert other.fingerprint("x") != TokenCounter(collator).fingerprint("x")
