"""What comes out of a decoder (`Answer`), and what it must know about a tokenizer (`Grammar`). No torch."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache

from ..data.chat import end_ids, get_tokenizer
from ..data.marks import HINT
from ..data.tags import VERIFICATION_TOKENS, strip_tags, verification
from ..errors import UserError


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

    def add(self, other: "Counts") -> None:
        """The work behind another answer to the same prompt."""
        self.tokens_forwarded += other.tokens_forwarded
        self.tokens_kept += other.tokens_kept
        self.forwards += other.forwards
        self.image_encodes += other.image_encodes


@dataclass
class Answer:
    """A decoded answer, how far it was verified, and everything that happened on the way.

    Attributes:
        text: the answer without tags: the verified text when `ok`, otherwise the best effort (with
            `rules: released` the accepted prefix, as that program returns).
        tagged_text: `text` with its tags.
        ok: False when attempts ran out or the length limit cut a phrase: something stayed unverified. An answer without
            a phrase is `ok` too, see `verdict`.
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

    @property
    def verdict(self) -> str | None:
        """Whether every phrase was verified, not all were, or there was none; None where the decoder verifies nothing."""
        return None if self.threshold is None else verification(self.ok, len(self.spans))

    def to_json(self) -> dict:
        return {**asdict(self), "verdict": self.verdict}


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
