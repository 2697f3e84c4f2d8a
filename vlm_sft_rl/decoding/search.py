"""Search at test time, as algorithms that ask for what they need: continuations, verdicts, scores. No torch.

Each search is a generator: it yields lists of requests and receives their results, so that one engine serves the searches
of many questions at once (`run_searches`), and a table can stand in for the engine in tests.

After LLaVA-CoT (arXiv 2411.10440): best-of-N, sentence beam, stage-level beam search, and SWIRES.
"""

import random
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..data.stages import SEPARATOR, STAGES, read_blocks
from ..data.tags import strip_tags
from .config import SearchConfig

SENTENCE_STOPS = (". ", ".\n", "? ", "?\n", "! ", "!\n")
LONGEST_SEARCH = 64  # sentences


@dataclass(frozen=True)
class Continue:
    """`n` continuations of an answer that begins with `prefix`, each up to and with the first of `stop`."""

    prefix: str
    n: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Continuation:
    """What followed a prefix. `finished`: the model ended its answer there; `log_prob`: mean over its tokens."""

    text: str
    finished: bool
    log_prob: float = 0.0


@dataclass(frozen=True)
class Ask:
    """A prompt that the policy answers greedily, as a judge; `image`: with the picture, `whole`: as long as an answer may
    be, not as a verdict."""

    prompt: str
    image: bool = True
    whole: bool = False


@dataclass(frozen=True)
class Score:
    """A number from the scorer for `text`, an answer so far whose last stage is `stage` (None: the whole answer)."""

    text: str
    stage: str | None
    log_prob: float = 0.0


Request = Continue | Ask | Score
Search = Generator[list[Request], list[Any], str]


def judge_prompt(question: str, what: str, one: str, two: str) -> str:
    return (
        f"Question: {question}\n\nTwo responses give the {what} of an answer.\n\nResponse 1:\n{one}\n\nResponse 2:\n{two}"
        f"\n\nCompare them with the image. Which {what} is more accurate and more useful for the question? Reply with "
        '"I choose response 1" or "I choose response 2".'
    )


def check_prompt(question: str, caption: str, reasoning: str) -> str:
    """The released pre-check of reasonings, asked without the image: the caption is taken as a fact."""
    return (
        f"Question: {question}\n\nWhat the image shows: {caption}\n\nReasoning:\n{reasoning}\n\nTake the description as a "
        'fact. Is the reasoning free of errors? Reply with "correct" or "incorrect".'
    )


def read_choice(text: str, rules: str = "ours") -> int | None:
    """0 for response 1, 1 for response 2, None where the judge says neither or both (`released`: then 2)."""
    if rules == "released":
        return 0 if "I choose response 1" in text else 1
    named = set(re.findall(r"response\s*([12])\b", text, re.IGNORECASE)) or set(
        re.findall(r"\b([12])\b", text)
    )
    return int(named.pop()) - 1 if len(named) == 1 else None


def compare(
    question: str, what: str, one: Continuation, two: Continuation, config: SearchConfig
) -> Generator[list[Request], list[Any], int]:
    """Which of two candidates is better, 0 or 1."""
    if one.text.strip() == two.text.strip():
        return 0
    if config.rules == "released":
        (verdict,) = yield [Ask(judge_prompt(question, what, one.text, two.text))]
        return read_choice(verdict, "released")
    verdicts = yield [
        Ask(judge_prompt(question, what, one.text, two.text)),
        Ask(judge_prompt(question, what, two.text, one.text)),
    ]
    straight, crossed = (read_choice(v) for v in verdicts)
    if straight is not None and crossed is not None and straight == 1 - crossed:
        return straight
    return 0 if one.log_prob >= two.log_prob else 1


def knockout(
    question: str, what: str, candidates: Sequence[Continuation], config: SearchConfig, rng: random.Random
) -> Generator[list[Request], list[Any], Continuation]:
    """Two at random are compared and the loser drops out, until one is left."""
    left = list(candidates)
    while len(left) > 1:
        i, j = rng.sample(range(len(left)), 2)
        winner = yield from compare(question, what, left[i], left[j], config)
        left.pop((i, j)[1 - winner])
    return left[0]


