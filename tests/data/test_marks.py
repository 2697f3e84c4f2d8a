from functools import partial

import families
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.marks import (
    IGNORE,
    Example,
    Turn,
    VerificationIds,
    add_hints,
    closing_weight_mark,
    delimiter_marks,
    verification_ids,
    verification_mark,
)
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTConfig, build_kind_collator

OPEN, CONFIDENT, UNCONFIDENT, END = 1, 2, 3, 4
IDS = VerificationIds(OPEN, CONFIDENT, UNCONFIDENT)

words = st.lists(st.integers(5, 9), max_size=3)
spans = st.tuples(words, words, st.sampled_from([CONFIDENT, UNCONFIDENT])).map(
    lambda parts: [*parts[0], OPEN, *parts[1], parts[2]]
)
answers = st.lists(spans, max_size=4).map(lambda pieces: [t for piece in pieces for t in piece] + [END])
# a prompt may quote tags, balanced or not: they are not answers
prompts = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@st.composite
def examples(draw):
    ids, labels, turns = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        prompt, answer = draw(prompts), draw(answers)
        extent = draw(st.sampled_from(["all", "verdicts"]))
        message = {"weight": draw(st.integers(0, 1)), "supervise": extent}
        if draw(st.booleans()):
            message["doubts"] = [
                i / 10 for i, _ in enumerate(t for t in answer if t in (CONFIDENT, UNCONFIDENT))
            ]
        start = len(ids) + len(prompt)
        ids += prompt + answer
        learns = message["weight"] and extent != "verdicts"
        labels += [IGNORE] * len(prompt) + (answer if learns else [IGNORE] * len(answer))
        turns.append(Turn(start, len(ids), message))
    return Example(ids, labels, [float(label != IGNORE) for label in labels], tuple(turns))


def slow_reference(example):
    """For each token by itself: is there loss on it?"""
    labels = []
    for i, token in enumerate(example.input_ids):
        turn = next((t for t in example.turns if t.start <= i < t.end), None)
        if turn is None or not turn.message["weight"]:
            labels.append(IGNORE)
            continue
        closing = token in (CONFIDENT, UNCONFIDENT)
        if turn.message["supervise"] == "verdicts" or closing:
            labels.append(token if closing else IGNORE)
            continue
        before = [t for t in example.input_ids[turn.start : i] if t in (OPEN, CONFIDENT, UNCONFIDENT)]
        after = [t for t in example.input_ids[i + 1 : turn.end] if t in (OPEN, CONFIDENT, UNCONFIDENT)]
        is_tag = token in (OPEN, CONFIDENT, UNCONFIDENT)
        strictly_inside = not is_tag and before[-1:] == [OPEN] and after[:1] == [UNCONFIDENT]
        labels.append(IGNORE if strictly_inside else token)
    return labels


@given(examples())
def test_mask_equals_the_slow_reference(example):
    marked = verification_mark(example, ids=IDS)
    assert marked.labels == slow_reference(example)
    assert marked.weights == [float(label != IGNORE) for label in marked.labels]
    assert list(marked.doubts) == [
        (place, doubt)
        for turn in example.turns
        if turn.message["weight"]
        for place, doubt in zip(
            [i for i in range(turn.start, turn.end) if example.input_ids[i] in (CONFIDENT, UNCONFIDENT)],
            turn.message.get("doubts") or [],
            strict=False,
        )
    ]


def test_doubts_are_those_of_the_phrases():
    ids = [OPEN, 5, CONFIDENT, END]
    turn = Turn(0, 4, {"doubts": [0.1, 0.2]})
    with pytest.raises(RowError, match="2 values, and the answer 1 phrases"):
        verification_mark(Example(ids, ids, [1.0] * 4, (turn,)), ids=IDS)


@given(examples(), st.floats(0.5, 4))
def test_closing_weight(example, weight):
    marked = verification_mark(example, ids=IDS)
    weighted = closing_weight_mark(marked, ids=IDS, weight=weight)
    assert weighted.labels == marked.labels
    for label, factor in zip(weighted.labels, weighted.weights, strict=True):
        assert factor == (0 if label == IGNORE else weight if label in IDS.closing else 1)


@pytest.mark.parametrize(
    "answer",
    [
        [7, UNCONFIDENT],
        [7, CONFIDENT],
        [OPEN, 7],
        [OPEN, 7, OPEN, 8, CONFIDENT],
        [OPEN, 7, CONFIDENT, CONFIDENT],
    ],
)
def test_unpaired_tags_are_refused(answer):
    example = Example(answer, answer, [1.0] * len(answer), (Turn(0, len(answer), {}),))
    with pytest.raises(RowError) as caught:
        verification_mark(example, ids=IDS)
    assert caught.value.kind == "unbalanced tags"


def test_mask_on_real_tokens(chat):
    ids = verification_ids(chat.processor.tokenizer)
    collator = VisionCollator(chat.processor, marks=[partial(verification_mark, ids=ids)])
    answer = "There is <SPAN> a cat </CN> and <SPAN> a blue kettle </UN>"
    talk = [{"role": "user", "content": "Quote </UN> and <SPAN>"}, {"role": "assistant", "content": answer}]
    kept = [t for t in collator.encode({"id": "1", "messages": talk}).labels if t != IGNORE]
    assert "".join(chat.decode(kept).split()) == "Thereis<SPAN>acat</CN>and<SPAN></UN>" + chat.end
    assert ids.unconfident in kept


