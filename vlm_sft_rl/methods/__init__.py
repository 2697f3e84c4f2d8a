"""From a recipe and its files to a trainer. The methods have `CONFIG`, `build()` and `plan()`; here is what they share."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_reporting_integration_callbacks

from ..data.chat import get_tokenizer
from ..data.collators import VisionCollator
from ..data.images import image_root_of
from ..data.index import takes_all
from ..data.marks import verification_ids
from ..data.named import NamedDataset
from ..errors import UserError, first_line
from ..models.load import load_for_training
from ..models.lora import build_peft_config
from ..models.parts import unwrap
from ..trainers.checks import check_engine, check_token_rows
from ..trainers.losses import next_token_log_probs


def check_files(data_args, what: str, cannot_skip: str | None = None, **files: str | None) -> None:
    """Check the data settings before anything is loaded.

    Args:
        what: the file's rows, in a message's words.
        cannot_skip: why `on_bad_row: skip` is refused; None: it is not.
        files: further files of rows, by their keys.

    Raises UserError: no rows are named, a file is not there, or bad rows are to be skipped where they cannot be.
    """
    if data_args.train_file and data_args.dataset_name:
        raise UserError(
            f"`train_file` ({data_args.train_file}) and `dataset_name` ({data_args.dataset_name}) both name {what}. Keep "
            "one of them."
        )
    if not data_args.train_file and not data_args.dataset_name:
        raise UserError(
            f"`train_file` is not set. Name {what} in the recipe or with --train_file, or a data set with --dataset_name."
        )
    if not data_args.dataset_name:
        for name, value in (("streaming", data_args.streaming), ("dataset_config", data_args.dataset_config)):
            if value:
                raise UserError(f"`{name}` belongs to `dataset_name`, and the rows are in `train_file`.")
    if cannot_skip is not None and data_args.streaming:
        raise UserError("`streaming`: this method looks at all rows before its first step. Leave it out.")
    if cannot_skip is not None and data_args.on_bad_row != "error":
        raise UserError(f"`on_bad_row: skip`: {cannot_skip}")
    for name, file in {"train_file": data_args.train_file, "eval_file": data_args.eval_file, **files}.items():
        if file and not Path(file).is_file():
            raise UserError(
                f"`{name}` is {file!r}, and there is no such file. Name it in the recipe or with --{name}."
            )


def check_reporting(args) -> None:
    """Raises UserError: `report_to` names a tracker that does not exist, or whose package is not installed."""
    for name in args.report_to:
        try:
            (tracker,) = get_reporting_integration_callbacks([name])
            tracker()
        except Exception as error:  # each of them refuses in its own way
            raise UserError(
                f"`report_to: {name}`: {first_line(error)} Install the package, or set `report_to: none`: what is logged is "
                "kept in trainer_state.json anyway."
            ) from error


@dataclass(frozen=True)
class Start:
    """What a run starts from: the arguments of a trainer that a recipe's model settings decide."""

    model: Any
    processor: Any
    peft_config: Any


def load_start(model_args, args, *, verification: bool = False) -> Start:
    """Load model and processor, seeded.

    Args:
        verification: the model must have verification tokens, and LoRA trains their rows.

    Raises UserError: as `check_engine` and `check_token_rows`, before a weight is read; as `load_for_training` and
    `build_peft_config`.
    """
    if os.path.isdir(model_args.model_name_or_path or ""):
        # an adapter remembers its base by this path and may be loaded from another folder
        model_args.model_name_or_path = os.path.abspath(model_args.model_name_or_path)
    check_engine(args.distributed_state, settled=False, fsdp=bool(args.fsdp))
    if verification and model_args.use_peft and model_args.train_new_tokens:
        check_token_rows(args)
    torch.manual_seed(args.seed)
    model, processor, token_ids, _ = load_for_training(model_args, verification=verification)
    return Start(model, processor, build_peft_config(model, model_args, token_ids))


def training_image_root(data_args) -> Path:
    """The folder that the image paths of both files start from.

    Raises UserError: it is no folder; or it is not set and the two files lie in different folders.
    """
    if data_args.dataset_name:
        folder = Path(data_args.dataset_name)
        # names of a data set from elsewhere open nothing outside of the current folder
        return image_root_of("", data_args.image_root or (folder if folder.is_dir() else Path(".")))
    root = image_root_of(data_args.train_file, data_args.image_root)
    if data_args.image_root is None and data_args.eval_file and image_root_of(data_args.eval_file) != root:
        raise UserError(
            f"{data_args.train_file} and {data_args.eval_file} lie in different folders, and image paths start from one. "
            "Set `image_root`."
        )
    return root


