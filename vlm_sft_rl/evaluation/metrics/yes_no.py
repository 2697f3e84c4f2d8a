"""Questions answered with yes or no: POPE (arXiv 2305.10355), AMBER's, MME's and HallusionBench's."""

import re
from collections.abc import Callable, Sequence

import datasets
import numpy as np

from ...data.conclusions import conclusion
from ...errors import UserError
from ...graders.grade import check_rules
from ...graders.text import marked_answer
from ..bootstrap import ratio, statistics_of
from .counting import TEXT, AnswerMetric


def parse_yes_no(answer: str) -> str | None:
    """Our rule for an answer's conclusion: `"yes"`, `"no"`, or None where it says neither or both.

    The word behind the last "Answer:" or "the answer is" decides where it is a yes or no; else the first word of all does;
    else the first sentence must contain exactly one of the two as a word, or the marked line must.
    """
    text = conclusion(answer).text
    marked, words = _words(marked_answer(text) or ""), _words(text)
    for first in (marked[:1], words[:1]):
        if first in (["yes"], ["no"]):
            return first[0]
    for verdicts in ({"yes", "no"}.intersection(words), {"yes", "no"}.intersection(marked)):
        if len(verdicts) == 1:
            return verdicts.pop()
    return None


def _words(text: str) -> list[str]:
    """The words of the first sentence, in lower case."""
    return re.findall(r"[^\W_]+", re.split(r"[.!?\n]", text.strip(), maxsplit=1)[0].lower())


# The released rules. They read the conclusion of an answer, because the released programs know no thinking and no wrappers.


def parse_pope(answer: str) -> str:
    """The released evaluators' rule for POPE: everything that does not say no is a yes, also an empty answer or a refusal.

    Looks at the text before the first full stop, without commas, split at single spaces; `No`, `not` and `no` make a
    no, in exactly this spelling.
    """
    words = conclusion(answer).text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"}.intersection(words) else "yes"


def parse_amber(answer: str) -> str | None:
    """AMBER's released rule: lower-cased text that contains "yes" says yes, else text that contains "no" says no.

    Substrings count: "eyes" says yes, "know" and "not" say no.
    """
    text = conclusion(answer).text.lower()
    return next((word for word in ("yes", "no") if word in text), None)


def parse_mme(answer: str) -> str | None:
    """MME's released rule: the whole answer, else its first four characters, lower-cased; "yes" is looked for first."""
    text = conclusion(answer).text.strip().lower()
    return text if text in ("yes", "no") else next((word for word in ("yes", "no") if word in text[:4]), None)


class YesNoMetric(AnswerMetric):
    """Base: answers read as yes or no, by our rule or by `released`, against a truth that is either.

    Args:
        rules: `"ours"`, or `"released"` for the reading of the published evaluations. The votes of decoders and the marks
            of pages are always by our rule.
    """

    parse_released: Callable[[str], str | None] = staticmethod(parse_pope)
    sample_columns = ("right", "unreadable")

    def __init__(self, rules: str = "ours", **kwargs):
        super().__init__(**kwargs)
        self.rules = check_rules(rules, "metric_options")

    def parse(self, answer: str) -> str | None:
        return self.parse_released(answer) if self.rules == "released" else parse_yes_no(answer)

    def truth(self, reference: str | dict) -> str:
        """Raises UserError: the truth is neither yes nor no."""
        answer = reference["answer"] if isinstance(reference, dict) else reference
        truth = answer.strip().lower() if isinstance(answer, str) else answer
        if truth not in ("yes", "no"):
            raise UserError(
                f'expected "yes" or "no", found {answer!r} (YAML reads a bare yes as true: quote it).'
            )
        return truth

    def sample_counts(self, prediction: str, reference: str | dict) -> tuple[int, ...]:
        truth, answer = self.truth(reference), self.parse(prediction)
        return int(answer == truth), int(answer is None)

    def read(self, answer: str, reference: str | dict) -> str | None:
        return parse_yes_no(answer)

    def grade(self, phrase: str, reference: str | dict) -> bool | None:
        answer = parse_yes_no(phrase)
        return None if answer is None else answer == self.truth(reference)

    def marks(self, answer: str, reference: str | dict) -> list[tuple[int, int, bool]]:
        right = self.grade(answer, reference)
        return [] if right is None else [(0, len(answer), right)]


