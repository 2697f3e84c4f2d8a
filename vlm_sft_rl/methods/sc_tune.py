"""SC-Tune: a recipe and its files to an `SCTuneTrainer`."""

import dataclasses
import os

import torch
from datasets import Dataset
from transformers import AutoConfig

from ..data.collators import RegionCollator, VisionCollator
from ..data.rows import read_regions, read_rows
from ..decoding.capabilities import config_obstacle
from ..dry_run import Plan
from ..errors import UserError
from ..models.boxes import convention_for
from ..models.load import check_config, load_for_training, processor_for_training
from ..models.lora import build_peft_config
from ..models.memory import meta_model
from ..models.regions import RegionPrompts
from ..models.sidecar import read_sidecar
from ..models.tokens import require_verification_tokens, row_count
from ..rewards.regions import check_weights, reward_named
from ..trainers.checks import check_first_rows
from ..trainers.sc_tune.batches import RegionPreview
from ..trainers.sc_tune.config import SCTuneConfig
from ..trainers.sc_tune.rollouts import measured_on
from ..trainers.sc_tune.trainer import SCTuneTrainer
from .effective import effective_recipe
from .subsample import subsampled

CONFIG = SCTuneConfig


def build(recipe: dict, model_args, data_args, args):
    """Model, data and trainer of a recipe, ready for `train()`."""
    check_data(data_args)
    check_family(model_args)
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, token_ids, sidecar = load_for_training(
        model_args, verification=args.describer == "retrospective"
    )
    trainer = SCTuneTrainer(
        model,
        args,
        data_collator=RegionCollator(data_args.image_root),
        train_dataset=load_regions(data_args.train_file, data_args.subsample, data_args.subsample_seed),
        eval_dataset=load_held_out(data_args.eval_file, args),
        rec_dataset=load_annotated(args.rec_file) if args.rec_file else None,
        replay_dataset=list(read_rows(args.replay_file)) if args.replay_file else None,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, token_ids),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar,
        box_convention=trainer.prompts.convention.name,
        recipe=effective_recipe(recipe, model_args, data_args, args) | args.prompts,
    )
    return trainer


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    check_data(data_args)
    check_family(model_args)
    verification = args.describer == "retrospective"
    processor = processor_for_training(model_args, verification=verification)
    path = model_args.model_name_or_path
    model = meta_model(model_args, require_verification_tokens(processor, path) if verification else ())
    sidecar = read_sidecar(path)
    convention = convention_for(model, args.box_convention or (sidecar and sidecar.box_convention))
    prompts = RegionPrompts(processor, convention, args.describe_prompt, args.locate_prompt)
    if args.replay_file:
        shown = list(read_rows(args.replay_file))
        vocabulary = row_count(model.get_input_embeddings().weight)
        check_first_rows(shown, VisionCollator(processor, data_args.image_root), vocabulary)
    load_held_out(data_args.eval_file, args)
    if args.rec_file:
        load_annotated(args.rec_file)
    check_weights([reward_named(name) for name in args.rewards], args.reward_weights)
    copies = 2 if args.kl_coef and args.kl_anchor == "start" else 1
    sharded = "SC-Tune exchanges whole weights with those of its frozen copy."
    return Plan(
        model,
        processor,
        load_regions(data_args.train_file, data_args.subsample, data_args.subsample_seed),
        RegionPreview(RegionCollator(data_args.image_root), prompts),
        extra={"copies": copies, "tiled": False},
        rows_per_pass=args.num_generations if args.describer_steps else 1,
        least_supervised=args.describe_max_new_tokens if args.describer_steps else 0,
        refused={"zero3": sharded, "fsdp2": sharded},
        notes=[
            "A step of SC-Tune decodes before it trains; the keys cached then, while there are no activations, are not "
            "counted. `rollout_batch_size` bounds them. Nor are the features of the step's pictures, which it keeps: image "
            "tokens x hidden size x 2 bytes a box, as often again per deepstack level (Qwen3-VL), and up to four times as "
            "much with the projector trained (what it reads is wider)."
        ],
    )


def check_data(data_args) -> None:
    """Raises UserError: no rows are named, or bad ones are to be skipped."""
    if not data_args.train_file:
        raise UserError("`train_file` is not set. Name the region rows in the recipe or with --train_file.")
    if data_args.on_bad_row != "error":
        raise UserError(
            "`on_bad_row: skip`: region rows are not skipped. Find bad ones, pictures included, with `vlm-sft-rl data "
            "validate FILE --image-root ROOT`; correct or remove them."
        )


def check_family(model_args) -> None:
    """Raises UserError: the configuration says that this model's cache cannot be rewound. Reads no weight."""
    path, revision = model_args.model_name_or_path, model_args.model_revision
    if not path or check_config(path, revision, training=True) is None:
        return  # the loader says what is missing
    config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    if (reason := config_obstacle(config)) is not None:
        raise UserError(
            f"{path}: {config.model_type!r} cannot share one prefill of an image, as SC-Tune does: {reason}. Use another "
            "family, see docs/families.md."
        )


def load_annotated(path: str) -> Dataset:
    """The region rows of `rec_file`.

    Raises:
        UserError: a row has no `expressions`.
    """
    rows = load_regions(path)
    for row in rows:
        if not row.get("expressions"):
            raise UserError(
                f"{path}: row {row['id']} has no `expressions`, and `rec_file` is read for them. Leave such rows out."
            )
    return rows


def load_held_out(path: str | None, args: SCTuneConfig) -> Dataset | None:
    """The region rows of `eval_file`.

    Raises:
        UserError: the best checkpoint is to be chosen by a figure that these rows do not give.
    """
    if not path:
        return None
    rows = load_regions(path)
    wanted, given = (args.metric_for_best_model or "").removeprefix("eval_"), measured_on(rows)
    if wanted and wanted not in given:
        raise UserError(
            f"`metric_for_best_model: {args.metric_for_best_model}`: evaluation on {path} gives "
            f"eval_{', eval_'.join(given)}."
            + (" eval_rec_acc50 needs rows with `expressions`." if wanted == "rec_acc50" else "")
        )
    return rows


def load_regions(path: str, subsample: int | None = None, seed: int = 0) -> Dataset:
    """The region rows of a file, as a dataset; `subsample` draws so many without replacement."""
    rows = subsampled(read_regions(path), subsample, seed)
    fields = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_list([{key: row.get(key) for key in fields} for row in rows])
