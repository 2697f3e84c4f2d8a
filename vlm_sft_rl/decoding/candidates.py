"""Test-time search on a transformers model: what answers the requests of searches, a step of many questions at a time."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from transformers import DynamicCache

from ..data import chat
from ..data.tags import strip_tags
from ..errors import UserError
from .answers import Answer, Counts
from .cache import Chunk, Prefill, RewindBackend
from .capabilities import backend_for
from .config import SamplingConfig, SearchConfig
from .generate import PromptBatch, draw_answers, draw_distinct
from .search import SEARCHES, Ask, Continuation, Continue, Score, Search, run_searches
from .shared_prefix import worth_sharing
from .vllm_engine import VLLMModel

# (images of the question, question, the answer so far, its last stage or None) of several candidates -> their scores
Scorer = Callable[[Sequence[tuple[list | None, str, str, str | None]]], Sequence[float]]
JUDGE_TOKENS = 32  # longest verdict


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

    Args:
        scorer: scores candidates (SWIRES); None takes the mean log-probability of their tokens.

    Returns:
        answers with the cost of everything drawn and judged in their counts. The trace has the text of every candidate
        and reply (`SearchResult.steps`), and ends with the event `{"kind": "search", "name", "drawn", "asked", "scored"}`.

    Raises UserError: as `sample_many`.
    """
    config = config or SearchConfig()

    def begin(prompt: str, name: str) -> Search:
        rng = random.Random(f"{config.seed}/{name}/{config.search}")
        return SEARCHES[config.search](prompt, config, rng)

    options = {"scorer": scorer, "ids": ids, "batch_size": batch_size}
    return generate_by(model, processor, images, prompts, config.search, begin, config, **options)


def generate_by(
    model,
    processor,
    images: list,
    prompts: list[str],
    search: str,
    begin: Callable[[str, str], Search],
    config: SamplingConfig,
    *,
    scorer: Scorer | None = None,
    ids: list[str] | None = None,
    batch_size: int = 16,
) -> list[Answer]:
    """`generate_searched` by any search; `begin(prompt, id)` gives it and `search` is what its trace calls it.

    `batch_size` is the number of answers decoded side by side and of questions whose prompts are kept.
    """
    batch = PromptBatch(model, processor, images, prompts, ids)
    answers: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        names = batch.names[part]
        source = CandidateSource(
            model, processor, images[part], prompts[part], names, config, batch_size, scorer
        )
        results = run_searches(map(begin, prompts[part], names), source)
        for result, counts, name, prompt in zip(results, source.counts, names, prompts[part], strict=True):
            text = strip_tags(result.text).strip()
            cost = {"drawn": result.drawn, "asked": result.asked, "scored": result.scored}
            trace = [*result.steps, {"kind": "search", "name": search, **cost}]
            answers.append(Answer(text, result.text, True, text, text, [], trace, counts, prompt, name))
    return answers


