"""What goes into a decoder (`RetrospectiveConfig`) and what comes out of it (`Answer`). No torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any, TypeVar

from ..data.chat import end_ids, get_tokenizer
from ..data.marks import HINT
from ..data.tags import VERIFICATION_TOKENS, strip_tags
from ..errors import UserError

PROFILES = ("paper", "released-code")
ENDINGS = ("finish", "continue")
Config = TypeVar("Config")


@dataclass(frozen=True)
class RetrospectiveConfig:
    """Settings of retrospective resampling (REVERSE, arXiv 2504.13169, section 3.3 and Algorithm 1).

    Attributes:
        threshold: tau; a phrase whose P(</UN>) at its close tag reaches it is rejected. 0 < tau < 1.
            Published: 0.003 (captions, LLaVA), 0.01 (captions, Qwen2.5-VL), 0.5 (yes/no questions).
        local_attempts: K, failed resamplings at one place before the rewind goes back to a sentence boundary.
        total_attempts: N, failed resamplings in the whole answer before decoding gives up.
        temperature: T0, of text that was not rejected. 0 = greedy.
        temperature_step: added to the temperature by every rejection, until the next accepted phrase.
        temperature_span: the temperature never exceeds T0 + this.
        rewrite_query: append the hint with the last five rejected phrases to the question.
        max_new_tokens: length limit of the answer (tokens kept, tags included).
        profile: "paper", or "released-code": the decisions of the authors' program, defects included.
        false_premise: two-stage mode for open-ended questions that may have no answer.
        parallel_attempts: how many resamplings of a rejected phrase are drawn side by side; they share one
            temperature and one hint, so a value above 1 is not the published algorithm.
        on_exhausted: "finish" ends the answer where attempts ran out, as published. "continue" writes it to its end from
            the last verified phrase, at T0 and without further rewinds; phrases at or above tau keep their flag. (The
            paper counts the cost of its Table 5 that way.)
        premise_sentence_in_every_hint: only with "released-code": what its LLaVA branch does.
    """

    threshold: float = 0.003
    local_attempts: int = 10
    total_attempts: int = 50
    temperature: float = 0.0
    temperature_step: float = 0.1
    temperature_span: float = 0.5
    rewrite_query: bool = True
    max_new_tokens: int = 512
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    profile: str = "paper"
    false_premise: bool = False
    parallel_attempts: int = 1
    on_exhausted: str = "finish"
    premise_sentence_in_every_hint: bool = False

    def __post_init__(self):
        """Raises UserError: a value is outside its range; the message names the field, the value and the range."""
        _check(0 < self.threshold < 1, self, "threshold", "a probability strictly between 0 and 1")
        for name, least in (
            ("local_attempts", 1),
            ("total_attempts", 0),
            ("max_new_tokens", 1),
            ("parallel_attempts", 1),
        ):
            _check(
                _is_int(getattr(self, name)) and getattr(self, name) >= least,
                self,
                name,
                f"an integer >= {least}",
            )
        for name in ("temperature", "temperature_step", "temperature_span"):
            value = getattr(self, name)
            _check(0 <= value < float("inf"), self, name, "a finite number >= 0")
        _check(
            self.top_k is None or (_is_int(self.top_k) and self.top_k >= 1),
            self,
            "top_k",
            "an integer >= 1, or null",
        )
        _check(self.top_p is None or 0 < self.top_p <= 1, self, "top_p", "a number in (0, 1], or null")
        _check(_is_int(self.seed), self, "seed", "an integer")
        _check(self.profile in PROFILES, self, "profile", " or ".join(PROFILES))
        _check(self.on_exhausted in ENDINGS, self, "on_exhausted", " or ".join(ENDINGS))
        released = self.profile == "released-code"
        _check(
            self.on_exhausted == "finish" or not (released or self.false_premise),
            self,
            "on_exhausted",
            'finish with `false_premise` or profile "released-code"',
        )
        _check(
            released or not self.premise_sentence_in_every_hint,
            self,
            "premise_sentence_in_every_hint",
            'false unless profile is "released-code"',
        )
        _check(
            not released or self.parallel_attempts == 1,
            self,
            "parallel_attempts",
            '1 when profile is "released-code"',
        )


def configured(cls: type[Config], values: dict[str, Any], what: str) -> Config:
    """A config of this package from settings of a file or a command line.

    Args:
        what: whose settings they are, for errors.

    Raises:
        UserError: a field that does not exist, or a value of the wrong type or out of range.
    """
    known = [item.name for item in fields(cls)]
    if stray := [name for name in values if name not in known]:
        raise UserError(f"{what}: there is no {stray[0]!r}. {cls.__name__} has {', '.join(known)}.")
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{what}: a value of the wrong type ({error}). See {cls.__name__}.") from error


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check(ok: bool, config: RetrospectiveConfig, name: str, expected: str) -> None:
    if not ok:
        raise UserError(f"retrospective resampling: {name} = {getattr(config, name)!r}, expected {expected}.")


@dataclass
class SpanRecord:
    """One phrase of an answer: its text without tags, P(</UN>) at its close tag, and the verdict."""

    text: str
    p_unconfident: float
    accepted: bool


@dataclass
class Counts:
    """The work behind one answer.

    Attributes:
        tokens_forwarded: tokens sent through the language model, prompt and image tokens included.
        tokens_kept: tokens of the returned answer; where it was chosen from several, of all that were drawn.
        forwards: forward passes of the language model that this answer took part in.
        image_encodes: images sent through the vision tower (1 per image when nothing is encoded twice).
        prompt_tokens: tokens of the prompt, image tokens included.
    """

    tokens_forwarded: int = 0
    tokens_kept: int = 0
    forwards: int = 0
    image_encodes: int = 0
    prompt_tokens: int = 0


@dataclass
class Answer:
    """A decoded answer, how far it was verified, and everything that happened on the way.

    Attributes:
        text: the answer without tags: the verified text when `ok`, otherwise the best effort (in the
            "released-code" profile the accepted prefix, as that program returns).
        tagged_text: `text` with its tags.
        ok: False when attempts ran out or the length limit cut a phrase: something stayed unverified.
        accepted_text: the verified prefix, without tags; equal to `text` when `ok`.
        best_effort_text: the longest verified prefix followed by the least doubtful rejected phrase there; with
            `on_exhausted: continue` the whole answer.
        spans: the phrases of `text` in order.
        trace: events in order; each has "kind" and what belongs to it.
    """

    text: str
    tagged_text: str
    ok: bool
    accepted_text: str
    best_effort_text: str
    spans: list[SpanRecord] = field(default_factory=list)
    trace: list[dict] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)
    prompt: str = ""
    id: str = ""
    threshold: float | None = None

    def to_json(self) -> dict:
        return asdict(self)


# What the decoding algorithms must know about a tokenizer. No torch.
SENTENCE_ENDS = (".", "!", "?", "\n", "。", "！", "？")
FALSE_PREMISE_SENTENCE = (
    "For this question, please point out the false premises or note what information is missing, "
    "rather than answering it directly."
)
CANNED_ANSWER = "Unable to answer directly due to false premises or missing information."


@dataclass(frozen=True)
class Grammar:
    """Token ids of the verification tags and of the end, and two views of the text.

    Attributes:
        open, confident, unconfident: ids of <SPAN>, </CN>, </UN>; None in a model without verification tokens.
        ends: ids that end an answer.
        decode: ids -> text, tags kept, other special tokens dropped.
        piece: id -> the text of one token, leading space kept.
        plain: ids -> text without tags.
    """

    open: int | None
    confident: int | None
    unconfident: int | None
    ends: frozenset[int]
    decode: Callable[[Sequence[int]], str]
    piece: Callable[[int], str]
    plain: Callable[[Sequence[int]], str]

    @cached_property
    def closes(self) -> frozenset[int]:
        return frozenset(i for i in (self.confident, self.unconfident) if i is not None)

    @cached_property
    def watched(self) -> frozenset[int]:
        """Ids that an algorithm must see; all others only make the answer longer."""
        return self.closes | self.ends | ({self.open} if self.open is not None else frozenset())

    def phrase(self, ids: Sequence[int]) -> str:
        return self.decode(ids).strip()

    def sentence_ends(self, ids: Sequence[int]) -> list[int]:
        """Lengths n such that ids[:n] ends with a sentence and no span is open there.

        A dot inside a number or an abbreviation ("3.5", "U.S.") does not count: what follows must begin with
        white space, be a tag, or be the end.
        """
        found, inside = [], False
        for i, token in enumerate(ids):
            if token in self.closes or token == self.open:
                inside = token == self.open
                continue
            text = self.piece(token)
            if inside or not text.rstrip(" ").endswith(SENTENCE_ENDS):
                continue
            last = i + 1 == len(ids) or ids[i + 1] in self.watched
            if last or text[-1:].isspace() or self.piece(ids[i + 1])[:1].isspace():
                found.append(i + 1)
        return found


def hint_text(phrases: Sequence[str], *, limit: int = 5) -> str:
    """The rewritten query's addition (REVERSE section 3.3), with the `limit` last phrases; empty without phrases."""
    return HINT.format(", ".join(phrases[-limit:])) if phrases else ""


