"""`vlm-sft-rl self-train RECIPE`: a recipe of a loop (`method: r3v` or `rewind`) -> rounds, summary.json and report.html."""

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from .data.images import image_root_of
from .data.model_files import check_model_files
from .errors import UserError
from .io import write_json
from .locks import sole_use
from .recipes import LOOPS, check_keys, find, read_yaml

if TYPE_CHECKING:
    from .launch import Machines


def self_train(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    accelerate_config: str = "single_gpu",
    num_processes: int | None = None,
    machines: "Machines | None" = None,
    console: Console | None = None,
) -> dict:
    """Run or resume the loop of a recipe; returns its summary.

    Args:
        overrides: `--key value` words.

    Raises UserError: a bad recipe, bad files, a stage that failed, an output folder of another configuration, or several
    machines.
    """
    from .self_training.loop import SelfTraining
    from .self_training.processes import Trainer
    from .self_training.report import finish, finish_rewinds
    from .self_training.rewinds import Rewinds
    from .self_training.rounds import read_seconds
    from .train import parse, read_recipe
    from .trainers.mixture_sft import kind_marks

    path = find("recipes", str(recipe))
    if (method := read_yaml(path).get("method")) not in LOOPS:
        methods = " or ".join(f"`method: {name}`" for name in LOOPS)
        raise UserError(f"{path}: `method` is {method!r}; self-training needs a recipe with {methods}.")
    keys = read_recipe(path)
    model_args, data_args, args = configs = parse(keys, overrides, str(path))
    overridden = {word[2:].split("=")[0].removeprefix("no_") for word in overrides if word.startswith("--")}
    for name in overridden:
        (holder,) = [config for config in configs if hasattr(config, name)]
        value = getattr(holder, name)
        keys[name] = value.value if isinstance(value, Enum) else value  # YAML knows no enums
    if not model_args.model_name_or_path:
        raise UserError("`model_name_or_path` is not set. Name the base model in the recipe.")
    check_model_files(model_args.model_name_or_path, model_args.model_revision)
    if data_args.dataset_name:
        raise UserError("`dataset_name`: self-training asks the rows of a file of its own. Leave it out.")
    output = Path(args.output_dir)
    args.check_self_training()
    kind_marks(args.kind_weights)
    # the rows of a round lie elsewhere than the questions that their image paths come from
    keys["image_root"] = str(image_root_of(args.asked_file, data_args.image_root).resolve())
    objectives = training_keys(keys, args, str(path))
    if args.uses_dpo:  # its values too are to be refused now and not behind the rounds before it
        parse(
            {"method": "reflection_dpo", **objectives["dpo"], "output_dir": args.output_dir},
            [],
            f"{path}, `dpo`",
        )
    trainer = Trainer(objectives, accelerate_config, num_processes, machines)
    if method == "rewind" and "sft" in args.round_objective and (engine := trainer.sharding) is not None:
        raise UserError(
            f"--accelerate-config {accelerate_config}: finished answers have `doubts`, which do not work under {engine}. "
            "Take zero2 or ddp, or `round_objective: dpo`."
        )
    loop, finish_loop = {"r3v": (SelfTraining, finish), "rewind": (Rewinds, finish_rewinds)}[method]
    with sole_use(output):
        run = loop(
            args,
            trainer,
            _absolute(model_args.model_name_or_path),
            output,
            keys["image_root"],
            seed=args.seed,
            console=console,
        )
        rounds = run.run()
        summary = {
            "method": method,
            "rounds": rounds,
            "n": rounds[-1]["n"],
            "seed": args.seed,
            "seconds": round(sum(read_seconds(run.folder(m["round"])) for m in rounds), 1),
            "model": run.base,
            "engine": run.engine,
            "settings": {name: getattr(args, name) for name in args.loop_keys()},
            **run.figures(rounds),
        }
        write_json(output / "summary.json", summary)
        finish_loop(run, summary)
        return summary


def training_keys(keys: dict, args, where: str) -> dict[str, dict]:
    """The recipe's keys that training takes, by objective; `dpo` names what differs there.

    Raises UserError: an unknown key under `dpo`, or a secret.
    """
    from .train import valid_keys

    dpo = args.dpo or {}
    if "hub_token" in {**keys, **dpo}:
        raise UserError(
            f"{where}: `hub_token` would come into the records of every stage. Put it into the environment as HF_TOKEN."
        )
    # the loop sets these in every round
    set_by_loop = {"method", "model_name_or_path", "train_file", "output_dir", *args.loop_keys()}
    objectives = {}
    for objective, method in (("sft", "sft"), ("dpo", "reflection_dpo")):
        valid = valid_keys(method)
        kept = {k: v for k, v in keys.items() if k in valid and k not in set_by_loop}
        if objective == "dpo":
            check_keys(dpo, valid, f"{where}, `dpo`")
            kept |= dpo
        objectives[objective] = kept
    return objectives


def _absolute(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model
