from functools import partial

import pytest
import templates
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.marks import (
    IGNORE,
    Example,
    Turn,
    VerificationIds,
    closing_weight_mark,
    verification_ids,
    verification_mark,
)
from vlm_sft_rl.errors import RowError

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
        message = {"weight": draw(st.integers(0, 1)), "supervise": draw(st.sampled_from(["all", "verdicts"]))}
        start = len(ids) + len(prompt)
        ids += prompt + answer
        learns = message["weight"] and message["supervise"] == "all"
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
        if turn.message["supervise"] == "verdicts":
            labels.append(token if token in (CONFIDENT, UNCONFIDENT) else IGNORE)
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
    assert marked.input_ids == example.input_ids


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


@pytest.mark.parametrize("kind", ["bytes", "bpe", "metaspace"])
@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_mask_on_real_tokens(template, kind):
    processor = templates.processor(template, kind)
    tokenizer = processor.tokenizer
    collator = VisionCollator(processor, marks=[partial(verification_mark, ids=verification_ids(tokenizer))])
    answer = "There is <SPAN> a cat </CN> and <SPAN> a blue kettle </UN>"
    question = "Quote </UN> and <SPAN>"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    example = collator.encode({"id": "1", "messages": messages})
    kept = [t for t in example.labels if t != IGNORE]
    text = "".join(tokenizer.decode(kept, clean_up_tokenization_spaces=False).split())
    assert text == "Thereis<SPAN>acat</CN>and<SPAN></UN>" + templates.END_OF_TURN[template]
    assert verification_ids(tokenizer).unconfident in kept


def test_tokenizer_without_the_tokens():
    tokenizer = templates.families.byte_tokenizer([], bos=None, eos="</s>", pad="<pad>")
    with pytest.raises(RowError, match="model prepare"):
        verification_ids(tokenizer)
