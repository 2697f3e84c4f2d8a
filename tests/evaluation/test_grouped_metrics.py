"""Metrics whose unit is a group of questions: MME, HallusionBench, circular multiple choice."""

import numpy as np
import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.answers import AnswerAccuracy
from vlm_sft_rl.evaluation.metrics.yes_no import CATEGORIES, HallusionBench, Mme, MmeHall, parse_mme


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("no", "no"),
        (" NO ", "no"),
        ("Yes, it is", "yes"),
        ("No, there is none", "no"),
        ("I say yes", None),
        ("eyes", "yes"),  # its first four letters are "eyes"
        ("know", "no"),
        ("Not sure", "no"),
        ("The answer is no", None),
        ("", None),
    ],
)
def test_mme_reads_four_letters(answer, said):
    assert parse_mme(answer) == said


def mme_rows(generator, pictures=12):
    rows = []
    for index in range(pictures):
        category = CATEGORIES[index % 5]
        for answer in ("yes", "no"):
            said = generator.choice(["Yes", "No", "hm"])
            rows.append((said, {"answer": answer, "category": category, "pair": f"{index}.jpg"}))
    return rows


def slow_mme(rows):
    scores = {}
    for category in CATEGORIES:
        pictures = {}
        for said, reference in rows:
            if reference["category"] == category:
                pictures.setdefault(reference["pair"], []).append(said.lower() == reference["answer"])
        if pictures:
            per = [100 * sum(v) / 2 + (100 if all(v) else 0) for v in pictures.values()]
            scores[category] = sum(per) / len(per)
    return scores


def test_mme_totals_match_a_slow_computation():
    rows = mme_rows(np.random.default_rng(0))
    result = Mme().compute(predictions=[r[0] for r in rows], references=[r[1] for r in rows])
    scores = slow_mme(rows)
    assert result["perception"] == pytest.approx(sum(scores.values())) and result["cognition"] == 0
    hall = MmeHall().compute(predictions=[r[0] for r in rows], references=[r[1] for r in rows])
    four = sum(scores[name] for name in ("existence", "count", "position", "color"))
    assert hall["hallucination"] == pytest.approx(four)
    assert hall["unreadable"] == pytest.approx(sum(r[0] == "hm" for r in rows) / len(rows))


def test_the_unit_of_mme_is_the_picture_whatever_the_order():
    rows = mme_rows(np.random.default_rng(1))
    metric = Mme()
    counts = metric.counts([r[0] for r in rows], [r[1] for r in rows])
    assert len(counts) == 12
    shuffled = [rows[i] for i in np.random.default_rng(2).permutation(len(rows))]
    again = metric.counts([r[0] for r in shuffled], [r[1] for r in shuffled])
    assert again.sum(axis=0) == pytest.approx(counts.sum(axis=0))
    with pytest.raises(UserError, match="none of MME's"):
        metric.check({"answer": "Yes", "category": "sports", "pair": "1"})


def test_hallusion_counts_figures_and_pairs():
    def reference(answer, figure, question):
        return {"answer": answer, "set": "VD/x/0", "figure": figure, "question_key": question}

    references = [
        reference("yes", "0", "0"),
        reference("no", "0", "1"),
        reference("no", "1", "0"),
        reference("yes", "1", "1"),
    ]
    result = HallusionBench().compute(predictions=["Yes", "No", "Yes", "Yes"], references=references)
    # figure 0 is right as a whole; question 1 is right on both figures
    assert result == {"accuracy": 0.75, "figure_accuracy": 0.5, "pair_accuracy": 0.5, "unreadable": 0.0}
    other = [r | {"set": "VS/y/1"} for r in references]
    both = HallusionBench().compute(predictions=["Yes"] * 8, references=references + other)
    assert both["figure_accuracy"] == 0.0 and both["pair_accuracy"] == 0.0 and both["accuracy"] == 0.5


def circle(index, answer):
    return {"answer": answer, "choices": ["one", "two"], "circle": index}


def test_circular_questions_are_right_when_all_rotations_are():
    metric = AnswerAccuracy("choice", circular=True)
    references = [circle("1", "A"), circle("1", "B"), circle("2", "A"), circle("2", "B"), circle("3", "B")]
    answers = ["A", "B", "A", "A", "dunno what this long text means at all"]
    counts = metric.counts(answers, references)
    values = {name: i.value for name, i in metric.intervals(counts, 10).items()}
    assert len(counts) == 3 and values["accuracy"] == pytest.approx(1 / 3)
    assert values["unreadable"] == pytest.approx(1 / 5)
    plain = AnswerAccuracy("choice").counts(answers, references)
    assert len(plain) == 5 and plain[:, 0].sum() == 3
    with pytest.raises(UserError, match="'circle' is missing"):
        metric.check({"answer": "A", "choices": ["one", "two"], "circle": None})


@pytest.mark.parametrize(
    "grader, mode, answer, question, right",
    [
        ("exact", "ours", "A woman.", {"answer": "woman"}, True),
        ("exact", "ours", "Answer: the Woman", {"answer": "woman"}, True),
        ("exact", "ours", "women", {"answer": "woman"}, False),
        ("exact", "released", "A woman.", {"answer": "woman"}, False),
        ("exact", "released", "Woman.", {"answer": "woman"}, True),
        ("mathvista", "ours", "Answer: 1.249", {"answer": "1.2", "precision": "1.0"}, True),
        ("mathvista", "ours", "Answer: 1.26", {"answer": "1.2", "precision": "1.0"}, False),
        ("mathvista", "ours", "Answer: 1.249", {"answer": "1.2"}, False),
        ("mathvista", "ours", "Answer: 12 cm", {"answer": "12", "unit": "cm"}, True),
        ("mathvista", "ours", "Answer: B", {"answer": "B", "choices": ["x", "y"]}, True),
        ("mathvista", "ours", "Answer: Cubism", {"answer": "cubism"}, True),
    ],
)
def test_graders_of_short_answers(grader, mode, answer, question, right):
    metric = AnswerAccuracy(grader, mode)
    reference = metric.reference_of(question)
    counts = metric.per_sample([answer], [reference])[0]
    assert bool(counts[0]) is right and metric.verdict(counts) == ("right" if right else "wrong")


def test_unreadable_answers_are_wrong_and_told_apart():
    metric = AnswerAccuracy("mathvista")
    counts = metric.per_sample(["I think about it for a very long time."], [{"answer": "4"}])[0]
    assert metric.verdict(counts) == "unreadable" and counts[0] == 0
