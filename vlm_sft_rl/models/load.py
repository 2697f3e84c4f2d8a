"""Loading: model and processor from a directory or the Hub, for inference or for training.

Safetensors only, no code from checkpoints. A directory may be a whole checkpoint or an adapter.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from trl import ModelConfig, get_quantization_config

from ..data.chat import get_tokenizer, load_processor
from ..errors import UserError, first_line
from ..io import read_json
from .parts import PROJECTOR_NAMES, VISION_NAMES, set_trainable
from .sidecar import Sidecar, read_sidecar
from .tokens import is_tied, require_verification_tokens

ANOTHER_FAMILY = "Use a family that transformers builds itself, see docs/families.md."
CONVERT = "Convert it: `vlm-sft-rl model convert SOURCE TARGET --vision-tower TOWER`."
# model types that transformers does not build, and what to use instead
INSTEAD = {
    "qwen": "Qwen-VL and Qwen-VL-Chat run code of transformers 4 from the checkpoint. Use Qwen2-VL or newer, for "
    "example Qwen/Qwen2.5-VL-3B-Instruct.",
    "internvl_chat": "Use the same model in the transformers form, for example OpenGVLab/InternVL3-8B-hf.",
    "llava_llama": f"It is in the original LLaVA format. {CONVERT}",
    "llava_mistral": f"It is in the original LLaVA format. {CONVERT}",
}
BIDIRECTIONAL = ("paligemma",)


def read_config(path: str | Path, **kwargs) -> dict[str, Any] | None:
    """The raw config of a checkpoint, None when there is none to read (the loader will say what is missing)."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, **kwargs)
    except (OSError, ValueError):
        return None
    return config or None


def check_config(path: str | Path, revision: str | None = None, *, training: bool = False) -> dict | None:
    """Refuse what cannot work before any weight is read: by the checkpoint's config, which is returned (None: unreadable).

    Args:
        training: refuse families, too, that load and decode but cannot be trained on conversations.
    """
    config = read_config(path, revision=revision) or {}
    kind = config.get("model_type")
    if kind == "llava" and "mm_vision_tower" in config:
        kind = "llava_llama"  # LLaVA-1.5's authors use the name that transformers took over
    refused = None
    if kind is None or kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        text = config.get("text_config") or {}
        if training and (config.get("is_encoder_decoder") or text.get("is_encoder_decoder")):
            refused = f"{kind!r} is an encoder-decoder model. Decoder-only models can be trained, see docs/families.md."
        elif training and kind in BIDIRECTIONAL:
            refused = (
                f"{kind!r} attends to its prompt in both directions, and its processor does not say where the prompt of "
                "a conversation ends, so an answer could see itself. Use another family, see docs/families.md."
            )
    elif kind in INSTEAD:
        refused = f"models of type {kind!r} are not supported. {INSTEAD[kind]}"
    elif kind in CONFIG_MAPPING:
        refused = (
            f"{kind!r} is not a vision-language model. Use a checkpoint that takes images and text, see "
            "docs/families.md."
        )
    elif config.get("auto_map"):
        refused = (
            f"model type {kind!r} needs code from the checkpoint, which is never run here. {ANOTHER_FAMILY}"
        )
    else:
        refused = f"model type {kind!r} is unknown here. {ANOTHER_FAMILY}"
    if refused:
        raise UserError(f"{path}: {refused}")
    return config or None


