"""Rows in which an answer is looked at again: an attempt, then one or more corrections of it.

The canonical form, as files hold it, is a conversation: question, attempt, request to check, correction, … Each draft
is an assistant message with `answer_type` `attempt` or `correction`, and with `weight` 0 where it is wrong (a wrong
draft is read, never taught). `lay_out` turns that form into the one to train on, so one file serves every layout:

- `turn`: as it is, every correction in a user turn of its own;
- `message`: one answer, the drafts joined by a line that says "check";
- `stage`: one answer that is corrected on the way, after one of its stages.

LLaVA-SCo publishes no layout; its one-turn inference fits `message`, its training code takes `turn` as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ..errors import FORMAT, RowError, UserError
from ..settings import check_factors
from .marks import Example, Mark
from .messages import ATTEMPT, CORRECTION
from .stages import SEPARATOR, STAGES, format_stage, parse, read_blocks, superseded

CHECK_PROMPT = "Check your answer against the image, stage by stage, and answer again."
CHECK_LINE = "Let me check this against the image again."
LAYOUTS = ("turn", "message", "stage")
POSITIONS = STAGES[1:]  # where the `stage` layout can correct
ATTEMPT_LOSSES = ("right", "all", "none")
OTHER_STAGE = 0  # `stage_ids` of tokens outside of all stages; stage k of STAGES is k + 1


@dataclass(frozen=True)
class Draft:
    """One version of an answer, and whether its conclusion is right."""

    text: str
    right: bool


@dataclass(frozen=True)
class Layout:
    """How the drafts of a row become what the model reads and writes.

    Attributes:
        kind: `turn`, `message` or `stage`.
        corrections: K. The attempt, the first K - 1 corrections and the last one are kept; where a row has fewer, the
            last one comes again (a right answer is kept). 0 leaves the last draft alone: plain SFT on it. None: as many
            as the row has.
        after: for `stage`: the stage behind which the correction stands.
        attempt_loss: on drafts before the last: `right` (as the row's weights say, 0 for wrong ones), `all` (as the
            released code does), or `none`.
        prompt: the request to check; None leaves the row's own.
        line: what joins the drafts of one message.
    """

    kind: str = "turn"
    corrections: int | None = None
    after: str = "CONCLUSION"
    attempt_loss: str = "right"
    prompt: str | None = None
    line: str = CHECK_LINE

    def __post_init__(self):
        """Raises UserError: a value that does not exist, or one that does not go with the others."""
        for name, value, known in (
            ("layout", self.kind, LAYOUTS),
            ("correction_after", self.after, POSITIONS),
            ("attempt_loss", self.attempt_loss, ATTEMPT_LOSSES),
        ):
            if value not in known:
                raise UserError(f"`{name}` is {value!r}, expected one of {', '.join(known)}.")
        if self.corrections is not None and (not isinstance(self.corrections, int) or self.corrections < 0):
            raise UserError(f"`corrections` must be a whole number >= 0, found {self.corrections!r}.")
        if self.kind == "stage" and self.corrections not in (None, 0, 1):
            raise UserError("`layout: stage` corrects once: set `corrections: 1`.")


def correction_row(
    identity: str, images: Sequence[Any], question: str, drafts: Sequence[Draft], prompt: str = CHECK_PROMPT
) -> dict:
    """The canonical row of these drafts; the last one is taught whatever its `right` says.

    Raises RowError: there is no draft.
    """
    if not drafts:
        raise RowError(FORMAT, "a correction row needs at least one draft.", identity)
    messages: list[dict] = []
    for number, draft in enumerate(drafts):
        last = number == len(drafts) - 1
        messages.append({"role": "user", "content": prompt if number else question})
        messages.append(
            {
                "role": "assistant",
                "content": draft.text,
                "answer_type": CORRECTION if number or len(drafts) == 1 else ATTEMPT,
                "weight": int(last or draft.right),
            }
        )
    return {"id": identity, "images": list(images), "messages": messages}


def is_correction_row(row: dict) -> bool:
    return any(m.get("answer_type") == ATTEMPT for m in row["messages"])


def lay_out(row: dict, layout: Layout) -> dict:
    """The row in another layout; a row without an attempt is left as it is.

    Raises RowError: drafts that the layout cannot join, because they are not staged.
    """
    if not is_correction_row(row):
        return row
    where = str(row.get("id", ""))
    first = next(i for i, m in enumerate(row["messages"]) if m.get("answer_type") == ATTEMPT)
    before, rest = row["messages"][:first], row["messages"][first:]
    drafts = [m for m in rest if m["role"] == "assistant"]
    prompts = [layout.prompt or m["content"] for m in rest if m["role"] == "user"]
    if len(drafts) < 2:
        raise RowError(FORMAT, "an attempt without a correction behind it.", where)
    if (count := layout.corrections) is not None:
        earlier = drafts[:-1][:count]
        drafts = earlier + drafts[-1:] * (count + 1 - len(earlier))
        prompts = (prompts + prompts[-1:] * count)[:count]
    weight = {"right": {}, "all": {"weight": 1}, "none": {"weight": 0}}[layout.attempt_loss]
    drafts = [*({**draft, **weight} for draft in drafts[:-1]), {**drafts[-1], "weight": 1}]
    if layout.kind == "turn" or len(drafts) == 1:
        messages = [drafts[0]]
        for prompt, draft in zip(prompts, drafts[1:], strict=True):
            messages += [{"role": "user", "content": prompt}, draft]
        return {**row, "messages": [*before, *messages]}
    texts = [draft["content"].strip() for draft in drafts]
    try:
        if layout.kind == "message":
            text = f"{SEPARATOR}{layout.line}{SEPARATOR}".join(texts)
        else:
            # the attempt up to the chosen stage, the line, then the correction's stages from the caption on
            attempt, correction = parse(texts[0]), parse(texts[-1])
            tried = STAGES[: STAGES.index(layout.after) + 1]
            pieces = [format_stage(stage, attempt.get(stage)) for stage in tried]
            pieces.append(layout.line)
            pieces += [format_stage(stage, correction.get(stage)) for stage in STAGES[1:]]
            text = SEPARATOR.join(pieces)
    except UserError as error:
        raise RowError(FORMAT, f"layout {layout.kind!r}: {error}", where) from error
    message = {"role": "assistant", "content": text, "answer_type": CORRECTION}
    if any(draft.get("weight", 1) == 0 for draft in drafts):
        message["supervise"] = "correction"
    return {**row, "messages": [*before, message]}


def draft_ids(example: Example) -> list[int]:
    """For every token the number of the draft it belongs to (1 the attempt), 0 outside of answers.

    In a single message a draft ends where one of its stages is written again.
    """
    numbers = [0] * len(example.input_ids)
    number = 0
    for turn in example.turns:
        number += 1
        seen: set[str] = set()
        starts = [0]
        for block in read_blocks(turn.text):
            if block.stage in seen:
                starts.append(block.start)
                seen = set()
            seen.add(block.stage)
        for place, at in turn.places():
            numbers[place] = number + sum(start <= at for start in starts) - 1
        number += len(starts) - 1
    return numbers


def stage_ids(example: Example) -> list[int]:
    """For every token the stage it belongs to, tags included: 1 to 4, or 0."""
    stages = [OTHER_STAGE] * len(example.input_ids)
    for turn in example.turns:
        blocks = read_blocks(turn.text)
        for place, at in turn.places():
            for block in blocks:
                if block.start <= at < block.end:
                    stages[place] = STAGES.index(block.stage) + 1
    return stages


def superseded_mark(example: Example) -> Example:
    """No loss on stages that the same message writes again, in messages with `"supervise": "correction"`."""
    labels, weights = list(example.labels), list(example.weights)
    for turn in example.turns:
        if turn.message.get("supervise") != "correction" or turn.message.get("weight", 1) == 0:
            continue
        revised = superseded(read_blocks(turn.text))
        for place, at in turn.places():
            if not any(block.start <= at < block.end for block in revised):
                labels[place], weights[place] = example.input_ids[place], 1.0
    return replace(example, labels=labels, weights=weights)


def attempt_weight_mark(example: Example, *, weight: float) -> Example:
    """Multiply the loss of every draft but the last by `weight`."""
    drafts = draft_ids(example)
    last = max(drafts, default=0)
    pairs = zip(example.weights, drafts, strict=True)
    return replace(example, weights=[w * weight if 0 < d < last else w for w, d in pairs])


def stage_weight_mark(example: Example, *, weights: Sequence[float]) -> Example:
    """Multiply each token's loss by the weight of its stage; `weights` has one entry for text outside, then STAGES'."""
    pairs = zip(example.weights, stage_ids(example), strict=True)
    return replace(example, weights=[w * weights[stage] for w, stage in pairs])


def correction_marks(
    attempt_weight: float = 1.0, stage_weights: dict[str, float] | None = None
) -> list[Mark]:
    """The marks of self-correction training.

    Args:
        stage_weights: stage (or `other`) -> factor; 1 where none is given.

    Raises UserError: a stage that does not exist, or a negative weight.
    """
    marks: list[Mark] = [superseded_mark]
    names = ("OTHER", *STAGES)
    stage_factors = {str(name).upper(): value for name, value in (stage_weights or {}).items()}
    check_factors(stage_factors, names, "stage_weights")
    check_factors({"drafts": attempt_weight}, ("drafts",), "attempt_weight")
    if attempt_weight != 1:
        marks.append(partial(attempt_weight_mark, weight=attempt_weight))
    factors = [float(stage_factors.get(name, 1.0)) for name in names]
    if any(factor != 1 for factor in factors):
        marks.append(partial(stage_weight_mark, weights=factors))
    return marks
