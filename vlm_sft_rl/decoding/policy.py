"""`HFPolicy`: a transformers model that answers the requests of searches, a step of many questions at a time."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch

from ..errors import UserError
from . import prompt as prompting
from .admission import choose_backend, rewindable_attention
from .backends import RecomputeBackend
from .held import HeldPrompts
from .hf import to_pictures
from .many import draw_loaded, sample_many
from .prefill import Prefill
from .records import Answer, Counts, RetrospectiveConfig
from .search import Ask, Continuation, Draw, Score
from .shared_prefix import worth_sharing

# (images of the question, question, the answer so far, its last stage or None) of several candidates -> their scores
Scorer = Callable[[Sequence[tuple[list | None, str, str, str | None]]], Sequence[float]]


class HFPolicy:
    """Draws and judges with one model; every request of a step goes into one call of the engine.

    Where the model can rewind its cache, pictures and prompt of a question are computed once (`HeldPrompts`), and every
    request feeds only the text that is new.

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
        top_k: int | None = None,
        scorer: Scorer | None = None,
        judge_tokens: int = 32,
    ):
        self.model, self.processor = model, processor
        self.images, self.questions, self.names = images, list(questions), list(names)
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.max_new_tokens, self.seed, self.batch_size = max_new_tokens, seed, batch_size
        self.scorer, self.judge_tokens = scorer, judge_tokens
        self.counts = [Counts() for _ in self.questions]
        self.turns = [0] * len(self.questions)  # how often each question has drawn
        self.lead = prompting.answer_lead(processor)
        self.held = self._hold()

    def _hold(self) -> HeldPrompts | None:
        pictures = [to_pictures(item) for item in self.images]
        with rewindable_attention(self.model), torch.inference_mode():
            if not self.questions or isinstance(choose_backend(self.model), RecomputeBackend):
                return None
            rendered = [self._render(i, prompt) for i, prompt in enumerate(self.questions)]
            held = HeldPrompts(self.model, self.processor, rendered, pictures)
        for count, ids, own in zip(self.counts, held.ids, pictures, strict=True):
            count.prompt_tokens, count.forwards, count.image_encodes = len(ids), 1, len(own)
            count.tokens_forwarded = len(ids)
        return held

    def _render(self, question: int, prompt: str, prefix: str = "") -> str:
        text = prompting.render(self.processor, prompt, len(to_pictures(self.images[question])))
        return text + (self.lead + prefix if prefix else "")

    def draw(self, requests: Sequence[tuple[int, Draw]]) -> list[list[Continuation]]:
        found: list[list[Continuation]] = [[] for _ in requests]
        # a question's own number of the request, so that no draw depends on the other questions
        slots = _numbers([i for i, _ in requests])
        for kind in dict.fromkeys((r.n, r.stop) for _, r in requests):
            places = [k for k, (_, r) in enumerate(requests) if (r.n, r.stop) == kind]
            n, stop = kind
            owners = [requests[k][0] for k in places]
            groups = self._sample(
                owners,
                [self.questions[i] for i in owners],
                n,
                [f"{self.names[i]}/{self.turns[i]}.{slots[k]}" for k, i in zip(places, owners, strict=True)],
                temperature=self.temperature,
                max_new_tokens=self.max_new_tokens,
                stop=stop,
                prefixes=[requests[k][1].prefix for k in places],
            )
            for k, group in zip(places, groups, strict=True):
                found[k] = [_continuation(answer, stop) for answer in group]
        for i in {i for i, _ in requests}:
            self.turns[i] += 1
        return found

    def ask(self, requests: Sequence[tuple[int, Ask]]) -> list[str]:
        verdicts = [""] * len(requests)
        for kind in dict.fromkeys((r.image, r.whole) for _, r in requests):
            places = [k for k, (_, r) in enumerate(requests) if (r.image, r.whole) == kind]
            image, whole = kind
            owners = [requests[k][0] for k in places]
            groups = self._sample(
                owners,
                [requests[k][1].prompt for k in places],
                1,
                [f"{self.names[i]}/judge" for i in owners],
                temperature=0.0,
                max_new_tokens=self.max_new_tokens if whole else self.judge_tokens,
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

    def _sample(
        self,
        owners: Sequence[int],
        prompts: Sequence[str],
        n: int,
        ids: Sequence[str],
        *,
        temperature: float,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        prefixes: Sequence[str] | None = None,
        blind: bool = False,
    ) -> list[list[Answer]]:
        """`n` answers to each prompt: of those that begin like their question's, only the rest is computed."""
        begun = list(prefixes or [""] * len(prompts))
        tails = [None if blind else self._tail(*each) for each in zip(owners, prompts, begun, strict=True)]
        groups: list[list[Answer]] = [[] for _ in prompts]
        fresh = [k for k, tail in enumerate(tails) if tail is None]
        shared = [k for k, tail in enumerate(tails) if tail is not None]
        settings = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
        }
        batch_size, often = max(n, self.batch_size), Counter(owners)
        if fresh:
            found = sample_many(
                self.model,
                self.processor,
                [None if blind else self.images[owners[k]] for k in fresh],
                [prompts[k] for k in fresh],
                n,
                ids=[ids[k] for k in fresh],
                prefixes=[begun[k] for k in fresh],
                stop=stop,
                batch_size=batch_size,
                **settings,
            )
            for k, group in zip(fresh, found, strict=True):
                groups[k] = group
        if shared:

            def load(indices: Sequence[int]) -> tuple[Prefill, None]:
                # an answer that grows in one place is kept; several beginnings, or what is asked about them, are not
                wanted = [
                    (owners[k], tails[k], prefixes is not None and often[owners[k]] == 1)
                    for k in (shared[i] for i in indices)
                ]
                return self.held.open(wanted), None

            shortest = min(self.held.fixed[owners[k]] + len(tails[k]) for k in shared)
            copies = n if worth_sharing(shortest, max_new_tokens) else 1
            with rewindable_attention(self.model), torch.inference_mode():
                found = draw_loaded(
                    self.model,
                    self.processor,
                    choose_backend(self.model, copies),
                    load,
                    [sorted(range(len(shared)), key=lambda i: -len(tails[shared[i]]))],
                    [ids[k] for k in shared],
                    [prompts[k] for k in shared],
                    n,
                    RetrospectiveConfig(**settings),
                    stop,
                    batch_size,
                    [0] * len(shared),
                )
            for k, group in zip(shared, found, strict=True):
                groups[k] = group
        for owner, group in zip(owners, groups, strict=True):
            total = self.counts[owner]
            for answer in group:
                for name, value in asdict(answer.counts).items():
                    if name != "prompt_tokens":
                        setattr(total, name, getattr(total, name) + value)
        return groups

    def _tail(self, question: int, prompt: str, prefix: str) -> list[int] | None:
        if self.held is None:
            return None
        return self.held.tail(question, self._render(question, prompt, prefix))


def _numbers(owners: Sequence[int]) -> list[int]:
    """For each request its number among those of the same question."""
    seen: Counter = Counter()
    numbers = []
    for owner in owners:
        numbers.append(seen[owner])
        seen[owner] += 1
    return numbers


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
