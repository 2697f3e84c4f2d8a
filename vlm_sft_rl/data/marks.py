"""Marks: pure functions that decide, on one example's tokens, where the loss goes and how much of it.

A mark takes an `Example` and returns an `Example`. It knows token ids only through its arguments, so the
same mark serves every tokenizer:

    ids = verification_ids(processor.tokenizer)
    VisionCollator(processor, marks=[partial(verification_mark, ids=ids)])
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from ..errors import TAGS, RowError, UserError
from .messages import IMAGE
from .tags import VERIFICATION_TOKENS

IGNORE = -100
NO_DOUBT = -1.0


@dataclass(frozen=True)
class Turn:
    """The tokens `[start, end)` of one message; those of an answer include the end-of-turn token.

    `text` is the message as rendered, and `offsets` says which of its characters each token covers.
    """

    start: int
    end: int
    message: dict
    text: str = ""
    offsets: tuple[tuple[int, int], ...] = ()

    def places(self) -> Iterator[tuple[int, int]]:
        """`(token, character)` for each token: where in `text` it begins, leading blanks not counted."""
        for place, (first, last) in enumerate(self.offsets, self.start):
            piece = self.text[first:last]
            yield place, first + (len(piece) - len(piece.lstrip()) if piece.strip() else 0)


@dataclass(frozen=True)
class Example:
    """One tokenised row without padding; the three lists have one entry per token.

    Attributes:
        input_ids: token ids, image tokens expanded.
        labels: the token id where there is loss, -100 elsewhere (not shifted).
        weights: factor on the loss of each token, 0 where there is none.
        turns: the assistant messages in order.
        prompts: the system and user messages, as far as they could be found.
        doubts: places of closing tags, and what P(`</UN>`) is taught to be there.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float]
    turns: tuple[Turn, ...]
    prompts: tuple[Turn, ...] = ()
    doubts: tuple[tuple[int, float], ...] = ()


Mark = Callable[[Example], Example]


@dataclass(frozen=True)
class VerificationIds:
    open: int
    confident: int
    unconfident: int

    @property
    def closing(self) -> tuple[int, int]:
        return self.confident, self.unconfident

    def phrases(self, tokens: Iterable[int]) -> list[tuple[int, int, bool]]:
        """`(start, end, confident)` of each closed phrase: its tokens `[start, end)`, and whether `</CN>` stands at `end`.

        As in decoding, of two opening tags the later one counts, and a closing tag without one closes nothing.
        """
        phrases, opened = [], None
        for place, token in enumerate(tokens):
            if token == self.open:
                opened = place + 1
            elif token in self.closing:
                if opened is not None:
                    phrases.append((opened, place, token == self.confident))
                opened = None
        return phrases


