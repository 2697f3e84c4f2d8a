"""Rollouts of the describer-locator loop: the one place where a trainer decodes.

Per box and network there is one prefill of the image; sampled and greedy descriptions, their re-locations and the
reference log-probabilities branch off from it (`decoding.branches`). The released code makes four separate `generate`
calls and as many scoring passes, each of which encodes the image again. Where the tower is not trained, the image is
encoded once for all networks, and for the updates that follow (`models.images`). A retrospective describer opens its
images by itself.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import mode
from typing import Any

import torch
from transformers.utils import logging

from ...data.chat import end_ids, suppressed_ids
from ...decoding.branches import ImageBranches
from ...decoding.config import RetrospectiveConfig
from ...decoding.generate import encode_batch, generate_retrospective
from ...decoding.sampling import GREEDY, Sampler, Sampling, row_rng
from ...models.images import (
    EncodedImage,
    encode_images,
    is_pixels,
    takes_images,
    trained_projectors,
    with_images,
)
from ...models.parts import unwrap
from ...models.regions import STAND_IN, RegionPrompts
from ...rewards.regions import iou
from ...settings import configured
from .batches import ImagePrefix, image_prefixes
from .frozen import FrozenCopy

logger = logging.get_logger(__name__)
Box = tuple[float, float, float, float]


@dataclass
class Description:
    """One description of one box: its tokens (end of turn included where produced), its text, where it led.

    `reference` are its tokens' log-probabilities by the anchor of KL; None where there is no KL, or where the anchor still
    is the live model, whose log-probabilities they then are.
    """

    ids: list[int]
    text: str
    located: Box | None = None
    reference: torch.Tensor | None = None


@dataclass
class Rollout:
    """Everything about one box: the sampled descriptions and the greedy one that is the baseline, if any.

    `prefix` is its image as it was opened, where no update changes what is made of it.
    """

    row: dict
    samples: list[Description]
    greedy: Description | None = None
    found: dict[str, Box | None] = field(default_factory=dict)
    prefix: ImagePrefix | None = None


@dataclass
class _Part:
    """Boxes that are decoded side by side: their rows, pictures, rendered prompts, and the processor's tensors; where their
    images are encoded, without the pixels."""

    rows: list[dict]
    pictures: list
    texts: list[str]
    inputs: dict[str, Any]
    prefixes: list[ImagePrefix | None]


class Rollouts:
    """Decodes for `SCTuneTrainer`.

    Args:
        args: an `SCTuneConfig`.
        retrospective: fields of `RetrospectiveConfig` that `args` does not have.
    """

    def __init__(
        self, processor, prompts: RegionPrompts, args, retrospective: Mapping[str, Any] | None = None
    ):
        self.processor, self.prompts, self.args = processor, prompts, args
        self.retrospective = dict(retrospective or {})
        if args.describer == "retrospective":
            self._retrospective_config(args.temperature)
        self.image_encodes = 0
        self.takes_images: bool | None = None  # not yet known

    @property
    def unended(self) -> int:
        """Tokens of a description before which it cannot end."""
        return 0 if self.args.describer == "retrospective" else self.args.min_new_tokens

    def barred(self, model) -> tuple[list[int], tuple[list[int], int]]:
        """What a description may not say, as `answer_log_probs` wants it: `(never, (the ends, not before))`."""
        ends = end_ids(unwrap(model), self.processor.tokenizer)
        never = suppressed_ids(unwrap(model), self.processor.tokenizer, ends)
        return sorted(never), (sorted(ends), self.unended)

    def describer(
        self, model, rows: list[dict], frozen: FrozenCopy, anchor: FrozenCopy | None, step: int
    ) -> list[Rollout]:
        """Sampled descriptions by the live model, located by the frozen copy, with the baseline and KL reference.

        Args:
            anchor: KL is measured against it; None: against the frozen copy.
            step: with the row's id it seeds the sampling, so nothing depends on batches, processes or restarts.
        """
        scored = bool(self.args.kl_coef) and not (anchor or frozen).equals_live()
        done = []
        for part in self._parts(rows):
            done += self._describer_part(model, part, frozen, anchor, step, scored)
        return done

    def _describer_part(self, model, rows, frozen, anchor, step, scored: bool) -> list[Rollout]:
        args = self.args
        part = self._open(model, rows)
        live = args.baseline == "greedy_live"
        described = self._describe(model, part, args.num_generations, live, step)
        rollouts = [
            Rollout(row, own[: args.num_generations], own[-1] if live else None, prefix=prefix)
            for row, own, prefix in zip(rows, described, part.prefixes, strict=True)
        ]
        with frozen.active():
            branches = self._branches(model, part)
            if args.baseline == "greedy":
                # what is sampled mostly is what greedy decoding gives, or begins so
                guesses = [list(mode(tuple(one.ids) for one in r.samples)) for r in rollouts]
                judge = scored and anchor is None
                greedy = self._greedy(model, branches, part, guesses, judge)
                for rollout, one in zip(rollouts, greedy, strict=True):
                    rollout.greedy = one
                if branches.guessed:
                    # the pass that read a guess judged it: a sample that was the guess needs no pass of its own
                    for rollout, guess, (found,) in zip(rollouts, guesses, branches.guessed, strict=True):
                        for one in rollout.samples:
                            one.reference = found if one.ids == guess else None
            self._locate(branches, rollouts)
            if scored and anchor is None:
                self._score(branches, rollouts)
        if scored and anchor is not None:
            with anchor.active():
                self._score(self._branches(model, part), rollouts)
        return rollouts

    def captions(
        self,
        model,
        rows: list[dict],
        copy: FrozenCopy | None,
        *,
        locate: bool,
        expressions: bool = False,
    ) -> list[Rollout]:
        """Greedy descriptions by the frozen copy, or (None) by the live model.

        Args:
            locate: also where they lead; `expressions`: and where the rows' own expressions lead (in `found`).
        """
        done = []
        for own in self._parts(rows):
            part = self._open(model, own)
            with copy.active() if copy is not None else nullcontext():
                branches = self._branches(model, part)
                said = self._greedy(model, branches, part)
                rollouts = [
                    Rollout(row, [one], prefix=prefix)
                    for row, one, prefix in zip(own, said, part.prefixes, strict=True)
                ]
                if locate:
                    # held-out boxes are no guess: what is measured is decoded without them
                    self._locate(branches, rollouts, expressions=expressions, guess=copy is not None)
            done += rollouts
        return done

    def _parts(self, rows: list[dict]):
        size = self.args.rollout_batch_size or len(rows)
        return [rows[i : i + size] for i in range(0, len(rows), size)]

    def _open(self, model, rows: list[dict]) -> _Part:
        pictures = [row["picture"] for row in rows]
        texts = [self.prompts.describe(row) for row in rows]
        inputs = encode_batch(model, self.processor, texts, [[picture] for picture in pictures])
        images = self._encode(model, inputs, len(rows))
        if images is None:
            return _Part(rows, pictures, texts, inputs, [None] * len(rows))
        self.image_encodes += len(rows)
        tails = [self.prompts.describe_tail(row) for row in rows]
        prefixes = image_prefixes(inputs, tails, images)
        # pixels are not read again, and are larger than the features
        inputs = {name: value for name, value in inputs.items() if not is_pixels(name)}
        return _Part(rows, pictures, texts, inputs, prefixes)

    def _encode(self, model, inputs: dict[str, Any], count: int) -> list[EncodedImage] | None:
        """The pictures' features, where every network and update may take the same; None elsewhere."""
        projectors = None if self.takes_images is False else trained_projectors(model)
        if projectors is None:
            return None
        plain = unwrap(model)
        images = encode_images(plain, inputs, count, projectors)
        if self.takes_images is None:
            self.takes_images = images is not None and takes_images(plain, inputs, images)
        return images if self.takes_images else None

    def _branches(self, model, part: _Part) -> ImageBranches:
        never, _ = self.barred(model)
        sampler = Sampler(top_k=self.args.top_k, top_p=self.args.top_p, suppress=never)
        images = [prefix.image for prefix in part.prefixes if prefix is not None]
        inputs = with_images(model, part.inputs, images) if images else part.inputs
        branches = ImageBranches(
            model, self.processor, part.pictures, part.texts, sampler, inputs, self.args.temperature
        )
        self.image_encodes += branches.image_encodes
        return branches

    def _describe(self, model, part: _Part, count: int, with_greedy: bool, step: int):
        """`count` sampled descriptions a row, then the greedy one if asked for."""
        args, rows, pictures = self.args, part.rows, part.pictures
        names = [[f"{step}\x1f{row['id']}\x1f{g}" for g in range(count)] for row in rows]
        if args.describer == "retrospective":
            sampled = self._retrospective(model, rows, pictures, count, args.temperature, names)
            if not with_greedy:
                return sampled
            greedy = self._retrospective(
                model, rows, pictures, 1, 0.0, [[f"greedy\x1f{n[0]}"] for n in names]
            )
            return [own + one for own, one in zip(sampled, greedy, strict=True)]
        branches = self._branches(model, part)
        draws = [
            [Sampling(args.temperature, row_rng(args.seed, name)) for name in own] + [GREEDY] * with_greedy
            for own in names
        ]
        tails = [[tail] * len(own) for tail, own in zip(branches.tails, draws, strict=True)]
        return self._answers(branches, tails, draws)

    def _greedy(self, model, branches, part: _Part, guesses=None, judge=False) -> list[Description]:
        if self.args.describer == "retrospective":
            names = [[f"greedy\x1f{row['id']}"] for row in part.rows]
            return [own[0] for own in self._retrospective(model, part.rows, part.pictures, 1, 0.0, names)]
        tails, guesses = [[tail] for tail in branches.tails], guesses and [[guess] for guess in guesses]
        return [own[0] for own in self._answers(branches, tails, [[GREEDY]] * len(part.rows), guesses, judge)]

    def _answers(
        self, branches: ImageBranches, tails, draws, guesses=None, judge=False
    ) -> list[list[Description]]:
        args = self.args
        said = branches.ask(tails, draws, args.describe_max_new_tokens, self.unended, guesses, judge)
        return [[Description(ids, self._text(ids)) for ids in own] for own in said]

    def _retrospective(self, model, rows, pictures, count, temperature, names) -> list[list[Description]]:
        """Descriptions in which every phrase was verified; the tokens kept are the ones that are trained."""
        config = self._retrospective_config(temperature)
        answers = generate_retrospective(
            model,
            self.processor,
            [picture for picture in pictures for _ in range(count)],
            [self.prompts.describe_question(row) for row in rows for _ in range(count)],
            config,
            ids=[name for own in names for name in own],
            batch_size=max(1, len(rows) * count),
        )
        made = []
        for answer, row in zip(answers, [row for row in rows for _ in range(count)], strict=True):
            ids = self.prompts.answer_ids(answer.tagged_text, row)
            ended = any(e["kind"] == "finish" and e["reason"] == "end" for e in answer.trace)
            # what was cut off did not end, and is not to be taught to
            made.append(Description(ids if ended or len(ids) == 1 else ids[:-1], answer.text.strip()))
        return [made[i : i + count] for i in range(0, len(made), count)]

    def _retrospective_config(self, temperature: float) -> RetrospectiveConfig:
        own = {
            "temperature": temperature,
            "max_new_tokens": self.args.describe_max_new_tokens,
            "top_k": self.args.top_k,
            "top_p": self.args.top_p,
            "seed": self.args.seed,
            # what is not verified is not to be learnt
            "on_exhausted": "finish",
        }
        where = "`decoding` in the checkpoint's vlm_sft_rl.json"
        return configured(RetrospectiveConfig, self.retrospective | own, where)

    def _locate(
        self,
        branches: ImageBranches,
        rollouts: list[Rollout],
        *,
        expressions: bool = False,
        guess: bool = True,
    ) -> None:
        """Ask for the box of every description; equal descriptions of one box are asked about once."""
        wanted = []
        for r in rollouts:
            texts = [d.text for d in [*r.samples, *([r.greedy] if r.greedy else [])]]
            if expressions:
                texts += r.row.get("expressions") or []
            wanted.append(list(dict.fromkeys(texts)))
        rows = [r.row for r in rollouts]
        found = self.locate(branches, rows, wanted, [self._target(row) for row in rows] if guess else None)
        for rollout, texts, boxes in zip(rollouts, wanted, found, strict=True):
            rollout.found = dict(zip(texts, boxes, strict=True))
            for one in [*rollout.samples, *([rollout.greedy] if rollout.greedy else [])]:
                one.located = rollout.found[one.text]

    def locate(
        self,
        branches: ImageBranches,
        rows: Sequence[dict],
        texts: Sequence[Sequence[str]],
        targets: Sequence[list[int]] | None = None,
    ) -> list[list[Box | None]]:
        """Where each text leads on its row's image. `targets`: per row, ids that are likely; they change no answer."""
        tails = [[self.prompts.locate_tail(text) for text in own] for own in texts]
        draws = [[GREEDY] * len(own) for own in texts]
        guesses = targets and [[ids] * len(own) for own, ids in zip(texts, targets, strict=True)]
        said = branches.ask(tails, draws, self.args.locate_max_new_tokens, guesses=guesses)
        return [[self.prompts.located(ids, row) for ids in own] for own, row in zip(said, rows, strict=True)]

    def warn_of_cut_boxes(self, rows: Sequence[dict]) -> None:
        """Says so where `locate_max_new_tokens` is too short for these rows' own boxes."""
        limit, longest = self.args.locate_max_new_tokens, max(len(self._target(row)) for row in rows)
        if longest > limit:
            logger.warning(
                f"`locate_max_new_tokens: {limit}`: the first rows' own boxes take up to {longest} tokens as "
                f"{self.prompts.convention.name!r} writes them. Boxes that are cut off cannot be read and earn nothing: "
                "raise the limit."
            )

    def _target(self, row: dict) -> list[int]:
        """The ids of the row's own box: a good locator's answer, or how it begins."""
        return self.prompts.target(STAND_IN, row["box"], (row["width"], row["height"]), row["resized"]).answer

    def _score(self, branches: ImageBranches, rollouts: list[Rollout]) -> None:
        samples = [rollout.samples for rollout in rollouts]
        if all(one.reference is not None for own in samples for one in own):
            return
        tails = [[tail] * len(own) for tail, own in zip(branches.tails, samples, strict=True)]
        scores = branches.score(tails, [[one.ids for one in own] for own in samples], self.unended)
        for own, found in zip(samples, scores, strict=True):
            for one, score in zip(own, found, strict=True):
                one.reference = score

    def _text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


