"""`SCTuneTrainer`: describer and locator teach each other in a closed loop (SC-Tune, arXiv 2403.13263)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from trl.trainer.utils import disable_dropout_in_model

from ...data.collators import RegionCollator, VisionCollator
from ...data.tags import NO_PHRASE, VERIFIED
from ...decoding.branches import check_branching
from ...errors import UserError
from ...models.boxes import convention_for
from ...models.load import load_model
from ...models.lora import with_token_rows
from ...models.parts import set_trainable, unwrap
from ...models.regions import RegionPrompts
from ...models.tokens import require_verification_tokens, row_count
from ...rewards.regions import Reward, check_weights, combine, iou, reward_named, spells_coordinates
from ..checks import check_first_rows
from . import policy
from .alternating import AlternatingTrainer, check_whole_weights
from .batches import (
    Completions,
    DrawnRow,
    ImagePrefix,
    RegionPreview,
    Suppressed,
    answer_log_probs,
    describing,
    draw_rows,
    from_collator,
    locating,
)
from .config import SCTuneConfig
from .rollouts import FIGURES, Description, Rollout, Rollouts, figures_of, measured_on


@dataclass
class _MicroBatch:
    """Descriptions that pass the model together.

    Attributes:
        rewards, baselines: (batch,).
        weights: (batch, 1), of the descriptions in the gradient; all 1 where draws are independent.
        old: (batch, tokens), log-probabilities by the weights that sampled; advantages: the same shape. Both are set in the
            first of a step's updates.
    """

    samples: list[Description]
    batch: Completions
    rewards: Tensor
    baselines: Tensor
    weights: Tensor
    old: Tensor | None = None
    advantages: Tensor | None = None

    def kl(self, log_probs: Tensor) -> Tensor:
        """(batch, tokens), to the anchor; exactly 0 where that still is the live model."""
        reference = log_probs.clone()
        for row, sample in zip(reference, self.samples, strict=True):
            if sample.reference is not None:
                row[: len(sample.ids)] = sample.reference
        return policy.token_kl(log_probs, reference, self.batch.mask)


class _Lesson(NamedTuple):
    """A box to locate by a description; `weight` is 0 or 1."""

    row: dict
    text: str
    prefix: ImagePrefix | None
    weight: float


class SCTuneTrainer(AlternatingTrainer):
    """Alternates describer steps (policy gradient) and locator steps (supervised) on boxes without any text.

    In a describer step the model describes each box (sampled), a frozen copy of it locates the description, and the
    IoU of the two boxes is the reward; the baseline is the IoU that the frozen copy's own greedy description earns. In
    a locator step the model learns to locate the frozen copy's greedy descriptions. When a phase ends the frozen copy
    becomes the live model and Adam starts anew.

    The base is TRL's base trainer over transformers' `Trainer`, not `GRPOTrainer`: a step here is one batch of boxes
    with several updates that may stop early, and a third of the steps are supervised. In `GRPOTrainer` generation,
    scoring, loss, sampler and scheduler would all be replaced, and they change from release to release. Here
    `training_step`, `evaluate`, the scheduler's factor by phase and the saving of the frozen copy are overridden.

    Args:
        model: a grounding VLM that can describe regions and locate descriptions, however badly; or its path, and then
            language model and projector are trained and the tower is not, as published. Of a model what requires gradients.
        args: an `SCTuneConfig`.
        data_collator: None makes a `RegionCollator` for paths relative to the current folder.
        train_dataset: region rows (see `vlm_sft_rl.data.collators`); no text is read.
        eval_dataset: region rows, or several sets by name; `evaluate` measures self-consistency on them, and REC where
            they have `expressions`.
        processing_class: the model's processor.
        reward_funcs: functions of TRL's protocol, or names; None takes `args.rewards`. They are given the columns of
            the rows, and `located`, the box that the description led to.
        rec_dataset: region rows with `expressions`, mixed into locator steps.
        replay_dataset: SFT rows (`messages` + `images`, see `vlm_sft_rl.data.rows`) mixed into locator steps, so that
            what they show is not forgotten. Their paths start where the collator's do.
        peft_config: LoRA settings; the frozen copy is then a copy of the adapter alone.

    Raises:
        UserError: settings, rows, or a model family that cannot work; before the first step.
    """

    _tag_names = ["trl", "sc-tune", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "SC-Tune"
    CONFIG = SCTuneConfig
    METHOD = "sc_tune"
    COLUMNS: ClassVar = {
        "describer/iou": "IoU",
        "describer/parse_rate": "boxes read",
        "describer/leak_rate": "leaks",
        "describer/kl": "KL",
        "describer/clip_fraction": "clipped",
        "locator/loss": "locator loss",
        "locator/kept": "kept",
    }

    def __init__(
        self,
        model,
        args: SCTuneConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | Sequence[dict] | None = None,
        eval_dataset=None,
        processing_class=None,
        reward_funcs: Sequence[Reward | str] | Reward | str | None = None,
        rec_dataset: Sequence[dict] | None = None,
        replay_dataset: Sequence[dict] | None = None,
        peft_config=None,
        callbacks=None,
        optimizers=(None, None),
    ):
        _, args, processor = self.begin(model, args, processing_class)
        check_whole_weights(args)
        if train_dataset is None or not len(train_dataset):
            raise UserError("`train_dataset` is missing or empty. Give it region rows.")
        if rec_dataset is not None and not all(row.get("expressions") for row in rec_dataset):
            raise UserError("`rec_file`: every row needs `expressions`.")
        if isinstance(model, str):
            model = load_model(model)
            set_trainable(model, vision=False, projector=True, language=True)
        if peft_config is not None:
            if args.describer == "retrospective":
                token_ids = require_verification_tokens(processor, "the processor", model)
                peft_config = with_token_rows(model, peft_config, token_ids)
            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        plain = unwrap(model)
        sidecar = self.sidecar
        convention = convention_for(plain, args.box_convention or sidecar.box_convention)
        self.prompts = RegionPrompts(processor, convention, args.describe_prompt, args.locate_prompt)
        # evaluation asks a checkpoint in the words and numbers that it was trained on
        self.sidecar = replace(sidecar, box_convention=convention.name, recipe=args.prompts)
        threshold = args.verification_threshold
        threshold = sidecar.threshold if threshold is None else threshold
        self.rollouts = Rollouts(processor, self.prompts, args, {**sidecar.decoding, "threshold": threshold})
        rewards = args.rewards if reward_funcs is None else reward_funcs
        rewards = [rewards] if callable(rewards) or isinstance(rewards, str) else rewards
        self.reward_funcs = [reward_named(r) if isinstance(r, str) else r for r in rewards]
        check_weights(self.reward_funcs, args.reward_weights)
        if optimizers[1] is not None and args.locator_learning_rate != args.learning_rate:
            raise UserError(
                "`optimizers`: a scheduler of your own cannot be scaled by phase. Give the optimizer alone, or set "
                "`locator_learning_rate` to `learning_rate`."
            )
        self.rec_dataset, self.replay_dataset = rec_dataset, replay_dataset
        self._waiting: list[list[dict]] = []
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or RegionCollator(),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.finish_model()
        # where it will decode and in the precision it will decode in
        with self.accelerator.autocast():
            check_branching(self.model)
        first_rows = self.data_collator(list(islice(train_dataset, 8)))["rows"]
        self.rollouts.warn_of_cut_boxes(self.prompts.with_sizes(first_rows))
        if replay_dataset is not None:
            root = getattr(self.data_collator, "image_root", None)
            # answers end where the batch ends, as those of boxes do
            self.replay_collator = VisionCollator(
                processor, root, padding_side="left", always_image=args.world_size > 1
            )
            vocabulary = row_count(plain.get_input_embeddings().weight)
            check_first_rows(replay_dataset, self.replay_collator, vocabulary)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Collects the rows of an accumulation window; at its end a whole describer or locator step."""
        model.train()
        self.note_rows(inputs)
        self._waiting.append(inputs["rows"])
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, []
        step = self._describer_step if self.begin_step() == "describer" else self._locator_step
        rows = self.prompts.with_sizes([row for batch in batches for row in batch])
        with self.naming_rows():
            return step(model, rows, max(map(len, batches)))

    def _describer_step(self, model, rows: list[dict], size: int) -> Tensor:
        """Describe, locate, reward, and up to `inner_epochs` clipped updates; `size` boxes pass the model at a time."""
        args = self.args
        with self.decoding(model) as plain:
            rollouts = self.rollouts.describer(plain, rows, self.frozen, self.start, self.state.global_step)
            suppressed = self.rollouts.suppressed(plain)
        rewards, baselines = self._rewards(rollouts)
        micros, first = [], 0
        # by boxes: processes make equally many passes though boxes may have different numbers of descriptions
        for part in _slices(len(rollouts), size):
            pairs = [(rollout, sample) for rollout in rollouts[part] for sample in rollout.samples]
            samples = [sample for _, sample in pairs]
            batch = describing(
                self.prompts,
                [rollout.row for rollout, _ in pairs],
                [sample.ids for sample in samples],
                [rollout.prefix for rollout, _ in pairs],
                args.device,
                self._dtype,
            )
            drawn = slice(first, first := first + len(samples))
            weights = torch.tensor([[sample.weight] for sample in samples], device=args.device)
            micros.append(_MicroBatch(samples, batch, rewards[drawn], baselines[drawn], weights))
        if not self._has_signal(model, micros, suppressed):
            return self._skipped_step()

        tokens = self.total(torch.stack([micro.batch.mask.sum() for micro in micros]).sum()).clamp(min=1)
        # a mean over tokens, each with the weight of its description
        weighted = self.total(
            torch.stack([(micro.batch.mask * micro.weights).sum() for micro in micros]).sum()
        )
        for micro in micros:
            micro.weights *= tokens / weighted.clamp(min=1)
        losses: list[Tensor] = []
        for epoch in range(args.inner_epochs):
            sums = torch.zeros(4, device=args.device)
            for i, micro in enumerate(micros):
                with self.accumulating(model, last=i == len(micros) - 1):
                    with self.accelerator.autocast():
                        log_probs = answer_log_probs(model, micro.batch, suppressed, args.temperature)
                    if epoch == 0:
                        # the weights that sampled are still in place: this pass gives the old log-probabilities too
                        micro.old = log_probs.detach()
                        micro.advantages = self._advantages(micro)
                    terms = policy.clipped_surrogate(
                        log_probs, micro.old, micro.advantages, micro.batch.mask, args.clip_range
                    )
                    # a micro-batch whose policy has left the one that sampled gets no gradient
                    mean_ratio = self.total(torch.stack([terms.ratio, terms.tokens]))
                    keep = float(mean_ratio[0] <= args.max_ratio * mean_ratio[1])
                    self.backward(terms.loss * (keep / tokens))
                sums += torch.stack([terms.loss.detach() * keep, terms.ratio, terms.clipped, terms.drift])
            loss, ratio, clipped, drift = (self.total(sums) / tokens).unbind()
            losses.append(loss)
            if epoch == args.inner_epochs - 1 or drift > args.early_stop:
                break
            self.update(model)
        figures = {"ratio": ratio, "clip_fraction": clipped, "drift": drift}
        self.record_phase("describer", figures | {"updates": epoch + 1, "skipped": 0})
        return losses[0]

    def _rewards(self, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
        """Rewards of all boxes' samples, (samples,), and, of the same shape, what each must beat."""
        args = self.args
        pairs = [(rollout.row, sample) for rollout in rollouts for sample in rollout.samples]
        rows, samples = [row for row, _ in pairs], [sample for _, sample in pairs]
        earned, parts = self.earn(rows, samples)
        rewards = torch.tensor(earned)
        if args.baseline == "none":
            baselines = torch.zeros_like(rewards)
        elif args.baseline == "group" and args.without_replacement:
            groups = [[sample.probability for sample in rollout.samples] for rollout in rollouts]
            earnings = rewards.split([len(group) for group in groups])
            baselines = torch.cat(list(map(policy.distinct_baselines, earnings, groups)))
        elif args.baseline == "group":
            baselines = policy.leave_one_out(rewards, args.num_generations)
        else:
            greedy, _ = self.earn([r.row for r in rollouts], [r.greedy for r in rollouts])
            counts = torch.tensor([len(rollout.samples) for rollout in rollouts])
            baselines = torch.tensor(greedy).repeat_interleave(counts)
        weights = torch.tensor([sample.weight for sample in samples])
        n = weights.sum()
        sums = {
            "reward": ((rewards * weights).sum(), n),
            "baseline": ((baselines * weights).sum(), n),
            "iou": (sum(sample.weight * iou(sample.located, row["box"]) for row, sample in pairs), n),
            "parse_rate": (sum(sample.weight for sample in samples if sample.located is not None), n),
        }
        for name, values in parts.items():
            known = [(s.weight, v) for s, v in zip(samples, values, strict=True) if v is not None]
            sums[f"rewards/{name}"] = (sum(w * value for w, value in known), sum(w for w, _ in known))
        self.record_phase("describer", self.means(sums) | self._description_figures(samples))
        return rewards, baselines

    def earn(self, rows: list[dict], descriptions: list[Description]) -> tuple[list[float], dict]:
        """The reward of each description of a row's box, and of each reward function its own part."""
        leaks = [self.args.leak_guard and self._leaks(description.text) for description in descriptions]
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "picture"}
        columns |= {
            "prompts": [self.prompts.describe_question(row) for row in rows],
            "completions": [description.text for description in descriptions],
            "completion_ids": [description.ids for description in descriptions],
            # a leak led nowhere: rewards that are negative for a miss would else pay for it
            "located": [None if leak else d.located for d, leak in zip(descriptions, leaks, strict=True)],
            "images": [[row["picture"]] for row in rows],
            "trainer_state": self.state,
        }
        rewards, parts = combine(self.reward_funcs, self.args.reward_weights, len(rows), columns)
        return [
            min(reward, 0.0) if leak else reward for reward, leak in zip(rewards, leaks, strict=True)
        ], parts

    def _has_signal(self, model, micros: list[_MicroBatch], suppressed: Suppressed) -> bool:
        """Whether any advantage of the step, on any process, is not 0.

        Else Adam would make whole updates of rounding, or its moments and the weights would decay for nothing.
        """
        if self.any(torch.cat([micro.rewards != micro.baselines for micro in micros])):
            return True
        if not self.args.kl_coef:
            return False
        drifts = torch.zeros((), dtype=torch.bool, device=self.args.device)
        if any(sample.reference is not None for micro in micros for sample in micro.samples):
            # seldom: nothing is earned, and the anchor is another network
            with self.decoding(model) as plain:
                for micro in micros:
                    log_probs = answer_log_probs(plain, micro.batch, suppressed, self.args.temperature)
                    drifts = (micro.kl(log_probs) != 0).any()
                    if drifts:
                        break
        return self.any(drifts)

    def _skipped_step(self) -> Tensor:
        """What a describer step without signal does: no update, and the figures of one whose ratios are all 1."""
        self.skip_update()
        figures = {"kl": 0, "advantage": 0, "ratio": 1, "clip_fraction": 0, "drift": 0}
        self.record_phase("describer", figures | {"updates": 0, "skipped": 1})
        return torch.zeros((), device=self.args.device)

    def _advantages(self, micro: _MicroBatch) -> Tensor:
        """Of each token of a micro-batch, (batch, tokens): the return from it on, less what must be beaten."""
        mask, kl = micro.batch.mask, micro.kl(micro.old)
        returns = policy.returns_to_go(micro.rewards.to(micro.old), kl, self.args.kl_coef)
        # a factor of the advantage is one of the loss
        advantages = policy.advantages(returns, micro.baselines.to(micro.old), mask) * micro.weights
        count = mask.sum()
        sums = {"kl": (kl * micro.weights).sum(), "advantage": advantages.sum()}
        means = self.means({name: (value, count) for name, value in sums.items()})
        self.record_phase("describer", means)
        return advantages

    def _locator_step(self, model, rows: list[dict], size: int) -> Tensor:
        """One update on the boxes of the frozen copy's descriptions, with rows of the two files mixed in."""
        args = self.args
        with self.decoding(model) as plain:
            rollouts = self.rollouts.captions(plain, rows, self.frozen, locate=args.min_caption_iou > 0)
        captions = [rollout.samples[0] for rollout in rollouts]
        weights = [float(self._worth_learning(rollout)) for rollout in rollouts]
        figures = self._description_figures(captions) | self.means({"kept": (sum(weights), len(weights))})
        lessons = [
            _Lesson(rollout.row, caption.text, rollout.prefix, weight)
            for rollout, caption, weight in zip(rollouts, captions, weights, strict=True)
        ]
        lessons += self._annotated_lessons(len(rows))
        micros = []
        for part in _slices(len(lessons), size):
            opened, texts, prefixes, weights = zip(*lessons[part], strict=True)
            batch = locating(self.prompts, opened, texts, prefixes, args.device, self._dtype)
            batch.mask *= torch.tensor(weights, device=args.device)[:, None]
            micros.append(batch)
        parts = {"replay_loss": self._replay_batches(len(rows), size), "loss": micros}

        counts = self.total(
            torch.tensor([sum(float(micro.mask.sum()) for micro in part) for part in parts.values()])
        )
        tokens, sums = counts.sum().clamp(min=1), torch.zeros(len(parts), device=args.device)
        together = [(place, micro) for place, part in enumerate(parts.values()) for micro in part]
        for i, (place, micro) in enumerate(together):
            with self.accumulating(model, last=i == len(together) - 1):
                with self.accelerator.autocast():
                    nll = -answer_log_probs(model, micro).sum()
                self.backward(nll / tokens)
            sums[place] += nll.detach()
        sums = self.total(sums)
        means = sums / counts.clamp(min=1)
        figures |= {name: mean for (name, part), mean in zip(parts.items(), means, strict=True) if part}
        self.record_phase("locator", figures)
        return sums.sum() / tokens

    def _worth_learning(self, rollout: Rollout) -> bool:
        caption, limit = rollout.samples[0], self.args.min_caption_iou
        if self.args.leak_guard and self._leaks(caption.text):
            return False
        return limit == 0 or iou(caption.located, rollout.row["box"]) >= limit

    def _annotated_lessons(self, boxes: int) -> list[_Lesson]:
        """Rows of `rec_dataset` with one of their expressions, that this process mixes into a locator step."""
        drawn = self._draw(self.rec_dataset, self.args.rec_share, boxes, "rec")
        rows = self.data_collator([self.rec_dataset[draw.row] for draw in drawn])["rows"]
        lessons = []
        for row, draw in zip(self.prompts.with_sizes(rows), drawn, strict=True):
            text = row["expressions"][int(draw.part * len(row["expressions"]))]
            lessons.append(_Lesson(row, text, None, draw.weight))
        return lessons

    def _replay_batches(self, boxes: int, size: int) -> list[Completions]:
        """SFT rows that this process mixes into a locator step, `size` a micro-batch."""
        drawn = self._draw(self.replay_dataset, self.args.replay_share, boxes, "replay")
        batches = []
        for part in _slices(len(drawn), size):
            batch = self.replay_collator([self.replay_dataset[draw.row] for draw in drawn[part]])
            weights = [draw.weight for draw in drawn[part]]
            batches.append(from_collator(batch, weights, self.args.device, self._dtype))
        return batches

    def _draw(self, dataset: Sequence[dict] | None, share: float, boxes: int, name: str) -> list[DrawnRow]:
        if dataset is None:
            return []
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        seed, step = self.args.seed, self.state.global_step
        return draw_rows(
            len(dataset), share, boxes, name=name, seed=seed, step=step, processes=processes, rank=rank
        )

    @property
    def _dtype(self) -> torch.dtype:
        return self.accelerator.unwrap_model(self.model).dtype

    @property
    def report_collator(self) -> RegionPreview:
        """What the start-up report measures."""
        return RegionPreview(self.data_collator, self.prompts)

    def _leaks(self, text: str) -> bool:
        return spells_coordinates(text, self.prompts.finds_box)

    def _description_figures(self, descriptions: list[Description]) -> dict[str, float]:
        n = sum(description.weight for description in descriptions)
        leaks = sum(description.weight for description in descriptions if self._leaks(description.text))
        length = sum(description.weight * len(description.ids) for description in descriptions)
        sums = {"leak_rate": (leaks, n), "length": (length, n)}
        if self.rollouts.verifies:
            verdicts = Counter(description.verdict for description in descriptions)
            sums |= {"verified_rate": (verdicts[VERIFIED], n), "no_phrase_rate": (verdicts[NO_PHRASE], n)}
        return self.means(sums)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Self-consistency (describe, then locate, both greedy) and REC on region rows, over all processes.

        Returns:
            `{prefix}_iou`, `_acc50`, `_parse_rate`, `_leak_rate`, `_length`, and `_rec_acc50` over the rows'
            `expressions`, if there are any.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            metrics = {}
            for name, rows in dataset.items():
                metrics |= self.evaluate(rows, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        if dataset is None or not len(dataset):
            raise UserError("`evaluate` needs region rows: give `eval_dataset`.")
        places = list(range(self.accelerator.process_index, len(dataset), self.accelerator.num_processes))
        sums = {name: [0.0, 0.0] for name in FIGURES}
        for part in _slices(len(places), self.args.per_device_eval_batch_size):
            rows = self.prompts.with_sizes(self.data_collator([dataset[i] for i in places[part]])["rows"])
            with self.decoding(self.model_wrapped) as plain:
                rollouts = self.rollouts.captions(plain, rows, None, locate=True, expressions=True)
            for name, value in figures_of(rollouts, self._leaks):
                sums[name][0] += value
                sums[name][1] += 1
        means = self.means(sums)
        names = measured_on(dataset[i] for i in range(len(dataset)))
        metrics = {f"{metric_key_prefix}_{name}": means[name] for name in names}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]
