"""`model prepare`: a checkpoint in, the same checkpoint with verification tokens out."""

from pathlib import Path

import torch
from transformers import GenerationConfig

from ..data.chat import load_processor
from ..errors import UserError
from ..io import writing
from .load import check_loadable, load_model, read_config
from .sidecar import Sidecar, read_sidecar, write_sidecar
from .tokens import add_verification_tokens

# thresholds of REVERSE (arXiv 2504.13169, section 4) for captions and open questions
THRESHOLD, QWEN_THRESHOLD = 0.003, 0.01
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def prepare(
    source: str | Path,
    target: str | Path,
    init: str = "mean",
    *,
    seed: int = 0,
    dtype: str = "auto",
    threshold: float | None = None,
) -> list[int]:
    """Load `source`, add the verification tokens, write an ordinary checkpoint directory with a sidecar.

    Args:
        source: directory or Hub name of any vision-language model.
        target: directory to write; may be the same as an earlier target, never the same as `source`.
        init: `mean` or `semantic`, see `add_verification_tokens`.
        dtype: `auto` keeps the checkpoint's own.
        threshold: default tau for decoding; None takes the paper's for the family.

    Returns:
        The ids of the three tokens.

    Raises:
        UserError: the source cannot be loaded, or source and target are the same.
    """
    if Path(source).exists() and Path(source).resolve() == Path(target).resolve():
        raise UserError(f"{target}: source and target are the same folder. Choose another target.")
    check_loadable(source, read_config(source))
    processor = load_processor(source)
    model = load_model(source, dtype=dtype)
    ids = add_verification_tokens(model, processor, init=init, seed=seed)
    if threshold is None:
        threshold = QWEN_THRESHOLD if model.config.model_type.startswith("qwen") else THRESHOLD
    save_checkpoint(model, processor, target, read_sidecar(source) or Sidecar(threshold=threshold))
    return ids


def save_checkpoint(model, processor, target: str | Path, sidecar: Sidecar) -> Path:
    """Write weights (safetensors), configs, processor, tokenizer, template and sidecar to `target`."""
    target = Path(target)
    cure_generation_config(model.generation_config)
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(target)
        processor.save_pretrained(target)
    write_sidecar(target, sidecar)
    return target


def cure_generation_config(config: GenerationConfig) -> list[str]:
    """Unset sampling flags that contradict `do_sample=False`; transformers refuses to save such a config.

    Vicuna's and LLaVA's published configs are of this kind (temperature and top_p, no do_sample).

    Returns:
        The names of the flags that were unset.
    """
    if config.do_sample:
        return []
    dropped = [flag for flag in SAMPLING_FLAGS if getattr(config, flag, None) is not None]
    for flag in dropped:
        setattr(config, flag, None)
    return dropped


def describe_dtype(model) -> str:
    """`bfloat16`, or `float32 + uint8` for a mixture."""
    return " + ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()}))


def checkpoint_dtype(model) -> torch.dtype:
    """The dtype of the output embedding, which is never quantised."""
    return model.get_input_embeddings().weight.dtype
