"""Loading: model and processor from a directory or the Hub, for inference or for training.

Safetensors only, no code from checkpoints. A directory may be a whole checkpoint or an adapter.
"""

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from trl import ModelConfig, get_quantization_config

from ..data.chat import end_ids, get_tokenizer, has_template, load_processor, small_inputs
from ..data.model_files import check_model_files, read_settings
from ..errors import UserError, first_line
from ..settings import setting
from .parts import PROJECTOR_NAMES, VISION_NAMES, set_trainable
from .sidecar import Sidecar, read_sidecar
from .tokens import is_tied, require_verification_tokens, row_count
from .weights import (
    ADAPTER,
    FAILED_RUN,
    check_finite,
    check_loaded,
    check_stored,
    check_types,
    refuse_codes,
    stored_tensors,
    without_loading_report,
)

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
ONE_CHECKPOINT = (
    "Take config.json, processor_config.json and preprocessor_config.json from one checkpoint (image_size, patch_size, "
    "image_token_id, size, crop_size)."
)
# what files lack is made up before it is told, and a config without `text_config` is of a model of seven billion weights:
# a model that is larger than its files by this factor is first read onto the meta device
MISSING_AT_MOST = 4
BIDIRECTIONAL = ("paligemma",)


def read_config(path: str | Path, **kwargs) -> dict[str, Any] | None:
    """The raw config of a checkpoint, None when there is none to read (the loader will say what is missing).

    Raises UserError: a settings file of the folder is broken, or a value in it cannot be meant.
    """
    check_model_files(path, kwargs.get("revision"))
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
        refused = untrainable_reason(config) if training else None
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


def untrainable_reason(config: Mapping[str, Any]) -> str | None:
    """Why a family that loads and decodes cannot be trained on conversations; None where it can."""
    kind, text = config.get("model_type"), config.get("text_config") or {}
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        return (
            f"{kind!r} is an encoder-decoder model. Decoder-only models can be trained, see docs/families.md."
        )
    if kind in BIDIRECTIONAL:
        return (
            f"{kind!r} attends to its prompt in both directions, and its processor does not say where the prompt of "
            "a conversation ends, so an answer could see itself. Use another family, see docs/families.md."
        )
    return None


