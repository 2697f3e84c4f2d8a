"""`ReflectionDPOTrainer`: TRL's DPO trainer on right and wrong rationales of a self-training pool, and on rewinds."""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer

from ..data.collators import PreferenceCollator
from ..data.rows import IMAGE_PAIR, PAIR_KINDS
from ..errors import UserError
from ..models.load import is_adapter
from ..models.parts import capture_outputs, unwrap
from ..models.tokens import require_verification_tokens
from ..settings import data_seed, setting
from .base import RawRowSettings, VisionTrainer, loaded
from .checks import FIRST_ROWS, check_reference, sharded_by, warn_without_images
from .losses import divergence, next_token_log_probs

WEIGHTED_LOSSES = ("sigmoid", "hinge")


@dataclass
class ReflectionDPOConfig(RawRowSettings, DPOConfig):
    """TRL's `DPOConfig` with defaults that are safe for images, see `RawRowSettings`."""

    phrases_only: bool = setting(
        False,
        "The loss leaves out `</CN>` and `</UN>`: for answers whose phrases carry verification tags.",
    )
    verdict_weight: float = setting(
        0.0,
        "Weight of a further term: KL(reference || policy) of the next token wherever a closing tag stands, the mean over a "
        "batch. It keeps the verifier as it was, without a further pass. Not with ZeRO-3 or FSDP.",
    )
    image_weight: float = setting(
        0.0,
        "Weight of the conditional preference of mDPO (arXiv 2406.11839; 1 there): the chosen answer with its "
        "images against the same answer with a small part of each. 0: off; else a step costs twice as much.",
    )
    image_crop: float = setting(0.2, "For `image_weight`: largest share of an image's area that is left.")
    anchor_weight: float = setting(
        0.0,
        "Weight of the anchor of mDPO (1 there): -log sigmoid(beta x log-ratio of the chosen answer), so that "
        "it gets no less likely than in the reference. 0: off.",
    )