class CandidateSource:
    """Draws and judges with one model (`search.Policy`); all requests of a step that can be are decoded together.

    Where the model can rewind its cache, pictures and prompt of a question are computed once (`PromptCache`), and every
    request feeds only the text that is new. The judge is greedy, so that a verdict depends on nothing but its question.

    Args:
        images: per question a list of PIL images, a PIL image, or None.
        config: of the sampling.
    """

    def __init__(
        self,
        model,
        processor,
        images: list,
        questions: Sequence[str],
        names: Sequence[str],
        config: SamplingConfig,
        batch_size: int,
        scorer: Scorer | None = None,
    ):
        self.model, self.processor, self.config = model, processor, config
        self.questions, self.names = list(questions), list(names)
        self.batch_size, self.scorer = batch_size, scorer
        self.images = [[item] if isinstance(item, Image.Image) else item for item in images]
        self.counts = [Counts() for _ in self.questions]
        self.turns = [0] * len(self.questions)  # how often each question has drawn
        self.cache: PromptCache | None = None
        if not self.questions or isinstance(model, VLLMModel):  # vLLM has a prefix cache
            return
        batch = PromptBatch(model, processor, images, self.questions)
        with backend_for(model) as backend:
            if not backend.keeps_keys:
                return
            self.cache = PromptCache(batch, backend)
        for count, ids, encodes in zip(self.counts, self.cache.ids, batch.image_counts, strict=True):
            count.prompt_tokens = count.tokens_forwarded = len(ids)
            count.forwards, count.image_encodes = 1, encodes

    def draw(self, requests: Sequence[tuple[int, Continue]]) -> list[list[Continuation]]:
        # a question's own number of the request, so that no draw depends on the other questions
        seen: Counter = Counter()
        tasks = []
        for i, request in requests:
            name = f"{self.names[i]}/{self.turns[i]}.{seen[i]}"
            seen[i] += 1
            drawing = request.n, request.stop, request.distinct
            tasks.append(_Task(i, self.questions[i], name, self.config, request.prefix, *drawing))
        for i in seen:
            self.turns[i] += 1
        return [
            [_continuation(answer, task.stop) for answer in group]
            for task, group in zip(tasks, self._answer(tasks), strict=True)
        ]

    def ask(self, requests: Sequence[tuple[int, Ask]]) -> list[str]:
        tasks = []
        for i, request in requests:
            limit = self.config.max_new_tokens if request.whole else JUDGE_TOKENS
            config = SamplingConfig(max_new_tokens=limit, seed=self.config.seed)
            tasks.append(_Task(i, request.prompt, f"{self.names[i]}/judge", config, blind=not request.image))
        return [group[0].text for group in self._answer(tasks)]

    def score(self, requests: Sequence[tuple[int, Score]]) -> list[float]:
        if self.scorer is None:
            return [request.log_prob for _, request in requests]
        scores = list(
            self.scorer([(self.images[i], self.questions[i], r.text, r.stage) for i, r in requests])
        )
        if len(scores) != len(requests):
            raise UserError(f"the scorer gave {len(scores)} scores for {len(requests)} candidates.")
        return [float(score) for score in scores]

    def _answer(self, tasks: Sequence["_Task"]) -> list[list[Answer]]:
        """The answers to each task; those that differ in nothing but their prompts are decoded together."""
        results: list[list[Answer]] = [[] for _ in tasks]
        for kind in dict.fromkeys(task.kind for task in tasks):
            places = [k for k, task in enumerate(tasks) if task.kind == kind]
            config, n, stop, distinct, blind = kind
            chosen = [tasks[k] for k in places]
            questions = [task.question for task in chosen]
            prompt_args = (
                self.model,
                self.processor,
                [None if blind else self.images[question] for question in questions],
                [task.prompt for task in chosen],
                [task.name for task in chosen],
                [task.prefix or "" for task in chosen],
            )
            if self.cache is None or blind:
                batch = PromptBatch(*prompt_args)
            else:
                # an answer that grows in one place stays in the cache; several beginnings, and what is asked about them, not
                often = Counter(questions)
                stays = [task.prefix is not None and often[task.question] == 1 for task in chosen]
                batch = CachedPrompts(self.cache, questions, stays, *prompt_args)
            draw = draw_distinct if distinct else draw_answers
            groups = draw(batch, n, config, stop, max(n, self.batch_size))
            for k, group in zip(places, groups, strict=True):
                results[k] = group
                for answer in group:
                    self.counts[tasks[k].question].add(answer.counts)
        return results


@dataclass(frozen=True)
class _Task:
    """Answers to draw to a prompt about a question's pictures, or `blind`. `prefix`: how they begin; None: no answer of the
    search grows by them."""

    question: int
    prompt: str
    name: str
    config: SamplingConfig
    prefix: str | None = None
    n: int = 1
    stop: tuple[str, ...] = ()
    distinct: bool = False
    blind: bool = False

    @property
    def kind(self) -> tuple[SamplingConfig, int, tuple[str, ...], bool, bool]:
        return self.config, self.n, self.stop, self.distinct, self.blind


def _continuation(answer: Answer, stop: Sequence[str]) -> Continuation:
    """The text up to and with the first stop string, blanks kept: they belong to the prefix that it makes."""
    text = answer.tagged_text
    ends = [at + len(s) for s in stop if (at := text.find(s)) >= 0]
    drawn = next(event for event in answer.trace if event["kind"] == "drawn")
    # an answer that the length limit cut off is over too: nothing more can follow it
    text = text[: min(ends)] if ends else text
    return Continuation(text, not ends, drawn["log_prob"], drawn.get("probability"))


