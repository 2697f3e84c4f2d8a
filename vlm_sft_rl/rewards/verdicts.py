"""Verdicts as credit: an answer closes its phrases by `</CN>` or `</UN>`, and each of these verdicts is right or wrong.

Phrases are read from token ids, so that it is known which tokens a wrong phrase is made of. The column that rewards read is
`row`: each question's own row as JSON text.
"""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from .regions import Reward, text_of

# (phrase, question row) of several answers -> for each whether the phrase is true; None: it cannot be said
Judge = Callable[[Sequence[tuple[str, dict]]], Sequence[bool | None]]


class Tags(Protocol):
    """What finds the closed phrases in token ids, as `data.marks.VerificationIds` does."""

    def phrases(self, tokens: Sequence[int]) -> Sequence[tuple[int, int, bool]]:
        """`(start, end, confident)` of each."""


@dataclass(frozen=True)
class TaggedPhrase:
    """A phrase that an answer closed.

    Attributes:
        start, end: its tokens `[start, end)` in the answer, without the tags.
        confident: closed by `</CN>`.
        true: whether what it says is there; None: nobody could say.
    """

    text: str
    start: int
    end: int
    confident: bool
    true: bool | None = None

    @property
    def is_right(self) -> bool | None:
        """Whether its verdict is right; None where nobody could say."""
        return None if self.true is None else self.confident == self.true


def tagged_phrases(
    ids: Sequence[int], tags: Tags, decode: Callable[[Sequence[int]], str]
) -> list[TaggedPhrase]:
    """The closed phrases of an answer, in order; an empty one is no verdict."""
    return [
        TaggedPhrase(text, start, end, confident)
        for start, end, confident in tags.phrases(ids)
        if (text := decode(ids[start:end]).strip())
    ]


class JudgedPhrases:
    """Reads the tagged phrases of answers and has them judged. The last answers are remembered: the reward and the
    trainer's span credit ask for the same ones.

    Args:
        tags: finds the closed phrases in token ids.
        decode: token ids to text.
    """

    def __init__(self, tags: Tags, decode: Callable[[Sequence[int]], str], judge: Judge):
        self.tags, self.decode, self.judge = tags, decode, judge
        self._last: tuple[list, list[list[TaggedPhrase]]] = ([], [])

    def __call__(self, answers: Sequence[Sequence[int]], rows: Sequence[str]) -> list[list[TaggedPhrase]]:
        """The phrases of each answer, judged.

        Args:
            answers: token ids, without padding.
            rows: each answer's question row as JSON text.
        """
        asked = [(list(ids), row) for ids, row in zip(answers, rows, strict=True)]
        if asked != self._last[0]:
            phrases = [tagged_phrases(ids, self.tags, self.decode) for ids, _ in asked]
            questions = [json.loads(row) for _, row in asked]
            claims = [
                (phrase.text, row) for own, row in zip(phrases, questions, strict=True) for phrase in own
            ]
            truths = iter(self.judge(claims))
            self._last = asked, [[replace(phrase, true=next(truths)) for phrase in own] for own in phrases]
        return self._last[1]


def verdicts_reward(phrases: JudgedPhrases | None) -> Reward:
    """A reward function: over the verdicts of an answer that could be judged, the mean of 1 for a right one and -1 for a
    wrong one; 0 without any.

    It pays for judging, not for saying much or what is there: weigh it beside a reward of the answer (`objects`). Logged are
    `verdicts/right` and `verdicts/unjudged` (shares of verdicts), `verdicts/wrong_phrases` (share of judged phrases that are
    not true).

    Args:
        phrases: None where the reward is not to be called.
    """

    def verdicts(
        completions: Sequence, completion_ids: Sequence, row: Sequence[str], log_metric=None, **columns
    ) -> list[float]:
        answers = phrases(completion_ids, row)
        judged = [[phrase for phrase in answer if phrase.true is not None] for answer in answers]
        total, known = sum(map(len, answers)), sum(map(len, judged))
        if log_metric is not None and total:
            log_metric("verdicts/unjudged", 1 - known / total)
            if known:
                log_metric("verdicts/right", sum(p.is_right for answer in judged for p in answer) / known)
                log_metric("verdicts/wrong_phrases", sum(not p.true for a in judged for p in a) / known)
        return [
            sum(1 if phrase.is_right else -1 for phrase in answer) / max(1, len(answer)) for answer in judged
        ]

    return verdicts


def objects_reward(named: Callable[[str], Sequence[str]]) -> Reward:
    """A reward function: F1 of the nouns that an answer names against the row's `objects`. A noun that is named again is a
    mistake, or the longest answer would earn most.

    Args:
        named: the nouns in a text, one entry a mention. Tags in the text are no words of it.
    """

    def objects(completions: Sequence, row: Sequence[str], **columns) -> list[float]:
        return [
            f1(named(text_of(completion)), set(json.loads(question)["objects"]))
            for completion, question in zip(completions, row, strict=True)
        ]

    return objects


def f1(named: Sequence[str], present: Collection[str]) -> float:
    """Harmonic mean of the share of mentions that are new and true, and of the share of what is there that is named; 1 where
    nothing is there and nothing was named."""
    total = len(named) + len(present)
    return 2 * len(set(named).intersection(present)) / total if total else 1.0