def verification_ids(tokenizer) -> VerificationIds:
    """The ids of `<SPAN>`, `</CN>`, `</UN>`. Raises RowError: the tokenizer does not have them as single tokens."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in VERIFICATION_TOKENS if token not in vocabulary]
    if missing:
        raise RowError(
            TAGS,
            f"the tokenizer {tokenizer.name_or_path!r} lacks the verification tokens {', '.join(missing)}. "
            "Add them with `vlm-sft-rl model prepare` and train from the folder that it writes.",
        )
    return VerificationIds(*(vocabulary[token] for token in VERIFICATION_TOKENS))


def verification_marks(tokenizer) -> list[Mark]:
    """The verification mark for this tokenizer, or nothing where it lacks the tokens."""
    vocabulary = tokenizer.get_vocab()
    if not all(token in vocabulary for token in VERIFICATION_TOKENS):
        return []
    return [partial(verification_mark, ids=verification_ids(tokenizer))]


def require_untagged(example: Example) -> Example:
    """For tokenizers without the verification tokens. Raises RowError: tags with `doubts`, which would be taught letter by
    letter."""
    for turn in example.turns:
        if turn.message.get("doubts") and any(t in turn.text for t in VERIFICATION_TOKENS):
            raise RowError(
                TAGS,
                "verification tags with `doubts`, and the tokenizer lacks their tokens. Train a model that has them, or add "
                "them with `vlm-sft-rl model prepare`.",
            )
    return example


def verification_mark(example: Example, *, ids: VerificationIds) -> Example:
    """No loss strictly inside `<SPAN> … </UN>`; the tags, the end-of-turn token and other text keep theirs.

    This is the indicator of REVERSE's Eq. 1: a hallucinated phrase stays in the input, so that `</UN>` is
    predicted after it, but is not taught. In a message with `"supervise": "verdicts"` only the closing tags
    have loss. With `"doubts"` they are taught as probabilities.

    Raises RowError: tags of an assistant message do not pair up, or its doubts are not those of its phrases.
    """
    labels, weights, doubts = list(example.labels), list(example.weights), []
    for turn in example.turns:
        extent = turn.message.get("supervise")
        learns = turn.message.get("weight", 1) != 0
        opened, closed = None, []
        for i in range(turn.start, turn.end):
            token = example.input_ids[i]
            if token == ids.open:
                if opened is not None:
                    raise RowError(TAGS, "<SPAN> inside of a <SPAN> that is still open. Close the first one.")
                opened = i
            elif token in ids.closing:
                if opened is None:
                    raise RowError(
                        TAGS, "a closing tag without <SPAN> before it. Put <SPAN> before the phrase."
                    )
                if token == ids.unconfident:
                    labels[opened + 1 : i] = [IGNORE] * (i - opened - 1)
                    weights[opened + 1 : i] = [0.0] * (i - opened - 1)
                if extent == "verdicts" and learns:
                    labels[i], weights[i] = token, 1.0
                opened = None
                closed.append(i)
        if opened is not None:
            raise RowError(TAGS, "<SPAN> is never closed. Add </CN> or </UN> after the phrase.")
        if (values := turn.message.get("doubts")) is not None:
            if len(values) != len(closed):
                raise RowError(
                    TAGS,
                    f"`doubts` has {len(values)} values, and the answer {len(closed)} phrases. Give one for each.",
                )
            doubts += zip(closed, values, strict=True) if learns else ()
    return replace(example, labels=labels, weights=weights, doubts=tuple(doubts))


def closing_weight_mark(example: Example, *, ids: VerificationIds, weight: float) -> Example:
    """Multiply the loss on `</CN>` and `</UN>` by `weight`; tokens without loss stay without."""
    pairs = zip(example.labels, example.weights, strict=True)
    return replace(example, weights=[w * weight if label in ids.closing else w for label, w in pairs])


def phrase_mark(example: Example, *, ids: VerificationIds) -> Example:
    """No loss on `</CN>` and `</UN>`: phrases are compared, not verdicts. A preference that fell on `</UN>` would teach the
    model not to doubt."""
    labels, weights = list(example.labels), list(example.weights)
    for turn in example.turns:
        for i in range(turn.start, turn.end):
            if example.input_ids[i] in ids.closing:
                labels[i], weights[i] = IGNORE, 0.0
    return replace(example, labels=labels, weights=weights)


# Query-rewriting augmentation: some questions are asked again with a list of phrases to avoid.
GENERAL_ANSWER = "general_answer"
HINT = "(Hint: potential incorrect phrases -> {})"


def add_hints(row: dict, probability: float, seed: int = 0) -> dict:
    """A copy of `row` in which questions whose answer is a general one with a hint are, at random, rewritten.

    The draw depends on `(seed, row id, turn)` alone: not on the epoch, the batch or the number of workers.
    """
    if probability <= 0:
        return row
    messages = list(row["messages"])
    for i in range(1, len(messages)):
        question, answer = messages[i - 1], messages[i]
        if question["role"] != "user" or answer["role"] != "assistant":
            continue
        if answer.get("answer_type") != GENERAL_ANSWER or not answer.get("hint"):
            continue
        if random.Random(f"{seed}/{row['id']}/{i}").random() < probability:
            messages[i - 1] = {**question, "content": append_hint(question["content"], answer["hint"])}
    return {**row, "messages": messages}


def append_hint(question: str, hint: str) -> str:
    """Put the hint after the words of the question, and before images that close it."""
    words = question
    while words.rstrip().endswith(IMAGE):
        words = words.rstrip().removesuffix(IMAGE)
    words = words.rstrip() if len(words) < len(question) else words
    return f"{words} {HINT.format(hint.lower())}{question[len(words) :]}"


# ChatML's turn delimiters as targets, as the training code released with Qwen-VL has them.
START, END = "<|im_start|>", "<|im_end|>"


def delimiter_mark(example: Example, *, start: int, end: int, newline: int) -> Example:
    """Loss on every `<|im_start|>`, `<|im_end|>` and newline behind it, in all turns; what has loss keeps it.

    The first token of a row follows nothing and gets none, nor does an answer of weight 0, which is read and not taught. A
    row that teaches nothing else is left as it is: it is a bad row.
    """
    if all(label == IGNORE for label in example.labels):
        return example
    ids, labels, weights = example.input_ids, list(example.labels), list(example.weights)
    read = {
        i for turn in example.turns if turn.message.get("weight", 1) == 0 for i in range(turn.start, turn.end)
    }
    for i in range(1, len(ids)):
        delimits = ids[i] in (start, end) or (ids[i] == newline and ids[i - 1] == end)
        if delimits and labels[i] == IGNORE and i not in read:
            labels[i], weights[i] = ids[i], 1.0
    return replace(example, labels=labels, weights=weights)


def delimiter_marks(tokenizer) -> list[Mark]:
    """The mark for this tokenizer. Raises UserError: its chats are not written in ChatML."""
    vocabulary, newline = tokenizer.get_vocab(), tokenizer.encode("\n", add_special_tokens=False)
    if START not in vocabulary or END not in vocabulary or len(newline) != 1:
        raise UserError(
            f"`label_delimiters`: the tokenizer {tokenizer.name_or_path!r} has no {START}, no {END} or no newline of one "
            "token, so its chats are not written in ChatML. Leave the setting out."
        )
    return [partial(delimiter_mark, start=vocabulary[START], end=vocabulary[END], newline=newline[0])]