class PromptCache:
    """The keys of one prompt a question, prefilled once; `prefill` extends them to other prompts about the same pictures."""

    def __init__(self, batch: PromptBatch, backend: RewindBackend):
        self.model, self.processor, self.backend = batch.model, batch.processor, backend
        count = len(batch.rendered)
        self.rows: dict[int, int] = {}  # question -> row of the backend
        self.ids: list[list[int]] = [[] for _ in range(count)]  # what a row holds, image tokens expanded
        self.heads: list[list[int] | None] = [None] * count  # tokens up to the last picture, not expanded
        self.head_lengths = [0] * count  # the same with expanded image tokens
        for group in batch.groups:
            questions = sorted(group)
            start = batch.load(questions, keeps_keys=True)
            backend.add(start)
            for i, ids in zip(questions, start.prompts, strict=True):
                self.rows[i], self.ids[i] = len(self.rows), ids
                head, tail = self._split(batch.rendered[i], bool(batch.image_counts[i]))
                if head is not None and ids[len(ids) - len(tail) :] == tail:
                    self.heads[i], self.head_lengths[i] = head, len(ids) - len(tail)

    def _split(self, rendered: str, with_images: bool) -> tuple[list[int] | None, list[int]]:
        """Ids up to the last picture and behind it; (None, []) where the processor names no image token."""
        ids = chat.encode_text(self.processor, rendered)
        end = chat.image_end(self.processor, ids) if with_images else 0
        return (None, []) if end is None else (ids[:end], ids[end:])

    def tail(self, question: int, rendered: str) -> list[int] | None:
        """What follows the pictures in this prompt; None where it does not begin as the question's own."""
        head, tail = self._split(rendered, bool(self.heads[question]))
        return tail if tail and head is not None and head == self.heads[question] else None

    @torch.inference_mode()
    def prefill(self, extensions: Sequence[tuple[int, list[int], bool]]) -> Prefill:
        """A prefill of prompts that share their questions' pictures, in one forward pass over what differs.

        Args:
            extensions: (question, ids behind its pictures, whether the row moves on to hold this prompt); a question moves
                at most once in a call.
        """
        backend = self.backend
        rows, chunks = [0] * len(extensions), [Chunk(0, [])] * len(extensions)
        prompts: list[list[int]] = [[] for _ in extensions]
        # forks first: they take what their row holds before it moves
        for k in sorted(range(len(extensions)), key=lambda k: extensions[k][2]):
            question, tail, moves = extensions[k]
            old, row = self.ids[question], self.rows[question]
            prompts[k] = new = old[: self.head_lengths[question]] + tail
            # the last token is fed in any case, for its logits
            shared = next(
                (i for i, pair in enumerate(zip(old, new[:-1], strict=False)) if pair[0] != pair[1]),
                min(len(old), len(new) - 1),
            )
            rows[k] = row if moves else backend.fork(row)
            backend.rewind(rows[k], shared)
            chunks[k] = Chunk(rows[k], new[shared:])
            if moves:
                self.ids[question] = new
        logits = backend.extend(chunks)
        start = Prefill(
            self._left_padded(rows),
            logits,
            prompts,
            [backend.offsets[row] for row in rows],
            backend.planes,
            [len(chunk.tokens) for chunk in chunks],
        )
        while len(backend.lengths) > len(self.rows):
            backend.remove(len(backend.lengths) - 1)
        return start

    def _left_padded(self, rows: Sequence[int]) -> DynamicCache:
        lengths = [self.backend.lengths[row] for row in rows]
        width = max(lengths)
        cache = DynamicCache()
        for number, layer in enumerate(self.backend.cache.layers):
            padded = []
            for states in (layer.keys, layer.values):
                new = states.new_zeros(len(rows), states.shape[1], width, states.shape[3])
                for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
                    new[i, :, width - length :] = states[row, :, :length]
                padded.append(new)
            cache.update(*padded, number)
        return cache


class CachedPrompts(PromptBatch):
    """A batch of which prompts that begin like the one in the cache are extended there.

    Args:
        questions: of each prompt, whose pictures it is about.
        stays: of each prompt, whether the cache holds it from then on.
        prompt_args: of `PromptBatch`.
    """

    def __init__(self, cache: PromptCache, questions: Sequence[int], stays: Sequence[bool], *prompt_args):
        super().__init__(*prompt_args)
        self.cache = cache
        self.extensions: dict[int, tuple[int, list[int], bool]] = {}
        for k, (question, stay) in enumerate(zip(questions, stays, strict=True)):
            if (tail := cache.tail(question, self.rendered[k])) is not None:
                self.extensions[k] = question, tail, stay
                self.image_counts[k] = 0
        extended = sorted(self.extensions, key=lambda k: -len(self.extensions[k][1]))
        anew = [[k for k in group if k not in self.extensions] for group in self.groups]
        self.groups = [group for group in (extended, *anew) if group]

    def answers_share(self, max_new_tokens: int) -> bool:
        if len(self.extensions) < len(self.texts):
            return super().answers_share(max_new_tokens)
        extensions = self.extensions.values()
        lengths = [self.cache.head_lengths[question] + len(tail) for question, tail, _ in extensions]
        return worth_sharing(min(lengths), max_new_tokens)

    def most_loaded(self, tokens: int) -> int | None:
        return super().most_loaded(tokens) if len(self.extensions) < len(self.texts) else None

    def load(self, indices: Sequence[int], keeps_keys: bool) -> Prefill:
        if indices[0] in self.extensions:
            return self.cache.prefill([self.extensions[k] for k in indices])
        return super().load(indices, keeps_keys)
