"""Tiny trainers: one maker for every method, recipes for tiny checkpoints, and what tests look at behind a run."""

import os
import subprocess
import sys
from pathlib import Path

import families
import torch
import yaml
from datasets import Dataset
from json_lines import write_lines
from tagged_rows import write_rows

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.models.load import VLMModelConfig, load_for_training
from vlm_sft_rl.models.lora import build_peft_config
from vlm_sft_rl.models.tokens import add_verification_tokens
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer, build_collator

# families that every test of families takes; the others are as thorough, and slow
QUICK = ["llava", "qwen2_5_vl", "mllama"]
OTHERS = [
    "llava_mistral",
    "llava_more",
    "llava_next",
    "qwen2_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "internvl",
]
SETTINGS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
}
# what the trainers' constructors take beside settings
ARGUMENTS = ("data_collator", "eval_dataset", "peft_config", "processing_class", "reward_funcs")


def tagged(family: str = "llava", **options):
    """`(model, processor)` of a family with verification tokens."""
    model, processor = getattr(families, family)(**options)
    add_verification_tokens(model, processor)
    return model, processor


def tagged_dataset(folder: Path, count: int = 8) -> Dataset:
    """Tagged rows whose image paths are absolute, so that a trainer's own collator finds them."""
    path = write_rows(folder / "data", count)
    rows = list(read_rows(path))
    return Dataset.from_list(
        [row | {"images": [str(path.parent / name) for name in row["images"]]} for row in rows]
    )


def arguments(trainer_class, folder: Path, **settings):
    return trainer_class.CONFIG(str(folder / "out"), **(SETTINGS | settings))


def trainer_of(trainer_class, folder: Path, rows, pair, **settings):
    """A trainer of `pair`: `(model, processor)`, of which the model is trained in place, or a checkpoint's path.

    Args:
        rows: a dataset, or a list of rows.
        settings: of the trainer's config, or ARGUMENTS of its constructor.
    """
    more = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    if not isinstance(pair, str | Path):
        model, more["processing_class"] = pair[0], more.get("processing_class", pair[1])
    else:
        model = str(pair)
    dataset = Dataset.from_list(rows) if isinstance(rows, list) else rows
    args = arguments(trainer_class, folder, **settings)
    return trainer_class(model, args=args, train_dataset=dataset, **more)


def loaded_trainer(base: Path, folder: Path, *, training=None, **settings):
    """A verification trainer two steps long as a recipe would make it, and the ids of the verification tokens.

    Args:
        base: a prepared checkpoint.
        training: what differs in the training arguments; `settings` are of `VLMModelConfig`.
    """
    rows = list(read_rows(write_rows(folder / "data")))
    args = VLMModelConfig(model_name_or_path=str(base), **settings)
    model, processor, ids, _ = load_for_training(args)
    changes = {"max_steps": 2, "learning_rate": 1e-2, **(training or {})}
    config = arguments(VerificationSFTTrainer, folder, **changes)
    trainer = VerificationSFTTrainer(
        model,
        config,
        data_collator=build_collator(processor, config, image_root=folder / "data"),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=build_peft_config(model, args, ids),
    )
    return trainer, ids


def recipe_of(folder: Path, method: str, rows: list[dict], **settings) -> dict:
    """A recipe for the checkpoint `folder/model` and these rows."""
    write_lines(folder / "rows.jsonl", rows)
    return {
        "method": method,
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "rows.jsonl"),
        "image_root": str(folder),
        "output_dir": str(folder / "out"),
        "dtype": "float32",
        "gradient_checkpointing": False,
        **SETTINGS,
        **settings,
    }


def written(recipe: dict, folder: Path) -> str:
    """The recipe as a file; returns its path."""
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


def start(recipe: dict, output: Path, *, processes=1, **settings) -> subprocess.Popen:
    """A recipe's training into a folder, in a process of its own or in several."""
    path = written(recipe | {"output_dir": str(output), **settings}, output.with_suffix(".recipe"))
    command = [sys.executable, "-m", "vlm_sft_rl.train", "--config", path]
    if processes > 1:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, "-m", *launcher, *command[1:]]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen) -> None:
    """Wait for a process that was killed, and not for the end of its output: a dataloader's worker that was just being
    forked does not notice that its parent has died, lives on and holds the pipe."""
    process.wait(timeout=60)
    process.stdout.close()


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def history(trainer, key: str) -> list:
    """The logged values of a figure, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(before: dict[str, torch.Tensor], model) -> set[str]:
    """The names of the parameters that are others than before."""
    return {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}


def trainable(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def without(batch: dict, *names: str) -> dict:
    return {name: value for name, value in batch.items() if name not in names}


def preference(number: int, image, **fields) -> dict:
    """A preference row about a picture; chosen answers of different numbers have different lengths."""
    return {
        "id": f"p{number}",
        "images": [str(image)],
        "prompt": [{"role": "user", "content": "How many things?"}],
        "chosen": [{"role": "assistant", "content": "It is one" + " more" * number}],
        "rejected": [{"role": "assistant", "content": "It is two, or three"}],
        **fields,
    }
