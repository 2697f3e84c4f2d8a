import families
import pytest

from vlm_sft_rl.data.marks import IGNORE, delimiter_marks
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTConfig, build_kind_collator

ROW = {
    "id": "talk",
    "images": [],
    "messages": [
        {"role": "user", "content": "Which?\nSay it."},
        {"role": "assistant", "content": "Two\nlines", "answer_type": "select"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes", "answer_type": "select"},
    ],
}


def released_labels(tokenizer, ids):
    """Turn by turn, as Qwen-VL's released code builds targets: delimiters around ignored prompts and kept answers."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    labels, first = [], 0
    for last in (i + 1 for i, token in enumerate(ids) if token == end):  # the newline behind the end
        turn = ids[first : last + 1]
        head = tokenizer.decode(turn[1:]).startswith("assistant")
        header = len(tokenizer.encode("assistant\n", add_special_tokens=False))
        said = turn[1 + header : -2] if head else []
        labels += [start, *[IGNORE] * (len(turn) - 3 - len(said)), *said, *turn[-2:]]
        first = last + 1
    labels[0] = IGNORE  # the shift leaves the first token out
    return labels


def test_labels_are_those_of_qwens_released_code(tmp_path):
    _, processor = families.qwen2_5_vl()
    plain = build_kind_collator(processor, MixtureSFTConfig(str(tmp_path), use_cpu=True)).encode(ROW)
    settings = {"label_delimiters": True, "kind_weights": {"select": 3.0}}
    ours = build_kind_collator(processor, MixtureSFTConfig(str(tmp_path), use_cpu=True, **settings)).encode(
        ROW
    )
    assert ours.labels == released_labels(processor.tokenizer, ours.input_ids)
    assert ours.weights == [3.0 * (label != IGNORE) for label in ours.labels]
    assert [label for label in plain.labels if label != IGNORE] != [
        label for label in ours.labels if label != IGNORE
    ]
    assert all(one in (IGNORE, other) for one, other in zip(plain.labels, ours.labels, strict=True))


def test_answers_that_are_only_read_stay_so(tmp_path):
    _, processor = families.qwen2_5_vl()
    collator = build_kind_collator(
        processor, MixtureSFTConfig(str(tmp_path), use_cpu=True, label_delimiters=True)
    )
    first, *rest = ROW["messages"][1:]
    row = ROW | {"messages": [ROW["messages"][0], first | {"weight": 0}, *rest]}
    example = collator.encode(row)
    read, taught = example.turns
    assert set(example.labels[read.start : read.end]) == {IGNORE}
    assert example.labels[taught.start : taught.end] == example.input_ids[taught.start : taught.end]
    silent = ROW | {"messages": [ROW["messages"][0], first | {"weight": 0}]}
    with pytest.raises(RowError):
        collator.encode(silent)


def test_other_templates_are_refused():
    _, processor = families.llava()
    with pytest.raises(UserError, match="ChatML"):
        delimiter_marks(processor.tokenizer)
