"""The parts of a vision-language model: vision tower, projector, language model. Found by name, for any family."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import UserError

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
VISION, PROJECTOR, LANGUAGE = "vision", "projector", "language"
PARTS = (VISION, PROJECTOR, LANGUAGE)

# what the families of transformers call their projector; a projector may live inside of the tower (Qwen's merger)
PROJECTOR_NAMES = frozenset(
    {
        "multi_modal_projector", "mm_projector", "connector", "merger", "deepstack_merger_list", "image_newline",
        "qformer", "query_tokens", "language_projection", "aligner", "resampler", "vision_projection", "embed_vision",
    }
)  # fmt: skip
VISION_NAMES = frozenset(
    {"vision_tower", "visual", "vision_model", "vision_encoder", "image_encoder", "vision_embed_tokens"}
)


def part_of(name: str) -> str:
    """`vision`, `projector` or `language`, for a parameter's or a module's dotted name (PEFT-wrapped or not)."""
    components = set(name.split("."))
    if components & PROJECTOR_NAMES:
        return PROJECTOR
    return VISION if components & VISION_NAMES else LANGUAGE


def parts(model: nn.Module) -> dict[str, list[tuple[str, nn.Parameter]]]:
    """The named parameters of each part. Raises UserError for a text model, or a family with an unknown tower."""
    parameters: dict[str, list] = {part: [] for part in PARTS}
    for name, parameter in model.named_parameters():
        parameters[part_of(name)].append((name, parameter))
    if not parameters[VISION]:
        children = sorted({name.split(".")[1] for name, _ in parameters[LANGUAGE] if name.count(".") > 1})
        raise UserError(
            f"{type(model).__name__}: no vision tower found (looked for {', '.join(sorted(VISION_NAMES))}; the model "
            f"has {', '.join(children[:8])}). Use a vision-language checkpoint."
        )
    return parameters


def set_trainable(model: nn.Module, *, vision: bool, projector: bool, language: bool) -> None:
    """Freeze or unfreeze each part, before PEFT wraps the model. Quantised weights stay frozen."""
    trains = {VISION: vision, PROJECTOR: projector, LANGUAGE: language}
    for part, parameters in parts(model).items():
        for _, parameter in parameters:
            if parameter.is_floating_point():
                parameter.requires_grad_(trains[part])


def projector_modules(model: nn.Module) -> list[str]:
    """Full names of the outermost projector modules, as PEFT's `modules_to_save` wants them: a list's items one by one.

    Raises UserError where there is none.
    """
    names = []
    for name, module in model.named_modules():
        if name.split(".")[-1] in PROJECTOR_NAMES and part_of(name.rpartition(".")[0]) != PROJECTOR:
            items = module.named_children() if isinstance(module, nn.ModuleList) else ()
            names += [f"{name}.{item}" for item, _ in items] or [name]
    if not names:
        raise UserError(
            f"{type(model).__name__}: no projector module found. Set `train_projector: false`, or name the modules "
            "in `lora_modules_to_save`."
        )
    return names


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """`{part: {"total": …, "trainable": …}}`; sharded parameters (ZeRO-3) are counted whole."""
    counts = {part: Counter(total=0, trainable=0) for part in PARTS}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts[part_of(name)].update(total=size, trainable=size if parameter.requires_grad else 0)
    return {part: dict(counter) for part, counter in counts.items()}


def parameter_groups(
    groups: list[dict], names: dict[int, str], projector_learning_rate: float
) -> Iterator[dict]:
    """Split optimizer groups so that the projector has a learning rate of its own.

    Args:
        names: the parameters' names by `id(parameter)`.

    Yields:
        The same groups without the projector's parameters, then theirs, every other setting kept.
    """
    for group in groups:
        projector, others = [], []
        for parameter in group["params"]:
            (projector if part_of(names[id(parameter)]) == PROJECTOR else others).append(parameter)
        if others:
            yield {**group, "params": others}
        if projector:
            yield {**group, "params": projector, "lr": projector_learning_rate}


def unwrap(model):
    """`model` itself, or the transformers model inside of its PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def tolerance(of: nn.Module | torch.Tensor, exact: float, rounded: float = 0.05) -> float:
    """How far two ways to the same values may lie apart: `exact` where a model (or what came out of it) computes in
    float32, `rounded` with 16-bit weights or under autocast."""
    in_float32 = of.dtype == torch.float32 and not torch.is_autocast_enabled(of.device.type)
    return exact if in_float32 else rounded


@contextmanager
def capture_outputs(module: torch.nn.Module) -> Iterator[list]:
    """Collect what `module` returns while the context is open."""
    outputs: list = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
