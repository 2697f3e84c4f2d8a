"""`CandidateSource`: a transformers model that answers the requests of searches, a step of many questions at a time."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from transformers import DynamicCache

from ..data import chat as prompting
from ..data.tags import strip_tags
from ..errors import UserError
from .answers import Answer, Counts
from .cache import Chunk, Prefill, RecomputeBackend, RewindBackend, prefill
from .capabilities import choose_backend, layer_windows, rewindable_attention
from .config import SamplingConfig, SearchConfig
from .generate import check_lists, draw_loaded, encode_batch, sample_many, to_pictures
from .search import SEARCHES, Ask, Continuation, Continue, Found, Score, Search, run_searches
from .shared_prefix import worth_sharing


# Prompts whose keys are kept between calls: pictures and whatever text a later prompt shares are computed once.
class HeldPrompts:
    """One row a question, prefilled once; `open` gives prefills of other prompts about the same pictures.

    Args:
        rendered: one rendered prompt a row (`data.chat.render`).
        pictures: the images of each row; rows with and without images may be mixed.
    """

    def __init__(self, model, processor, rendered: Sequence[str], pictures: Sequence[list]):
        self.processor = processor
        self.backend = RewindBackend(model, layer_windows(model))
        self.order: dict[int, int] = {}  # question -> row of the backend
        self.ids: list[list[int]] = [[] for _ in rendered]  # what a row holds, image tokens expanded
        self.heads: list[list[int] | None] = [None for _ in rendered]  # up to the last picture, not expanded
        self.fixed = [0 for _ in rendered]
        # processors do not mix rows with and without images
        for with_images in (True, False):
            chosen = [i for i, own in enumerate(pictures) if bool(own) == with_images]
            if not chosen:
                continue
            inputs = encode_batch(
                model, processor, [rendered[i] for i in chosen], [pictures[i] for i in chosen]
            )
            start = prefill(model, inputs)
            self.backend.add(start, inputs)
            for i, ids in zip(chosen, start.prompts, strict=True):
                self.order[i], self.ids[i] = len(self.order), ids
                head, tail = self._split(rendered[i], bool(pictures[i]))
                if head is not None and ids[len(ids) - len(tail) :] == tail:
                    self.heads[i], self.fixed[i] = head, len(ids) - len(tail)

    def _split(self, rendered: str, with_images: bool) -> tuple[list[int] | None, list[int]]:
        """Ids up to the last picture and behind it; (None, []) where the processor names no image token."""
        ids = prompting.encode_text(self.processor, rendered)
        if not with_images:
            return [], ids
        at = prompting.image_end(self.processor, ids)
        return (None, []) if at is None else (ids[:at], ids[at:])

    def tail(self, question: int, rendered: str) -> list[int] | None:
        """What follows the pictures in this prompt; None where its beginning is not the question's own."""
        head, tail = self._split(rendered, bool(self.heads[question]))
        return tail if tail and head is not None and head == self.heads[question] else None

    @torch.inference_mode()
    def open(self, wanted: Sequence[tuple[int, list[int], bool]]) -> Prefill:
        """A prefill of prompts that share their questions' pictures, in one forward pass over what differs.

        Args:
            wanted: (question, ids behind its pictures, whether the row moves on to hold this prompt); a question moves
                at most once in a call.
        """
        backend, rows = self.backend, len(self.order)
        places = [0] * len(wanted)
        texts: list[list[int]] = [[] for _ in wanted]
        fed: list[list[int]] = [[] for _ in wanted]
        # forks first: they take what their row held before it moves
        for k in sorted(range(len(wanted)), key=lambda k: wanted[k][2]):
            question, tail, moves = wanted[k]
            held, row = self.ids[question], self.order[question]
            texts[k] = held[: self.fixed[question]] + tail
            shared = min(_common(held, texts[k]), len(texts[k]) - 1)
            places[k] = row if moves else backend.fork(row)
            backend.rewind(places[k], shared)
            fed[k] = texts[k][shared:]
            if moves:
                self.ids[question] = texts[k]
        logits = backend.extend([Chunk(place, new) for place, new in zip(places, fed, strict=True)])
        start = Prefill(
            self._left_padded(places),
            logits,
            texts,
            [backend.offsets[place] for place in places],
            backend.planes,
            {},
            [len(new) for new in fed],
        )
        while len(backend.lengths) > rows:
            backend.remove(len(backend.lengths) - 1)
        return start

    def _left_padded(self, places: Sequence[int]) -> DynamicCache:
        lengths = [self.backend.lengths[place] for place in places]
        width = max(lengths)
        cache = DynamicCache()
        for number, layer in enumerate(self.backend.cache.layers):
            padded = []
            for kept in (layer.keys, layer.values):
                new = kept.new_zeros(len(places), kept.shape[1], width, kept.shape[3])
                for i, (place, length) in enumerate(zip(places, lengths, strict=True)):
                    new[i, :, width - length :] = kept[place, :, :length]
                padded.append(new)
            cache.update(*padded, number)
        return cache


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    count = 0
    while count < min(len(one), len(two)) and one[count] == two[count]:
        count += 1
    return count


