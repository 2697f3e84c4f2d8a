"""ChatML's turn delimiters as targets, as the training code released with Qwen-VL has them."""

from dataclasses import replace
from functools import partial

from ..errors import UserError
from .marks import IGNORE, Example, Mark

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
    """The mark for this tokenizer.

    Raises:
        UserError: its chats are not written in ChatML.
    """
    vocabulary, newline = tokenizer.get_vocab(), tokenizer.encode("\n", add_special_tokens=False)
    if START not in vocabulary or END not in vocabulary or len(newline) != 1:
        raise UserError(
            f"`label_delimiters`: the tokenizer {tokenizer.name_or_path!r} has no {START}, no {END} or no newline of one "
            "token, so its chats are not written in ChatML. Leave the setting out."
        )
    return [partial(delimiter_mark, start=vocabulary[START], end=vocabulary[END], newline=newline[0])]
