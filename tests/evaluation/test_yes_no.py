"""Yes/no benchmarks: how answers are read, and the figures of POPE, AMBER, MME and HallusionBench."""

import numpy as np
import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.metrics.yes_no import (
    CATEGORIES,
    AmberDiscriminative,
    HallusionBench,
    Mme,
    MmeHall,
    YesNo,
    parse_amber,
    parse_mme,
    parse_pope,
    parse_yes_no,
)


@pytest.mark.parametrize(
    "answer, pope, ours",
    [
        ("Yes", "yes", "yes"),
        ("No.", "no", "no"),
        ("yes, there is no doubt", "no", "yes"),
        ("No, there is a dog.", "no", "no"),
        ("There is no dog in the image.", "no", "no"),
        ("The answer is yes.", "yes", "yes"),
        ("NO", "yes", "no"),  # the released rule knows only these spellings: No, not, no
        ("I cannot tell.", "yes", None),
        ("I do not know", "no", None),
        ("", "yes", None),
        ("Maybe. No.", "yes", None),
        ("It is yes or no", "no", None),
        ("no\nbut", "yes", "no"),  # the released rule splits at spaces only
        ("eyes know", "yes", None),
        ("**Yes**", "yes", "yes"),
    ],
)
def test_answers_are_read(answer, pope, ours):
    assert parse_pope(answer) == pope and parse_yes_no(answer) == ours


@pytest.mark.parametrize(
    "answer, amber, mme",
    [
        ("Yes", "yes", "yes"),
        ("Yes, it is", "yes", "yes"),
        (" NO ", "no", "no"),
        ("NO.", "no", "no"),
        ("No, there is none", "no", "no"),
        ("No, yes", "yes", "no"),
        ("I say yes", "yes", None),
        ("eyes", "yes", "yes"),  # its first four letters are "eyes"
        ("know", "no", "no"),
        ("Not sure", "no", "no"),
        ("There is nothing", "no", None),
        ("The answer is no", "no", None),
        ("I do not know", "no", None),
        ("His eyes are shut", "yes", None),
        ("Maybe", None, None),
        ("", None, None),
    ],
)
def test_released_readings_of_amber_and_mme(answer, amber, mme):
    assert parse_amber(answer) == amber and parse_mme(answer) == mme


WRAPPED = [
    "<think>There is no dog. Is it not a wolf? Eyes, know.</think>{}",
    "There is no dog, is it not? Eyes.</think>\n{}",
    "<think>no</think>I see it, it is not far. <answer>{}</answer>",
    "<REASONING> no, not yes </REASONING> <CONCLUSION> {} </CONCLUSION>",
    r"It is not clear, but yes and no: $\boxed{{\text{{{}}}}}$",
    "<answer>No</answer> not so: <answer>{}</answer>",
]


@pytest.mark.parametrize("output", WRAPPED)
@pytest.mark.parametrize("parse", [parse_yes_no, parse_pope, parse_amber, parse_mme])
def test_every_rule_reads_the_conclusion(output, parse):
    assert [parse(output.format(said)) for said in ("Yes", "No")] == ["yes", "no"]
    assert parse("<think>no, it is not there") == parse("")  # cut off before it was said


@pytest.mark.parametrize(
    "answer, ours",
    [
        ("There is a cat on it. **Answer:** No", "no"),
        ("No cat at first. But look:\nFinal answer: yes.", "yes"),
        ("A cat lies there. So the answer is yes.", "yes"),
        ("A cat lies there.\n\n## Answer\n\nYes", "yes"),
        ("No. The answer is based on the picture.", "no"),
        ("Yes. Answer: a cat", "yes"),
        ("A cat. Answer: it is a cat, yes", "yes"),
        ("A cat. Answer: yes? no?", "yes"),
    ],
)
def test_a_marked_answer_is_read_by_our_rule(answer, ours):
    assert parse_yes_no(answer) == ours


def slow_scores(answers, truths, parse):
    verdicts = [parse(answer) for answer in answers]
    both = list(zip(verdicts, truths, strict=True))
    tp, fp = both.count(("yes", "yes")), both.count(("yes", "no"))
    positives = truths.count("yes")
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / positives if positives else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "accuracy": sum(a == b for a, b in both) / len(both),
        "precision": precision,
        "recall": recall,
        "yes_ratio": verdicts.count("yes") / len(verdicts),
        "unreadable": verdicts.count(None) / len(verdicts),
    }


@pytest.mark.parametrize("rules, parse", [("ours", parse_yes_no), ("released", parse_pope)])
def test_scores_match_the_textbook(rules, parse):
    generator = np.random.default_rng(0)
    answers = generator.choice(["Yes", "No", "yes.", "I do not know", "hm", "No, none"], 200).tolist()
    truths = generator.choice(["yes", "no"], 200).tolist()
    result = YesNo(rules=rules).compute(predictions=answers, references=truths)
    assert result == pytest.approx(slow_scores(answers, truths, parse))


