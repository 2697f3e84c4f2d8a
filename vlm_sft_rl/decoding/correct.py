"""`generate_corrected`: an answer, then corrections of it, batched on the shared engine."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..data import chat as prompting
from ..data.stages import conclusion
from ..errors import UserError
from ..models.parts import unwrap
from .answers import Answer, Counts, Grammar, build_grammar
from .config import CorrectionConfig, SamplingConfig
from .generate import decode_with
from .retrospective import CONTINUE, FINISH, Action, Feed

# An answer and its corrections as one pass of the engine: the image is encoded once, and cached keys are kept.
OPENING = "<CONCLUSION>"
STOPS = ("never", "same", "confident")
LINE_WINDOW = 8  # tokens beyond those of the line itself in which it is looked for


@dataclass(frozen=True)
class CorrectionPlan:
    """What comes between two drafts, and when there is a next one.

    Attributes:
        kind: `turn` (a user turn asks for the correction) or `message` (a line in the same answer leads to it).
        corrections: the most corrections, K. 0 is one-shot.
        between: for `turn`: ids of end of turn, user turn and assistant header. For `message`: ids of the line.
        line: for `message`: its text.
        forced: for `message`: the line is put where the model would end before K corrections.
        stop: `never` before K; `same`, when a correction repeats the conclusion before it; `confident`, also when a
            draft's least sure token of the conclusion has at least probability `confidence`.
        confidence: see `stop`.
    """

    kind: str
    corrections: int
    between: tuple[int, ...]
    line: str = ""
    forced: bool = True
    stop: str = "never"
    confidence: float = 0.9

    def __post_init__(self):
        """Raises UserError: a value out of its range."""
        if self.kind not in ("turn", "message"):
            raise UserError(f"correction layout {self.kind!r} is not one of turn, message.")
        if not isinstance(self.corrections, int) or self.corrections < 0:
            raise UserError(f"`corrections` must be a whole number >= 0, found {self.corrections!r}.")
        if self.stop not in STOPS:
            raise UserError(f"`stop` is {self.stop!r}, expected one of {', '.join(STOPS)}.")
        if not 0 <= self.confidence <= 1:
            raise UserError(f"`confidence` must lie in [0, 1], found {self.confidence!r}.")


class Dialogue:
    """The state machine: drafts until the plan is done.

    `observe(token, probability)` takes each sampled token with its probability. The answer's text is the last draft;
    its trace has one `turn` event a draft: `text`, `tokens`, `cut` (by the length limit), `probability` (geometric mean
    over the draft's tokens), `least_sure` (smallest token probability in its conclusion, or in the draft without one).
    """

    every_probability = True
    insertion = ""
    checkpoint = 0

    def __init__(self, config: SamplingConfig, grammar: Grammar, plan: CorrectionPlan):
        self.config, self.grammar, self.plan = config, grammar, plan
        self.temperature = config.temperature
        self.ids: list[int] = []  # everything behind the prompt, what was fed included
        self.draft: list[int] = []
        self.probabilities: list[float] = []
        self.trace: list[dict] = []
        self.kept = 0

    def observe(self, token: int, p: float | None = None) -> Action:
        ended = token in self.grammar.ends
        self.kept += 1
        if not ended:
            self.ids.append(token)
            self.draft.append(token)
            self.probabilities.append(1.0 if p is None else p)
        if not ended and self.plan.kind == "message" and self._line_written():
            del self.draft[-self._line_length() :]
            return self._finish_draft(cut=False, written=True, last=None)
        cut = not ended and len(self.draft) >= self.config.max_new_tokens
        if not ended and not cut:
            return CONTINUE
        return self._finish_draft(cut=cut, written=False, last=None if ended else token)

    def _line_written(self) -> bool:
        window = self.draft[-len(self.plan.between) - LINE_WINDOW :]
        return bool(self.plan.line) and self.plan.line in self.grammar.decode(window)

    def _line_length(self) -> int:
        """How many tokens at the end of the draft hold the line."""
        count = 1
        while self.plan.line not in self.grammar.decode(self.draft[-count:]):
            count += 1
        return count

    def _finish_draft(self, *, cut: bool, written: bool, last: int | None) -> Action:
        text = self.grammar.plain(self.draft)
        probabilities = self.probabilities[: len(self.draft)]
        self.trace.append(
            {
                "kind": "turn",
                "number": len(self.trace) + 1,
                "text": text,
                "tokens": len(self.draft),
                "cut": cut,
                "probability": _geometric_mean(probabilities),
                "least_sure": min(self._of_conclusion(probabilities), default=0.0),
            }
        )
        if self._done(cut):
            return FINISH
        self.draft, self.probabilities = [], []
        if written:
            return CONTINUE  # the model leads to the next draft itself
        if self.plan.kind == "message" and not self.plan.forced:
            return FINISH
        fed = ([last] if last is not None else []) + list(self.plan.between)
        self.ids += self.plan.between
        return Feed(tuple(fed))

    def _of_conclusion(self, probabilities: list[float]) -> list[float]:
        """The token probabilities of the conclusion; of the whole draft where there is none."""
        text = self.grammar.decode(self.draft)
        tag = text.upper().rfind(OPENING)
        if tag < 0:
            return probabilities
        at = tag + len(OPENING)
        for i in range(len(self.draft)):
            if len(self.grammar.decode(self.draft[: i + 1])) > at:
                return probabilities[i:]
        return probabilities

    def _done(self, cut: bool) -> bool:
        if len(self.trace) > self.plan.corrections:
            return True
        if cut and self.plan.kind == "message":
            return True  # a second draft behind half of a first one is nothing the model has seen
        if self.plan.stop == "never":
            return False
        if self.plan.stop == "confident" and self.trace[-1]["least_sure"] >= self.plan.confidence:
            return True
        return len(self.trace) > 1 and _said(self.trace[-1]) == _said(self.trace[-2])

    def answer(self) -> Answer:
        """`ok` is False when the last draft was cut by the length limit."""
        last = self.trace[-1] if self.trace else {"text": "", "cut": False}
        text = last["text"]
        ok = not last["cut"]
        return Answer(text, text, ok, text if ok else "", text, [], self.trace, Counts(tokens_kept=self.kept))


def turns_of(trace: list[dict]) -> list[dict]:
    """The drafts' events of an answer's trace, in order; empty for answers of other decoders."""
    return [event for event in trace if event.get("kind") == "turn"]


def _said(turn: dict) -> str:
    text = conclusion(turn["text"])
    return " ".join((turn["text"] if text is None else text).casefold().split()).strip(" .")


def _geometric_mean(values: list[float]) -> float:
    if not values:
        return 0.0
    return math.exp(sum(math.log(max(value, 1e-12)) for value in values) / len(values))


def plan_for(processor, config: CorrectionConfig) -> CorrectionPlan:
    """The plan with this tokenizer's ids."""
    tokenizer = prompting.get_tokenizer(processor)
    common: dict[str, Any] = {"stop": config.stop, "confidence": config.confidence}
    if config.layout == "turn":
        ids = prompting.follow_up_ids(processor, config.correction_prompt)
        return CorrectionPlan("turn", config.corrections, tuple(ids), **common)
    # SentencePiece drops the leading space of a text's first token, so the line is encoded behind an anchor
    anchor = tokenizer.encode("x", add_special_tokens=False)
    ids = tokenizer.encode(f"x\n\n{config.correction_line}\n\n", add_special_tokens=False)[len(anchor) :]
    forced = config.forced and config.layout == "message"
    corrections = config.corrections if config.layout == "message" else max(1, config.corrections)
    return CorrectionPlan("message", corrections, tuple(ids), config.correction_line, forced, **common)


def generate_corrected(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: CorrectionConfig | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 8,
) -> list[Answer]:
    """Answer `prompts` about `images`, then check and correct each answer.

    Returns:
        answers whose text is the last draft and whose trace has an event of kind `turn` for every draft.

    Raises:
        UserError: as `generate_plain`.
    """
    config = config or CorrectionConfig()
    grammar = build_grammar(unwrap(model), processor, required=False)
    machine = partial(Dialogue, plan=plan_for(processor, config))
    answers = decode_with(
        model, processor, images, prompts, config, grammar, machine, ids=ids, batch_size=batch_size
    )
    return answers
