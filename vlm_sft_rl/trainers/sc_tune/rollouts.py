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
from ...decoding.sampling import GREEDY, DistinctSampling, Sampler, Sampling, row_rng
from ...decoding.tried import weights
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
from .batches import ImagePrefix, Suppressed, image_prefixes
from .frozen import FrozenCopy

logger = logging.get_logger(__name__)
Box = tuple[float, float, float, float]


@dataclass
class Description:
    """One description of one box: its tokens (end of turn included where produced), its text, where it led.

    `probability`: as a first draw, where draws are without replacement, and `weight`: for how many of `num_generations`
    independent draws it then stands.
    `verdict` is what a retrospective describer says of its phrases, see `Answer.verdict`; None of a plain one.
    `reference` are its tokens' log-probabilities by the anchor of KL; None where there is no KL, or where the anchor still
    is the live model, whose log-probabilities they then are.
    """

    ids: list[int]
    text: str
    located: Box | None = None
    reference: torch.Tensor | None = None
    verdict: str | None = None
    weight: float = 1.0
    probability: float | None = None


@dataclass
class Rollout:
    """Everything about one box.

    Attributes:
        prefix: the image as it was opened, where no update changes what is made of it.
        samples: the sampled descriptions; greedy: the one that is the baseline, if any.
        boxes: where each text led that was asked about.
    """

    row: dict
    prefix: ImagePrefix | None = None
    samples: list[Description] = field(default_factory=list)
    greedy: Description | None = None
    boxes: dict[str, Box | None] = field(default_factory=dict)

    @property
    def descriptions(self) -> list[Description]:
        return [*self.samples, self.greedy] if self.greedy else self.samples


@dataclass
class _Opened:
    """Boxes that are decoded side by side, their rendered prompts, and the processor's tensors; where their images are
    encoded, without the pixels."""

    rollouts: list[Rollout]
    prompts: list[str]
    inputs: dict[str, Any]


