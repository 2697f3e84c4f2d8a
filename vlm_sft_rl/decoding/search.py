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

from ..data.conclusions import without_thinking
from ..data.stages import SEPARATOR, STAGES, read_blocks
from ..data.tags import strip_tags
from .config import SearchConfig

SENTENCE_STOPS = (". ", ".\n", "? ", "?\n", "! ", "!\n")
LONGEST_SEARCH = 64  # sentences


@dataclass(frozen=True)
class Continue:
    """`n` continuations of an answer that begins with `prefix`, each up to and with the first of `stop`; `distinct`: none
    twice, and fewer where there are no others."""

    prefix: str
    n: int
    stop: tuple[str, ...] = ()
    distinct: bool = False


@dataclass(frozen=True)
class Continuation:
    """What followed a prefix. `finished`: the model ended its answer there; `log_prob`: mean over its tokens;
    `probability`: of it as a first draw, where that is known (`Continue.distinct`)."""

    text: str
    finished: bool
    log_prob: float = 0.0
    probability: float | None = None


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


def judge_prompt(question: str, part: str, first: str, second: str) -> str:
    return (
        f"Question: {question}\n\nTwo responses give the {part} of an answer.\n\nResponse 1:\n{first}\n\n"
        f"Response 2:\n{second}\n\nCompare them with the image. Which {part} is more accurate and more useful for the "
        'question? Reply with "I choose response 1" or "I choose response 2".'
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
    text = without_thinking(text)
    named = set(re.findall(r"response\s*([12])\b", text, re.IGNORECASE)) or set(
        re.findall(r"\b([12])\b", text)
    )
    return int(named.pop()) - 1 if len(named) == 1 else None


def compare(
    question: str, part: str, first: Continuation, second: Continuation, config: SearchConfig
) -> Generator[list[Request], list[Any], int]:
    """Which of two candidates is better, 0 or 1."""
    if first.text.strip() == second.text.strip():
        return 0
    if config.rules == "released":
        (verdict,) = yield [Ask(judge_prompt(question, part, first.text, second.text))]
        return read_choice(verdict, "released")
    verdicts = yield [
        Ask(judge_prompt(question, part, first.text, second.text)),
        Ask(judge_prompt(question, part, second.text, first.text)),
    ]
    straight, crossed = (read_choice(v) for v in verdicts)
    if straight is not None and crossed is not None and straight == 1 - crossed:
        return straight
    return 0 if first.log_prob >= second.log_prob else 1


def knockout(
    question: str,
    part: str,
    candidates: Sequence[Continuation],
    config: SearchConfig,
    rng: random.Random,
    caption: str | None = None,
) -> Generator[list[Request], list[Any], Continuation]:
    """Two at random are compared and the loser drops out, until one is left.

    Args:
        caption: the candidates are reasonings behind it, and a wrong one loses before it is compared (`rules: released`).
    """
    left = list(candidates)
    while len(left) > 1:
        i, j = rng.sample(range(len(left)), 2)
        pair, wrong = (left[i], left[j]), [False, False]
        if caption is not None:
            checks = yield [Ask(check_prompt(question, caption, c.text), image=False) for c in pair]
            wrong = ["incorrect" in text.lower() for text in checks]
        if any(wrong):
            loser = wrong.index(True)  # the first is looked at first, also where both are wrong
        else:
            loser = 1 - (yield from compare(question, part, *pair, config))
        left.pop((i, j)[loser])
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

    def complete(text: str, stage: str) -> bool:
        return any(block.stage == stage and block.closed and block.text for block in read_blocks(text))

    stages: list[str] = []
    for stage in STAGES:
        (drawn,) = yield [Continue(SEPARATOR.join(stages), config.beams, (f"</{stage}>",))]
        candidates = [c for c in drawn if complete(c.text, stage)] or drawn
        caption = None
        if stage == "REASONING" and config.rules == "released":
            caption = next((text for text in stages if text.upper().startswith("<CAPTION>")), "")
        best = yield from knockout(question, stage.lower(), candidates, config, rng, caption)
        stages.append(best.text.strip())
        if not complete(best.text, stage):  # no candidate wrote it: the model is not following the form
            break
    return SEPARATOR.join(stages)


def swires(question: str, config: SearchConfig, rng: random.Random) -> Search:
    """Stage-wise retracing search: captions and reasonings are drawn anew until two reasonings score above the threshold.

    Candidates accumulate over the rounds; the best `finalists` get a conclusion each, and the best whole answer wins.
    """
    (drawn,) = yield [Continue("", 1, ("</SUMMARY>",))]
    start = drawn[0].text.strip()
    reasonings: list[tuple[float, str]] = []
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
        reasonings += [(score, text) for score, (text, _) in zip(scores, longer, strict=True)]
        ranked = sorted((score for score, _ in reasonings), reverse=True)
        if len(ranked) > 1 and ranked[1] > config.threshold:
            break
    top = [text for _, text in sorted(reasonings, key=lambda pair: -pair[0])[: config.finalists]]
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


class Policy(Protocol):
    """What answers requests; each list holds (number of the search, request), and results come in the same order."""

    def draw(self, requests: Sequence[tuple[int, Continue]]) -> list[list[Continuation]]: ...

    def ask(self, requests: Sequence[tuple[int, Ask]]) -> list[str]: ...

    def score(self, requests: Sequence[tuple[int, Score]]) -> list[float]: ...


@dataclass
class SearchResult:
    """Result of a search and what it asked for.

    Attributes:
        steps: in order, `{"kind": "candidates", "texts"}` for every draw, with `probabilities` where it was of distinct
            ones; `{"kind": "asked", "text"}` for every reply.
    """

    text: str = ""
    drawn: int = 0
    asked: int = 0
    scored: int = 0
    steps: list[dict] = field(default_factory=list)

    def note(self, kind: type, reply: Any) -> None:
        if kind is Continue:
            step = {"kind": "candidates", "texts": [candidate.text for candidate in reply]}
            if reply[0].probability is not None:
                step["probabilities"] = [candidate.probability for candidate in reply]
            self.steps.append(step)
            self.drawn += len(reply)
        elif kind is Ask:
            self.steps.append({"kind": "asked", "text": reply})
            self.asked += 1
        else:
            self.scored += 1


def run_searches(searches: Iterable[Search], policy: Policy) -> list[SearchResult]:
    """Run searches side by side: in every step the requests of all of them go to the policy together."""
    running = list(searches)
    results = [SearchResult() for _ in running]
    waiting: dict[int, list[Request]] = {}

    def advance(i: int, replies: list[Any] | None) -> None:
        try:
            waiting[i] = running[i].send(replies)
        except StopIteration as stop:
            results[i].text = stop.value
            waiting.pop(i, None)

    for i in range(len(running)):
        advance(i, None)
    while waiting:
        replies: dict[int, list[Any]] = {i: [None] * len(requests) for i, requests in waiting.items()}
        for kind, answer in ((Continue, policy.draw), (Ask, policy.ask), (Score, policy.score)):
            places = [
                (i, k)
                for i, requests in waiting.items()
                for k, request in enumerate(requests)
                if isinstance(request, kind)
            ]
            if not places:
                continue
            for (i, k), reply in zip(places, answer([(i, waiting[i][k]) for i, k in places]), strict=True):
                replies[i][k] = reply
                results[i].note(kind, reply)
        for i in list(waiting):
            advance(i, replies[i])
    return results


# Answers that look at answers, after R3V (arXiv 2411.00855): self-select and self-refine as searches. No torch.
def sample_candidates(question: str, n: int, distinct: bool = False) -> Search:
    """N answers, and the first of them; choosing is left to whoever can read answers."""
    (drawn,) = yield [Continue("", n, distinct=distinct)]
    return drawn[0].text.strip()


def self_select(
    question: str, n: int, write: Callable[[str, Sequence[str]], str], distinct: bool = False
) -> Search:
    """N answers in the order drawn, and greedily one more in view of them."""
    (drawn,) = yield [Continue("", n, distinct=distinct)]
    candidates = [strip_tags(candidate.text).strip() for candidate in drawn]
    (selection,) = yield [Ask(write(question, candidates), whole=True)]
    return selection.strip()


def self_refine(question: str, write: Callable[[str, str], str]) -> Search:
    """A greedy answer, and greedily another one in view of it."""
    (first,) = yield [Ask(question, whole=True)]
    (second,) = yield [Ask(write(question, strip_tags(first).strip()), whole=True)]
    return second.strip()
