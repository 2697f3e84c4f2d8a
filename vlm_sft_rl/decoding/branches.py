"""Several questions about one image on one prefill of it: the questions branch off behind the image tokens.

A loop that asks about the same picture again and again (describe a region, find what was described, score a
description) pays for the image once. Rows are kept in a rewinding cache: a question is the text behind the image, so
asking another one is a rewind to the end of the image and one short forward pass.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data import chat as prompting
from ..errors import UserError
from ..models.parts import unwrap
from .cache import Chunk, RewindBackend, prefill
from .capabilities import layer_windows, rewind_obstacle, rewindable_attention
from .generate import encode_batch
from .sampling import Sampler


@dataclass
class Sampling:
    """How one branch chooses its tokens: greedy at temperature 0, else from `rng`."""

    temperature: float = 0.0
    rng: random.Random | None = None


GREEDY = Sampling()


def check_branching(model) -> None:
    """Raises UserError when this model's cache cannot be rewound, with the reason."""
    with rewindable_attention(model):
        reason = rewind_obstacle(model)
    if reason is not None:
        raise UserError(f"{type(unwrap(model)).__name__} cannot share one prefill of an image: {reason}.")


class ImageBranches:
    """Images, prefilled once each; every call of `ask` or `score` hangs new questions behind them.

    Args:
        images: one PIL image a row.
        prompts: one rendered prompt a row (`data.chat.render`), the question that is prefilled with the image.
        sampler: its `suppress` should hold image and padding tokens; None makes a plain one.
        inputs: `encode_batch` of `images` and `prompts`, where it is at hand; encoded pictures may
            stand in it for the pixels (`models.images`).
        temperature: at which log-probabilities are taken; what is decoded has its own (`Sampling`).

    Attributes:
        forwards: forward passes of the language model so far; image_encodes: images encoded so far.
        guessed: of the last `ask` that judged guesses, per image and question, the log-probabilities of the guess's
            tokens, as `score` gives them; else empty.
    """

    def __init__(
        self,
        model,
        processor,
        images: list,
        prompts: list[str],
        sampler: Sampler | None = None,
        inputs: dict[str, Any] | None = None,
        temperature: float = 1.0,
    ):
        self.processor, self.temperature = processor, temperature
        self.ends = prompting.end_ids(unwrap(model), prompting.get_tokenizer(processor))
        suppress = prompting.suppressed_ids(unwrap(model), prompting.get_tokenizer(processor), self.ends)
        self.sampler = sampler or Sampler(suppress=suppress)
        self.tails = [prompting.tail_ids(processor, prompt) for prompt in prompts]
        with torch.inference_mode(), rewindable_attention(model):
            if inputs is None:
                inputs = encode_batch(model, processor, prompts, [[image] for image in images])
            start = prefill(model, inputs)
            self.backend = RewindBackend(model, layer_windows(model))
            self.backend.add(start, inputs)
        self.model = model
        self.logits: torch.Tensor | None = start.logits
        self.prefixes = []
        for ids, tail in zip(start.prompts, self.tails, strict=True):
            if ids[len(ids) - len(tail) :] != tail:
                raise UserError(
                    f"{type(processor).__name__} changes the text behind the image, so that questions cannot share "
                    "it. Please report this family."
                )
            self.prefixes.append(len(ids) - len(tail))
        self.guessed: list[list[torch.Tensor]] = []
        self.forwards, self.image_encodes = 1, 0 if "mm_encoder_outputs" in inputs else len(images)

    @torch.inference_mode()
    def ask(
        self,
        questions: Sequence[Sequence[list[int]]],
        draws: Sequence[Sequence[Sampling]],
        max_new_tokens: int,
        min_new_tokens: int = 0,
        guesses: Sequence[Sequence[list[int]]] | None = None,
        judge: bool = False,
    ) -> list[list[list[int]]]:
        """Decode an answer to every question.

        Args:
            questions: per image the tails (token ids behind the image) of its questions.
            draws: per image and question how tokens are chosen.
            min_new_tokens: no answer may end before it has this many tokens.
            guesses: per image and question what a greedy answer may well be. The pass that reads the question reads its
                guess too, and what greedy decoding would have chosen anyway is decoded already: answers are the same,
                passes are fewer. Nothing is guessed for sampled answers.
            judge: keep the log-probabilities of the guesses in `guessed`.

        Returns:
            per image and question the answer's ids, the end-of-turn token included where it was produced.
        """
        with rewindable_attention(self.model):
            owners = self._branch([len(own) for own in questions])
            tails, hows = _flat(questions, owners), _flat(draws, owners)
            guessed = _flat(guesses, owners) if guesses is not None else [[]] * len(tails)
            guessed = [
                [] if how.temperature > 0 else guess[:max_new_tokens]
                for guess, how in zip(guessed, hows, strict=True)
            ]
            answers, scores = self._start(tails, hows, guessed, max_new_tokens, min_new_tokens, owners, judge)
            self.guessed = _nested(scores, owners, len(questions)) if judge else []

            def unfinished(rows):
                return [
                    i for i in rows if answers[i][-1] not in self.ends and len(answers[i]) < max_new_tokens
                ]

            live = unfinished(range(len(tails)))
            while live:
                tokens: list[int | None] = [None] * len(tails)
                for i in live:
                    tokens[i] = answers[i][-1]
                logits = self.backend.decode(tokens)[live]
                self.forwards += 1
                self._forbid_ends(logits, [len(answers[i]) < min_new_tokens for i in live])
                chosen = self.sampler.choose(logits, [hows[i] for i in live])
                for i, token in zip(live, chosen, strict=True):
                    answers[i].append(token)
                live = unfinished(live)
            self._prune()
        return _nested(answers, owners, len(questions))

    @torch.inference_mode()
    def score(
        self,
        questions: Sequence[Sequence[list[int]]],
        answers: Sequence[Sequence[list[int]]],
        min_new_tokens: int = 0,
    ) -> list[list[torch.Tensor]]:
        """Log-probabilities (float32) of every token of given answers, in one forward pass for all.

        The softmax is over what `ask` may say with the same `min_new_tokens`: without the sampler's `suppress`, and without
        the ends among the first tokens.
        """
        with rewindable_attention(self.model):
            owners = self._branch([len(own) for own in questions])
            tails, said = _flat(questions, owners), _flat(answers, owners)
            keep = max(len(answer) for answer in said)
            # the last token of an answer predicts nothing that is asked for
            chunks = [
                Chunk(i, tail + answer[:-1]) for i, (tail, answer) in enumerate(zip(tails, said, strict=True))
            ]
            for row, owner in enumerate(owners):
                self.backend.rewind(row, self.prefixes[owner])
            logits = self.backend.extend_keeping(chunks, min(keep, max(len(c.tokens) for c in chunks)))
            self.forwards += 1
            found = []
            for row, answer in enumerate(said):
                own = logits[row, logits.shape[1] - len(answer) :]
                self._forbid_ends(own, [place < min_new_tokens for place in range(len(own))])
                found.append(self._judge(own, answer))
            self._prune()
        return _nested(found, owners, len(questions))

    def _branch(self, counts: list[int]) -> list[int]:
        """Make room for `counts[i]` questions about image i; returns whose row each is."""
        if min(counts) < 1:
            raise ValueError("every image needs at least one question")
        self.backend.reserve(sum(counts))
        owners = list(range(len(counts)))
        for image, count in enumerate(counts):
            for _ in range(count - 1):
                self.backend.rewind(image, self.prefixes[image])
                self.backend.fork(image)
                owners.append(image)
                self.logits = None
        return owners

    def _start(
        self,
        tails: list[list[int]],
        hows: list[Sampling],
        guesses: list[list[int]],
        max_new_tokens: int,
        min_new_tokens: int,
        owners: list[int],
        judge: bool,
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Read the questions; the first token of every answer, and before it as much of its guess as is right; and the
        guesses' log-probabilities."""
        # what follows the last token of a whole answer is not asked for
        read = [
            guess[:-1] if guess and (guess[-1] in self.ends or len(guess) >= max_new_tokens) else guess
            for guess in guesses
        ]
        if self.logits is not None and tails == self.tails and not any(guesses):
            logits = self.logits[:, None]
        else:
            for row, owner in enumerate(owners):
                self.backend.rewind(row, self.prefixes[owner])
            self.forwards += 1
            chunks = [Chunk(i, tail + own) for i, (tail, own) in enumerate(zip(tails, read, strict=True))]
            logits = self.backend.extend_keeping(chunks, 1 + max(map(len, read)))
        self.logits = None
        widths = [1 + len(own) for own in read]
        places = [(row, place) for row, width in enumerate(widths) for place in range(width)]
        # rows end together, so a row's guess begins where its length says
        columns = [place - widths[row] for row, place in places]
        logits = logits[[row for row, _ in places], columns]
        self._forbid_ends(logits, [place < min_new_tokens for _, place in places])
        parts = zip(logits.split(widths), guesses, strict=True)
        scores = [self._judge(part, guess) for part, guess in parts] if judge else []
        chosen = iter(self.sampler.choose(logits, [hows[row] for row, _ in places]))
        answers = []
        for row, own in enumerate(read):
            found = [next(chosen) for _ in range(widths[row])]
            right = next(
                (i for i, token in enumerate(own) if token != found[i] or token in self.ends), len(own)
            )
            answers.append(found[: right + 1])
            self.backend.rewind(row, self.backend.lengths[row] - len(own) + right)
        return answers, scores

    def _forbid_ends(self, logits: torch.Tensor, early: list[bool]) -> None:
        rows = [row for row, wanted in enumerate(early) if wanted]
        if rows:
            logits[torch.tensor(rows)[:, None], torch.tensor(sorted(self.ends))] = float("-inf")

    def _judge(self, logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
        """(tokens,) log-probabilities of `ids`, each predicted by the logits (at least tokens, vocabulary) at its place."""
        chosen = torch.tensor(ids, dtype=torch.long, device=logits.device)[:, None]
        scaled = self.sampler.masked(logits[: len(ids)]) / self.temperature
        return scaled.log_softmax(-1).gather(1, chosen).squeeze(1)

    def _prune(self) -> None:
        """Back to one row an image, each at the end of its image."""
        while len(self.backend.lengths) > len(self.prefixes):
            self.backend.remove(len(self.backend.lengths) - 1)
        for row, length in enumerate(self.prefixes):
            self.backend.rewind(row, length)


def _flat(nested: Sequence[Sequence], owners: list[int]) -> list:
    """Rows in the order of the cache: every image's first, then the forks."""
    seen = [0] * len(nested)
    flat = []
    for owner in owners:
        flat.append(nested[owner][seen[owner]])
        seen[owner] += 1
    return flat


def _nested(flat: list, owners: list[int], count: int) -> list[list]:
    nested: list[list] = [[] for _ in range(count)]
    for owner, value in zip(owners, flat, strict=True):
        nested[owner].append(value)
    return nested
