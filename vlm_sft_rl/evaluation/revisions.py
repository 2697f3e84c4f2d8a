"""What an evaluation makes of a decoded answer, as pure functions: a doubted phrase left out, an early end.

`drop` and `stop` are the cheap ways to use a verifier: both start from one greedy answer with its P(</UN>) per tagged
phrase. What retrospective resampling is worth shows only beside them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..data.conclusions import conclusion
from ..data.tags import CONFIDENT, OPEN, UNCONFIDENT, strip_tags
from ..errors import UserError

_TAG = re.compile("|".join(map(re.escape, (OPEN, CONFIDENT, UNCONFIDENT))))
_SENTENCE_END = re.compile(r"[.!?]+(?:\s+|$)")
_LIST_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|or)?|and|or|&)\s*", re.IGNORECASE)
_FIRST_LETTER = re.compile(rf"^(\s*(?:{re.escape(OPEN)}\s*)?)(\w)")


@dataclass(frozen=True)
class _Phrase:
    before: str  # text between the previous phrase of the sentence (or its start) and this one
    tagged: str  # with its tags
    p_unconfident: float


@dataclass(frozen=True)
class _Sentence:
    phrases: tuple[_Phrase, ...]
    end: str  # text after the last phrase, the full stop and the space behind it included

    def text(self) -> str:
        return "".join(phrase.before + phrase.tagged for phrase in self.phrases) + self.end


def split_phrases(tagged: str) -> list[tuple[str, bool]]:
    """Cut at the tags into `(piece, is a closed phrase)`; a phrase piece keeps its tags.

    A close tag without an open one, or an open tag that is never closed, makes no phrase: it stays in the text around.
    """
    pieces, text_start, open_start = [], 0, None
    for match in _TAG.finditer(tagged):
        if match.group() == OPEN:
            open_start = match.start()
        elif open_start is not None:
            pieces += [(tagged[text_start:open_start], False), (tagged[open_start : match.end()], True)]
            text_start, open_start = match.end(), None
    return [*pieces, (tagged[text_start:], False)]


def _sentences(tagged: str, p_unconfident: Sequence[float]) -> list[_Sentence]:
    pieces = split_phrases(tagged)
    count = sum(is_phrase for _, is_phrase in pieces)
    if count != len(p_unconfident):
        raise UserError(
            f"the answer {tagged!r} has {count} closed phrases, but {len(p_unconfident)} verdicts came with it. "
            "The samples file is not from this version: evaluate again into another folder."
        )
    verdicts, sentences, phrases, before = iter(p_unconfident), [], [], ""
    for piece, is_phrase in pieces:
        if is_phrase:
            phrases.append(_Phrase(before, piece, next(verdicts)))
            before = ""
            continue
        start = 0
        for match in _SENTENCE_END.finditer(piece):
            sentences.append(_Sentence(tuple(phrases), piece[start : match.end()]))
            phrases, start = [], match.end()
        before = piece[start:]
    if phrases or before:
        sentences.append(_Sentence(tuple(phrases), before))
    return sentences


def _lists(phrases: Sequence[_Phrase]) -> list[list[_Phrase]]:
    """Runs of phrases with nothing between them but commas, `and`, `or`."""
    runs: list[list[_Phrase]] = []
    for phrase in phrases:
        if runs and _LIST_SEPARATOR.fullmatch(phrase.before):
            runs[-1].append(phrase)
        else:
            runs.append([phrase])
    return runs


def _relisted(run: list[_Phrase], kept: list[_Phrase]) -> str:
    """The survivors of a list, with the commas and the `and` where a writer would have put them."""
    if len(kept) == 1 or len(kept) == len(run):
        return kept[0].tagged + "".join(phrase.before + phrase.tagged for phrase in kept[1:])
    first, last = run[1].before, run[-1].before
    if len(kept) == 2:
        last = re.sub(r"^\s*,\s*(?=and|or)", " ", last)
    middle = "".join(first + phrase.tagged for phrase in kept[1:-1])
    return kept[0].tagged + middle + last + kept[-1].tagged


def _capitalise_like(original: str, text: str) -> str:
    was = _FIRST_LETTER.match(original)
    if was and was.group(2).isupper():
        return _FIRST_LETTER.sub(lambda match: match.group(1) + match.group(2).upper(), text, count=1)
    return text


def drop_phrases(tagged: str, p_unconfident: Sequence[float], threshold: float) -> str:
    """Leave out every phrase with P(</UN>) > `threshold`; the tags of the others stay.

    The list around a left-out phrase is joined again, the words that led to it go with it, and a sentence that
    loses all its phrases goes as a whole. An answer without doubted phrases comes back as it was.

    Raises UserError: the number of closed phrases is not the number of probabilities.
    """
    text = ""
    for sentence in _sentences(tagged, p_unconfident):
        kept = [phrase for phrase in sentence.phrases if phrase.p_unconfident <= threshold]
        if len(kept) == len(sentence.phrases):
            text += sentence.text()
            continue
        if not kept:
            continue
        rebuilt = ""
        for run in _lists(sentence.phrases):
            survivors = [phrase for phrase in run if phrase.p_unconfident <= threshold]
            if survivors:
                lead = run[0].before if rebuilt else sentence.phrases[0].before
                rebuilt += lead + _relisted(run, survivors)
        text += _capitalise_like(sentence.text(), rebuilt + sentence.end)
    return text.rstrip() if text != tagged else text


def stop_before(tagged: str, p_unconfident: Sequence[float], threshold: float) -> str:
    """End the answer before the first phrase with P(</UN>) > `threshold`; the tags of the others stay.

    The sentence is closed after its last accepted phrase, or left out if it has none.

    Raises UserError: the number of closed phrases is not the number of probabilities.
    """
    text = ""
    for sentence in _sentences(tagged, p_unconfident):
        doubted = [index for index, p in enumerate(sentence.phrases) if p.p_unconfident > threshold]
        if doubted:
            kept = sentence.phrases[: doubted[0]]
            closing = "." if kept else ""
            return (text + replace(sentence, phrases=kept, end=closing).text()).rstrip()
        text += sentence.text()
    return text


def scored(text: str) -> str:
    """A model's text as answers are scored: without tags, its conclusion."""
    return conclusion(strip_tags(text)).text.strip()


def derive(sample: dict, mode: str, threshold: float) -> dict:
    """The sample that `drop` or `stop` makes of a greedy one. Counts stay: no token is generated anew."""
    spans = sample["spans"]
    verdicts = [span["p_unconfident"] for span in spans]
    rewrite = {"drop": drop_phrases, "stop": stop_before}[mode]
    try:
        tagged = rewrite(sample["tagged_answer"], verdicts, threshold)
    except UserError as error:
        raise UserError(f"sample {sample['id']!r}: {error}") from error
    if mode == "drop":
        kept = [span for span in spans if span["p_unconfident"] <= threshold]
    else:
        first = next((i for i, p in enumerate(verdicts) if p > threshold), len(spans))
        kept = spans[:first]
    answer = scored(tagged)
    return sample | {
        "answer": answer,
        "tagged_answer": tagged,
        "accepted_answer": answer,
        "ok": True,
        "spans": [span | {"accepted": True} for span in kept],
        "trace": [
            {"kind": mode, "text": span["text"], "p_unconfident": span["p_unconfident"]}
            for span in spans
            if span["p_unconfident"] > threshold
        ],
    }
