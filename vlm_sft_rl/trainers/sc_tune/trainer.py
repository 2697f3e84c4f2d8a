"""`SCTuneTrainer`: describer and locator teach each other in a closed loop (SC-Tune, arXiv 2403.13263)."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice

import torch
from peft import get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from trl.trainer.utils import disable_dropout_in_model

from ...data.collators import RegionCollator, VisionCollator
from ...decoding.branches import check_branching
from ...errors import UserError
from ...models.boxes import convention_for
from ...models.load import load_model
from ...models.parts import set_trainable, unwrap
from ...models.regions import RegionPrompts
from ...models.tokens import row_count
from ...rewards.regions import Reward, check_weights, combine, iou, reward_named, spells_coordinates
from ..checks import check_first_rows
from . import policy
from .alternating import AlternatingTrainer
from .batches import (
    Completions,
    Drawn,
    ImagePrefix,
    RegionPreview,
    answer_log_probs,
    answers_of,
    describing,
    drawn,
    locating,
)
from .config import SCTuneConfig
from .rollouts import FIGURES, Description, Rollout, Rollouts, figures_of, measured_on


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
    _paper = {  # noqa: RUF012
        "title": "SC-Tune: Unleashing Self-Consistent Referential Comprehension in Large Vision Language Models",
        "id": "2403.13263",
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
        if train_dataset is None or not len(train_dataset):
            raise UserError("`train_dataset` is missing or empty. Give it region rows.")
        if rec_dataset is not None and not all(row.get("expressions") for row in rec_dataset):
            raise UserError("`rec_file`: every row needs `expressions`.")
        sidecar = self.sidecar
        if isinstance(model, str):
            model = load_model(model)
            set_trainable(model, vision=False, projector=True, language=True)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        if args.disable_dropout:
            disable_dropout_in_model(model)
        plain = unwrap(model)
        convention = convention_for(plain, args.box_convention or sidecar.box_convention)
        self.prompts = RegionPrompts(processor, convention, args.describe_prompt, args.locate_prompt)
        # evaluation asks a checkpoint in the words and numbers that it was trained on
        self.sidecar = replace(sidecar, box_convention=convention.name, recipe=args.prompts)
        own = args.verification_threshold
        threshold = sidecar.threshold if own is None else own
        self.rollouts = Rollouts(processor, self.prompts, args, {**sidecar.decoding, "threshold": threshold})
        given = args.rewards if reward_funcs is None else reward_funcs
        given = [given] if callable(given) or isinstance(given, str) else given
        self.reward_funcs = [reward_named(one) if isinstance(one, str) else one for one in given]
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
        first = list(islice(train_dataset, 8))
        self.rollouts.warn_of_cut_boxes(self.prompts.with_sizes(self.data_collator(first)["rows"]))
        if replay_dataset is not None:
            root = getattr(self.data_collator, "image_root", None)
            # answers end where the batch ends, as those of boxes do
            self._collate_replay = VisionCollator(
                processor, root, padding_side="left", always_image=args.world_size > 1
            )
            vocabulary = row_count(plain.get_input_embeddings().weight)
            check_first_rows(replay_dataset, self._collate_replay, vocabulary)

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Collects the rows of an accumulation window; at its end a whole describer or locator step."""
        model.train()
        self._waiting.append(inputs["rows"])
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        batches, self._waiting = self._waiting, []
        step = self._describer_step if self.begin_step() == "describer" else self._locator_step
        rows = self.prompts.with_sizes([row for own in batches for row in own])
        return step(model, rows, max(map(len, batches)))

    def _describer_step(self, model, rows: list[dict], size: int) -> Tensor:
        args = self.args
        with self.decoding(model) as plain:
            rollouts = self.rollouts.describer(plain, rows, self._frozen, self._start, self.state.global_step)
            barred = self.rollouts.barred(plain)
        rewards, baselines = self._rewards(rollouts)
        samples = [(r, one) for r in rollouts for one in r.samples]
        parts = _slices(len(samples), size * args.num_generations)
        micros = [self._describing(samples[part]) for part in parts]
        if not self._has_signal(model, samples, micros, parts, rewards, baselines, barred):
            return self._skipped_step()
        tokens = self.total(torch.stack([m.mask.sum() for m in micros]).sum()).clamp(min=1)
        old: list[Tensor] = []
        gains: list[Tensor] = []
        losses: list[Tensor] = []
        for epoch in range(args.inner_epochs):
            sums = torch.zeros(4, device=args.device)
            for i, (micro, part) in enumerate(zip(micros, parts, strict=True)):
                with self.accumulating(model, last=i == len(micros) - 1):
                    with self.accelerator.autocast():
                        log_probs = answer_log_probs(model, micro, *barred, args.temperature)
                    if epoch == 0:
                        # the weights that sampled are still in place: this pass gives the old log-probabilities too
                        old.append(log_probs.detach())
                        gains.append(
                            self._gain(samples[part], old[i], micro.mask, rewards[part], baselines[part])
                        )
                    found = policy.clipped_surrogate(log_probs, old[i], gains[i], micro.mask, args.clip_range)
                    mean_ratio = self.total(torch.stack([found.ratio, found.tokens]))
                    keep = float(mean_ratio[0] <= args.max_ratio * mean_ratio[1])
                    self.backward(found.loss * (keep / tokens))
                sums += torch.stack([found.loss.detach() * keep, found.ratio, found.clipped, found.drift])
            loss, ratio, clipped, drift = (self.total(sums) / tokens).unbind()
            losses.append(loss)
            if epoch == args.inner_epochs - 1 or drift > args.early_stop:
                break
            self.update(model)
        figures = {
            "ratio": ratio,
            "clip_fraction": clipped,
            "drift": drift,
            "updates": epoch + 1,
            "skipped": 0,
        }
        self.record({f"describer/{name}": value for name, value in figures.items()})
        return losses[0]

    def _has_signal(self, model, samples, micros, parts, rewards, baselines, barred) -> bool:
        """Whether any advantage of the step, on any process, is not 0.

        Else Adam would make whole updates of rounding, or its moments and the weights would decay for nothing.
        """
        if self.any(rewards != baselines):
            return True
        if not self.args.kl_coef:
            return False
        drifts = torch.zeros((), dtype=torch.bool, device=self.args.device)
        if any(one.reference is not None for _, one in samples):
            # seldom: nothing is earned, and the anchor is another network
            with self.decoding(model) as plain:
                for micro, part in zip(micros, parts, strict=True):
                    log_probs = answer_log_probs(plain, micro, *barred, self.args.temperature)
                    drifts = (self._kl(samples[part], log_probs, micro.mask) != 0).any()
                    if drifts:
                        break
        return self.any(drifts)

    def _skipped_step(self) -> Tensor:
        """What a describer step without signal does: no update, and the figures of one whose ratios are all 1."""
        self.skip_update()
        figures = {
            "kl": 0,
            "advantage": 0,
            "ratio": 1,
            "clip_fraction": 0,
            "drift": 0,
            "updates": 0,
            "skipped": 1,
        }
        self.record({f"describer/{name}": value for name, value in figures.items()})
        return torch.zeros((), device=self.args.device)

    def _kl(self, samples, log_probs: Tensor, mask: Tensor) -> Tensor:
        """(batch, tokens) of one micro-batch; exactly 0 where the anchor still is the live model."""
        reference = log_probs.clone()
        for i, (_, one) in enumerate(samples):
            if one.reference is not None:
                reference[i, : len(one.ids)] = one.reference
        return policy.token_kl(log_probs, reference, mask)

    def _gain(self, samples, old: Tensor, mask: Tensor, rewards: Tensor, baselines: Tensor) -> Tensor:
        """Advantages (batch, tokens) of one micro-batch."""
        kl = self._kl(samples, old, mask)
        returns = policy.returns_to_go(rewards.to(old), kl, self.args.kl_coef)
        gain = policy.advantages(returns, baselines.to(old), mask)
        count = mask.sum()
        means = self.means({"kl": (kl.sum(), count), "advantage": (gain.sum(), count)})
        self.record({f"describer/{name}": value for name, value in means.items()})
        return gain

    def _locator_step(self, model, rows: list[dict], size: int) -> Tensor:
        args = self.args
        with self.decoding(model) as plain:
            rollouts = self.rollouts.captions(plain, rows, self._frozen, locate=args.min_caption_iou > 0)
        pairs = [(r.row, r.samples[0].text) for r in rollouts]
        prefixes = [r.prefix for r in rollouts]
        weights = [float(self._worth_learning(r)) for r in rollouts]
        figures = self._description_figures([r.samples[0] for r in rollouts])
        figures |= self.means({"kept": (sum(weights), len(weights))})
        extra, counted = self._rec_pairs(len(rows))
        pairs += extra
        prefixes += [None] * len(extra)
        weights += counted
        micros = []
        for part in _slices(len(pairs), size):
            micro = self._locating(pairs[part], prefixes[part])
            micro.mask *= torch.tensor(weights[part], device=args.device)[:, None]
            micros.append(micro)
        parts = {"replay_loss": self._replayed(len(rows), size), "loss": micros}
        counts = self.total(torch.tensor([sum(float(m.mask.sum()) for m in own) for own in parts.values()]))
        tokens, sums = counts.sum().clamp(min=1), torch.zeros(len(parts), device=args.device)
        together = [(place, micro) for place, own in enumerate(parts.values()) for micro in own]
        for i, (place, micro) in enumerate(together):
            with self.accumulating(model, last=i == len(together) - 1):
                with self.accelerator.autocast():
                    nll = -answer_log_probs(model, micro).sum()
                self.backward(nll / tokens)
            sums[place] += nll.detach()
        sums = self.total(sums)
        means = zip(parts.items(), sums / counts.clamp(min=1), strict=True)
        figures |= {name: float(mean) for (name, own), mean in means if own}
        self.record({f"locator/{name}": value for name, value in figures.items()})
        return sums.sum() / tokens

    def _worth_learning(self, rollout: Rollout) -> bool:
        one = rollout.samples[0]
        if self.args.leak_guard and self._leaks(one.text):
            return False
        limit = self.args.min_caption_iou
        return limit == 0 or iou(one.located, rollout.row["box"]) >= limit

    def _describing(self, samples: list[tuple[Rollout, Description]]) -> Completions:
        rows, prefixes = [r.row for r, _ in samples], [r.prefix for r, _ in samples]
        answers = [one.ids for _, one in samples]
        return describing(self.prompts, rows, answers, prefixes, self.args.device, self._dtype)

    def _locating(self, pairs: list[tuple[dict, str]], prefixes: list[ImagePrefix | None]) -> Completions:
        return locating(self.prompts, pairs, self.args.device, self._dtype, prefixes)

    @property
    def _dtype(self) -> torch.dtype:
        return self.accelerator.unwrap_model(self.model).dtype

    def _rec_pairs(self, boxes: int) -> tuple[list[tuple[dict, str]], list[float]]:
        """Rows and expressions of this process that are mixed into a locator step, and their weights."""
        found = self._drawn(self.rec_dataset, self.args.rec_share, boxes, "rec")
        rows = self.prompts.with_sizes(
            self.data_collator([self.rec_dataset[one.row] for one in found])["rows"]
        )
        pairs = [
            (row, row["expressions"][int(one.part * len(row["expressions"]))])
            for row, one in zip(rows, found, strict=True)
        ]
        return pairs, [one.weight for one in found]

    def _replayed(self, boxes: int, size: int) -> list[Completions]:
        """SFT rows of this process that are mixed into a locator step, `size` a micro-batch."""
        found = self._drawn(self.replay_dataset, self.args.replay_share, boxes, "replay")
        batches = []
        for part in _slices(len(found), size):
            batch = self._collate_replay([self.replay_dataset[one.row] for one in found[part]])
            weights = [one.weight for one in found[part]]
            batches.append(answers_of(batch, weights, self.args.device, self._dtype))
        return batches

    def _drawn(self, dataset: Sequence[dict] | None, share: float, boxes: int, name: str) -> list[Drawn]:
        if dataset is None:
            return []
        return drawn(
            len(dataset),
            share,
            boxes,
            name=name,
            seed=self.args.seed,
            step=self.state.global_step,
            processes=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
        )

    def _rewards(self, rollouts: list[Rollout]) -> tuple[Tensor, Tensor]:
        """Rewards (boxes * samples,) and, of the same shape, what each must beat."""
        args = self.args
        said = [one for r in rollouts for one in r.samples]
        rows = [r.row for r in rollouts for _ in r.samples]
        earned, parts = self._earn(rows, said)
        rewards = torch.tensor(earned)
        if args.baseline == "none":
            baselines = torch.zeros_like(rewards)
        elif args.baseline == "group":
            baselines = policy.leave_one_out(rewards, args.num_generations)
        else:
            greedy, _ = self._earn([r.row for r in rollouts], [r.greedy for r in rollouts])
            baselines = torch.tensor(greedy).repeat_interleave(args.num_generations)
        n = len(said)
        sums = {"reward": (rewards.sum(), n), "baseline": (baselines.sum(), n)}
        sums["iou"] = (sum(iou(one.located, row["box"]) for one, row in zip(said, rows, strict=True)), n)
        sums["parse_rate"] = (sum(one.located is not None for one in said), n)
        for name, values in parts.items():
            known = [value for value in values if value is not None]
            sums[f"rewards/{name}"] = (sum(known), len(known))
        figures = self.means(sums) | self._description_figures(said)
        self.record({f"describer/{name}": value for name, value in figures.items()})
        return rewards, baselines

    def _earn(self, rows: list[dict], said: list[Description]) -> tuple[list[float], dict]:
        guarded = [self.args.leak_guard and self._leaks(one.text) for one in said]
        columns = {key: [row.get(key) for row in rows] for key in rows[0] if key != "picture"}
        columns |= {
            "prompts": [self.prompts.describe_question(row) for row in rows],
            "completions": [one.text for one in said],
            "completion_ids": [one.ids for one in said],
            # a leak led nowhere: rewards that are negative for a miss would else pay for it
            "located": [None if leak else one.located for one, leak in zip(said, guarded, strict=True)],
            "images": [[row["picture"]] for row in rows],
            "trainer_state": self.state,
        }
        earned, parts = combine(self.reward_funcs, self.args.reward_weights, len(said), columns)
        return [min(e, 0.0) if leak else e for e, leak in zip(earned, guarded, strict=True)], parts

    @property
    def report_collator(self) -> RegionPreview:
        """What the start-up report measures."""
        return RegionPreview(self.data_collator, self.prompts)

    def _leaks(self, text: str) -> bool:
        return spells_coordinates(text, self.prompts.finds_box)

    def _description_figures(self, said: list[Description]) -> dict[str, float]:
        n = len(said)
        leaks, length = sum(self._leaks(one.text) for one in said), sum(len(one.ids) for one in said)
        return self.means({"leak_rate": (leaks, n), "length": (length, n)})

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval"):
        """Self-consistency (describe, then locate, both greedy) and REC on region rows, over all processes.

        Returns:
            `{prefix}_iou`, `_acc50`, `_parse_rate`, `_leak_rate`, `_length`, and `_rec_acc50` over the rows'
            `expressions`, if there are any.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            found = [
                self.evaluate(one, ignore_keys, f"{metric_key_prefix}_{name}")
                for name, one in dataset.items()
            ]
            return {name: value for metrics in found for name, value in metrics.items()}
        if dataset is None or not len(dataset):
            raise UserError("`evaluate` needs region rows: give `eval_dataset`.")
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        own = list(range(rank, len(dataset), processes))
        sums = {name: [0.0, 0.0] for name in FIGURES}
        for part in _slices(len(own), self.args.per_device_eval_batch_size):
            rows = self.prompts.with_sizes(self.data_collator([dataset[i] for i in own[part]])["rows"])
            with self.decoding(self.model_wrapped) as plain:
                rollouts = self.rollouts.captions(plain, rows, None, locate=True, expressions=True)
            for name, value in figures_of(rollouts, self._leaks):
                sums[name][0] += value
                sums[name][1] += 1
        means, given = self.means(sums), measured_on(dataset[i] for i in range(len(dataset)))
        metrics = {f"{metric_key_prefix}_{name}": means[name] for name in given}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def _slices(count: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, count, size)]