# (images of the question, question, the answer so far, its last stage or None) of several candidates -> their scores
Scorer = Callable[[Sequence[tuple[list | None, str, str, str | None]]], Sequence[float]]


class CandidateSource:
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

    def draw(self, requests: Sequence[tuple[int, Continue]]) -> list[list[Continuation]]:
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
        config = SamplingConfig(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
        )
        batch_size, often = max(n, self.batch_size), Counter(owners)
        if fresh:
            found = sample_many(
                self.model,
                self.processor,
                [None if blind else self.images[owners[k]] for k in fresh],
                [prompts[k] for k in fresh],
                n,
                config,
                ids=[ids[k] for k in fresh],
                prefixes=[begun[k] for k in fresh],
                stop=stop,
                batch_size=batch_size,
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
                    config,
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


# Test-time search on a transformers model: `generate_searched`, and `generate_by` for searches of one's own.
def generate_searched(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: SearchConfig | None = None,
    *,
    scorer: Scorer | None = None,
    ids: list[str] | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """Answer `prompts` about `images` by the search that `config` names.

    Returns:
        answers with the cost of everything drawn and judged in their counts. The trace has the text of every candidate
        and reply (`Found.steps`), and ends with the event `{"kind": "search", "name", "drawn", "asked", "scored"}`.

    Raises:
        UserError: as `sample_many`.
    """
    config = config or SearchConfig()
    search = config.search

    def make(prompt: str, name: str) -> Search:
        return SEARCHES[search](prompt, config, random.Random(f"{config.seed}/{name}/{search}"))

    return generate_by(
        model,
        processor,
        images,
        prompts,
        search,
        make,
        config,
        scorer=scorer,
        ids=ids,
        batch_size=batch_size,
    )


def generate_by(
    model,
    processor,
    images: list,
    prompts: list[str],
    name: str,
    make: Callable[[str, str], Search],
    config: SamplingConfig,
    *,
    scorer: Scorer | None = None,
    ids: list[str] | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """`generate_searched` by any search; `make(prompt, id)` begins it and `name` is what its trace calls it.

    `batch_size` is the number of answers decoded side by side and of questions whose prompts are kept.
    """
    names = check_lists(model, images, prompts, ids, batch_size)
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        policy = CandidateSource(
            model,
            processor,
            images[part],
            prompts[part],
            names[part],
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            batch_size=batch_size,
            scorer=scorer,
        )
        found = run_searches(map(make, prompts[part], names[part]), policy)
        parts = zip(found, policy.counts, names[part], prompts[part], strict=True)
        answers += [_answer(name, *each) for each in parts]
    return answers


def _answer(search: str, found: Found, counts: Counts, name: str, prompt: str) -> Answer:
    text = strip_tags(found.text).strip()
    event = {
        "kind": "search",
        "name": search,
        "drawn": found.drawn,
        "asked": found.asked,
        "scored": found.scored,
    }
    return Answer(text, found.text, True, text, text, [], [*found.steps, event], counts, prompt, name)
