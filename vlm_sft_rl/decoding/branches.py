"""Several questions about one image on one prefill of it: the questions branch off behind the image tokens.

A loop that asks about the same picture again and again (describe a region, find what was described, score a
description) pays for the image once. Rows are kept in a rewinding cache: a question is the text behind the image, so
asking another one is a rewind to the end of the image and one short forward pass.
"""

from collections.abc import Sequence
from typing import Any

import torch

from ..data import chat
from ..errors import NotFinite, UserError
from ..models.parts import unwrap
from .cache import Chunk, RewindBackend, prefill
from .capabilities import rewind_obstacle, rewindable_attention
from .generate import encode_batch
from .sampling import DistinctSampling, Sampler, Sampling, not_finite


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
        tails: the tokens of each prompt behind its image; prefixes: the number of those up to its end.
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
        self.model, self.temperature = model, temperature
        self.ends = chat.end_ids(unwrap(model), chat.get_tokenizer(processor))
        suppress = chat.suppressed_ids(unwrap(model), chat.get_tokenizer(processor), self.ends)
        self.sampler = sampler or Sampler(suppress=suppress)
        self.tails = [chat.tail_ids(processor, prompt) for prompt in prompts]
        with torch.inference_mode(), rewindable_attention(model):
            if inputs is None:
                inputs = encode_batch(model, processor, prompts, [[image] for image in images])
            start = prefill(model, inputs)
            self.backend = RewindBackend(model)
            self.backend.add(start)
        self.prefixes = [len(ids) - len(tail) for ids, tail in zip(start.prompts, self.tails, strict=True)]
        if [ids[n:] for ids, n in zip(start.prompts, self.prefixes, strict=True)] != self.tails:
            raise UserError(
                f"{type(processor).__name__} changes the text behind the image, so that questions cannot share "
                "it. Please report this family."
            )
        # of the prefilled questions, until another one is read
        self.logits: torch.Tensor | None = start.logits
        self.guessed: list[list[torch.Tensor]] = []
        self.forwards, self.image_encodes = 1, 0 if "mm_encoder_outputs" in inputs else len(images)

    @torch.inference_mode()
    def ask(
        self,
        questions: Sequence[Sequence[list[int]]],
        draws: Sequence[Sequence[Sampling | DistinctSampling]],
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
            rows = self._branch(questions)
            tails, samplings = _flat(questions, rows), _flat(draws, rows)
            hints: list[list[int]] = [[] for _ in rows]
            if guesses is not None:
                hints = [
                    [] if sampling.temperature > 0 else guess[:max_new_tokens]
                    for guess, sampling in zip(_flat(guesses, rows), samplings, strict=True)
                ]
            answers, scores = self._start(
                rows, tails, samplings, hints, max_new_tokens, min_new_tokens, judge
            )
            self.guessed = _nested(scores, rows) if judge else []
            while True:
                live = [
                    row
                    for row, answer in enumerate(answers)
                    if answer[-1] not in self.ends and len(answer) < max_new_tokens
                ]
                if not live:
                    break
                tokens: list[int | None] = [None] * len(rows)
                for row in live:
                    tokens[row] = answers[row][-1]
                logits = self.backend.decode(tokens)[live]
                self.forwards += 1
                self._forbid_ends(logits, [len(answers[row]) < min_new_tokens for row in live])
                length = max(len(answers[row]) for row in live)
                chosen = self._choose(logits, [samplings[row] for row in live], length)
                for row, token in zip(live, chosen, strict=True):
                    answers[row].append(token)
            self._prune()
        return _nested(answers, rows)

    def _start(
        self,
        rows: list[tuple[int, int]],
        tails: list[list[int]],
        samplings: list[Sampling],
        guesses: list[list[int]],
        max_new_tokens: int,
        min_new_tokens: int,
        judge: bool,
    ) -> tuple[list[list[int]], list[torch.Tensor]]:
        """Read the questions; the first token of every answer, and before it as much of its guess as is right; and the
        guesses' log-probabilities."""
        # what follows the last token of a whole answer is not asked for
        reads = [
            guess[:-1] if guess and (guess[-1] in self.ends or len(guess) >= max_new_tokens) else guess
            for guess in guesses
        ]
        if self.logits is not None and tails == self.tails and not any(guesses):
            logits = self.logits[:, None]
        else:
            chunks = [tail + read for tail, read in zip(tails, reads, strict=True)]
            logits = self._extend(rows, chunks, 1 + max(map(len, reads)))
        self.logits = None
        widths = [1 + len(read) for read in reads]
        # rows end together, so a row's guess begins where its length says
        logits = torch.cat([row[len(row) - width :] for row, width in zip(logits, widths, strict=True)])
        self._forbid_ends(logits, [place < min_new_tokens for width in widths for place in range(width)])
        pairs = zip(logits.split(widths), guesses, strict=True)
        scores = [self._judge(*pair) for pair in pairs] if judge else []
        draws = [sampling for sampling, width in zip(samplings, widths, strict=True) for _ in range(width)]
        chosen = iter(self._choose(logits, draws, 0))
        answers = []
        for row, read in enumerate(reads):
            tokens = [next(chosen) for _ in range(widths[row])]
            wrong = (i for i, token in enumerate(read) if token != tokens[i] or token in self.ends)
            right = next(wrong, len(read))
            answers.append(tokens[: right + 1])
            self.backend.rewind(row, self.backend.lengths[row] - len(read) + right)
        return answers, scores

    @torch.inference_mode()
    def score(
        self,
        questions: Sequence[Sequence[list[int]]],
        answers: Sequence[Sequence[list[int]]],
        min_new_tokens: int = 0,
    ) -> list[list[torch.Tensor]]:
        """Log-probabilities (float32) of every token of the answers, in one forward pass for all.

        The softmax is over what `ask` may say with the same `min_new_tokens`: without the sampler's `suppress`, and without
        the ends among the first tokens.
        """
        with rewindable_attention(self.model):
            rows = self._branch(questions)
            texts = _flat(answers, rows)
            # the last token of an answer predicts nothing that is asked for
            chunks = [tail + ids[:-1] for tail, ids in zip(_flat(questions, rows), texts, strict=True)]
            keep = min(max(map(len, texts)), max(map(len, chunks)))
            scores = []
            for logits, ids in zip(self._extend(rows, chunks, keep), texts, strict=True):
                logits = logits[len(logits) - len(ids) :]
                self._forbid_ends(logits, [place < min_new_tokens for place in range(len(ids))])
                scores.append(self._judge(logits, ids))
            self._prune()
        return _nested(scores, rows)

    def _branch(self, questions: Sequence[Sequence]) -> list[tuple[int, int]]:
        """A row of the cache for every question: (image, number of its question), each image's first before the others."""
        if not all(questions):
            raise ValueError("every image needs at least one question")
        rows = [(image, 0) for image in range(len(questions))]
        rows += [(image, k) for image, tails in enumerate(questions) for k in range(1, len(tails))]
        self.backend.reserve(len(rows))
        for image, _ in rows[len(questions) :]:
            self.backend.rewind(image, self.prefixes[image])
            self.backend.fork(image)
            self.logits = None
        return rows

    def _extend(self, rows: list[tuple[int, int]], texts: list[list[int]], keep: int) -> torch.Tensor:
        """Hang texts behind the images; the logits of their last `keep` tokens, `(rows, keep, vocabulary)`."""
        for row, (image, _) in enumerate(rows):
            self.backend.rewind(row, self.prefixes[image])
        self.forwards += 1
        return self.backend.extend_keeping([Chunk(row, text) for row, text in enumerate(texts)], keep)

    def _choose(
        self, logits: torch.Tensor, draws: list[Sampling | DistinctSampling], length: int
    ) -> list[int]:
        """The next tokens of answers that have up to `length`. Raises NotFinite: the logits are no numbers."""
        try:
            tokens = self.sampler.choose(logits, draws)
        except NotFinite as error:
            raise not_finite(f"questions about {len(self.prefixes)} images, token {length + 1}") from error
        distinct = [row for row, draw in enumerate(draws) if isinstance(draw, DistinctSampling)]
        if distinct:
            tries, drawn = [draws[row].tried for row in distinct], [tokens[row] for row in distinct]
            self.sampler.weigh(logits[distinct], tries, [draws[row].temperature for row in distinct], drawn)
            for tried, token in zip(tries, drawn, strict=True):
                tried.step(token)
        return tokens

    def _forbid_ends(self, logits: torch.Tensor, early: list[bool]) -> None:
        rows = [row for row, is_early in enumerate(early) if is_early]
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


def _flat(nested: Sequence[Sequence], rows: list[tuple[int, int]]) -> list:
    return [nested[image][number] for image, number in rows]


def _nested(flat: list, rows: list[tuple[int, int]]) -> list[list]:
    nested: list[list] = []
    for (image, _), value in zip(rows, flat, strict=True):
        if image == len(nested):
            nested.append([])
        nested[image].append(value)
    return nested