def test_tokenizer_without_the_tokens():
    tokenizer = families.byte_tokenizer([], bos=None, eos="</s>", pad="<pad>")
    with pytest.raises(RowError, match="model prepare"):
        verification_ids(tokenizer)


# --- Hints ---

GENERAL = {"hint": "A Red Blender", "answer_type": "general_answer"}
HINT = "(Hint: potential incorrect phrases -> a red blender)"


def hinted_row(identity="1", question="What?", **answer):
    answer = {"role": "assistant", "content": "A cat.", **answer}
    return {"id": identity, "messages": [{"role": "user", "content": question}, answer], "images": []}


@pytest.mark.parametrize(
    "question, hinted", [("What?", f"What? {HINT}"), ("What?\n<image>", f"What? {HINT}\n<image>")]
)
def test_hint_goes_before_a_closing_image(question, hinted):
    assert add_hints(hinted_row(question=question, **GENERAL), 1.0)["messages"][0]["content"] == hinted


@pytest.mark.parametrize(
    "answer", [{}, {"hint": "x"}, {"answer_type": "general_answer"}, {"hint": "x", "answer_type": "yes_no"}]
)
def test_only_general_answers_with_a_hint(answer):
    assert add_hints(hinted_row(**answer), 1.0) == hinted_row(**answer)


def test_frequency_and_independence_of_order():
    rows = [hinted_row(str(i), **GENERAL) for i in range(5000)]
    hinted = [r["id"] for r in rows if add_hints(r, 0.2) != r]
    assert 900 < len(hinted) < 1100
    assert sorted(hinted) == sorted(r["id"] for r in reversed(rows) if add_hints(r, 0.2) != r)
    assert hinted != [r["id"] for r in rows if add_hints(r, 0.2, seed=1) != r]


@given(st.text(), st.integers(), st.floats(0, 1))
def test_pure(identity, seed, probability):
    row = hinted_row(identity, **GENERAL)
    assert add_hints(row, probability, seed) == add_hints(row, probability, seed)
    assert row == hinted_row(identity, **GENERAL)


# --- ChatML's delimiters as targets ---

KIND = {"answer_type": "select"}
TALK = {
    "id": "talk",
    "images": [],
    "messages": [
        {"role": "user", "content": "Which?\nSay it."},
        {"role": "assistant", "content": "Two\nlines", **KIND},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes", **KIND},
    ],
}


def released_labels(tokenizer, ids):
    """Turn by turn, as Qwen-VL's released code builds targets: delimiters around ignored prompts and kept answers."""
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    labels, first = [], 0
    for last in (i + 1 for i, token in enumerate(ids) if token == end):  # the newline behind the end
        turn = ids[first : last + 1]
        is_answer = tokenizer.decode(turn[1:]).startswith("assistant")
        header = len(tokenizer.encode("assistant\n", add_special_tokens=False))
        words = turn[1 + header : -2] if is_answer else []
        labels += [start, *[IGNORE] * (len(turn) - 3 - len(words)), *words, *turn[-2:]]
        first = last + 1
    labels[0] = IGNORE  # the shift leaves the first token out
    return labels


def encode_talk(row, folder, **settings):
    _, processor = families.qwen2_5_vl()
    args = MixtureSFTConfig(str(folder), use_cpu=True, **settings)
    return processor.tokenizer, build_kind_collator(processor, args).encode(row)


def test_labels_are_those_of_qwens_released_code(tmp_path):
    tokenizer, plain = encode_talk(TALK, tmp_path)
    _, ours = encode_talk(TALK, tmp_path, label_delimiters=True, kind_weights={"select": 3.0})
    assert ours.labels == released_labels(tokenizer, ours.input_ids)
    assert ours.weights == [3.0 * (label != IGNORE) for label in ours.labels]
    assert sum(label == IGNORE for label in plain.labels) > sum(label == IGNORE for label in ours.labels)
    assert all(label in (IGNORE, other) for label, other in zip(plain.labels, ours.labels, strict=True))


def test_answers_that_are_only_read_stay_so(tmp_path):
    question, first, *rest = TALK["messages"]
    read_first = {**TALK, "messages": [question, first | {"weight": 0}, *rest]}
    _, example = encode_talk(read_first, tmp_path, label_delimiters=True)
    read, taught = example.turns
    assert set(example.labels[read.start : read.end]) == {IGNORE}
    assert example.labels[taught.start : taught.end] == example.input_ids[taught.start : taught.end]
    with pytest.raises(RowError):
        encode_talk({**TALK, "messages": [question, first | {"weight": 0}]}, tmp_path, label_delimiters=True)


def test_other_templates_are_refused():
    _, processor = families.llava()
    with pytest.raises(UserError, match="ChatML"):
        delimiter_marks(processor.tokenizer)
