"""Retrospective resampling: the released loop against this package's engine, with the same decisions on both sides.

The tokens and the verdicts of every answer are scripted (each phrase fails a fixed number of times), the computation is
real: a random LLaVA of 3M parameters with 144 image tokens. Both sides must reject the same phrases in the same order
and return the same ids, or the benchmark stops.
"""

import random
import statistics
import time
from dataclasses import dataclass, field

import torch
from bench import main, random_images, tiny_llava
from released_loop import released_loop
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.config import RetrospectiveConfig, SamplingConfig
from vlm_sft_rl.decoding.generate import PromptBatch, decode, encode_batch, generate_plain
from vlm_sft_rl.decoding.retrospective import Retrospective
from vlm_sft_rl.decoding.sampling import Sampler

QUESTION_WORDS = 30


@dataclass
class Script:
    """The answer of one row: `tokens` when all phrases are right; phrase s fails its first `failures` attempts."""

    tokens: list[int]
    phrase_of: list[int | None]
    close_of: dict[int, int]
    wrong: dict[tuple[int, int], int]
    failures: int
    tags: tuple[int, int]
    end: int
    attempts: dict[int, int] = field(default_factory=dict)

    def token(self, place: int) -> int:
        if place >= len(self.tokens):
            return self.end
        phrase = self.phrase_of[place]
        attempt = self.attempts.get(phrase, 0) if phrase is not None else self.failures
        if attempt >= self.failures:
            return self.tokens[place]
        if place in self.close_of:
            return self.tags[1]
        return self.wrong[place, attempt]

    def verdict(self, place: int) -> float:
        """P(</UN>) at the close tag at `place`; counts the attempt."""
        phrase = self.close_of[place]
        attempt = self.attempts.get(phrase, 0)
        self.attempts[phrase] = attempt + 1
        return 0.9 if attempt < self.failures else 0.001


def make_script(index: int, grammar, words: list[int], dot: int, *, length: int, failures: int) -> Script:
    """An answer of `length` tokens tagged as REVERSE's data are: every noun phrase.

    An introduction of 3 to 5 words, then phrases of 4 to 6 tokens (tags included) with 1 to 3 words between them.
    """
    rng = random.Random(index)
    tokens: list[int] = []
    phrase_of: list[int | None] = []
    close_of: dict[int, int] = {}
    wrong: dict[tuple[int, int], int] = {}

    def put(token: int, phrase: int | None = None) -> None:
        tokens.append(token)
        phrase_of.append(phrase)

    gap = rng.randint(3, 5)
    while True:
        size = rng.randint(2, 4)
        if len(tokens) + gap + size + 2 > length - 1:
            break
        for _ in range(gap):
            put(rng.choice(words))
        put(grammar.open)
        for _ in range(size):
            for attempt in range(failures):
                wrong[len(tokens), attempt] = rng.choice(words)
            put(rng.choice(words), len(close_of))
        close_of[len(tokens)] = len(close_of)
        put(grammar.confident, len(close_of) - 1)
        gap = rng.randint(1, 3)
    while len(tokens) < length:
        put(dot)
    return Script(
        tokens,
        phrase_of,
        close_of,
        wrong,
        failures,
        (grammar.confident, grammar.unconfident),
        min(grammar.ends),
    )


class ScriptSampler(Sampler):
    """Does a sampler's work, then takes the script's tokens and verdicts."""

    def __init__(self, scripts: dict[str, Script], **options):
        super().__init__(**options)
        self.scripts = scripts

    def choose(self, logits, rows):
        super().choose(logits, rows)
        return [self.scripts[row.job.id].token(len(row.machine.ids)) for row in rows]

    def p_unconfident(self, logits, row, unconfident):
        super().p_unconfident(logits, row, unconfident)
        return self.scripts[row.job.id].verdict(len(row.machine.ids))


class _Force(LogitsProcessor):
    def __init__(self, script: Script, prompt_length: int):
        self.script, self.prompt_length = script, prompt_length

    def __call__(self, input_ids, scores):
        token = self.script.token(input_ids.shape[1] - self.prompt_length)
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token] = 0.0
        return forced


