"""The small files of a model folder, looked at before a library reads them.

Libraries take what stands there and fail late, in words of their own, or not at all: a billion layers are built for hours,
`"do_resize": "false"` resizes, a chat template may have no end.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError, first_line
from ..shapes import Map, Number, Shape, fault, read_object
from . import template_trial

SETTINGS = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "adapter_config.json",
)
# large, and read only when a library has failed on it
TOKENIZER = "tokenizer.json"
# sides of pictures and of patches; a picture of more is no picture that a model was made for
LONGEST_SIDE = 8192
TRIAL_SECONDS = 60
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
COPY = "Correct the file, or copy it again."


def read_settings(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises UserError: it holds something else."""
    return read_object(path, dict, COPY)


def check_model_files(folder: str | Path, revision: str | None = None) -> None:
    """Raises UserError: there is no such folder, and the Hub has no model of that name; a settings file of the folder is no
    JSON object, or a value in it cannot be meant."""
    if not Path(folder).is_dir():
        check_hub_name(str(folder), revision)
    for path in (Path(folder) / name for name in SETTINGS):
        if path.is_file():
            state = path.stat()
            _check_settings(path, (state.st_ino, state.st_size, state.st_mtime_ns))


@lru_cache  # a load asks for its config, its weights and its processor, and each of them asks here
def _check_settings(path: Path, state: tuple[int, ...]) -> None:
    """`state`: of the file, by which it is read again when it has changed."""
    for place, key, value in _values(read_settings(path)):
        shape = next((shape for pattern, shape in _SHAPES if pattern.fullmatch(key)), None)
        if shape is not None and (reason := fault(value, shape, place)):
            raise UserError(f"{path}: {reason}. {COPY}")


def check_hub_name(name: str, revision: str | None) -> None:
    """The first file of a model is asked for alone: a Hub that cannot be reached is tried for half a minute for each.

    Raises UserError: `name` is none of the Hub, or the Hub does not give the model's config.json.
    """
    from transformers import PreTrainedConfig

    if Path(name).exists():
        raise UserError(f"{name}: a file, expected the folder of a model.")
    if not HUB_NAME.fullmatch(name):
        raise UserError(
            f"{name}: no such folder, and no name of a model on the Hub (OWNER/NAME). Check the path."
        )
    try:
        PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{name}: no such folder, and its config.json does not come from the Hub ({first_line(error)}). Check the "
            "path or the name, and the connection; or download the model and name its folder."
        ) from error


def check_tokenizer_file(folder: str | Path) -> None:
    """Raises UserError: `tokenizer.json` is no JSON object."""
    if (path := Path(folder) / TOKENIZER).is_file():
        read_settings(path)


def _values(value: dict, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every `(place, key, value)` of nested objects; null says nothing."""
    for key, inner in value.items():
        place = f"{prefix}{key}"
        if inner is not None:
            yield place, key, inner
        if isinstance(inner, dict):
            yield from _values(inner, f"{place}.")


def _some(number: Number) -> Shape:
    """A number, or several: one a layer, a height and a width."""
    return (number, [number], Map((number, None)))


_SIDE, _MANY = Number(1, LONGEST_SIDE, whole=True), Number(1, 10**8, whole=True)
_STATISTIC, _SPREAD = Number(-1000, 1000), Number(1e-5, 1000)
# what stands under a key, in any file and at any depth; the first pattern that fits the key counts
_SHAPES: list[tuple[re.Pattern, Shape]] = [
    (re.compile(pattern), shape)
    for pattern, shape in (
        # of LLaVA's authors
        (r"mm_vision_tower|mm_projector_type|mm_vision_select_feature", str),
        (r"mm_vision_select_layer", Number(-1000, 1000, whole=True)),
        (r"num_hidden_layers|depth|num_layers", _some(Number(1, 1000, whole=True))),
        (
            r"(hidden|intermediate|vocab|out_hidden|spatial_merge|temporal_patch|merge)_size|head_dim|embed_dim|"
            r"projection_dim|num_(attention_heads|key_value_heads|heads|channels)|in_channels|max_position_embeddings",
            _some(_MANY),
        ),
        (r"image_size|patch_size|crop_size", _some(_SIDE)),
        (r"size|max_image_size", _some(Number(1, 2**40, whole=True))),
        (r"image_seq_length|num_image_tokens|num_additional_image_tokens", Number(0, 100_000, whole=True)),
        (
            r"eos_token_id|(image|video|vision_start|vision_end)_token_(id|index)",
            _some(Number(0, 10**8, whole=True)),
        ),
        (r"(bos|pad)_token_id", _some(Number(-1, 10**8, whole=True))),
        (r"image_mean", (_STATISTIC, [_STATISTIC])),
        (r"image_std", (_SPREAD, [_SPREAD])),
        (r"rescale_factor", Number(1e-5, 1e6)),
        (r"resample", Number(0, 5, whole=True)),
        (r"do_\w+|tie_word_embeddings|is_encoder_decoder", bool),
        (r"temperature|top_p|top_k|repetition_penalty", Number(0)),
        (r"model_max_length", Number(1)),
        (r"chat_template", (str, [{"template": str}], Map(str))),
        (r"(bos|eos|unk|pad|sep|cls|mask|image)_token", (str, {"content": str})),
        (r"model_type|\w+_class|image_processor_type|base_model_name_or_path|padding_side", str),
        (r"(text|vision|audio|llm|quantization)_config", dict),
        (r"architectures", [str]),
        (r"r", Number(1, 2**16, whole=True)),
        (r"lora_alpha", Number(0)),
    )
]


@lru_cache
def template_fault(template: str) -> str | None:
    """Why a chat template cannot be used: it does not end on a short conversation, or writes without measure.

    It is tried in a process of its own: a template is a program, and a product or a power in it may keep the interpreter
    in one operation that nothing interrupts. Other errors show where the template is used.
    """
    command = [sys.executable, "-I", template_trial.__file__]
    try:
        done = subprocess.run(command, input=template.encode(), capture_output=True, timeout=TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        return "does not come to an end"
    if done.returncode == template_trial.TOO_LONG:
        return f"writes more than {template_trial.CHARACTERS:,} characters for a short conversation"
    if done.returncode == template_trial.TOO_LARGE:
        return "takes all memory for a short conversation"
    return "does not come to an end" if done.returncode < 0 else None