def train_source(data_args) -> str | NamedDataset:
    """Where the training rows are: a file, or a data set with a name."""
    if not data_args.dataset_name:
        return data_args.train_file
    return NamedDataset(data_args.dataset_name, data_args.dataset_config, data_args.dataset_split)


def subsampled(rows: list[dict], data_args) -> list[dict]:
    """`subsample` rows of `train_file` drawn without replacement, in its order; all of them where there are no more."""
    count = data_args.subsample
    if takes_all(count, len(rows), train_source(data_args)):
        return rows
    generator = torch.Generator().manual_seed(data_args.subsample_seed)
    chosen = torch.randperm(len(rows), generator=generator)[:count]
    return [rows[i] for i in sorted(chosen.tolist())]


def build_probe(data_args, trainer):
    """The callback that asks the model questions during training (`probe_*` keys)."""
    from ..decoding import SamplingConfig, generate_plain
    from ..evaluation.probe import VerifierProbe

    def generate(model, images, prompts, max_new_tokens):
        # the projector may be float32 beside 16-bit weights
        with trainer.accelerator.autocast():
            config = SamplingConfig(max_new_tokens=max_new_tokens)
            return generate_plain(model, trainer.processing_class, images, prompts, config, batch_size=16)

    def read(model, images, prompts, texts):
        with trainer.accelerator.autocast():
            return read_verdicts(model, trainer.processing_class, images, prompts, texts)

    return VerifierProbe(
        trainer.record,
        generate,
        data_args.probe_spec,
        data_args.probe_data_dir or ".",
        questions=data_args.probe_questions,
        every=data_args.probe_every,
        limit=data_args.probe_limit,
        fall=data_args.probe_fall,
        read=read,
    )


@torch.no_grad()
def read_verdicts(
    model, processor, images: list, prompts: list[str], texts: list[str], batch_size: int = 16
) -> list[list[float]]:
    """P(`</UN>`) where each phrase of given answers closes, as it stands in the model's next-token distribution.

    Args:
        images: per prompt a list of PIL images, or None.
        texts: the answers, tags included.
    """
    ids, plain, probabilities = verification_ids(get_tokenizer(processor)), unwrap(model), []
    collate = VisionCollator(processor)
    for first in range(0, len(texts), batch_size):
        part = slice(first, first + batch_size)
        rows = [
            {
                "id": str(number),
                "images": pictures or [],
                "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}],
            }
            for number, (pictures, prompt, text) in enumerate(
                zip(images[part], prompts[part], texts[part], strict=True)
            )
        ]
        batch = {name: tensor.to(plain.device) for name, tensor in collate(rows).items()}
        labels, _ = batch.pop("labels")[:, 1:], batch.pop("loss_weights")
        hidden = plain.base_model(**batch).last_hidden_state[:, :-1]
        for states, answer in zip(hidden, labels, strict=True):
            closes = [end for _, end, _ in ids.phrases(answer.tolist())]
            read = next_token_log_probs(plain, states[closes])[:, ids.unconfident].exp()
            probabilities.append(read.tolist())
    return probabilities


# transformers fills these in by itself
_FILLED_IN = {"logging_dir", "run_name", "dataset_kwargs", "bf16", "fp16", "accelerator_config", "hub_token"}


def remember_recipe(trainer, recipe: dict, *configs, **more) -> None:
    """Let the checkpoints say what they were trained with: the recipe's keys with the values that are in force, plus every
    other setting that is not its default, plus `more`."""
    settings = {"method": recipe["method"]}
    for config in configs:
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            default = field.default if field.default is not dataclasses.MISSING else None
            # a token would come into every checkpoint, and with it onto the Hub
            simple = isinstance(value, str | int | float | bool | list | dict | type(None))
            kept = simple and field.init and field.name != "hub_token"
            if kept and (field.name in recipe or _is_changed(field, value, default)):
                settings[field.name] = value
    trainer.sidecar = dataclasses.replace(trainer.sidecar, recipe=settings | more)


def _is_changed(field, value, default) -> bool:
    return (
        field.default_factory is dataclasses.MISSING
        and field.name not in _FILLED_IN
        and type(value) is type(default)
        and value != default
    )