class _Bench:
    def __init__(self, rows: int, failures: int, length: int, size: dict | None = None):
        self.model, self.processor = tiny_llava(**(size or {}))
        self.grammar = build_grammar(self.model, self.processor, required=True)
        words = [self.processor.tokenizer.convert_tokens_to_ids(f"w{i}") for i in range(900)]
        dot = self.processor.tokenizer.convert_tokens_to_ids(".")
        self.make = lambda i: make_script(i, self.grammar, words, dot, length=length, failures=failures)
        self.images = random_images(rows, side=self.processor.image_processor.crop_size["height"])
        rng = random.Random(0)
        self.prompts = [
            " ".join(f"w{rng.randrange(900)}" for _ in range(QUESTION_WORDS)) for _ in range(rows)
        ]
        self.length = length

    def config(self, rewrite: bool, **changes) -> RetrospectiveConfig:
        return RetrospectiveConfig(threshold=0.5, rewrite_query=rewrite, total_attempts=200, **changes)

    def released(self, index: int, rewrite: bool):
        script = self.make(index)
        return released_loop(
            self.model,
            self.processor,
            self.images[index],
            self.prompts[index],
            self.config(rewrite),
            self.grammar,
            logits_processor=lambda n: LogitsProcessorList([_Force(script, n)]),
            verdict=lambda p, before: script.verdict(len(before)),
        )

    def ours(self, indices: list[int], rewrite: bool, **changes):
        sampler = ScriptSampler({str(i): self.make(i) for i in indices})
        images, prompts = [self.images[i] for i in indices], [self.prompts[i] for i in indices]
        batch = PromptBatch(self.model, self.processor, images, prompts, indices)
        config = self.config(rewrite, **changes)
        return decode(batch, Retrospective, config, batch_size=len(indices), sampler=sampler)

    def generate(self, indices: list[int]):
        texts = [prompting.render(self.processor, self.prompts[i], 1) for i in indices]
        inputs = encode_batch(self.model, self.processor, texts, [[self.images[i]] for i in indices])
        out = self.model.generate(**inputs, max_new_tokens=self.length, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    def plain(self, indices: list[int]):
        return generate_plain(
            self.model,
            self.processor,
            [self.images[i] for i in indices],
            [self.prompts[i] for i in indices],
            SamplingConfig(max_new_tokens=self.length),
            batch_size=len(indices),
        )

    def typical(self, indices: list[int]) -> int:
        """The answer whose number of phrases is nearest the mean."""
        phrases = {i: len(self.make(i).close_of) for i in indices}
        mean = statistics.mean(phrases.values())
        return min(indices, key=lambda i: abs(phrases[i] - mean))

    def check(self, rewrite: bool, indices: list[int]) -> None:
        """Raises AssertionError: the two sides decided differently, or ours with and without replacement."""
        replaced = self.ours(indices, rewrite, without_replacement=False)
        for index, answer, twin in zip(indices, self.ours(indices, rewrite), replaced, strict=True):
            other = self.released(index, rewrite)
            mine = [e["text"] for e in answer.trace if e["kind"] == "reject"]
            same = mine == other.rejected and answer.tagged_text == self.grammar.decode(other.ids)
            if not (same and answer.ok and other.ok and answer.trace == twin.trace):
                raise AssertionError(f"row {index}: the two sides decided differently")


def run(*, rows: int = 16, repeats: int = 3, failures: int = 3, length: int = 64) -> dict:
    """Wall-time ratios and work counts.

    Args:
        rows: answers per batch; the released loop runs one by one: it is timed on one typical answer and scaled.
        repeats: rounds; the sides alternate, in turned order every other round. A ratio is that of the two sides'
            quickest rounds: on a busy machine the others measure the neighbours.

    Returns:
        `{"ratios": {released_over_ours_batch1, released_over_ours_batch16, released_over_ours_batch16_rewriting,
        ours_over_generate, ...}, "cpu_time_ratios": the same from CPU time, "counts": {...}, "seconds": {...},
        "settings": {...}}`
    """
    bench = _Bench(rows, failures, length)
    everyone = list(range(rows))
    for rewrite in (False, True):
        bench.check(rewrite, everyone[:3])  # also warms both sides up
    texts = [a.tagged_text for a in bench.plain(everyone)]
    if texts != [bench.grammar.decode(ids) for ids in bench.generate(everyone)]:
        raise AssertionError("plain decoding and model.generate gave different tokens")
    one = bench.typical(everyone)
    sides = {
        "released": lambda: bench.released(one, False),
        "ours_batch1": lambda: bench.ours([one], False),
        "released_rewriting": lambda: bench.released(one, True),
        "ours_batch1_rewriting": lambda: bench.ours([one], True),
        "ours_batch": lambda: bench.ours(everyone, False),
        "ours_batch_rewriting": lambda: bench.ours(everyone, True),
        "ours_batch1_replaced": lambda: bench.ours([one], False, without_replacement=False),
        "ours_batch_replaced": lambda: bench.ours(everyone, False, without_replacement=False),
        "generate_batch1": lambda: bench.generate([one]),
        "plain_batch1": lambda: bench.plain([one]),
        "generate_batch": lambda: bench.generate(everyone),
        "plain_batch": lambda: bench.plain(everyone),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            # the short sides are as cheap as they are noisy
            for _ in range(4 if name.startswith(("generate", "plain", "ours_batch1")) else 1):
                wall, busy = time.perf_counter(), time.process_time()
                sides[name]()
                seconds[name].append(time.perf_counter() - wall)
                cpu[name].append(time.process_time() - busy)
    return {
        "ratios": _ratios(seconds, rows),
        "cpu_time_ratios": _ratios(cpu, rows),
        "counts": _counts(bench, everyone),
        "seconds": {name: min(values) for name, values in seconds.items()},
        "settings": {"rows": rows, "repeats": repeats, "failures": failures, "length": length},
    }


def _ratios(seconds: dict[str, list[float]], rows: int) -> dict[str, float]:
    def ratio(above: str, below: str, scale: float = 1.0) -> float:
        return round(scale * min(seconds[above]) / min(seconds[below]), 3)

    alone, batched = ratio("plain_batch1", "generate_batch1"), ratio("plain_batch", "generate_batch")
    return {
        "released_over_ours_batch1": ratio("released", "ours_batch1"),
        "released_over_ours_batch16": ratio("released", "ours_batch", rows),
        "released_over_ours_batch1_rewriting": ratio("released_rewriting", "ours_batch1_rewriting"),
        "released_over_ours_batch16_rewriting": ratio("released_rewriting", "ours_batch_rewriting", rows),
        "without_over_with_replacement_batch1": ratio("ours_batch1", "ours_batch1_replaced"),
        "without_over_with_replacement_batch16": ratio("ours_batch", "ours_batch_replaced"),
        "ours_over_generate": max(alone, batched),
        "ours_over_generate_batch1": alone,
        "ours_over_generate_batch16": batched,
    }


def _counts(bench: _Bench, everyone: list[int]) -> dict[str, dict[str, float]]:
    counts: dict[str, dict[str, float]] = {}
    for rewrite in (False, True):
        answers = [a.counts for a in bench.ours(everyone, rewrite)]
        kept = sum(c.tokens_kept for c in answers)
        suffix = "_rewriting" if rewrite else ""
        counts["ours" + suffix] = {
            "tokens_forwarded_per_kept_token": round(sum(c.tokens_forwarded for c in answers) / kept, 3),
            "forwards_per_answer": round(sum(c.forwards for c in answers) / len(answers), 3),
            "image_encodes_per_answer": sum(c.image_encodes for c in answers) / len(answers),
        }
        other = bench.released(0, rewrite)
        counts["released" + suffix] = {
            "tokens_forwarded_per_kept_token": round(other.tokens_forwarded / len(other.ids), 3),
            "forwards_per_answer": other.forwards,
            "image_encodes_per_answer": other.image_encodes,
        }
    return counts


if __name__ == "__main__":
    main(__file__, run)
