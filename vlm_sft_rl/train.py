"""`accelerate launch -m vlm_sft_rl.train --config RECIPE [--key value …]`: a recipe in, a checkpoint out.

A run that was stopped goes on from its last complete checkpoint when the same command is given again
(`--resume_from_checkpoint no` starts anew). `--dry-run` checks everything up to the first step and estimates the memory
per GPU, without loading a weight.
"""

import argparse
import dataclasses
import gc
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, first_line, missing_package, next_steps, printable
from .io import writing
from .launch import end_with_parent, leave_out_the_harmless
from .locks import sole_use
from .recipes import check_keys, find, load_recipe, parse_yaml
from .settings import check_values, takes_list_of_text

# fields of our configs that hold keys of their own
MAPPINGS = ("decoding", "dpo", "kind_weights", "pair_weights", "pairs", "stage_weights")
# what numbers must be where no config says so itself: a recipe's fields are also argparse's, which knows no limits
_AT_LEAST_1 = (
    "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps lora_r "
    "torch_empty_cache_steps dataloader_prefetch_factor ddp_timeout ddp_bucket_cap_mb max_length max_completion_length "
    "num_generations num_generations_eval num_iterations steps_per_generation generation_batch_size pad_to_multiple_of "
    "ref_model_sync_steps subsample min_pixels max_pixels probe_every probe_limit sample_top_k serve_concurrency "
    "max_row_tokens"
)
_AT_LEAST_0 = (
    "learning_rate num_train_epochs warmup_steps weight_decay adam_epsilon max_grad_norm eval_delay save_total_limit "
    "dataloader_num_workers seed data_seed neftune_noise_alpha router_aux_loss_coef lora_alpha epsilon beta "
    "subsample_seed min_rationale_chars close_tag_weight attempt_weight projector_learning_rate "
    "span_credit verdict_weight image_weight anchor_weight"
)
LIMITS = {
    **{name: {"least": 1} for name in _AT_LEAST_1.split()},
    **{name: {"least": 0} for name in _AT_LEAST_0.split()},
    **{
        name: {"above": 0}
        for name in ("logging_steps", "eval_steps", "save_steps", "temperature", "serve_timeout")
    },
    **{name: {"least": 0, "below": 1} for name in ("adam_beta1", "adam_beta2", "lora_dropout")},
    **{name: {"least": 0, "most": 1} for name in ("label_smoothing_factor", "label_smoothing", "top_p")},
    "max_steps": {"least": -1},
    "early_stop": {"infinite": True},
    "max_ratio": {"infinite": True},
    "check_question": {"holds": "{phrase}"},
}
# transformers writes this file last; a run killed while saving leaves a folder without it
LAST_FILE = "trainer_state.json"
FIRST_SAYS_SECONDS = 5
# settings that name places, or are made of the process's: they may differ between machines
_MACHINES_OWN = ("_dir", "_file", "_path", "_root", "_spec", "_token", "run_name", "resume_from_checkpoint")
AS_IT_IS = {"highlight": False, "markup": False, "soft_wrap": True}  # of text that rich prints
WEIGHTS = ("*.safetensors", "*.distcp", "pytorch_model_fsdp_0", "global_step*")


def valid_keys(method: str) -> set[str]:
    """The keys a recipe of this method may have."""
    return {
        field.name for config in config_classes(method) for field in dataclasses.fields(config) if field.init
    }


def config_classes(method: str) -> tuple[type, type, type]:
    """The dataclasses whose fields are a recipe's keys: model, data, trainer."""
    from .data.config import VLMDataConfig
    from .models.load import VLMModelConfig

    return VLMModelConfig, VLMDataConfig, load_method(method).CONFIG