class Rollouts:
    """Decodes for `SCTuneTrainer`.

    Args:
        args: an `SCTuneConfig`.
        retrospective: fields of `RetrospectiveConfig` that `args` does not have.

    Attributes:
        image_encodes: images encoded so far.
        takes_images: whether the model is given encoded images; None: not yet known.
    """

    def __init__(
        self, processor, prompts: RegionPrompts, args, retrospective: Mapping[str, Any] | None = None
    ):
        self.processor, self.prompts, self.args = processor, prompts, args
        self.verifies = args.describer == "retrospective"
        self._retrospective_settings = dict(retrospective or {})
        if self.verifies:
            self.retrospective_config(args.temperature)  # what cannot be is refused now
        # tokens of a description before which it cannot end
        self.least_tokens = 0 if self.verifies else args.min_new_tokens
        self.image_encodes = 0
        self.takes_images: bool | None = None

    def retrospective_config(self, temperature: float) -> RetrospectiveConfig:
        """Raises UserError: the checkpoint's sidecar names a setting that does not exist or cannot be."""
        settings = self._retrospective_settings | {
            "temperature": temperature,
            "max_new_tokens": self.args.describe_max_new_tokens,
            "top_k": self.args.top_k,
            "top_p": self.args.top_p,
            "seed": self.args.seed,
            # what is not verified is not to be learnt
            "on_exhausted": "finish",
        }
        return configured(RetrospectiveConfig, settings, "`decoding` in the checkpoint's vlm_sft_rl.json")

    def suppressed(self, model) -> Suppressed:
        """What a description cannot contain."""
        tokenizer, plain = self.processor.tokenizer, unwrap(model)
        ends = end_ids(plain, tokenizer)
        never = suppressed_ids(plain, tokenizer, ends)
        return Suppressed(sorted(never), sorted(ends), self.least_tokens)

    def describer(
        self, model, rows: list[dict], frozen: FrozenCopy, anchor: FrozenCopy | None, step: int
    ) -> list[Rollout]:
        """Sampled descriptions by the live model, located by the frozen copy, with the baseline and KL reference.

        Args:
            anchor: KL is measured against it; None: against the frozen copy.
            step: with the row's id it seeds the sampling, so nothing depends on batches, processes or restarts.
        """
        # a network that still is the live one needs no passes of its own: KL to it is 0
        needs_reference = bool(self.args.kl_coef) and not (anchor or frozen).equals_live()
        by_frozen = needs_reference and anchor is None
        rollouts = []
        for opened in self._opened(model, rows):
            self._sample(model, opened, step)
            with frozen.active():
                branches = self._branches(model, opened)
                if self.args.baseline == "greedy":
                    self._greedy_baseline(model, branches, opened, by_frozen)
                self._locate(branches, opened.rollouts)
                if by_frozen:
                    self._score(branches, opened.rollouts)
            if needs_reference and anchor is not None:
                with anchor.active():
                    self._score(self._branches(model, opened), opened.rollouts)
            rollouts += opened.rollouts
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
            locate: also where they lead; `expressions`: and where the rows' own expressions lead (in `boxes`).
        """
        rollouts = []
        for opened in self._opened(model, rows):
            with copy.active() if copy is not None else nullcontext():
                branches = self._branches(model, opened)
                for rollout, caption in zip(
                    opened.rollouts, self._greedy(model, branches, opened), strict=True
                ):
                    rollout.samples = [caption]
                if locate:
                    # rows of an evaluation are decoded without guesses: what is measured owes nothing to the answer
                    self._locate(branches, opened.rollouts, expressions=expressions, guess=copy is not None)
            rollouts += opened.rollouts
        return rollouts

    def warn_of_cut_boxes(self, rows: Sequence[dict]) -> None:
        """Says so where `locate_max_new_tokens` is too short for these rows' own boxes."""
        limit, longest = self.args.locate_max_new_tokens, max(len(self._target(row)) for row in rows)
        if longest > limit:
            logger.warning(
                f"`locate_max_new_tokens: {limit}`: the first rows' own boxes take up to {longest} tokens as "
                f"{self.prompts.convention.name!r} writes them. Boxes that are cut off cannot be read and earn nothing: "
                "raise the limit."
            )

    def _opened(self, model, rows: list[dict]) -> Iterator[_Opened]:
        """The rows, `rollout_batch_size` at a time."""
        size = self.args.rollout_batch_size or len(rows)
        for part in (rows[i : i + size] for i in range(0, len(rows), size)):
            prompts = [self.prompts.describe(row) for row in part]
            inputs = encode_batch(model, self.processor, prompts, [[row["picture"]] for row in part])
            images = self._encode(model, inputs, len(part))
            if images is None:
                yield _Opened([Rollout(row) for row in part], prompts, inputs)
                continue
            self.image_encodes += len(part)
            tails = [self.prompts.describe_tail(row) for row in part]
            prefixes = image_prefixes(inputs, tails, images)
            # pixels are not read again, and are larger than the features
            inputs = {name: value for name, value in inputs.items() if not is_pixels(name)}
            yield _Opened([Rollout(*pair) for pair in zip(part, prefixes, strict=True)], prompts, inputs)

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

    def _branches(self, model, opened: _Opened) -> ImageBranches:
        suppress = self.suppressed(model).never
        sampler = Sampler(top_k=self.args.top_k, top_p=self.args.top_p, suppress=suppress)
        images = [r.prefix.image for r in opened.rollouts if r.prefix is not None]
        inputs = with_images(model, opened.inputs, images) if images else opened.inputs
        pictures = [r.row["picture"] for r in opened.rollouts]
        temperature = self.args.temperature
        branches = ImageBranches(
            model, self.processor, pictures, opened.prompts, sampler, inputs, temperature
        )
        self.image_encodes += branches.image_encodes
        return branches

    def _sample(self, model, opened: _Opened, step: int) -> None:
        """`num_generations` sampled descriptions a box by the live model, and its greedy one where that is the baseline."""
        args, with_greedy = self.args, self.args.baseline == "greedy_live"
        keys = [
            [f"{step}\x1f{r.row['id']}\x1f{g}" for g in range(args.num_generations)] for r in opened.rollouts
        ]
        if self.verifies:
            samples = self._retrospective(model, opened, keys, args.temperature)
            if with_greedy:
                greedy = self._retrospective(model, opened, [[f"greedy\x1f{row[0]}"] for row in keys], 0.0)
                samples = [[*row, *last] for row, last in zip(samples, greedy, strict=True)]
        elif args.without_replacement:
            samples = self._distinct(self._branches(model, opened), keys, with_greedy)
        else:
            choices = [
                [Sampling(args.temperature, row_rng(args.seed, key)) for key in row] + [GREEDY] * with_greedy
                for row in keys
            ]
            samples = self._ask(self._branches(model, opened), choices)
        for rollout, row in zip(opened.rollouts, samples, strict=True):
            rollout.greedy = row.pop() if with_greedy else None
            rollout.samples = row

    def _distinct(
        self, branches: ImageBranches, keys: list[list[str]], with_greedy: bool
    ) -> list[list[Description]]:
        """Descriptions of each box, drawn one behind the other without replacement and weighted; fewer than `keys` where the
        sampling allows no others. With `with_greedy` each box's greedy one behind them."""
        args = self.args
        draws = [DistinctSampling(args.temperature) for _ in keys]
        samples: list[list[Description]] = [[] for _ in keys]
        greedy: list[list[Description]] = [[] for _ in keys]
        for number in range(args.num_generations):
            live = [not draw.exhausted for draw in draws]
            if not any(live):
                break
            for draw, row in zip(draws, keys, strict=True):
                draw.rng = row_rng(args.seed, row[number])
            further = [GREEDY] * (with_greedy and number == 0)
            # every image is asked something: of a box without further descriptions the answer is dropped
            choices = [[draw if more else GREEDY, *further] for draw, more in zip(draws, live, strict=True)]
            for i, (description, *last) in enumerate(self._ask(branches, choices)):
                greedy[i] += last
                if live[i]:
                    samples[i].append(description)
                    description.probability = draws[i].end(description.ids)
        for row in samples:
            shares = weights([description.probability for description in row])
            for description, share in zip(row, shares, strict=True):
                description.weight = share * args.num_generations
        return [[*row, *last] for row, last in zip(samples, greedy, strict=True)]

    def _greedy_baseline(self, model, branches: ImageBranches, opened: _Opened, score: bool) -> None:
        """The frozen copy's greedy descriptions; with `score` also its judgement of the samples that were guessed."""
        # what is sampled mostly is what greedy decoding gives, or begins so
        guesses = [list(mode(tuple(sample.ids) for sample in r.samples)) for r in opened.rollouts]
        greedy = self._greedy(model, branches, opened, guesses, score)
        for rollout, description in zip(opened.rollouts, greedy, strict=True):
            rollout.greedy = description
        if branches.guessed:
            # the pass that read a guess judged it: a sample that was the guess needs no pass of its own
            for rollout, guess, (log_probs,) in zip(opened.rollouts, guesses, branches.guessed, strict=True):
                for sample in rollout.samples:
                    sample.reference = log_probs if sample.ids == guess else None

    def _greedy(
        self, model, branches: ImageBranches, opened: _Opened, guesses=None, judge: bool = False
    ) -> list[Description]:
        if self.verifies:
            keys = [[f"greedy\x1f{r.row['id']}"] for r in opened.rollouts]
            descriptions = self._retrospective(model, opened, keys, 0.0)
        else:
            guesses = guesses and [[guess] for guess in guesses]
            descriptions = self._ask(branches, [[GREEDY]] * len(opened.rollouts), guesses, judge)
        return [row[0] for row in descriptions]

    def _ask(
        self,
        branches: ImageBranches,
        choices: list[list[Sampling | DistinctSampling]],
        guesses=None,
        judge: bool = False,
    ) -> list[list[Description]]:
        """A description for each of a box's `choices` of tokens."""
        tails = [[tail] * len(row) for tail, row in zip(branches.tails, choices, strict=True)]
        limit = self.args.describe_max_new_tokens
        answers = branches.ask(tails, choices, limit, self.least_tokens, guesses, judge)
        decode = self.processor.tokenizer.decode
        return [
            [Description(ids, decode(ids, skip_special_tokens=True).strip()) for ids in row]
            for row in answers
        ]

    def _retrospective(
        self, model, opened: _Opened, keys: list[list[str]], temperature: float
    ) -> list[list[Description]]:
        """Descriptions whose phrases were resampled until they were verified or attempts ran out (`verdict` says which, or
        that there was no phrase), one for each of a box's `keys`; the tokens kept are the ones that are trained."""
        count = len(keys[0])
        rows = [r.row for r in opened.rollouts for _ in range(count)]
        answers = generate_retrospective(
            model,
            self.processor,
            [row["picture"] for row in rows],
            [self.prompts.describe_question(row) for row in rows],
            self.retrospective_config(temperature),
            ids=[key for row in keys for key in row],
            batch_size=max(1, len(rows)),
        )
        descriptions = []
        for answer, row in zip(answers, rows, strict=True):
            ids = self.prompts.answer_ids(answer.tagged_text, row)
            ended = any(event["kind"] == "finish" and event["reason"] == "end" for event in answer.trace)
            # what was cut off did not end, and is not to be taught to
            ids = ids if ended or len(ids) == 1 else ids[:-1]
            descriptions.append(Description(ids, answer.text.strip(), verdict=answer.verdict))
        return [descriptions[i : i + count] for i in range(0, len(descriptions), count)]

    def _locate(
        self,
        branches: ImageBranches,
        rollouts: list[Rollout],
        *,
        expressions: bool = False,
        guess: bool = True,
    ) -> None:
        """Ask for the box of every description; equal descriptions of one box are asked about once.

        Args:
            guess: the box itself is what a good locator answers, or begins with; guesses change no answer.
        """
        texts = []
        for rollout in rollouts:
            more = (rollout.row.get("expressions") or []) if expressions else []
            texts.append(list(dict.fromkeys([*(d.text for d in rollout.descriptions), *more])))
        tails = [[self.prompts.locate_tail(text) for text in row] for row in texts]
        guesses = None
        if guess:
            guesses = [[self._target(r.row)] * len(row) for r, row in zip(rollouts, texts, strict=True)]
        limit = self.args.locate_max_new_tokens
        answers = branches.ask(tails, [[GREEDY] * len(row) for row in texts], limit, guesses=guesses)
        for rollout, row, ids in zip(rollouts, texts, answers, strict=True):
            boxes = [self.prompts.located(answer, rollout.row) for answer in ids]
            rollout.boxes = dict(zip(row, boxes, strict=True))
            for description in rollout.descriptions:
                description.located = rollout.boxes[description.text]

    def _target(self, row: dict) -> list[int]:
        """The ids of the row's own box."""
        return self.prompts.target(STAND_IN, row["box"], (row["width"], row["height"]), row["resized"]).answer

    def _score(self, branches: ImageBranches, rollouts: list[Rollout]) -> None:
        """Log-probabilities of the samples by the network that `branches` belong to."""
        if all(sample.reference is not None for r in rollouts for sample in r.samples):
            return
        tails = [[tail] * len(r.samples) for tail, r in zip(branches.tails, rollouts, strict=True)]
        answers = [[sample.ids for sample in r.samples] for r in rollouts]
        for rollout, scores in zip(rollouts, branches.score(tails, answers, self.least_tokens), strict=True):
            for sample, log_probs in zip(rollout.samples, scores, strict=True):
                sample.reference = log_probs


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
        caption, box = rollout.samples[0], rollout.row["box"]
        overlap = iou(caption.located, box)
        yield "iou", overlap
        yield "acc50", float(overlap >= 0.5)
        yield "parse_rate", float(caption.located is not None)
        yield "leak_rate", float(leaks(caption.text))
        yield "length", float(len(caption.ids))
        for text in rollout.row.get("expressions") or ():
            yield "rec_acc50", float(iou(rollout.boxes[text], box) >= 0.5)