@dataclass
class VLMModelConfig(ModelConfig):
    """TRL's model settings plus those of vision-language models."""

    dtype: str = field(
        default="auto",
        metadata={
            "help": "Weights' dtype. `auto`: float32 on CPU; on a GPU bfloat16 with LoRA, QLoRA or DeepSpeed, and "
            "float32 (under bf16 autocast) for full training without DeepSpeed, because small updates vanish in "
            "plain bfloat16 weights.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    freeze_vision: bool = field(default=True, metadata={"help": "Do not train the vision tower."})
    freeze_language: bool = field(
        default=False, metadata={"help": "Do not train the language model (full training only)."}
    )
    train_projector: bool = field(
        default=True,
        metadata={"help": "Train the projector in full, with LoRA too (saved inside of the adapter)."},
    )
    train_new_tokens: bool = field(
        default=True,
        metadata={
            "help": "With LoRA: train the verification tokens' rows in the input and the output embedding."
        },
    )
    min_pixels: int | None = field(
        default=None, metadata={"help": "Smallest image area in pixels, for processors that resize by area."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Largest image area in pixels, for processors that resize by area."}
    )


def load_for_inference(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    *,
    base: str | Path | None = None,
    attn_implementation: str | None = None,
):
    """Load a checkpoint for decoding: in eval mode, left padding, an adapter merged into its base.

    Args:
        path: a whole or merged checkpoint, or an adapter directory (its base is read from `adapter_config.json`).
        device: None takes this process's GPU when there is one.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        base: the adapter's base model, when it is no longer where the adapter was trained.

    Returns:
        `(model, processor, sidecar)`; the sidecar is None when the checkpoint has none.
    """
    device = torch.device(device or own_device())
    if dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kwargs = {"dtype": dtype, "attn_implementation": attn_implementation}
    if is_adapter(path):
        model = load_adapter(path, base=base, **kwargs).merge_and_unload()
        model.tie_weights()
    else:
        model = load_model(path, **kwargs)
    processor = load_processor(processor_source(path, base))
    get_tokenizer(processor).padding_side = "left"
    return model.to(device).eval(), processor, read_sidecar(path)


def own_device() -> str:
    """The GPU of this process (a launcher of several says which), or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    rank = os.environ.get("LOCAL_RANK")
    return "cuda" if rank is None else f"cuda:{rank}"


def load_for_training(args: VLMModelConfig, *, verification: bool = True):
    """Load model and processor as a recipe says, check the verification tokens, freeze parts.

    Create the trainer's config before: under ZeRO-3 it must exist when the weights are read.

    Returns:
        `(model, processor, token_ids, sidecar)`; no ids where the method needs no `verification` tokens.

    Raises:
        UserError: no path, no verification tokens, an adapter as the base, or settings that exclude each other.
    """
    processor = processor_for_training(args, verification=verification)
    path = args.model_name_or_path
    args.dtype = training_dtype(args)
    kwargs = {"dtype": args.dtype, "attn_implementation": args.attn_implementation}
    if args.load_in_4bit or args.load_in_8bit:
        kwargs |= {"quantization_config": quantisation(args), "device_map": {"": PartialState().device}}
    model = load_model(path, revision=args.model_revision, **kwargs)
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights on a CPU at the first pass in eval mode, and its kernel for those has no
        # gradient: a run that decodes or evaluates between its steps would go on with wrong gradients and a warning
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    token_ids = require_verification_tokens(processor, path, model) if verification else ()
    # PEFT decides by the config whether to tie the new rows; some checkpoints' configs contradict their weights
    model.config.tie_word_embeddings = is_tied(model)
    model.config.use_cache = False
    set_trainable(
        model,
        vision=not args.freeze_vision,
        projector=args.train_projector,
        language=not args.freeze_language,
    )
    return model, processor, token_ids, read_sidecar(path) or Sidecar()


def processor_for_training(args: VLMModelConfig, *, verification: bool = True):
    """The processor of a recipe's model, after every check that needs no weights; pads on the right."""
    path = args.model_name_or_path
    if not path:
        raise UserError("`model_name_or_path` is not set. Name a prepared checkpoint in the recipe.")
    if is_adapter(path):
        raise UserError(
            f"{path}: an adapter cannot be the base of a new run. Merge it first: `vlm-sft-rl merge {path} MERGED`."
        )
    if (args.load_in_4bit or args.load_in_8bit) and not args.use_peft:
        raise UserError("Quantised weights cannot be trained. Set `use_peft: true` for QLoRA.")
    check_config(path, args.model_revision, training=True)
    processor = load_processor(path, revision=args.model_revision)
    limit_pixels(processor, path, args.min_pixels, args.max_pixels)
    if verification:
        require_verification_tokens(processor, path)
    get_tokenizer(processor).padding_side = "right"
    return processor


def limit_pixels(processor, path: str, smallest: int | None, largest: int | None) -> None:
    """Set the areas between which images are resized; None leaves one as it is.

    Raises UserError: the processor does not resize by area.
    """
    limits = {
        "shortest_edge": smallest,
        "longest_edge": largest,
    }  # areas, in the processors that take such limits
    limits = {edge: area for edge, area in limits.items() if area is not None}
    images = processor.image_processor
    if limits and "min_pixels" not in images.valid_kwargs.__annotations__:
        raise UserError(
            f"{path}: its {type(images).__name__} does not resize by area. Leave out `min_pixels` and `max_pixels`."
        )
    # not as arguments of `from_pretrained`: the tokenizer would keep them and hand them to every call
    images.size = type(images.size)(**(dict(images.size) | limits))


def training_dtype(args: VLMModelConfig) -> str:
    """The name of the dtype that `dtype: auto` stands for, see `VLMModelConfig`."""
    if args.dtype != "auto":
        return args.dtype
    if not torch.cuda.is_available():
        return "float32"
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return "bfloat16" if args.use_peft or deepspeed else "float32"


def quantisation(args: VLMModelConfig):
    """The bitsandbytes settings of a recipe."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise UserError(
            "`load_in_4bit` and `load_in_8bit` need bitsandbytes. Install it: `pip install vlm-sft-rl[quant]`."
        ) from error
    config = get_quantization_config(args)
    # a quantised projector could not be trained, and the tower is small beside what it must not lose sight of;
    # transformers matches these as regular expressions from the start of a module's full name
    parts = sorted(PROJECTOR_NAMES | VISION_NAMES)
    config.llm_int8_skip_modules = ["lm_head", *(rf"(?:.*\.)?{name}" for name in parts)]
    return config


def load_model(path: str | Path, **kwargs):
    """`AutoModelForImageTextToText.from_pretrained` with errors a user can act on."""
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    check_config(path, kwargs.get("revision"))
    try:
        return AutoModelForImageTextToText.from_pretrained(
            path, trust_remote_code=False, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path}: no loadable vision-language model ({first_line(error)}). Expected a folder with config.json and "
            "*.safetensors, or a Hub name."
        ) from error


@torch.no_grad()
def restore_weights(model, directory: str | Path) -> None:
    """Copy the weights of a checkpoint directory into a model of the same architecture, in place."""
    stored = load_model(directory, dtype=model.dtype).state_dict()
    weights = model.state_dict()
    wrong = sorted(weights.keys() ^ stored.keys())
    wrong += [name for name in weights if name in stored and weights[name].shape != stored[name].shape]
    if wrong:
        raise UserError(
            f"{directory}: the checkpoint is of another model: {len(wrong)} weights differ, the first is {wrong[0]}."
        )
    for name, tensor in weights.items():
        tensor.copy_(stored[name])


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def adapter_base(path: str | Path, base: str | Path | None = None) -> str:
    """Where an adapter's base model is: `base`, or what `adapter_config.json` says (also relative to the adapter)."""
    if base is not None:
        return str(base)
    config = Path(path) / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path")
    if not named:
        raise UserError(
            f"{config}: `base_model_name_or_path` is empty. Write the base model there (`vlm-sft-rl merge` "
            "takes it as --base)."
        )
    for candidate in (Path(named), Path(path) / named):
        if candidate.is_dir():
            return str(candidate)
    if Path(named).is_absolute() or named.count("/") != 1 or named.startswith("."):
        raise UserError(
            f"{config}: the base model {named} does not exist. Put it back, or write its new place "
            "there (`vlm-sft-rl merge` takes it as --base)."
        )
    return named


def load_adapter(path: str | Path, base: str | Path | None = None, is_trainable: bool = False, **kwargs):
    """The base model with the adapter on it, not merged (a `PeftModel`)."""
    from peft import PeftModel, get_peft_model_state_dict

    base = adapter_base(path, base)
    misfit = f"{path}: the adapter does not fit its base model {base}"
    model = load_model(base, **kwargs)
    try:
        model = PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{misfit} ({first_line(error)}). Use the base it was trained on.") from error
    # PEFT only warns of weights without a place, and goes on with untrained ones
    file = Path(path) / "adapter_model.safetensors"
    try:
        with safe_open(file, framework="pt") as stored:
            names = set(stored.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read ({error}). Copy the adapter again.") from error
    if stray := sorted(names ^ set(get_peft_model_state_dict(model, save_embedding_layers=False))):
        raise UserError(
            f"{misfit}: {len(stray)} tensors have no counterpart, the first is {stray[0]}. Use the base, and the "
            "transformers version, it was trained with."
        )
    return model


def processor_source(path: str | Path, base: str | Path | None = None) -> str:
    """The directory to read the processor from: an adapter without tokenizer files leaves it to its base."""
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        return adapter_base(path, base)
    return str(path)