def load_method(name: str):
    """What turns a recipe of this method into its trainer: `CONFIG`, `build()` and mostly `plan()`.

    Raises:
        UserError: there is no such method.
    """
    match name:
        case "reverse" | "sft" | "r3v" | "rewind" | "sco":
            from .methods.supervised import METHODS

            return METHODS[name]
        case "reflection_dpo":
            from .methods import reflection_dpo as method
        case "grpo":
            from .methods import grpo as method
        case "sc_tune":
            from .methods import sc_tune as method
        case _:
            raise UserError(f"There is no method {name!r}.")
    return method


def read_recipe(path: str | Path) -> dict:
    """Read a recipe and check its keys against the fields of its method's config dataclasses.

    Raises:
        UserError: not YAML, `method` missing or unknown, or an unknown key (with the nearest valid ones).
    """
    recipe = load_recipe(path)
    check_keys(recipe, {"method", *valid_keys(recipe["method"])}, str(path))
    return recipe


def parse(recipe: dict, overrides: Sequence[str], where: str) -> tuple:
    """Turn a recipe and `--key value` overrides into the three configs.

    Raises:
        UserError: an unknown override, or a value of the wrong type or out of range.
    """
    from trl import TrlParser

    classes, valid = config_classes(recipe["method"]), valid_keys(recipe["method"])
    keys = [word[2:].split("=")[0] for word in overrides if word.startswith("--")]
    check_keys(keys, valid | {f"no_{key}" for key in valid}, "command line")
    parser = TrlParser(classes, usage="vlm-sft-rl train --config RECIPE [--key value …]", allow_abbrev=False)

    def refuse(message: str):
        raise UserError(
            f"{where}: {message.rstrip('.')}. Correct the value in the recipe or on the command line."
        )

    parser.error = refuse
    holders = {field.name: config for config in classes for field in dataclasses.fields(config)}
    values = {key: value for key, value in recipe.items() if key != "method"}
    # where the rows are is one setting with two names, and the command line has the last word
    if "dataset_name" in keys and "train_file" not in keys:
        values = {key: value for key, value in values.items() if key not in ("train_file", "image_root")}
    elif "train_file" in keys and "dataset_name" not in keys:
        named = ("dataset_name", "dataset_config", "dataset_split", "streaming")
        values = {key: value for key, value in values.items() if key not in named}
    for name, value in values.items():
        if isinstance(value, str) and takes_list_of_text(holders[name], name):
            values[name] = [value]
    parser.set_defaults_with_config(**values)
    words = list(overrides)
    # numbers in quotes and those of the command line are numbers by now
    read = vars(parser.parse_known_args(words)[0])
    values |= {
        name: read[name] for key in keys if (name := key if key in valid else key.removeprefix("no_")) in read
    }
    values |= {name: read[name] for name, value in values.items() if isinstance(value, str) and name in read}
    for config in classes:
        check_values(config, values, where, LIMITS)
    try:
        *configs, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    except Exception as error:  # each config refuses in its own way
        reason = str(error) if isinstance(error, UserError) else first_line(error)
        raise UserError(f"{where}: {reason}") from error
    if rest:
        raise UserError(f"command line: what is {' '.join(rest)}? Write overrides as --key value.")
    for config in configs:
        read_mappings(config, where)
    return tuple(configs)


def read_mappings(config, where: str) -> None:
    """Turn our own mappings that the command line gave as text into mappings, in place.

    transformers reads the text of its own fields alone.

    Raises:
        UserError: the text is neither a JSON object nor a YAML mapping.
    """
    for name in MAPPINGS:
        text = getattr(config, name, None)
        if not isinstance(text, str):
            continue
        try:
            setattr(config, name, parse_yaml(text, f"--{name}"))
        except UserError as error:
            raise UserError(
                f"{where}: `{name}` is {text!r}. Write a mapping as in a recipe, --{name} '{{key: 1.0}}', or a JSON object."
            ) from error


