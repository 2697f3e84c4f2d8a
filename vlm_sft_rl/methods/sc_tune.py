"""SC-Tune: a recipe and its files to an `SCTuneTrainer`."""

from datasets import Dataset

from ..data.collators import RegionCollator, VisionCollator
from ..data.named import NamedDataset
from ..data.rows import read_regions, read_rows
from ..decoding.capabilities import config_obstacle
from ..dry_run import Plan
from ..errors import UserError
from ..models.boxes import convention_for
from ..models.load import check_config, load_config, processor_for_training
from ..models.memory import meta_model
from ..models.regions import RegionPrompts
from ..models.sidecar import read_sidecar
from ..models.tokens import require_verification_tokens, row_count
from ..rewards.regions import check_weights, reward_named
from ..trainers.checks import check_first_rows
from ..trainers.sc_tune.alternating import check_whole_weights
from ..trainers.sc_tune.batches import RegionPreview
from ..trainers.sc_tune.config import SCTuneConfig
from ..trainers.sc_tune.rollouts import measured_on
from ..trainers.sc_tune.trainer import SCTuneTrainer
from . import check_files, load_start, remember_recipe, subsampled, train_source

CONFIG = SCTuneConfig


def build(recipe: dict, model_args, data_args, args) -> SCTuneTrainer:
    """Model, data and trainer of a recipe, ready for `train()`; `train_file` holds region rows."""
    check_whole_weights(args)
    check_data(model_args, data_args, args)
    start = load_start(model_args, args, verification=args.describer == "retrospective")
    trainer = SCTuneTrainer(
        start.model,
        args,
        data_collator=RegionCollator(data_args.image_root),
        train_dataset=load_regions(train_source(data_args), data_args),
        eval_dataset=load_held_out(data_args.eval_file, args),
        rec_dataset=load_annotated(args.rec_file) if args.rec_file else None,
        replay_dataset=list(read_rows(args.replay_file)) if args.replay_file else None,
        processing_class=start.processor,
        peft_config=start.peft_config,
    )
    remember_recipe(trainer, recipe, model_args, data_args, args, **args.prompts)
    return trainer


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    check_data(model_args, data_args, args)
    verification = args.describer == "retrospective"
    processor = processor_for_training(model_args, verification=verification)
    path = model_args.model_name_or_path
    model = meta_model(model_args, require_verification_tokens(processor, path) if verification else ())
    sidecar = read_sidecar(path)
    convention = convention_for(model, args.box_convention or (sidecar and sidecar.box_convention))
    prompts = RegionPrompts(processor, convention, args.describe_prompt, args.locate_prompt)
    if args.replay_file:
        replayed = list(read_rows(args.replay_file))
        vocabulary = row_count(model.get_input_embeddings().weight)
        check_first_rows(replayed, VisionCollator(processor, data_args.image_root), vocabulary)
    load_held_out(data_args.eval_file, args)
    if args.rec_file:
        load_annotated(args.rec_file)
    check_weights([reward_named(name) for name in args.rewards], args.reward_weights)
    copies = 2 if args.kl_coef and args.kl_anchor == "start" else 1
    sharded = "SC-Tune exchanges whole weights with those of its frozen copy."
    return Plan(
        model,
        processor,
        load_regions(train_source(data_args), data_args),
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


def check_data(model_args, data_args, args) -> None:
    """What can be refused before a weight is read.

    Raises UserError: no rows are named, bad ones are to be skipped, or this model's cache cannot be rewound.
    """
    check_files(
        data_args,
        "the region rows",
        "region rows are not skipped. Find bad ones, pictures included, with `vlm-sft-rl data validate FILE --image-root "
        "ROOT`; correct or remove them.",
        rec_file=args.rec_file,
        replay_file=args.replay_file,
    )
    path, revision = model_args.model_name_or_path, model_args.model_revision
    if not path or check_config(path, revision, training=True) is None:
        return  # the loader says what is missing
    config = load_config(path, revision)
    if (reason := config_obstacle(config)) is not None:
        raise UserError(
            f"{path}: {config.model_type!r} cannot share one prefill of an image, as SC-Tune does: {reason}. Use another "
            "family, see docs/families.md."
        )


def load_annotated(path: str) -> Dataset:
    """The region rows of `rec_file`.

    Raises UserError: a row has no `expressions`.
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

    Raises UserError: the best checkpoint is to be chosen by a figure that these rows do not give.
    """
    if not path:
        return None
    rows = load_regions(path)
    metric, figures = (args.metric_for_best_model or "").removeprefix("eval_"), measured_on(rows)
    if metric and metric not in figures:
        raise UserError(
            f"`metric_for_best_model: {args.metric_for_best_model}`: evaluation on {path} gives "
            f"eval_{', eval_'.join(figures)}."
            + (" eval_rec_acc50 needs rows with `expressions`." if metric == "rec_acc50" else "")
        )
    return rows


def load_regions(path: str | NamedDataset, data_args=None) -> Dataset:
    """The region rows of a file; of `data_args` counts `subsample`."""
    rows = read_regions(path)
    if data_args is not None:
        rows = subsampled(rows, data_args)
    fields = dict.fromkeys(key for row in rows for key in row)
    return Dataset.from_list([{key: row.get(key) for key in fields} for row in rows])