def best_of_n(question: str, config: SearchConfig, rng: random.Random) -> Search:
    """N whole answers; the judge keeps one."""
    (drawn,) = yield [Continue("", config.beams)]
    best = yield from knockout(question, "whole", drawn, config, rng)
    return best.text.strip()


def sentence_beam(question: str, config: SearchConfig, rng: random.Random) -> Search:
    """N next sentences; the judge keeps one; until the kept one ends the answer."""
    answer = ""
    for _ in range(LONGEST_SEARCH):
        (drawn,) = yield [Continue(answer, config.beams, SENTENCE_STOPS)]
        best = yield from knockout(question, "next sentence", drawn, config, rng)
        answer += best.text
        if best.finished or not best.text:
            break
    return answer.strip()


def stage_beam(question: str, config: SearchConfig, rng: random.Random) -> Search:
    """Stage by stage, N candidates and a knock-out; the winner is the prefix of the next stage."""
    stages: list[str] = []
    for stage in STAGES:
        prefix = SEPARATOR.join(stages)
        (drawn,) = yield [Continue(prefix, config.beams, (f"</{stage}>",))]
        whole = [c for c in drawn if _has(c.text, stage)] or drawn
        best = yield from _keep_one(question, stage, whole, stages, config, rng)
        stages.append(best.text.strip())
        if not _has(best.text, stage):  # no candidate wrote the stage: the model is not following the form
            break
    return SEPARATOR.join(stages)


def _keep_one(
    question: str, stage: str, candidates, stages: list[str], config: SearchConfig, rng: random.Random
):
    if stage != "REASONING" or config.rules != "released":
        return (yield from knockout(question, stage.lower(), candidates, config, rng))
    caption = next((s for s in stages if s.upper().startswith("<CAPTION>")), "")
    left = list(candidates)
    while len(left) > 1:
        i, j = rng.sample(range(len(left)), 2)
        checks = yield [Ask(check_prompt(question, caption, left[k].text), image=False) for k in (i, j)]
        wrong = ["incorrect" in text.lower() for text in checks]
        if any(wrong):
            loser = 0 if wrong[0] else 1  # the first is looked at first, also where both are wrong
        else:
            loser = 1 - (yield from compare(question, "reasoning", left[i], left[j], config))
        left.pop((i, j)[loser])
    return left[0]


def swires(question: str, config: SearchConfig, rng: random.Random) -> Search:
    """Stage-wise retracing search: captions and reasonings are drawn anew until two reasonings score above the threshold.

    Candidates accumulate over the rounds; the best `finalists` get a conclusion each, and the best whole answer wins.
    """
    (drawn,) = yield [Continue("", 1, ("</SUMMARY>",))]
    start = drawn[0].text.strip()
    found: list[tuple[float, str]] = []
    for _ in range(config.max_rounds):
        (captions,) = yield [Continue(start, config.captions, ("</CAPTION>",))]
        prefixes = [SEPARATOR.join([start, c.text.strip()]) for c in captions]
        scores = yield [Score(p, "CAPTION", c.log_prob) for p, c in zip(prefixes, captions, strict=True)]
        best = sorted(range(len(prefixes)), key=lambda i: -scores[i])[: config.kept]
        drawn = yield [Continue(prefixes[i], config.reasonings, ("</REASONING>",)) for i in best]
        longer = [
            (SEPARATOR.join([prefixes[i], c.text.strip()]), c.log_prob)
            for i, group in zip(best, drawn, strict=True)
            for c in group
        ]
        scores = yield [Score(text, "REASONING", log_prob) for text, log_prob in longer]
        found += [(score, text) for score, (text, _) in zip(scores, longer, strict=True)]
        ranked = sorted((score for score, _ in found), reverse=True)
        if len(ranked) > 1 and ranked[1] > config.threshold:
            break
    top = [text for _, text in sorted(found, key=lambda pair: -pair[0])[: config.finalists]]
    drawn = yield [Continue(text, 1, ("</CONCLUSION>",)) for text in top]
    whole = [SEPARATOR.join([text, group[0].text.strip()]) for text, group in zip(top, drawn, strict=True)]
    scores = yield [Score(t, None, group[0].log_prob) for t, group in zip(whole, drawn, strict=True)]
    return whole[max(range(len(whole)), key=lambda i: scores[i])]


