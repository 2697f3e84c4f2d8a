"""`generate_corrected`: an answer, then corrections of it, batched on the shared engine."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from ..data.corrections import CHECK_LINE, CHECK_PROMPT
from ..errors import UserError
from ..models.unwrap import unwrap
from . import prompt as prompting
from .dialogue import CorrectionPlan, Dialogue
from .hf import decode_with
from .records import Answer, RetrospectiveConfig

INFERENCE_LAYOUTS = ("turn", "message", "stage")


@dataclass(frozen=True)
class CorrectionConfig:
    """How answers are corrected.

    Attributes:
        layout: as in training: `turn`, `message` or `stage` (there the model corrects on its way, unforced).
        corrections: K; 0 is one-shot.
        prompt: the user's request to check (`turn`).
        line: the line between two drafts (`message`, `stage`).
        forced: `message`: write the line where the model would end before K corrections.
        stop, confidence: see `CorrectionPlan`; `stop: same` is self-stopped correction.
        max_new_tokens: of each draft. temperature, top_p, top_k: of all drafts; LLaVA-SCo samples with 0.7 and 0.9.
    """

    layout: str = "turn"
    corrections: int = 1
    prompt: str = CHECK_PROMPT
    line: str = CHECK_LINE
    forced: bool = True
    stop: str = "never"
    confidence: float = 0.9
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self):
        """Raises UserError: a value out of its range."""
        if self.layout not in INFERENCE_LAYOUTS:
            raise UserError(f"`layout` is {self.layout!r}, expected one of {', '.join(INFERENCE_LAYOUTS)}.")
        for name in ("prompt", "line"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise UserError(f"`{name}` of a correction must be text that is not empty.")
        CorrectionPlan("turn", self.corrections, (), stop=self.stop, confidence=self.confidence)


def plan_for(processor, config: CorrectionConfig) -> CorrectionPlan:
    """The plan with this tokenizer's ids."""
    tokenizer = prompting.tokenizer_of(processor)
    common: dict[str, Any] = {"stop": config.stop, "confidence": config.confidence}
    if config.layout == "turn":
        ids = prompting.follow_up_ids(processor, config.prompt)
        return CorrectionPlan("turn", config.corrections, tuple(ids), **common)
    # SentencePiece drops the leading space of a text's first token, so the line is encoded behind an anchor
    anchor = tokenizer.encode("x", add_special_tokens=False)
    ids = tokenizer.encode(f"x\n\n{config.line}\n\n", add_special_tokens=False)[len(anchor) :]
    forced = config.forced and config.layout == "message"
    corrections = config.corrections if config.layout == "message" else max(1, config.corrections)
    return CorrectionPlan("message", corrections, tuple(ids), config.line, forced, **common)


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
    settings = RetrospectiveConfig(
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        rewrite_query=False,
    )
    grammar = prompting.build_grammar(unwrap(model), processor, required=False)
    machine = partial(Dialogue, plan=plan_for(processor, config))
    answers = decode_with(
        model, processor, images, prompts, settings, grammar, machine, ids=ids, batch_size=batch_size
    )
    for answer in answers:
        answer.threshold = None
    return answers
