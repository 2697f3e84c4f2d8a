"""`accelerate launch -m vlm_sft_rl.train --config RECIPE [--key value …]`: a recipe in, a checkpoint out.

A run that was stopped goes on from its last complete checkpoint when the same command is given again
(`--resume_from_checkpoint no` starts anew). `--dry-run` does everything up to the first step.
"""

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence

from .errors import UserError
from .recipes import check_keys, find, load_recipe


def valid_keys(method: str) -> set[str]:
    """The keys a recipe of this method may have."""
    return {
        field.name for config in config_classes(method) for field in dataclasses.fields(config) if field.init
    }


def config_classes(method: str) -> tuple[type, type, type]:
    """The dataclasses whose fields are a recipe's keys: model, data, trainer."""
    from .data.config import VLMDataConfig
    from .models.config import VLMModelConfig
    from .trainers.verification_config import VerificationSFTConfig

    return VLMModelConfig, VLMDataConfig, {"reverse": VerificationSFTConfig}[method]


def parse(recipe: dict, overrides: Sequence[str], where: str) -> tuple:
    """Turn a recipe and `--key value` overrides into the three configs.

    Raises:
        UserError: an unknown override, or a value of the wrong type.
    """
    from trl import TrlParser

    classes = config_classes(recipe["method"])
    given = [word[2:].split("=")[0] for word in overrides if word.startswith("--")]
    check_keys(
        given,
        valid_keys(recipe["method"]) | {f"no_{key}" for key in valid_keys(recipe["method"])},
        "command line",
    )
    parser = TrlParser(classes, usage="vlm-sft-rl train --config RECIPE [--key value …]", allow_abbrev=False)

    def refuse(message: str):
        raise UserError(f"{where}: {message}. Correct the value in the recipe or on the command line.")

    parser.error = refuse
    parser.set_defaults_with_config(**{key: value for key, value in recipe.items() if key != "method"})
    try:
        *configs, rest = parser.parse_args_into_dataclasses(list(overrides), return_remaining_strings=True)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    if rest:
        raise UserError(f"command line: what is {' '.join(rest)}? Write overrides as --key value.")
    return tuple(configs)


def run(recipe: dict, model_args, data_args, args, *, dry_run: bool = False):
    """Train as the configs say; returns the trainer.

    Raises:
        UserError: bad settings, model or data; a full disk.
    """
    from rich.console import Console

    from .checkpoints import resume_from
    from .models.report import print_report, startup_report

    console = Console(stderr=True, quiet=not args.should_log)
    checkpoint, incomplete = resume_from(args.output_dir, args.resume_from_checkpoint)
    trainer = build(recipe, model_args, data_args, args)
    if args.should_log:
        report = startup_report(
            trainer.model, trainer.processing_class, trainer.train_dataset, trainer.data_collator
        )
        print_report(report, console)
    for folder in incomplete:
        console.print(f"{folder} was not written to its end; it is left out.")
    if dry_run:
        console.print("Dry run: everything is ready for the first step.")
        return trainer
    if checkpoint is not None:
        warn_of_changes(checkpoint, trainer.sidecar.recipe, console)
        console.print(f"Going on from {checkpoint}.")
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.save_model()
        trainer.save_state()
    except (OSError, RuntimeError) as error:
        # safetensors and torch.save wrap the system's error in their own ways
        if (
            "No space left" in str(error)
            or "file write failed" in str(error)
            or "PytorchStreamWriter" in str(error)
        ):
            raise UserError(
                f"{args.output_dir}: the disk is full. Free some space and give the same command again: it goes on "
                "from the last complete checkpoint. `save_total_limit` keeps fewer of them."
            ) from error
        raise
    return trainer