class ReflectionDPOTrainer(VisionTrainer, DPOTrainer):
    """DPO on rows of TRL's conversational preference format with images, plus `pair_kind` and `pair_weight`.

    Same constructor as `trl.DPOTrainer`. Without pair weights (or with all of them 1) the loss is stock TRL's to the last
    bit; otherwise each pair's sigmoid or hinge loss is multiplied by its weight and the sum divided by the number of
    pairs. Other terms (`sft`) are not weighted.

    On answers with verification tags a preference falls on the verdicts, too, and blinds the verifier: see `phrases_only`
    and `verdict_weight`. With `image_weight` each row with images gives a further pair, of kind `image` (see
    `PreferenceCollator`); TRL's metrics are means over both, and its `sft` counts the chosen answer of such a row twice.
    With `anchor_weight` a term on chosen answers is added. All are off by default.

    Logged besides TRL's metrics: `rewards/margins_KIND` and `rewards/accuracies_KIND` for each kind of pair, and
    `verdict_drift`, the mean divergence that `verdict_weight` multiplies.

    Raises:
        UserError: settings that would go wrong in silence: an adapter as the model (its reference would be trained from
            the wrong weights), a model whose reference on the disk has another vocabulary, weights with a loss that they
            are not defined for; tokens or an engine that `phrases_only` and `verdict_weight` need.
    """

    _tag_names = ["trl", "dpo", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    _name = "ReflectionDPO"
    CONFIG = ReflectionDPOConfig
    METHOD = "reflection_dpo"
    COLUMNS: ClassVar = {
        "rewards/accuracies": "pairs right",
        "rewards/margins": "margin",
        "verdict_drift": "verdict drift",
        "verifier_auc_at_start": "verifier",
    }

    def __init__(
        self,
        model,
        ref_model=None,
        args: ReflectionDPOConfig | None = None,
        data_collator=None,
        train_dataset: Dataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        **kwargs,
    ):
        check_start(model)
        source, args, processor = self.begin(model, args, processing_class)
        if train_dataset is None:
            raise UserError("`train_dataset` is missing.")
        if not isinstance(model, str) and ref_model is None and kwargs.get("peft_config") is None:
            check_reference(model, source, "DPO")
        check_dpo(args, train_dataset)
        self.closing: tuple[int, ...] = ()
        if args.phrases_only or args.verdict_weight:
            self.closing = require_verification_tokens(processor, source)[1:]
        if data_collator is None:
            data_collator = PreferenceCollator(
                processor,
                args.phrases_only,
                args.image_weight,
                args.image_crop,
                data_seed(args),
                max_length=args.max_length,
            )
        for name in ("phrases_only", "image_weight"):
            if (given := getattr(data_collator, name, False)) != getattr(args, name):
                raise UserError(
                    f"`{name}` is {getattr(args, name)}, and that of the collator {given}. Give PreferenceCollator the "
                    "same, or no collator."
                )
        super().__init__(
            loaded(model, args, kwargs),
            ref_model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processor,
            *positional,
            **kwargs,
        )
        self.finish_model()
        data_collator(list(train_dataset.select(range(1))))  # a row that cannot be used fails now
        warn_without_images(list(islice(train_dataset, FIRST_ROWS)))

    def _compute_loss(self, model, inputs, return_outputs):
        weights, kinds = inputs.pop("pair_weight", None), inputs.pop("pair_kind", None)
        # under DDP and DeepSpeed the policy's pass goes through the wrapper, the pass with adapters off does not
        policy = self.accelerator.unwrap_model(model)
        reference = policy if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)
        with capture_outputs(policy) as policy_passes, capture_outputs(reference) as reference_passes:
            if self.args.verdict_weight:
                result = self._with_verdicts(model, inputs, return_outputs, policy, reference)
            else:
                result = super()._compute_loss(model, inputs, return_outputs)
        # with adapters one model runs twice: first as the policy, then, adapters off, as the reference
        passes = policy_passes[0], reference_passes[1 if reference is policy else 0]
        length = inputs["completion_mask"].shape[1] - 1
        policy_sums, reference_sums = (outputs.log_probs[:, -length:].sum(1) for outputs in passes)
        chosen, rejected = (policy_sums - reference_sums).chunk(2)
        margin = self.beta * (chosen - rejected)
        if kinds is not None:
            self._record_kinds(margin.detach(), kinds)
        loss = result[0] if return_outputs else result
        if weights is not None and not bool((weights == 1).all()):
            # TRL's loss has weight 1 on every pair; add what the others differ by
            loss = loss + ((weights.to(margin) - 1) * self._weighted_terms(margin)).mean()
        if self.args.anchor_weight:
            rows = slice(None) if kinds is None else kinds.to(chosen.device) != PAIR_KINDS.index(IMAGE_PAIR)
            loss = loss - self.args.anchor_weight * F.logsigmoid(self.beta * chosen[rows]).mean()
        return (loss, result[1]) if return_outputs else loss

    def _with_verdicts(self, model, inputs, return_outputs, policy, reference):
        """TRL's loss, and what `verdict_weight` adds to it."""
        plain, plain_reference = unwrap(policy), unwrap(reference)
        with (
            capture_outputs(plain.base_model) as hidden,
            capture_outputs(plain_reference.base_model) as before,
        ):
            result = super()._compute_loss(model, inputs, return_outputs)
        following = inputs["input_ids"][:, 1:]
        closes = torch.isin(following, following.new_tensor(self.closing))
        hidden, before = (
            states.last_hidden_state[:, -following.shape[1] - 1 : -1][closes]
            for states in (hidden[0], before[1 if reference is policy else 0])
        )
        with torch.no_grad(), policy.disable_adapter() if reference is policy else nullcontext():
            expected = next_token_log_probs(plain_reference, before)
        drift = divergence(expected, next_token_log_probs(plain, hidden))
        (count,) = self.record_means(("verdict_drift",), drift.detach().sum()[None], closes.sum()[None])
        # the mean over the phrases of all processes, whose losses are averaged; of a batch without a phrase it is a sum of
        # nothing, with a gradient of zero
        term = self.args.verdict_weight * drift.sum() * self.accelerator.num_processes / max(1, count)
        loss = (result[0] if return_outputs else result) + term
        return (loss, result[1]) if return_outputs else loss

    def _weighted_terms(self, margin: torch.Tensor) -> torch.Tensor:
        """(pairs,): those terms of TRL's loss that `pair_weight` multiplies."""
        total = torch.zeros_like(margin)
        for name, weight in zip(self.loss_types, self.loss_weights, strict=True):
            if name == "sigmoid":
                total = total - weight * F.logsigmoid(margin)
            elif name == "hinge":
                total = total + weight * torch.relu(1 - margin)
        return total

    def _record_kinds(self, margin: torch.Tensor, kinds: torch.Tensor) -> None:
        """Margins and accuracies of each kind of pair."""
        pairs = F.one_hot(kinds.to(margin.device), len(PAIR_KINDS)).double()  # (pairs, kinds)
        names = [f"rewards/{name}_{kind}" for name in ("margins", "accuracies") for kind in PAIR_KINDS]
        sums = torch.cat([pairs.T @ margin.double(), pairs.T @ (margin > 0).double()])
        self.record_means(names, sums, pairs.sum(0).repeat(2))


