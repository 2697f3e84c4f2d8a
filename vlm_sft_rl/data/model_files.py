"""The small files of a model folder, looked at before a library reads them.

Libraries take what stands there and fail late, in words of their own, or not at all: a billion layers are built for hours,
`"do_resize": "false"` resizes, a chat template may have no end.
"""

import math
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..io import read_json
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


def read_object(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds one object. Raises UserError: it holds something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}. Copy the file again.")
    return value


def check_model_files(folder: str | Path) -> None:
    """Raises UserError: a settings file of the folder is no JSON object, or a value in it cannot be meant."""
    for path in (Path(folder) / name for name in SETTINGS):
        if path.is_file():
            for place, key, value in _values(read_object(path)):
                words = _expected(key, value)
                if words is not None:
                    raise UserError(
                        f"{path}: `{place}` is {repr(value)[:80]}, expected {words}. Correct the file, or copy it again."
                    )


def check_tokenizer_file(folder: str | Path) -> None:
    """Raises UserError: `tokenizer.json` is no JSON object."""
    if (path := Path(folder) / TOKENIZER).is_file():
        read_object(path)


def _values(value: dict, prefix: str = "") -> Iterator[tuple[str, str, Any]]:
    """Every `(place, key, value)` of nested objects; null says nothing."""
    for key, inner in value.items():
        place = f"{prefix}{key}"
        if inner is not None:
            yield place, key, inner
        if isinstance(inner, dict):
            yield from _values(inner, f"{place}.")


def _expected(key: str, value: Any) -> str | None:
    """What was expected under this key; None where the value is of that kind, or the key is none that is known."""
    for pattern, words, fits in _KINDS:
        if pattern.fullmatch(key):
            return None if fits(value) else words
    return None


def _is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and least <= value <= most


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    """Whole numbers of a range; of several (one a layer, a height and a width) each."""

    def fits(value: Any) -> bool:
        if isinstance(value, dict):
            value = [number for number in value.values() if number is not None]
        values = value if isinstance(value, list) else [value]
        return bool(values) and all(isinstance(v, int) and _is_number(v, least, most) for v in values)

    return fits


def _is_statistic(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_is_number(v, -1e3, 1e3) for v in values)


def _is_spread(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(_is_number(v, 1e-6, 1e3) for v in values)


def _is_template(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(item, dict) and isinstance(item.get("template"), str) for item in value)
    return isinstance(value, str) or (
        isinstance(value, dict) and all(isinstance(t, str) for t in value.values())
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


_MANY = 10**8
# what stands under a key, in any file and at any depth; the first pattern that fits the key counts
_KINDS: list[tuple[re.Pattern, str, Callable[[Any], bool]]] = [
    (re.compile(pattern), words, fits)
    for pattern, words, fits in (
        # of LLaVA's authors
        (r"mm_vision_tower|mm_projector_type", "text", _is(str)),
        (r"mm_vision_select_layer", "a whole number", _whole(-1000, 1000)),
        (r"mm_vision_select_feature", "patch or cls_patch", lambda value: value in ("patch", "cls_patch")),
        (r"num_hidden_layers|depth|num_layers", "a whole number from 1 to 1000", _whole(1, 1000)),
        (
            r"(hidden|intermediate|vocab|out_hidden|spatial_merge|temporal_patch|merge)_size|head_dim|embed_dim|"
            r"projection_dim|num_(attention_heads|key_value_heads|heads|channels)|in_channels|max_position_embeddings",
            f"a whole number from 1 to {_MANY}",
            _whole(1, _MANY),
        ),
        (
            r"image_size|patch_size|crop_size",
            f"whole numbers from 1 to {LONGEST_SIDE}",
            _whole(1, LONGEST_SIDE),
        ),
        (r"size|max_image_size", "whole numbers of at least 1", _whole(1, 2**40)),
        (
            r"image_seq_length|num_image_tokens|num_additional_image_tokens",
            "a whole number from 0 to 100000",
            _whole(0, 100_000),
        ),
        (
            r"eos_token_id|(image|video|vision_start|vision_end)_token_(id|index)",
            "a token id (a whole number of at least 0)",
            _whole(0, _MANY),
        ),
        (r"(bos|pad)_token_id", "a token id", _whole(-1, _MANY)),
        (r"image_mean", "finite numbers, one a channel", _is_statistic),
        (r"image_std", "numbers above 0, one a channel", _is_spread),
        (r"rescale_factor", "a number above 0", lambda value: _is_number(value, 1e-12, 1e6)),
        (r"resample", "a whole number from 0 to 5", _whole(0, 5)),
        (r"do_\w+|tie_word_embeddings|is_encoder_decoder", "true or false", _is(bool)),
        (
            r"temperature|top_p|top_k|repetition_penalty",
            "a number of at least 0",
            lambda value: _is_number(value, 0),
        ),
        (r"model_max_length", "a number of at least 1", lambda value: _is_number(value, 1)),
        (r"padding_side|truncation_side", "left or right", lambda value: value in ("left", "right")),
        (r"chat_template", "text", _is_template),
        (r"(bos|eos|unk|pad|sep|cls|mask|image)_token", "a token (text)", _is_token),
        (r"model_type|\w+_class|image_processor_type|base_model_name_or_path", "text", _is(str)),
        (r"(text|vision|audio|llm|quantization)_config", "an object", _is(dict)),
        (
            r"architectures",
            "a list of names",
            lambda value: isinstance(value, list) and all(map(_is(str), value)),
        ),
        (r"r", "a whole number from 1 to 65536", _whole(1, 2**16)),
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