def test_an_unreadable_answer_is_wrong_and_is_told_apart():
    result = YesNo().compute(predictions=["hm", "hm"], references=["yes", "no"])
    assert result["accuracy"] == 0 and result["unreadable"] == 1 and result["yes_ratio"] == 0
    lenient = YesNo(rules="released").compute(predictions=["hm", "hm"], references=["yes", "no"])
    assert lenient["accuracy"] == 0.5 and lenient["unreadable"] == 0


def test_no_is_the_positive_class_of_amber():
    answers, truths = ["No", "No", "Yes", "Yes", "hm"], ["no", "yes", "no", "yes", "no"]
    result = AmberDiscriminative().compute(predictions=answers, references=truths)
    f1 = 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3)
    expected = {"f1": f1, "accuracy": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "yes_ratio": 2 / 5}
    assert result == pytest.approx(expected | {"unreadable": 1 / 5})


def test_grading_a_phrase():
    metric = YesNo()
    assert [metric.grade(text, "yes") for text in ("Yes", "No", "a dog")] == [True, False, None]


def test_bad_references_and_options():
    with pytest.raises(UserError, match="found True"):
        YesNo().counts(["yes"], [True])
    with pytest.raises(UserError, match="'lenient'"):
        YesNo(rules="lenient")
    with pytest.raises(UserError, match="none of MME's"):
        Mme().check({"answer": "Yes", "category": "sports", "pair": "1"})
    for name, options, message in (
        ("chiar", {}, "Metrics: amber_discriminative, .*yes_no"),
        ("yes_no", {"ruless": "ours"}, "unknown key 'ruless'"),
        ("hallusion_bench", {"rules": "released"}, "unknown key 'rules'"),
        ("chair", {}, "'vocabulary' is missing"),
    ):
        with pytest.raises(UserError, match=message):
            load_metric(name, options)
    assert load_metric("yes_no", {"rules": "released"}).rules == "released"
    assert load_metric("chair", {"vocabulary": ["dog"]}).vocabulary.nouns == {"dog"}


@pytest.fixture
def mme_rows():
    """`(answers, references)`: two questions on each of 12 pictures of five categories."""
    generator = np.random.default_rng(0)
    references = [
        {"answer": answer, "category": CATEGORIES[index % 5], "pair": f"{index}.jpg"}
        for index in range(12)
        for answer in ("yes", "no")
    ]
    return [str(generator.choice(["Yes", "No", "hm"])) for _ in references], references


def test_mme_totals_match_a_slow_computation(mme_rows):
    answers, references = mme_rows
    scores = {}
    for category in CATEGORIES[:5]:
        pictures = {}
        for answer, reference in zip(answers, references, strict=True):
            if reference["category"] == category:
                pictures.setdefault(reference["pair"], []).append(answer.lower() == reference["answer"])
        points = [100 * sum(rights) / 2 + (100 if all(rights) else 0) for rights in pictures.values()]
        scores[category] = sum(points) / len(points)
    result = Mme().compute(predictions=answers, references=references)
    assert result["perception"] == pytest.approx(sum(scores.values())) and result["cognition"] == 0
    hall = MmeHall().compute(predictions=answers, references=references)
    four = sum(scores[name] for name in ("existence", "count", "position", "color"))
    assert hall["hallucination"] == pytest.approx(four)
    assert hall["unreadable"] == pytest.approx(answers.count("hm") / len(answers))


def test_the_unit_of_mme_is_the_picture_whatever_the_order(mme_rows):
    answers, references = mme_rows
    counts = Mme().counts(answers, references)
    assert len(counts) == 12
    order = np.random.default_rng(2).permutation(len(answers))
    again = Mme().counts([answers[i] for i in order], [references[i] for i in order])
    assert again.sum(axis=0) == pytest.approx(counts.sum(axis=0))


def test_hallusion_counts_figures_and_pairs():
    rows = [("yes", "0", "0"), ("no", "0", "1"), ("no", "1", "0"), ("yes", "1", "1")]
    references = [{"answer": a, "set": "VD/x/0", "figure": f, "question_key": q} for a, f, q in rows]
    result = HallusionBench().compute(predictions=["Yes", "No", "Yes", "Yes"], references=references)
    # figure 0 is right as a whole; question 1 is right on both figures
    assert result == {"accuracy": 0.75, "figure_accuracy": 0.5, "pair_accuracy": 0.5, "unreadable": 0.0}
    other_set = [reference | {"set": "VS/y/1"} for reference in references]
    both = HallusionBench().compute(predictions=["Yes"] * 8, references=references + other_set)
    assert both == {"accuracy": 0.5, "figure_accuracy": 0.0, "pair_accuracy": 0.0, "unreadable": 0.0}