def build_grammar(model, processor, *, required: bool) -> Grammar:
    """Raises UserError: `required` and the tokenizer lacks a verification token."""
    tokenizer = get_tokenizer(processor)
    ids = [_token_id(tokenizer, token) for token in VERIFICATION_TOKENS]
    if None in ids:
        if required:
            missing = ", ".join(t for t, i in zip(VERIFICATION_TOKENS, ids, strict=True) if i is None)
            raise UserError(
                f"The tokenizer has no {missing}: this model was not trained to verify its phrases. Add the tokens "
                "with `vlm-sft-rl model prepare`, train on tagged rows, then decode; or decode without verification."
            )
        ids = [None, None, None]
    tags = {i for i in ids if i is not None}
    hidden = set(tokenizer.all_special_ids) - tags
    anchor = tokenizer.encode("x", add_special_tokens=False)
    prefix = len(tokenizer.decode(anchor))

    def decode(tokens: Sequence[int]) -> str:
        shown = [t for t in tokens if t not in hidden]
        return tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @lru_cache(maxsize=4096)
    def piece(token: int) -> str:
        # behind an anchor, because SentencePiece drops the leading space of a text's first token
        text = tokenizer.decode(
            [*anchor, token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text[prefix:]

    def plain(tokens: Sequence[int]) -> str:
        return strip_tags(decode(tokens)).strip()

    return Grammar(*ids, end_ids(model, tokenizer), decode, piece, plain)


def _token_id(tokenizer, token: str) -> int | None:
    number = tokenizer.convert_tokens_to_ids(token)
    return None if number is None or number == tokenizer.unk_token_id else number
