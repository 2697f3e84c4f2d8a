"""An answer, then corrections of it, as one pass of the engine: the image is encoded once, and cached keys are kept."""

import math
from functools import partial

from ..data import chat
from ..data.conclusions import conclusion, folded
from .answers import Answer, Counts, Grammar
from .config import CorrectionConfig
from .generate import PromptBatch, decode
from .machines import CONTINUE, FINISH, Action, Feed, Machine

CONCLUSION = "<CONCLUSION>"
LINE_WINDOW = 8  # tokens beyond those of the line itself in which it is looked for


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

    Raises UserError: as `generate_plain`.
    """
    config = config or CorrectionConfig()
    machine = partial(Dialogue, between=between_drafts(processor, config))
    batch = PromptBatch(model, processor, images, prompts, ids)
    return decode(batch, machine, config, batch_size=batch_size)


def between_drafts(processor, config: CorrectionConfig) -> list[int]:
    """The ids between two drafts: end of turn, user turn and assistant header, or the line."""
    if config.layout == "turn":
        return chat.follow_up_ids(processor, config.correction_prompt)
    # SentencePiece drops the leading space of a text's first token, so the line is encoded behind an anchor
    tokenizer = chat.get_tokenizer(processor)
    anchor = tokenizer.encode("x", add_special_tokens=False)
    return tokenizer.encode(f"x\n\n{config.correction_line}\n\n", add_special_tokens=False)[len(anchor) :]


class Dialogue(Machine):
    """Drafts until there is no next one.

    The answer's text is the last draft; its trace has one `turn` event a draft: `text`, `tokens`, `cut` (by the length
    limit), `probability` (geometric mean over the draft's tokens), `least_sure` (smallest token probability in its
    conclusion, or in the draft without one).
    """

    every_probability = True

    def __init__(self, config: CorrectionConfig, grammar: Grammar, between: list[int]):
        super().__init__(config, grammar)
        self.between = between
        # `ids` is everything behind the prompt, what was fed included
        self.draft: list[int] = []
        self.probabilities: list[float] = []
        self.tokens_kept = 0
        # in stages the model corrects on its way; it is given the room to, and never made to
        self.corrections = max(1, config.corrections) if config.layout == "stage" else config.corrections
        self.feeds = config.layout == "turn" or (config.layout == "message" and config.forced)

    def observe(self, token: int, probability: float | None = None) -> Action:
        self.tokens_kept += 1
        ended = token in self.grammar.ends
        if not ended:
            self.ids.append(token)
            self.draft.append(token)
            self.probabilities.append(1.0 if probability is None else probability)
            if self.config.layout != "turn" and (length := self._line_length()):
                # the model leads to the next draft itself
                del self.draft[-length:]
                self._end_draft(cut=False)
                return FINISH if self._done() else CONTINUE
            if len(self.draft) < self.config.max_new_tokens:
                return CONTINUE
        self._end_draft(cut=not ended)
        if self._done() or not self.feeds:
            return FINISH
        self.ids += self.between
        # a token that reached the limit is not in the cache yet
        return Feed((*([] if ended else [token]), *self.between))

    def _line_length(self) -> int:
        """How many tokens at the end of the draft hold the line; 0: it is not there."""
        decode, line = self.grammar.decode, self.config.correction_line
        if line not in decode(self.draft[-len(self.between) - LINE_WINDOW :]):
            return 0
        return next(n for n in range(1, len(self.draft) + 1) if line in decode(self.draft[-n:]))

    def _end_draft(self, *, cut: bool) -> None:
        probabilities = self.probabilities[: len(self.draft)]
        mean = 0.0
        if probabilities:
            mean = math.exp(sum(math.log(max(p, 1e-12)) for p in probabilities) / len(probabilities))
        self.note(
            "turn",
            number=len(self.trace) + 1,
            text=self.grammar.plain(self.draft),
            tokens=len(self.draft),
            cut=cut,
            probability=mean,
            least_sure=min(probabilities[self._conclusion_start() :], default=0.0),
        )
        self.draft, self.probabilities = [], []

    def _conclusion_start(self) -> int:
        """The draft's token behind the opening of its conclusion; 0 where there is none."""
        decode = self.grammar.decode
        tag = decode(self.draft).upper().rfind(CONCLUSION)
        if tag < 0:
            return 0
        lengths = (len(decode(self.draft[: i + 1])) for i in range(len(self.draft)))
        return next((i for i, length in enumerate(lengths) if length > tag + len(CONCLUSION)), 0)

    def _done(self) -> bool:
        stop, last = self.config.stop, self.trace[-1]
        if len(self.trace) > self.corrections:
            return True
        if last["cut"] and self.config.layout != "turn":
            return True  # a second draft behind half of a first one is nothing the model has seen
        if stop == "never":
            return False
        if stop == "confident" and last["least_sure"] >= self.config.confidence:
            return True
        return len(self.trace) > 1 and _conclusion(last) == _conclusion(self.trace[-2])

    def answer(self) -> Answer:
        """`ok` is False when the last draft was cut by the length limit."""
        last = self.trace[-1] if self.trace else {"text": "", "cut": False}
        text, ok = last["text"], not last["cut"]
        counts = Counts(tokens_kept=self.tokens_kept)
        return Answer(text, text, ok, text if ok else "", text, [], self.trace, counts)


def _conclusion(turn: dict) -> str:
    return folded(conclusion(turn["text"]).text)