# What held-out regions tell of a model: self-consistency, and REC where they have expressions.
FIGURES = ("iou", "acc50", "parse_rate", "leak_rate", "length", "rec_acc50")


def measured_on(rows: Iterable[dict]) -> list[str]:
    """The names of `FIGURES` that these rows give: `rec_acc50` needs `expressions`."""
    described = any(row.get("expressions") for row in rows)
    return [name for name in FIGURES if described or name != "rec_acc50"]


def figures_of(rollouts: Sequence[Rollout], leaks: Callable[[str], bool]) -> Iterator[tuple[str, float]]:
    """`(name of FIGURES, value)` of every region's greedy description, and of every expression for `rec_acc50`.

    A figure is the mean of its values. `rollouts` are those of `Rollouts.captions(locate=True, expressions=True)`.
    """
    for rollout in rollouts:
        one, box = rollout.samples[0], rollout.row["box"]
        overlap = iou(one.located, box)
        yield "iou", overlap
        yield "acc50", float(overlap >= 0.5)
        yield "parse_rate", float(one.located is not None)
        yield "leak_rate", float(leaks(one.text))
        yield "length", float(len(one.ids))
        for text in rollout.row.get("expressions") or ():
            yield "rec_acc50", float(iou(rollout.found[text], box) >= 0.5)
