"""Checks that fail before the first step what would otherwise fail late, or go wrong without a word."""

import copy
import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import ProcessorMixin

from ..data.collators import VisionCollator
from ..data.marks import IGNORE
from ..data.tags import count_tagged, tag_shortage
from ..errors import RowError, UserError
from ..models.load import load_config
from ..models.lora import trainable_rows
from ..models.parts import SIXTEEN_BIT, unwrap
from ..models.tokens import row_count
from ..models.weights import check_stored

FIRST_ROWS = 8
ROWS_TRIED = 256
IMAGE_COLUMNS = ("images", "image")

logger = logging.getLogger(__name__)


def check_arguments(args) -> None:
    """Refuse TRL options that do nothing, or the wrong thing, with images and our collator.

    Raises:
        UserError: the option is named, with what to set instead.
    """
    refused = {
        "packing": (args.packing, "TRL's packing cannot hold images; set `vision_packing: rows` or `image`"),
        "padding_free": (args.padding_free, "TRL's cannot hold images; set `vision_packing: rows`"),
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


def check_reference(model, source: str, method: str) -> None:
    """TRL reads the reference model from the disk again: it must be there, with the same vocabulary.

    Args:
        source: the folder that `model` was loaded from.

    Raises:
        UserError: the folder cannot be read, or tokens were added to the model and not saved.
    """
    try:
        config = load_config(source)
        check_stored(source)
    except UserError as error:
        raise UserError(
            f"the model's folder {source!r} cannot be read, but {method} takes its reference from there. Save the model "
            f"and the processor, and train from that folder. ({error})"
        ) from error
    rows = row_count(model.get_input_embeddings().weight)
    stored = config.get_text_config(decoder=True).vocab_size
    if stored != rows:
        raise UserError(
            f"{source}: the model in memory has {rows} embedding rows, its folder {stored}: tokens were added and not "
            "saved. Save the extended model first (`vlm-sft-rl model prepare`), and train from there."
        )


def asked_for(engine: str) -> bool:
    """Whether the launcher was told to use `FSDP` or `DEEPSPEED`."""
    # by hand as any word that accelerate's other switches know
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("true", "1", "yes", "y", "t", "on")


def check_engine(state, *, settled: bool = True, fsdp: bool = False) -> None:
    """Refuse a run that is not distributed as its launcher was told, which accelerate does not say by itself.

    Args:
        state: accelerate's `AcceleratorState`; or, before there is one and with `settled` False, its `PartialState`, to
            which FSDP is still a matter of several GPUs.
        fsdp: the recipe asks for FSDP itself.

    Raises:
        UserError: FSDP or DeepSpeed was asked for and is not used, or processes would train each by itself.
    """
    kind = state.distributed_type
    for engine in ("FSDP", "DEEPSPEED"):
        pending = not settled and engine == "FSDP" and kind not in ("NO", "MULTI_CPU")
        asked = asked_for(engine) or (fsdp and engine == "FSDP")
        if asked and kind != engine and not pending:
            raise UserError(
                f"{engine} was asked for, and accelerate trains without it ({kind.value} on {state.device.type}). It needs "
                "GPUs: launch with accelerate_configs/cpu.yaml or ddp.yaml here, and leave `use_cpu` out where there are."
            )
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks != state.num_processes:
        raise UserError(
            f"{ranks} processes were started, and each would train by itself ({state.num_processes} work together). Without "
            "GPUs set `use_cpu: true`, or launch with accelerate_configs/cpu.yaml."
        )


def name_wrapped_layers(trainer) -> None:
    """Tell FSDP which of the model's blocks to wrap where the config does not: those of its family that it has.

    accelerate takes all that transformers names for a family and refuses one that this model is made without.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.transformer_cls_names_to_wrap is not None:
        return
    present = {type(module).__name__ for module in trainer.model.modules()}
    blocks = getattr(trainer.model, "_no_split_modules", None) or ()
    plugin.transformer_cls_names_to_wrap = sorted(present & set(blocks)) or None


def check_adapter_settings(model: PeftModel) -> None:
    """Raises UserError: settings of an adapter that PEFT leaves out without a word, or that no step can be made with."""
    names = [name for name, _ in model.named_modules()]
    for config in model.peft_config.values():
        if config.is_prompt_learning:
            raise UserError(
                f"`peft_config`: {type(config).__name__} makes every row longer than its labels. Use LoRA, or another "
                "adapter of weights."
            )
        for choice in getattr(config, "modules_to_save", None) or ():
            if not any(name.endswith(choice) for name in names):
                raise UserError(
                    f"`modules_to_save` (in a recipe `lora_modules_to_save`) names {choice}, and "
                    f"{type(unwrap(model)).__name__} has no such module. Correct the name, or leave it out."
                )
    for name, ids in trainable_rows(model).items():
        if min(ids, default=0) < 0:
            raise UserError(
                f"`trainable_token_indices`: {min(ids)} is no row of {name}. Give the tokens' ids."
            )


def sharded_by(args) -> str | None:
    """What cuts the weights themselves over the processes: `ZeRO-3`, `FSDP` or nothing."""
    plugin = args.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return "ZeRO-3"
    return "FSDP" if args.fsdp or asked_for("FSDP") else None


def check_doubts(args, rows=None) -> None:
    """Raises UserError: the weights are sharded, and one of these rows (None: a row that came) has doubts."""
    if (engine := sharded_by(args)) is None:
        return
    if rows is not None and not any(
        isinstance(turn, dict) and turn.get("doubts") is not None
        for batch in rows.select_columns("messages").iter(1000)
        for talk in batch["messages"]
        for turn in talk or ()
    ):
        return
    raise UserError(
        f"`doubts` in a row do not work under {engine}. Use ZeRO-2 or DDP, or take them out of the rows: then the tags are "
        "taught as they stand."
    )


def check_token_rows(args) -> None:
    """Trainable token rows and sharded weights exclude each other: PEFT would read the rows from a shard under ZeRO-3, and
    FSDP2 would shard tied rows twice.

    Raises:
        UserError: the weights are sharded.
    """
    if (engine := sharded_by(args)) is not None:
        raise UserError(
            f"LoRA with trainable token rows does not work under {engine}. Launch with accelerate_configs/zero2.yaml or "
            "ddp.yaml, or set `train_new_tokens: false`."
        )


def check_sharding(args, model, peft_config=None) -> None:
    """`check_token_rows` where such rows train.

    Args:
        model: a model, adapted or not, or its path.
        peft_config: what it is going to be adapted by.
    """
    adapted = trainable_rows(model) if isinstance(model, PeftModel) else {}
    if adapted or getattr(peft_config, "trainable_token_indices", None):
        check_token_rows(args)


def may_hold_float32(model, args) -> bool:
    """Whether a trained module may be float32 beside 16-bit ones.

    Autocast makes one dtype of them; without it there must be none in 16 bits around it. DeepSpeed wants one.
    """
    return args.deepspeed_plugin is None and bool(args.bf16 or args.fp16 or model.dtype == torch.float32)


def check_trains(model) -> None:
    """Raises UserError: no weight of the model is trained."""
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "nothing is trained: no parameter requires a gradient. Leave a part of the model free (`freeze_language: "
            "false`, `train_projector: true`), or add adapters with `use_peft: true`."
        )


def check_precision(trainer) -> int:
    """Warn when trained weights are in 16 bits and nobody keeps float32 copies; returns how many tensors are.

    A weight of 0.02 in bfloat16 moves in steps of 1e-4: updates of a usual learning rate round to nothing.

    Raises:
        UserError: they cannot be trained, which would show at the first update or later: any with `fp16: true`, whose
            gradient scaler unscales float32 alone, and float16 by Adam, whose epsilon is 0 there.
    """
    args = trainer.args
    if args.deepspeed_plugin is not None:
        return 0
    low = {
        n: p.dtype for n, p in trainer.model.named_parameters() if p.requires_grad and p.dtype in SIXTEEN_BIT
    }
    if not low:
        return 0
    half = torch.float16 in low.values()
    what = f"{len(low)} trained tensors are in 16 bits ({next(iter(low))}, …)"
    if isinstance(trainer.model, PeftModel):
        cure = "Set `bf16: true` or `fp16: true`: what trains beside frozen 16-bit weights is float32 then."
    else:
        cure = "Set `dtype: float32`: with `bf16: true` or `fp16: true` the computation stays in 16 bits."
    if args.fp16:
        raise UserError(f"{what}, whose gradients the scaler of `fp16: true` cannot unscale. {cure}")
    if half and "adam" in args.optim:
        raise UserError(f"{what}, and Adam divides by zero in float16. {cure}")
    logger.warning("%s, where small updates vanish. %s Or train with DeepSpeed.", what, cure)
    return len(low)


def check_first_rows(dataset: Iterable, collator, vocabulary: int, count: int = FIRST_ROWS) -> None:
    """Collate the first rows one by one: ids must exist in the model, and something must be learned.

    A collator that skips bad rows gets further, up to `ROWS_TRIED`, until `count` rows are good. Nothing is recorded
    as skipped here.

    Raises:
        UserError: a token id beyond the embedding matrix, no usable row, or no supervised token in any of them. Errors
            of a collator that does not skip (images, tags, length) come through as they are.
    """
    skips = getattr(collator, "rejects", None) is not None
    if skips:
        collator = copy.copy(collator)
        collator.rejects = None
    supervised, good, bad, rows = 0, 0, [], []
    for row in dataset:
        if good >= count or good + len(bad) >= ROWS_TRIED:
            break
        try:
            batch = collator([row])
        except RowError as error:
            if not skips:
                raise
            bad.append(error)
            continue
        if (largest := int(batch["input_ids"].max())) >= vocabulary:
            raise UserError(
                f"row {row.get('id', good)}: token id {largest}, but the model has {vocabulary} embedding rows. The "
                "processor and the model do not belong together: load both from the same prepared folder "
                "(`vlm-sft-rl model prepare`)."
            )
        learnt = batch["labels"] != IGNORE if "labels" in batch else batch["completion_mask"]
        supervised += int(learnt[:, 1:].sum())
        good += 1
        rows.append(row)
    if not good and not bad:
        raise UserError("The training data has no rows.")
    if not good:
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(error.kind for error in bad).most_common())
        raise UserError(
            f"None of the first {len(bad)} rows can be used ({kinds}), so `on_bad_row: skip` would leave nothing to learn "
            f"from. The first: {bad[0]} `vlm-sft-rl data validate` lists what is wrong with all rows."
        )
    if not supervised:
        raise UserError(
            f"None of the first {good} rows has a supervised token, so nothing would be learned. Look at one with "
            "`vlm-sft-rl data preview`: are the answers empty, of weight 0, or masked out?"
        )
    warn_without_images(rows)


def warn_without_images(rows: Sequence[dict]) -> None:
    """Say so when a vision-language model is about to be trained on rows of which the first ones have no image."""
    if rows and not any(row.get(name) for row in rows for name in IMAGE_COLUMNS):
        logger.warning(
            "None of the first %d rows has an image, so they teach text alone. If they should have one: is it in a column "
            "`images` (or `image`)?",
            len(rows),
        )


def check_tagged(rows, warn: bool = True) -> None:
    """Warn when few answers have a verification tag, or all the same verdict. Raises UserError: none has a tag.

    Args:
        warn: False: only raise, because the trainer of these rows will look at them, too.
    """
    counts = count_tagged(rows)
    # without any answer it is something else, which `check_first_rows` tells
    if not counts.answers or (shortage := tag_shortage(counts)) is None:
        return
    if not counts.tagged:
        raise UserError(f"`method: reverse`: {shortage} Or train them with `method: sft`.")
    if warn:
        logger.warning("`method: reverse`: %s.", shortage)


def check_mixture(dataset, collator, batch_size: int) -> None:
    """Rows without images that this processor does not take, alone or beside rows with images.

    Raises:
        UserError: text-only rows that are refused and not skipped, or batches that would mix both kinds.
    """
    if not isinstance(collator, VisionCollator) or collator.trial(1) is not None:
        return
    alone, mixed = collator.trial(0), collator.trial(1, 0)
    if alone is None and mixed is None:
        return
    name = type(collator.processor).__name__
    without, rows = rows_without_images(dataset)
    if not without:
        return
    if alone is not None:
        complaint = (
            f"{name} takes no rows without an image, and {without} of {rows} rows have none ({alone}) Drop them, or "
            "train a model whose processor takes them."
        )
        if collator.rejects is None:
            raise UserError(complaint)
        logger.warning("%s They will be skipped.", complaint)
    elif without < rows and batch_size > 1:
        raise UserError(
            f"{name} takes no batch of rows with and without images ({mixed}), and {without} of {rows} rows have none. "
            "Set `per_device_train_batch_size: 1` (and more `gradient_accumulation_steps`), or train both kinds apart."
        )


def rows_without_images(dataset) -> tuple[int, int]:
    """`(rows without images, rows)` of a dataset of paths; (0, 0) where counting would open every picture."""
    features = getattr(dataset, "features", None) or {}
    if not isinstance(dataset, Dataset) or any(
        name in features and "string" not in str(features[name]) for name in IMAGE_COLUMNS
    ):
        return 0, 0
    names = [name for name in IMAGE_COLUMNS if name in features]
    if not names:
        return len(dataset), len(dataset)
    column = dataset.select_columns(names).with_format(None)
    return sum(not any(row.values()) for row in column), len(dataset)


def check_loss_weights(weights: torch.Tensor | None, labels: torch.Tensor | None) -> None:
    """Raises UserError when a collator's `loss_weights` do not lie over its `labels`."""
    if weights is not None and (labels is None or weights.shape != labels.shape):
        raise UserError(
            f"The collator's `loss_weights` have shape {tuple(weights.shape)}, its `labels` "
            f"{None if labels is None else tuple(labels.shape)}. They must be equal."
        )