SEARCHES: dict[str, Callable[[str, SearchConfig, random.Random], Search]] = {
    "best_of_n": best_of_n,
    "sentence_beam": sentence_beam,
    "stage_beam": stage_beam,
    "swires": swires,
}


def _has(text: str, stage: str) -> bool:
    return any(block.stage == stage and block.closed and block.text for block in read_blocks(text))


class Policy(Protocol):
    """What answers requests; each list holds (number of the search, request), and results come in the same order."""

    def draw(self, requests: Sequence[tuple[int, Continue]]) -> list[list[Continuation]]: ...

    def ask(self, requests: Sequence[tuple[int, Ask]]) -> list[str]: ...

    def score(self, requests: Sequence[tuple[int, Score]]) -> list[float]: ...


@dataclass
class Found:
    """Result of a search and what it asked for.

    Attributes:
        steps: in order, `{"kind": "candidates", "texts"}` for every draw, `{"kind": "asked", "text"}` for every reply.
    """

    text: str = ""
    drawn: int = 0
    asked: int = 0
    scored: int = 0
    steps: list[dict] = field(default_factory=list)


def run_searches(searches: Iterable[Search], policy: Policy) -> list[Found]:
    """Run searches side by side: in every step the requests of all of them go to the policy together."""
    running = dict(enumerate(searches))
    found = {i: Found() for i in running}
    waiting: dict[int, list[Request]] = {}

    def advance(i: int, results: list[Any] | None) -> None:
        try:
            waiting[i] = next(running[i]) if results is None else running[i].send(results)
        except StopIteration as stop:
            found[i].text = stop.value
            waiting.pop(i, None)

    for i in running:
        advance(i, None)
    while waiting:
        results: dict[int, list[Any]] = {i: [None] * len(requests) for i, requests in waiting.items()}
        for kind, answer in ((Continue, policy.draw), (Ask, policy.ask), (Score, policy.score)):
            places = [(i, k) for i, rs in waiting.items() for k, r in enumerate(rs) if isinstance(r, kind)]
            if not places:
                continue
            for (i, k), result in zip(places, answer([(i, waiting[i][k]) for i, k in places]), strict=True):
                results[i][k] = result
                note = found[i]
                if kind is Continue:
                    note.steps.append({"kind": "candidates", "texts": [c.text for c in result]})
                    note.drawn += len(result)
                elif kind is Ask:
                    note.steps.append({"kind": "asked", "text": result})
                    note.asked += 1
                else:
                    note.scored += 1
        for i in list(waiting):
            advance(i, results[i])
    return [found[i] for i in sorted(found)]


# Answers that look at answers, after R3V (arXiv 2411.00855): self-select and self-refine as searches. No torch.
def sample_candidates(question: str, n: int) -> Search:
    """N answers, and the first of them; choosing is left to whoever can read answers."""
    (drawn,) = yield [Continue("", n)]
    return drawn[0].text.strip()


def self_select(question: str, n: int, write: Callable[[str, Sequence[str]], str]) -> Search:
    """N answers in the order drawn, and greedily one more in view of them."""
    (drawn,) = yield [Continue("", n)]
    (chosen,) = yield [Ask(write(question, [_shown(c.text) for c in drawn]), whole=True)]
    return chosen.strip()


def self_refine(question: str, write: Callable[[str, str], str]) -> Search:
    """A greedy answer, and greedily another one in view of it."""
    (first,) = yield [Ask(question, whole=True)]
    (refined,) = yield [Ask(write(question, _shown(first)), whole=True)]
    return refined.strip()


def _shown(text: str) -> str:
    return strip_tags(text).strip()