def build(recipe: dict, model_args, data_args, args):
    """Model, data and trainer of a recipe, ready for `train()`."""
    import torch

    from .data.tagged_set import load_train_rows
    from .models.load import load_for_training
    from .models.peft import build_peft_config
    from .trainers.verification_sft import VerificationSFTTrainer, build_collator

    if not data_args.train_file:
        raise UserError("`train_file` is not set. Name the training rows in the recipe or with --train_file.")
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    torch.manual_seed(args.seed)
    model, processor, token_ids, sidecar = load_for_training(model_args)
    where = {"image_root": data_args.image_root, "cache_dir": data_args.index_dir}
    with args.main_process_first(desc="indexing the training rows"):
        rows = load_train_rows(
            data_args.train_file, subsample=data_args.subsample, seed=data_args.subsample_seed, **where
        )
        eval_rows = load_train_rows(data_args.eval_file, **where) if data_args.eval_file else None
    rejects = data_args.rejects_file or os.path.join(args.output_dir, "rejects.jsonl")
    trainer = VerificationSFTTrainer(
        model,
        args,
        data_collator=build_collator(
            processor,
            args,
            image_root=data_args.image_root,
            on_bad_row=data_args.on_bad_row,
            rejects_path=rejects if data_args.on_bad_row == "skip" else None,
        ),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=processor,
        peft_config=build_peft_config(model, model_args, token_ids),
    )
    trainer.sidecar = dataclasses.replace(
        sidecar, recipe=effective_recipe(recipe, model_args, data_args, args)
    )
    if data_args.probe_spec:
        trainer.add_callback(build_probe(data_args, trainer, processor))
    return trainer


def build_probe(data_args, trainer, processor):
    """The callback that asks the model questions during training (`probe_*` keys)."""
    from .decoding import generate_plain
    from .evaluation.probe import VerifierProbe

    def generate(model, images, prompts, max_new_tokens):
        # the projector may be float32 beside 16-bit weights
        with trainer.accelerator.autocast():
            return generate_plain(
                model, processor, images, prompts, max_new_tokens=max_new_tokens, batch_size=16
            )

    def record(figures):
        # joins the step's own record: `trainer.log` from a callback would swallow that record
        for name, value in figures.items():
            trainer._metrics["train"][name].append(value)

    return VerifierProbe(
        record,
        generate,
        data_args.probe_spec,
        data_args.probe_data_dir or ".",
        questions=data_args.probe_questions,
        every=data_args.probe_every,
        limit=data_args.probe_limit,
    )


def effective_recipe(recipe: dict, *configs) -> dict:
    """The recipe's keys with the values that are in force, plus every other setting that is not its default."""
    found = {"method": recipe["method"]}
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default if field.default is not dataclasses.MISSING else None
            simple = isinstance(value, str | int | float | bool | list | dict | type(None))
            if simple and field.init and (field.name in recipe or _overridden(field, value, default)):
                found[field.name] = value
    return found


# transformers fills these in by itself
_FILLED_IN = {"logging_dir", "run_name", "dataset_kwargs", "bf16", "accelerator_config", "hub_token"}


def _overridden(field, value, default) -> bool:
    return (
        field.default_factory is dataclasses.MISSING
        and field.name not in _FILLED_IN
        and type(value) is type(default)
        and value != default
    )


def warn_of_changes(checkpoint, recipe: dict, console) -> None:
    """Say which settings differ from those the checkpoint was trained with: going on mixes the two."""
    from .models.sidecar import read_sidecar

    sidecar = read_sidecar(checkpoint)
    before = (sidecar.recipe if sidecar else None) or {}
    changed = sorted(k for k in {*before, *recipe} if k in before and k in recipe and before[k] != recipe[k])
    if changed:
        lines = "\n".join(f"  {key}: {before[key]} -> {recipe[key]}" for key in changed)
        console.print(
            f"[yellow]{checkpoint} was trained with other settings:[/]\n{lines}\nTo start anew, choose another "
            "--output_dir or add --resume_from_checkpoint no."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = argparse.ArgumentParser(
        prog="vlm_sft_rl.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--config", required=True, metavar="RECIPE", help="a recipe's name or path")
    command.add_argument("--dry-run", action="store_true", help="stop before the first step")
    known, overrides = command.parse_known_args(argv)
    try:
        path = find("recipes", known.config)
        recipe = load_recipe(path)
        run(recipe, *parse(recipe, overrides, str(path)), dry_run=known.dry_run)
    except UserError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