@dataclass
class VLMModelConfig(ModelConfig):
    """TRL's model settings plus those of vision-language models."""

    dtype: str = setting(
        "auto",
        "Weights' dtype. `auto`: float32 on CPU; on a GPU bfloat16 with LoRA, QLoRA or DeepSpeed, and "
        "float32 (under bf16 autocast) for full training without DeepSpeed, because small updates vanish in "
        "plain bfloat16 weights.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    freeze_vision: bool = setting(True, "Do not train the vision tower.")
    freeze_language: bool = setting(False, "Do not train the language model (full training only).")
    train_projector: bool = setting(
        True, "Train the projector in full, with LoRA too (saved inside of the adapter)."
    )
    train_new_tokens: bool = setting(
        True, "With LoRA: train the verification tokens' rows in the input and the output embedding."
    )
    min_pixels: int | None = setting(
        None, "Smallest image area in pixels, for processors that resize by area."
    )
    max_pixels: int | None = setting(
        None, "Largest image area in pixels, for processors that resize by area."
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
    processor = processor_for_inference(path, base)
    model = model.to(device).eval()
    check_fit(model, processor, path)
    return model, processor, read_sidecar(path)


def processor_for_inference(path: str | Path, base: str | Path | None = None):
    """The processor of a checkpoint; pads on the left.

    Raises UserError: it has no chat template, or its tokenizer no end.
    """
    processor = load_processor(processor_source(path, base))
    if not has_template(processor):
        raise UserError(f"{path}: no chat template. Save one with the processor (`processor.chat_template`).")
    tokenizer = get_tokenizer(processor)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"{path}: the tokenizer has no end-of-sequence token. Copy tokenizer_config.json again."
        )
    return processor


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

    Raises UserError: no path, no verification tokens, an adapter as the base, or settings that exclude each other.
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
    check_fit(model, processor, path)
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
    """`AutoModelForImageTextToText.from_pretrained` with errors a user can act on.

    Raises UserError: no loadable model there, or its files lack weights that the model has: transformers would draw them at
    random and warn.
    """
    if is_adapter(path):  # transformers would load its base, and save the adapter alone
        raise UserError(
            f"{path}: an adapter, not a whole model. Merge it first: `vlm-sft-rl merge {path} MERGED`."
        )
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    revision = kwargs.get("revision")
    config = check_config(path, revision) or {}
    stored = check_stored(path, revision)
    # shapes that differ are told apart in `check_loaded`: transformers' error names neither them nor their number
    read = partial(
        AutoModelForImageTextToText.from_pretrained,
        path,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    try:
        with without_loading_report():
            # ZeRO-3 cuts a model while it is made
            uncounted = stored is None or "quantization_config" in config or is_deepspeed_zero3_enabled()
            if not uncounted:
                numbers = sum(tensor.numel() for tensor in stored.values())
                if numbers_of(load_config(path, revision)) > MISSING_AT_MOST * numbers:
                    check_loaded(path, *read(revision=revision, device_map={"": "meta"}))
            model, info = read(**kwargs)
    except UserError:
        raise
    except Exception as error:  # of many types, for settings and files that do not fit each other
        raise UserError(
            f"{path}: no loadable vision-language model ({first_line(error)}). Expected a folder with config.json and "
            "*.safetensors that belong together, or a Hub name."
        ) from error
    check_loaded(path, model, info)
    # a checkpoint is written under the names that were read: under ZeRO-3 transformers would also undo renamings that these
    # files did not need
    if renamings := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [renaming for renaming in renamings if renaming.was_used()]
    if stored is None:  # the Hub's files have come since
        stored = check_stored(path, revision) or {}
    check_types(path, model, {name: t for name, t in stored.items() if name not in info["unexpected_keys"]})
    return model


def numbers_of(config) -> int:
    """How many weights a model of this config has, counted without making one."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(p.numel() for p in model.parameters())


def load_config(path: str | Path, revision: str | None = None):
    """transformers' config of a checkpoint. Raises UserError: there is none, or it cannot be meant."""
    check_model_files(path, revision)
    try:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # of many types, for values of wrong types
        raise UserError(f"{path}: no readable config.json ({first_line(error)}).") from error


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


@torch.no_grad()
def check_fit(model, processor, path: str | Path) -> None:
    """Encode one small picture: what the processor makes of it must be what the model takes.

    Nothing is checked where the weights are not at hand (ZeRO-3's shards, FSDP's empty copies), or the family encodes
    pictures inside of its forward pass alone.

    Raises UserError: the two are not of one checkpoint.
    """
    rows = row_count(model.get_input_embeddings().weight)
    if broken := [i for i in end_ids(model, get_tokenizer(processor)) if i >= rows]:
        raise UserError(
            f"{path}: the end-of-sequence token {broken[0]} (generation_config.json, tokenizer_config.json) is none of the "
            f"model's {rows}, so no answer would end. Take the files from one checkpoint."
        )
    encode = getattr(model.base_model, "get_image_features", None)
    if encode is None or not has_template(processor) or any(is_elsewhere(p) for p in model.parameters()):
        return
    inputs = small_inputs(processor)
    pixels = {
        k: v.to(model.device, model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()
    }
    known = inspect.signature(encode).parameters
    image_id = getattr(model.config, "image_token_id", None)
    marks = int((inputs["input_ids"] == image_id).sum())
    try:
        features = encode(**{k: v for k, v in pixels.items() if k in known}, return_dict=True).pooler_output
        count = sum(part.shape[:-1].numel() for part in features)
    except Exception as error:  # of many types, by what does not fit
        raise UserError(
            f"{path}: the model cannot encode what its processor makes of a picture ({first_line(error)}). {ONE_CHECKPOINT}"
        ) from error
    if marks != count:
        raise UserError(
            f"{path}: the processor writes {marks} image tokens (id {image_id}) for a picture of which the model makes "
            f"{count} features. {ONE_CHECKPOINT}"
        )
    if (largest := int(inputs["input_ids"].max())) >= rows:
        raise UserError(
            f"{path}: the tokenizer writes token id {largest}, the model has {rows} embedding rows. {ONE_CHECKPOINT}"
        )


def is_elsewhere(parameter: torch.Tensor) -> bool:
    """Whether the values are not in this process: ZeRO-3 cuts them, FSDP leaves all but the first process without."""
    return parameter.is_meta or hasattr(parameter, "ds_shape")


def is_adapter(path: str | Path) -> bool:
    return (Path(path) / "adapter_config.json").is_file()


def adapter_base(path: str | Path, base: str | Path | None = None) -> str:
    """Where an adapter's base model is: `base`, or what `adapter_config.json` says (also relative to the adapter)."""
    if base is not None:
        return str(base)
    config = Path(path) / "adapter_config.json"
    check_model_files(path)
    named = read_settings(config).get("base_model_name_or_path")
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
    from peft import PeftModel

    base = adapter_base(path, base)
    misfit = f"{path}: the adapter does not fit its base model {base}"
    if not (Path(path) / ADAPTER).is_file():
        raise UserError(f"{path}: no {ADAPTER}. Copy the folder again, with all its files.")
    model = load_model(base, **kwargs)
    try:
        model = PeftModel.from_pretrained(model, str(path), is_trainable=is_trainable, use_safetensors=True)
    except Exception as error:  # of many types, for settings and weights of another model
        raise UserError(f"{misfit} ({first_line(error)}). Use the base it was trained on.") from error
    check_adapter(model, path, misfit)
    return model


def check_adapter(model, folder: str | Path, misfit: str) -> None:
    """PEFT only warns of weights without a place, and goes on with untrained ones.

    Args:
        misfit: how the message begins.

    Raises UserError: the tensors of the folder are not those of the model's adapter, or not finite.
    """
    from peft import get_peft_model_state_dict

    stored = dict(stored_tensors([Path(folder) / ADAPTER]))
    expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    if stray := sorted(stored.keys() ^ expected.keys()):
        raise UserError(
            f"{misfit}: {len(stray)} tensors have no counterpart, the first is {stray[0]}. Use the base, and the "
            "transformers version, it was trained with."
        )
    if other := [name for name, tensor in stored.items() if tensor.shape != expected[name].shape]:
        raise UserError(
            f"{misfit}: {len(other)} tensors have another shape, the first is {other[0]}. Use the base, and the "
            "settings, it was trained with."
        )
    refuse_codes(
        {name: tensor for name, tensor in stored.items() if expected[name].is_floating_point()}, folder
    )
    check_finite(stored.items(), folder, FAILED_RUN)


def processor_source(path: str | Path, base: str | Path | None = None) -> str:
    """The directory to read the processor from: an adapter without tokenizer files leaves it to its base."""
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").is_file():
        return adapter_base(path, base)
    return str(path)