def run(recipe: dict, model_args, data_args, args, *, dry_run: bool = False, gpus: int = 1):
    """Train as the configs say; returns the trainer, or with `dry_run` the report for that many GPUs.

    Raises:
        UserError: bad settings, model or data; a full disk.
    """
    from rich.console import Console

    from .machines import check_machines
    from .methods import check_reporting

    console = Console(stderr=True, quiet=not args.should_log)
    check_reporting(args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if args.dataloader_num_workers > cores:
        console.print(
            f"`dataloader_num_workers`: {cores} in place of {args.dataloader_num_workers}, as there are {cores} CPU cores."
        )
        args.dataloader_num_workers = cores
    method = load_method(recipe["method"])
    if args.eval_strategy != "no" and not data_args.eval_file:
        raise UserError(
            f"`eval_strategy: {args.eval_strategy.value}` needs `eval_file`: name the rows to evaluate on, or leave it out."
        )
    if dry_run:
        checkpoint, _ = resume_from(args.output_dir, args.resume_from_checkpoint)
        if hasattr(method, "plan"):
            from .dry_run import dry_run_report

            result = dry_run_report(method, recipe, model_args, data_args, args, gpus=gpus, console=console)
        else:
            result = start(method, recipe, model_args, data_args, args, console)
        console.print("Dry run: everything is ready for the first step. To train, leave --dry-run out.")
        if checkpoint is not None:
            console.print(f"The run would go on from {checkpoint}.")
        return result
    with sole_use(args.output_dir):
        checkpoint, incomplete = resume_from(args.output_dir, args.resume_from_checkpoint)
        check_machines(args.output_dir, common_facts(model_args, data_args, args, checkpoint))
        trainer = start(method, recipe, model_args, data_args, args, console)
        for folder in incomplete:
            console.print(f"{folder} was not written to its end; it is left out.")
        if checkpoint is not None:
            warn_of_changes(checkpoint, trainer.sidecar.recipe, console)
            console.print(f"Going on from {checkpoint}.")
        cure = "it goes on from the last complete checkpoint. `save_total_limit` keeps fewer of them."
        with writing(args.output_dir, cure):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            steps = trainer.state.global_step
            if checkpoint is not None and steps == steps_of(checkpoint) == steps_of(args.output_dir):
                # what is there may have been completed by hand since: a threshold, a model card
                console.print(f"All {steps} steps were done before. {args.output_dir} stays as it is.")
            else:
                trainer.save_model()
                trainer.save_state()
                console.print(f"Written to {args.output_dir}")
                console.print(printable(next_steps(what_now(args.output_dir, recipe["method"]))), **AS_IT_IS)
    return trainer


def common_facts(model_args, data_args, args, checkpoint: Path | None) -> dict:
    """What must be the same on all machines of a run: the settings but for paths, the size of the rows, where it goes on."""
    facts = {}
    for config in (model_args, data_args, args):
        for item in dataclasses.fields(config):
            if item.init and not item.name.endswith(_MACHINES_OWN):
                facts[f"`{item.name}`"] = repr(getattr(config, item.name, None))
    rows = getattr(data_args, "train_file", None)
    size = os.path.getsize(rows) if rows and os.path.isfile(rows) else None
    return {**facts, "the size of `train_file`": size, "the last checkpoint": checkpoint and checkpoint.name}


def what_now(folder: str, method: str) -> dict[str, tuple]:
    """What can be done with the result of a run, for `next_steps`."""
    decoder = "retrospective" if method == "reverse" else "greedy"
    ask = ("generate", "--model", folder, "--decoder", decoder, "--image", "PICTURE", "--prompt", "QUESTION")
    measure = ("eval", "run", "BENCHMARK", "--model", folder, "--decoder", decoder, "--data-dir", "DIR")
    steps = {"ask it": ask, "measure it": measure}
    if (Path(folder) / "adapter_config.json").is_file():
        steps["make a whole model of the adapter"] = ("merge", folder, f"{folder}-merged")
    return steps


def start(method, recipe: dict, model_args, data_args, args, console):
    """The trainer of a recipe, ready for its first step, and the report of what it is about to do."""
    from .models.report import print_report, startup_report

    trainer = method.build(recipe, model_args, data_args, args)
    if args.should_log:
        # a trainer whose collator leaves the text for later says what its rows look like to the model
        collator = getattr(trainer, "report_collator", trainer.data_collator)
        report = startup_report(trainer.model, trainer.processing_class, trainer.train_dataset, collator)
        print_report(report, console)
    return trainer


def last_complete_checkpoint(output_dir: str | Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint that was written to its end, and the newer ones that were not.

    Returns:
        `(checkpoint or None, incomplete)`.
    """
    folders = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        if (number := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir():
            folders[int(number[1])] = folder
    incomplete = []
    for _, folder in sorted(folders.items(), reverse=True):
        if is_complete(folder):
            return folder, incomplete
        incomplete.append(folder)
    return None, incomplete


def is_complete(folder: str | Path) -> bool:
    """Whether a checkpoint has its weights and the state that is written after everything else."""
    return steps_of(folder) is not None


def steps_of(folder: str | Path) -> int | None:
    """How many steps a complete checkpoint, or the result of a run, was trained for; None where it is not complete."""
    folder = Path(folder)
    try:
        steps = json.loads((folder / LAST_FILE).read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    whole = any(next(folder.glob(pattern), None) is not None for pattern in WEIGHTS)
    return steps if whole else None


def resume_from(output_dir: str | Path, choice: str | None) -> tuple[Path | None, list[Path]]:
    """What to resume from: `choice` is None (the last complete one), `no` (start anew) or a folder.

    Raises:
        UserError: the folder asked for is not a complete checkpoint.
    """
    if choice is None or str(choice).lower() in ("true", "yes", "last"):
        return last_complete_checkpoint(output_dir)
    if str(choice).lower() in ("no", "false", "none"):
        return None, []
    if not is_complete(choice):
        raise UserError(
            f"{choice}: not a complete checkpoint (weights and {LAST_FILE}). Name another one, or leave "
            "`resume_from_checkpoint` out to go on from the last complete one."
        )
    return Path(choice), []


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


def leave_out_bars() -> None:
    """No progress bars of libraries in a log that is no terminal."""
    import datasets
    import transformers

    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def leave_process_group() -> None:
    """End this process's part in a distributed run. Left to the interpreter's exit, gloo's threads now and then abort a
    process whose work was done, and the launcher calls the whole run failed."""
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        # the trainer and its wrapped model refer to each other and to the group, whose threads end with its last holder
        gc.collect()


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = argparse.ArgumentParser(
        prog="vlm_sft_rl.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--config", required=True, metavar="RECIPE", help="a recipe's name or path")
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, estimate memory, train nothing"
    )
    command.add_argument("--gpus", type=int, default=1, help="how many GPUs --dry-run estimates for")
    known, overrides = command.parse_known_args(argv)
    end_with_parent()
    leave_out_the_harmless()
    leave_out_bars()
    try:
        path = find("recipes", known.config)
        recipe = read_recipe(path)
        run(recipe, *parse(recipe, overrides, str(path)), dry_run=known.dry_run, gpus=known.gpus)
        leave_process_group()
    except (UserError, ImportError) as error:
        if isinstance(error, ImportError):
            error = missing_package(error)
        # what all met the first process says, on each machine, and the launcher then ends the others
        rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
        time.sleep(FIRST_SAYS_SECONDS * ((rank != "0") + (local_rank not in ("0", rank))))
        print(f"\nError: {printable(str(error))}", file=sys.stderr, flush=True)  # behind a progress bar
        return 2
    return 0


if __name__ == "__main__":
    if status := main():
        # the process group's threads wait for the other processes, and those for the end of this one
        sys.stdout.flush()
        os._exit(status)
