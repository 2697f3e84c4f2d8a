"""The `regions` part of an eval spec: what is asked about boxes, in which words. No torch here."""

from dataclasses import dataclass, field

from ..errors import UserError

# task -> the metric that scores it, and the decoders that make its answers; located boxes are always greedy
METRICS = {"locate": "rec", "describe": "reg", "describe_and_locate": "self_consistency"}
DESCRIBERS = ("greedy", "sample", "retrospective", "vcd", "dola")


@dataclass(frozen=True)
class Regions:
    """Questions about boxes. A prompt or a box convention that is null here is the checkpoint's own."""

    task: str = field(
        metadata={
            "help": "`locate` an expression (REC), `describe` a box (REG), or `describe_and_locate`: find again by its own "
            "description (self-consistency)"
        }
    )
    describe_prompt: str | dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "with {box}: one text, or a text per `model_type` with an optional `default`; for checkpoints that were "
            "not trained with a prompt of their own"
        },
    )
    locate_prompt: str | dict[str, str] | None = field(
        default=None, metadata={"help": "with {description}: as describe_prompt"}
    )
    box_convention: str | None = field(
        default=None, metadata={"help": "overrides the checkpoint's or its family's, see models/boxes.py"}
    )
    locate_max_new_tokens: int = field(
        default=48, metadata={"help": "longest box of `describe_and_locate`, in tokens"}
    )

    @property
    def describes(self) -> bool:
        return self.task != "locate"

    @property
    def locates(self) -> bool:
        return self.task != "describe"

    def prompt(self, name: str, model_type: str) -> str | None:
        """`describe_prompt` or `locate_prompt` for this family of models."""
        value = getattr(self, name)
        return value.get(model_type, value.get("default")) if isinstance(value, dict) else value


def check_regions(regions: Regions | None, metric: str, prompt: str, where: str) -> None:
    """Raises UserError: a value out of range, or a metric that does not score the task."""
    task = None if regions is None else regions.task
    if task is not None and task not in METRICS:
        raise UserError(f"{where}: regions: 'task' must be one of {', '.join(METRICS)}, found {task!r}.")
    wanted = next((name for name, own in METRICS.items() if own == metric), None)
    if task != wanted:
        fit = (
            f"the metric of task {task!r} is {METRICS[task]!r}"
            if task
            else f"it needs `regions: {{task: {wanted}}}`"
        )
        raise UserError(f"{where}: metric {metric!r} does not fit: {fit}.")
    if regions is None:
        return
    if prompt != "{question}":
        raise UserError(
            f"{where}: 'prompt' has no effect on questions about boxes: give regions: describe_prompt or locate_prompt."
        )
    for name, mark in (("describe_prompt", "{box}"), ("locate_prompt", "{description}")):
        value = getattr(regions, name)
        for text in value.values() if isinstance(value, dict) else [value] if value is not None else []:
            if not isinstance(text, str) or mark not in text:
                raise UserError(f"{where}: regions: {name!r} must contain {mark}, found {text!r}.")
    longest = regions.locate_max_new_tokens
    if not isinstance(longest, int) or longest < 1:
        raise UserError(
            f"{where}: regions: 'locate_max_new_tokens' must be a positive number, found {longest!r}."
        )


def check_decoder(regions: Regions, decoder: str) -> None:
    """Raises UserError: a decoder that does not make answers of this task."""
    known = DESCRIBERS if regions.describes else ("greedy",)
    if decoder not in known:
        raise UserError(
            f"--decoder {decoder} does not work for the task {regions.task!r}. Decoders for it: {', '.join(known)}."
        )
