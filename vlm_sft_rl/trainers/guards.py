"""Checks that fail before the first step what would otherwise fail late, or go wrong without a word."""

import logging
from collections.abc import Iterable

import torch
from peft import PeftModel
from transformers import ProcessorMixin

from ..errors import UserError
from ..models.peft import trainable_rows

IGNORE = -100
FIRST_ROWS = 8

logger = logging.getLogger(__name__)


def check_arguments(args) -> None:
    """Refuse TRL options that do nothing, or the wrong thing, with images and our collator.

    Raises:
        UserError: the option is named, with what to set instead.
    """
    refused = {
        "packing": (args.packing, "packing is not possible with images; set `packing: false`"),
        "padding_free": (args.padding_free, "it is not possible with images; set `padding_free: false`"),
        "assistant_only_loss": (
            args.assistant_only_loss,
            "the collator already puts loss on the assistant's text alone; remove it",
        ),
        "loss_type": (args.loss_type != "nll", "token weights are defined for `nll`; remove it"),
        "label_smoothing_factor": (args.label_smoothing_factor > 0, "it ignores token weights; set it to 0"),
        "remove_unused_columns": (
            args.remove_unused_columns,
            "it would take away the columns that the collator reads; set it to false",
        ),
    }
    for name, (wrong, cure) in refused.items():
        if wrong:
            raise UserError(f"`{name}`: {cure}.")
    for name in ("close_tag_weight", "projector_learning_rate"):
        value = getattr(args, name, None)
        if value is not None and value < 0:
            raise UserError(f"`{name}` must not be negative, it is {value}.")


def check_processor(processor) -> None:
    """Raises UserError for a bare tokenizer: images need the model's processor."""
    if not isinstance(processor, ProcessorMixin):
        raise UserError(
            f"`processing_class` is a {type(processor).__name__}. Pass the model's processor "
            "(`AutoProcessor.from_pretrained(...)`)."
        )


def check_sharding(trainer) -> None:
    """Trainable token rows and ZeRO-3 exclude each other: the output rows would be read from an empty shard.

    Raises:
        UserError: both are on.
    """
    model = trainer.model
    if not isinstance(model, PeftModel) or not trainable_rows(model):
        return
    plugin = trainer.args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise UserError(
            "LoRA with trainable token rows does not work under ZeRO-3. Launch with accelerate_configs/zero2.yaml, or "
            "set `train_new_tokens: false`."
        )


def warn_of_low_precision(trainer) -> int:
    """Warn when trained weights are in 16 bits and nobody keeps float32 copies; returns how many tensors are.

    A weight of 0.02 in bfloat16 moves in steps of 1e-4: updates of a usual learning rate round to nothing.
    """
    if trainer.args.deepspeed_plugin is not None:
        return 0
    low = [
        n
        for n, p in trainer.model.named_parameters()
        if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)
    ]
    if low and not getattr(trainer.model, "is_quantized", False):
        logger.warning(
            "%d trained tensors are in 16 bits (%s, …), where small updates vanish. Set `dtype: auto` or `float32` "
            "(computation stays in bfloat16), or train with DeepSpeed.",
            len(low),
            low[0],
        )
    return len(low)


def check_first_rows(dataset: Iterable, collator, vocabulary: int, count: int = FIRST_ROWS) -> None:
    """Collate the first rows one by one: ids must exist in the model, and something must be learned.

    Raises:
        UserError: a token id beyond the embedding matrix, or no supervised token in any of the rows. Errors of the
            collator (images, tags, length) come through as they are.
    """
    supervised, seen = 0, 0
    for row in dataset:
        batch = collator([row])
        if (largest := int(batch["input_ids"].max())) >= vocabulary:
            raise UserError(
                f"row {row.get('id', seen)}: token id {largest}, but the model has {vocabulary} embedding rows. The "
                "processor and the model do not belong together: load both from the same prepared folder "
                "(`vlm-sft-rl model prepare`)."
            )
        supervised += int((batch["labels"][:, 1:] != IGNORE).sum())
        seen += 1
        if seen >= count:
            break
    if not seen:
        raise UserError("The training data has no rows.")
    if not supervised:
        raise UserError(
            f"None of the first {seen} rows has a supervised token, so nothing would be learned. Look at one with "
            "`vlm-sft-rl data preview`: are the answers empty, of weight 0, or masked out?"
        )


def check_batch(inputs: dict[str, torch.Tensor]) -> None:
    """Raises UserError when `loss_weights` do not lie over `labels`."""
    weights, labels = inputs.get("loss_weights"), inputs.get("labels")
    if weights is not None and (labels is None or weights.shape != labels.shape):
        raise UserError(
            f"The collator's `loss_weights` have shape {tuple(weights.shape)}, its `labels` "
            f"{None if labels is None else tuple(labels.shape)}. They must be equal."
        )