# the column of an answer and its truth
_CELLS = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), (None, "yes"), (None, "no")]


def _answers(t) -> np.ndarray:
    return t.true_yes + t.false_yes + t.false_no + t.true_no + t.unreadable_yes + t.unreadable_no


class YesNo(YesNoMetric):
    """Yes/no questions (POPE, arXiv 2305.10355), all as fractions.

    `f1`, `accuracy`, `precision`, `recall` (yes positive), `yes_ratio`, `unreadable`.

    `predictions` are free text, `references` `"yes"` or `"no"`. An answer that says neither is wrong, and is also
    reported apart as `unreadable`: a model that lost the answer format is not a model that cannot see.

    With `rules: released` everything that is not a no is a yes (`parse_pope`), so `unreadable` is always 0. POPE's own
    figure for everything is the mean of its three categories; the summary has it beside that of all questions.
    """

    averages_categories = True

    columns = ("true_yes", "false_yes", "false_no", "true_no", "unreadable_yes", "unreadable_no")
    sample_columns = columns
    # yes is the positive class; an unreadable answer to a yes question is a miss
    statistics = statistics_of(
        columns,
        f1=lambda t: ratio(2 * t.true_yes, 2 * t.true_yes + t.false_yes + t.false_no + t.unreadable_yes),
        accuracy=lambda t: ratio(t.true_yes + t.true_no, _answers(t)),
        precision=lambda t: ratio(t.true_yes, t.true_yes + t.false_yes),
        recall=lambda t: ratio(t.true_yes, t.true_yes + t.false_no + t.unreadable_yes),
        yes_ratio=lambda t: ratio(t.true_yes + t.false_yes, _answers(t)),
        unreadable=lambda t: ratio(t.unreadable_yes + t.unreadable_no, _answers(t)),
    )
    reference_fields = datasets.Features(answer=TEXT)

    def sample_counts(self, prediction: str, reference: str) -> tuple[int, ...]:
        truth, answer = self.truth(reference), self.parse(prediction)
        counts = [0] * len(self.columns)
        counts[_CELLS.index((answer, truth))] = 1
        return tuple(counts)

    def outcome(self, counts: np.ndarray) -> tuple[float, float]:
        return counts[0] + counts[3], counts[4] + counts[5]


class AmberDiscriminative(YesNo):
    """AMBER's yes/no questions (arXiv 2311.07397). The positive class is "no": a hallucination is a wrong yes.

    `f1`, `precision`, `recall` of no, `accuracy`, `yes_ratio`, `unreadable`. With `rules: released` answers are
    read by `parse_amber`; those it cannot read are wrong, as by our rules.
    """

    averages_categories = False
    parse_released = staticmethod(parse_amber)
    # F1 is 2PR / (P + R); the released 1e-6 in the denominator does not reach a printed digit
    statistics = YesNo.statistics | statistics_of(
        YesNo.columns,
        f1=lambda t: ratio(2 * t.true_no, 2 * t.true_no + t.false_yes + t.false_no + t.unreadable_no),
        precision=lambda t: ratio(t.true_no, t.true_no + t.false_no),
        recall=lambda t: ratio(t.true_no, t.true_no + t.false_yes + t.unreadable_no),
    )