def check_start(model) -> None:
    """Raises UserError: the model is an adapter."""
    if isinstance(model, PeftModel) or (isinstance(model, str) and is_adapter(model)):
        source = model if isinstance(model, str) else model.config._name_or_path
        raise UserError(
            f"{source}: an adapter cannot be the start of DPO: TRL would put a copy of it beside it as the reference. Merge "
            f"it first: `vlm-sft-rl merge {source} MERGED`."
        )


def check_dpo(args: ReflectionDPOConfig, dataset: Dataset) -> None:
    """Raises UserError: settings that do not work with images, with these pairs' weights, or with the engine."""
    if args.remove_unused_columns:
        raise UserError(
            "`remove_unused_columns`: it would take away the columns that the collator reads; set it to false."
        )
    if args.precompute_ref_log_probs:
        raise UserError("`precompute_ref_log_probs` does not work with images; set it to false.")
    for name in ("verdict_weight", "image_weight", "anchor_weight"):
        if not 0 <= (value := getattr(args, name)) < float("inf"):
            raise UserError(f"`{name}` is {value}, expected a number >= 0.")
    if args.verdict_weight and (engine := sharded_by(args)) is not None:
        raise UserError(f"`verdict_weight` does not work under {engine}. Use ZeRO-2 or DDP, or set it to 0.")
    if not 0 < args.image_crop <= 1:
        raise UserError(f"`image_crop` is {args.image_crop}, expected a share of the image in (0, 1].")
    weighted = "pair_weight" in dataset.column_names and any(w != 1 for w in dataset["pair_weight"])
    settings = {
        "image_weight": args.image_weight,
        "anchor_weight": args.anchor_weight,
        "pair_weight": weighted,
    }
    name = next((name for name, value in settings.items() if value), None)
    if name is None:
        return
    if not set(args.loss_type) <= {*WEIGHTED_LOSSES, "sft"}:
        raise UserError(
            f"`{name}` is defined for the losses {', '.join(WEIGHTED_LOSSES)} (and `sft` beside them), not for "
            f"{args.loss_type}. Change `loss_type`, or {'make all weights 1' if name == 'pair_weight' else 'set it to 0'}."
        )
    if args.f_divergence_type != "reverse_kl" or args.ld_alpha is not None or args.use_weighting:
        raise UserError(
            f"`{name}` goes with plain DPO only: remove `f_divergence_type`, `ld_alpha`, `use_weighting`."
        )
