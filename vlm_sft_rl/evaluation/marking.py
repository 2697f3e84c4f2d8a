"""Answers cut into pieces for display: what is right or wrong, and what the verifier thought of it."""

from collections.abc import Sequence
from typing import Any

from ..data.tags import strip_tags
from .metrics.counting import CountMetric
from .report import AnswerView, Piece
from .revisions import split_phrases


def mark_plain(text: str, metric: CountMetric, reference: Any) -> list[Piece]:
    """Pieces of an untagged answer: the stretches the metric judges, and the text between them."""
    pieces, cursor = [], 0
    for start, end, right in metric.marks(text, reference):
        pieces += [Piece(text[cursor:start]), Piece(text[start:end], right)]
        cursor = end
    return [piece for piece in (*pieces, Piece(text[cursor:])) if piece.text]


def mark_tagged(tagged: str, spans: Sequence[dict], metric: CountMetric, reference: Any) -> list[Piece]:
    """Pieces of a tagged answer: each closed phrase with its verdict and its truth, the rest as plain text."""
    pieces, verdicts = [], iter(spans)
    for text, is_phrase in split_phrases(tagged):
        if not is_phrase:
            # spaces at the edges separate the phrases from the text and would be lost by stripping
            pieces += mark_plain(strip_tags(text), metric, reference)
            continue
        span, phrase = next(verdicts), strip_tags(text).strip()
        truth = metric.grade(phrase, reference)
        pieces.append(Piece(phrase, truth, span["p_unconfident"], span["accepted"]))
    return [piece for piece in pieces if piece.text]


def answer_view(system: str, sample: dict, metric: CountMetric, note: str = "") -> AnswerView:
    """A sample as one system's answer in a gallery."""
    reference = metric.reference_of(sample["reference"])
    closed = sum(is_phrase for _, is_phrase in split_phrases(sample["tagged_answer"]))
    if closed and closed == len(sample["spans"]):
        pieces = mark_tagged(sample["tagged_answer"], sample["spans"], metric, reference)
    else:
        pieces = mark_plain(sample["answer"], metric, reference)
    return AnswerView(system, pieces, note or ("" if sample["ok"] else "not fully verified"))
