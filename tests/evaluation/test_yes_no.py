import numpy as np
import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.metrics.yes_no import YesNo, parse_pope, parse_yes_no


@pytest.mark.parametrize(
    "answer, released, strict",
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
def test_parsing(answer, released, strict):
    assert parse_pope(answer) == released
    assert parse_yes_no(answer) == strict


def slow_scores(answers, truths, parse):
    said = [parse(answer) for answer in answers]
    both = list(zip(said, truths, strict=True))
    tp, fp = both.count(("yes", "yes")), both.count(("yes", "no"))
    positives = truths.count("yes")
    precision = tp / (tp + fp) if tp + fp else 0.0
    recall = tp / positives if positives else 0.0
    return {
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "accuracy": sum(a == b for a, b in both) / len(both),
        "precision": precision,
        "recall": recall,
        "yes_ratio": said.count("yes") / len(said),
        "unreadable": said.count(None) / len(said),
    }


@pytest.mark.parametrize("rules, parse", [("ours", parse_yes_no), ("released", parse_pope)])
def test_scores_match_the_textbook(rules, parse):
    generator = np.random.default_rng(0)
    answers = generator.choice(["Yes", "No", "yes.", "I do not know", "hm", "No, none"], 200).tolist()
    truths = generator.choice(["yes", "no"], 200).tolist()
    result = YesNo(rules=rules).compute(predictions=answers, references=truths)
    assert result == pytest.approx(slow_scores(answers, truths, parse))


def test_lost_format_is_wrong_and_is_told_apart():
    result = YesNo().compute(predictions=["hm", "hm"], references=["yes", "no"])
    assert result["accuracy"] == 0 and result["unreadable"] == 1 and result["yes_ratio"] == 0
    lenient = YesNo(rules="released").compute(predictions=["hm", "hm"], references=["yes", "no"])
    assert lenient["accuracy"] == 0.5 and lenient["unreadable"] == 0


def test_bad_reference_and_bad_option():
    with pytest.raises(UserError, match="found True"):
        YesNo().counts(["yes"], [True])
    with pytest.raises(UserError, match="'lenient'"):
        YesNo(rules="lenient")


def test_grading():
    metric = YesNo()
    assert metric.grade("Yes", "yes") is True
    assert metric.grade("No", "yes") is False
    assert metric.grade("a dog", "yes") is None


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("chiar", {}, "Metrics: amber_discriminative, .*yes_no"),
        ("yes_no", {"ruless": "ours"}, "unknown key 'ruless'"),
        ("chair", {}, "'vocabulary' is missing"),
    ],
)
def test_loading_by_name_refuses(name, options, message):
    with pytest.raises(UserError, match=message):
        load_metric(name, options)


def test_loading_by_name():
    assert load_metric("yes_no", {"rules": "released"}).rules == "released"
    assert load_metric("chair", {"vocabulary": ["dog"]}).vocabulary.nouns == {"dog"}
