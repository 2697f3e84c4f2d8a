"""Test-time search on a transformers model: `generate_searched`, and the policy that answers a search's requests."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ..errors import UserError
from .hf import check_lists
from .many import sample_many
from .records import Answer, Counts
from .search import SEARCHES, Ask, Continuation, Draw, Found, Score, SearchConfig, run_searches

# (images of the question, question, the answer so far, its last stage or None) of several candidates -> their scores
Scorer = Callable[[Sequence[tuple[list | None, str, str, str | None]]], Sequence[float]]


class HFPolicy:
    """Draws and judges with one model; every request of a step goes into one call of the engine.

    Args:
        images: per question a list of PIL images, a PIL image, or None.
        scorer: scores candidates (SWIRES); None takes the mean log-probability of the drawn tokens.
        judge_tokens: longest verdict. The judge is greedy, so that a verdict depends on nothing but its question.
    """

    def __init__(
        self,
        model,
        processor,
        images: list,
        questions: Sequence[str],
        names: Sequence[str],
        *,
        temperature: float,
        top_p: float | None,
        max_new_tokens: int,
        seed: int,
        batch_size: int,
        scorer: Scorer | None = None,
        judge_tokens: int = 32,
    ):
        self.model, self.processor = model, processor
        self.images, self.questions, self.names = images, list(questions), list(names)
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.seed, self.batch_size, self.scorer, self.judge_tokens = seed, batch_size, scorer, judge_tokens
        self.counts = [Counts() for _ in self.questions]
        self.turns = [0] * len(self.questions)  # how often each question has drawn

    def draw(self, requests: Sequence[tuple[int, Draw]]) -> list[list[Continuation]]:
        found: list[list[Continuation]] = [[] for _ in requests]
        for kind in dict.fromkeys((r.n, r.stop) for _, r in requests):
            places = [k for k, (_, r) in enumerate(requests) if (r.n, r.stop) == kind]
            n, stop = kind
            groups = self._sample(
                [requests[k][0] for k in places],
                [self.questions[requests[k][0]] for k in places],
                n,
                # a question's own number of the request, so that no draw depends on the other questions
                [f"{self.names[i]}/{self.turns[i]}.{k}" for k, i in self._slots(requests, places)],
                stop=stop,
                temperature=self.temperature,
                prefixes=[requests[k][1].prefix for k in places],
            )
            for k, group in zip(places, groups, strict=True):
                found[k] = [_continuation(answer, stop) for answer in group]
        for i in {i for i, _ in requests}:
            self.turns[i] += 1
        return found

    def ask(self, requests: Sequence[tuple[int, Ask]]) -> list[str]:
        verdicts = [""] * len(requests)
        for image in (True, False):
            places = [k for k, (_, r) in enumerate(requests) if r.image == image]
            if not places:
                continue
            groups = self._sample(
                [requests[k][0] for k in places],
                [requests[k][1].prompt for k in places],
                1,
                [f"{self.names[requests[k][0]]}/judge" for k in places],
                temperature=0.0,
                max_new_tokens=self.judge_tokens,
                blind=not image,
            )
            for k, group in zip(places, groups, strict=True):
                verdicts[k] = group[0].text
        return verdicts

    def score(self, requests: Sequence[tuple[int, Score]]) -> list[float]:
        if self.scorer is None:
            return [r.log_prob for _, r in requests]
        scores = list(
            self.scorer([(_listed(self.images[i]), self.questions[i], r.text, r.stage) for i, r in requests])
        )
        if len(scores) != len(requests):
            raise UserError(f"the scorer gave {len(scores)} scores for {len(requests)} candidates.")
        return [float(score) for score in scores]

    def _sample(self, owners, prompts, n, ids, *, blind: bool = False, max_new_tokens=None, **options):
        groups = sample_many(
            self.model,
            self.processor,
            [None if blind else self.images[i] for i in owners],
            prompts,
            n,
            max_new_tokens=max_new_tokens or self.max_new_tokens,
            top_p=self.top_p,
            top_k=None,
            seed=self.seed,
            ids=ids,
            batch_size=max(n, self.batch_size),
            **options,
        )
        for owner, group in zip(owners, groups, strict=True):
            total = self.counts[owner]
            for answer in group:
                for name, value in asdict(answer.counts).items():
                    if name != "prompt_tokens":
                        setattr(total, name, getattr(total, name) + value)
        return groups

    def _slots(self, requests, places) -> list[tuple[int, int]]:
        """For each place (its number among the question's own requests, the question)."""
        seen: dict[int, int] = {}
        numbers = {}
        for k, (i, _) in enumerate(requests):
            numbers[k] = seen.get(i, 0)
            seen[i] = numbers[k] + 1
        return [(numbers[k], requests[k][0]) for k in places]


def generate_searched(
    model,
    processor,
    images: list,
    prompts: list[str],
    search: str = "stage_beam",
    config: SearchConfig | None = None,
    *,
    scorer: Scorer | None = None,
    temperature: float = 0.6,
    top_p: float | None = 0.9,
    max_new_tokens: int = 2048,
    ids: list[str] | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """Answer `prompts` about `images` by a search of `SEARCHES`; the sampling defaults are LLaVA-CoT's.

    Returns:
        answers with the cost of everything drawn and judged in their counts, and a trace event
        `{"kind": "search", "name", "drawn", "asked", "scored"}`.

    Raises:
        UserError: no such search, or as `sample_many`.
    """
    if search not in SEARCHES:
        raise UserError(f"There is no search {search!r}. Searches: {', '.join(SEARCHES)}.")
    config = config or SearchConfig()
    names = check_lists(model, images, prompts, ids, batch_size)
    policy = HFPolicy(
        model,
        processor,
        images,
        prompts,
        names,
        temperature=temperature,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        seed=config.seed,
        batch_size=batch_size,
        scorer=scorer,
    )
    searches = [
        SEARCHES[search](prompt, config, random.Random(f"{config.seed}/{name}/{search}"))
        for prompt, name in zip(prompts, names, strict=True)
    ]
    found = run_searches(searches, policy)
    return [_answer(search, result, policy.counts[i], names[i], prompts[i]) for i, result in enumerate(found)]


def _answer(search: str, found: Found, counts: Counts, name: str, prompt: str) -> Answer:
    event = {
        "kind": "search",
        "name": search,
        "drawn": found.drawn,
        "asked": found.asked,
        "scored": found.scored,
    }
    text = found.text
    return Answer(text, text, True, text, text, [], [event], counts, prompt, name)


def _continuation(answer: Answer, stop: Sequence[str]) -> Continuation:
    """The text up to and with the first stop string, blanks kept: they belong to the prefix that it makes."""
    text = answer.tagged_text
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    log_prob = next(e["log_prob"] for e in answer.trace if e["kind"] == "drawn")
    # an answer that the length limit cut off is over too: nothing more can follow it
    return Continuation(text[: min(ends)] if ends else text, not ends, log_prob)


def _listed(images) -> list | None:
    if images is None:
        return None
    return list(images) if isinstance(images, list | tuple) else [images]