HALLUCINATION = ("existence", "count", "position", "color")
PERCEPTION = (*HALLUCINATION, "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = (*PERCEPTION, *COGNITION)


def _points(names: Sequence[str]) -> Callable[[np.ndarray], np.ndarray]:
    """The sum over categories of the mean score of a picture."""
    scores = [CATEGORIES.index(name) for name in names]
    pictures = [len(CATEGORIES) + index for index in scores]
    return lambda totals: ratio(totals[..., scores], totals[..., pictures]).sum(axis=-1)


class Mme(YesNoMetric):
    """MME (arXiv 2306.13394, section 2.3), in its points.

    `perception` (up to 2000 points) and `cognition` (up to 800), `accuracy`, `accuracy_plus`, `unreadable`.

    A picture scores 100 * (share of its questions right + 1 if all are right); a category is the mean over its
    pictures, at most 200; a total is the sum over its categories. The unit of the bootstrap is the picture, drawn from
    all categories together (the released one draws in each category by itself, unseeded, and prints the mean of
    the draws). A picture whose questions are cut apart by `--limit` is scored on those that are left.

    `references` are `{"answer", "category", "pair"}`; `pair` names the picture within its category. With
    `rules: released` answers are read by their first four characters (`parse_mme`).
    """

    parse_released = staticmethod(parse_mme)
    columns = (
        *(f"score_{name}" for name in CATEGORIES),
        *(f"pictures_{name}" for name in CATEGORIES),
        *("right", "questions", "pictures_right", "pictures", "unreadable"),
    )
    _shares = statistics_of(
        columns,
        accuracy=lambda t: ratio(t.right, t.questions),
        accuracy_plus=lambda t: ratio(t.pictures_right, t.pictures),
        unreadable=lambda t: ratio(t.unreadable, t.questions),
    )
    statistics = {"perception": _points(PERCEPTION), "cognition": _points(COGNITION)} | _shares
    not_fractions = frozenset({"perception", "cognition", "hallucination"})
    reference_fields = datasets.Features(answer=TEXT, category=TEXT, pair=TEXT)

    def check(self, reference: dict) -> None:
        if reference["category"] not in CATEGORIES:
            raise UserError(f"category {reference['category']!r} is none of MME's: {', '.join(CATEGORIES)}.")
        super().check(reference)

    def group_of(self, reference: dict) -> tuple[str, str]:
        return reference["category"], reference["pair"]

    def group_counts(self, rows: np.ndarray, references: Sequence[dict]) -> list[float]:
        right, questions, category = float(rows[:, 0].sum()), len(rows), references[0]["category"]
        picture = {
            f"score_{category}": 100 * (right / questions + (right == questions)),
            f"pictures_{category}": 1,
            "right": right,
            "questions": questions,
            "pictures_right": right == questions,
            "pictures": 1,
            "unreadable": float(rows[:, 1].sum()),
        }
        return list((dict.fromkeys(self.columns, 0.0) | picture).values())


class MmeHall(Mme):
    """As `Mme`, for its four categories on hallucination (arXiv 2504.13169): existence, count, position, color.

    `hallucination` is their sum, at most 800 points.
    """

    statistics = {"hallucination": _points(HALLUCINATION)} | Mme._shares


class HallusionBench(YesNoMetric):
    """HallusionBench (arXiv 2310.14566), as fractions.

    `accuracy` (per question, aAcc), `figure_accuracy` (all questions on a figure, fAcc), `pair_accuracy` (one
    question right on every version of its figure, qAcc), `unreadable`.

    Answers are read as yes or no without a judge; the owners let GPT-4 compare answers with the truth, which this does
    not imitate. The unit of the bootstrap is a set: a figure with its altered versions and all questions on them.

    `predictions` are free text, `references` are `{"answer", "set", "figure", "question_key"}`.
    """

    columns = ("right", "questions", "figures_right", "figures", "pairs_right", "pairs", "unreadable")
    statistics = statistics_of(
        columns,
        accuracy=lambda t: ratio(t.right, t.questions),
        figure_accuracy=lambda t: ratio(t.figures_right, t.figures),
        pair_accuracy=lambda t: ratio(t.pairs_right, t.pairs),
        unreadable=lambda t: ratio(t.unreadable, t.questions),
    )
    reference_fields = datasets.Features(answer=TEXT, set=TEXT, figure=TEXT, question_key=TEXT)

    def __init__(self, **kwargs):  # there are no released rules
        super().__init__(**kwargs)

    def group_of(self, reference: dict) -> str:
        return reference["set"]

    def group_counts(self, rows: np.ndarray, references: Sequence[dict]) -> list[float]:
        counts = [float(rows[:, 0].sum()), len(rows)]
        for field in ("figure", "question_key"):
            all_right: dict[str, bool] = {}
            for row, reference in zip(rows, references, strict=True):
                all_right[reference[field]] = all_right.get(reference[field], True) and bool(row[0])
            counts += [sum(all_right.values()), len(all_right)]
        return [*counts, float(rows[:, 1].sum())]
