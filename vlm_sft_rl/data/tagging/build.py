"""One plain row -> its tagged rows: everything confident, and copies that stop at something wrong."""

import random
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import TAGS, RowError
from ..rows import IMAGE
from ..tags import VERIFICATION_TOKENS, format_span, tag_ranges
from .corpus import Corpus
from .lexicon import words
from .quality import Facts, fault
from .rules import GENERAL, KINDS, Negative, answer_type, by_rule, swap_noun
from .taggers import Chunk

FOUND = "found"  # a negative that the data set had itself, and a checker found
TRIES = 8  # draws of a noun before a phrase counts as having none


@dataclass
class Counts:
    """What was made: `answers` and `negatives` by answer type (and kind), `faults` of what was not used."""

    rows: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)
    phrases: Counter = field(default_factory=Counter)
    negatives: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Answer:
    """One assistant message with its question and phrases."""

    turn: int
    question: str
    text: str
    chunks: Sequence[Chunk]

    @property
    def kind(self) -> str:
        return answer_type(self.question, self.text)


def answers_of(row: dict, chunks: Mapping[int, Sequence[Chunk]]) -> list[Answer]:
    """The answers of a row. Raises RowError where one has tags already."""
    found, question = [], ""
    for turn, message in enumerate(row["messages"]):
        if message["role"] == "user":
            question = message["content"].replace(IMAGE, "").strip()
        elif message["role"] == "assistant":
            if tag := next((t for t in VERIFICATION_TOKENS if t in message["content"]), None):
                raise RowError(
                    TAGS,
                    f"message {turn + 1} has the tag {tag} already. Tag plain answers.",
                    row.get("source", ""),
                )
            found.append(Answer(turn, question, message["content"], chunks.get(turn, ())))
    return found


def image_key(row: dict) -> str:
    """What rows about the same image share; rows without an image stand alone."""
    return "|".join(map(str, row["images"])) or f"row {row['id']}"


def untrue(answers: Sequence[Answer], present: Collection[str], known: Collection[str]) -> str | None:
    """The first noun of a vocabulary that an answer names although it is not in the image; None where there is none."""
    heads = [chunk.head for answer in answers for chunk in answer.chunks]
    return next((head for head in heads if head in known and head not in present), None)


class RowBuilder:
    """Makes the tagged rows of one row after another; nothing depends on their order.

    Args:
        corpus: closed counts over the whole data set.
        kinds: negatives wanted, of `rules.KINDS`.
        negatives: negative rows for each row, at most.
        seed: draws depend on it, the row's id, the turn and the number of the negative alone.
    """

    def __init__(self, corpus: Corpus, kinds: Collection[str] = KINDS, negatives: int = 1, seed: int = 0):
        self.corpus, self.kinds, self.count, self.seed = corpus, frozenset(kinds), negatives, seed
        self.counts = Counts()

    def rows(
        self,
        row: dict,
        answers: Sequence[Answer],
        present: Collection[str] = (),
        proposals: Mapping[tuple[int, int], Negative | None] | None = None,
    ) -> Iterator[dict]:
        """`{id}-pos`, then `{id}-neg0`, … Each negative row has a wrong phrase in every answer that allows one.

        Args:
            present: nouns known to be in the image, beside those named in answers.
            proposals: a teacher's negatives by (turn, number of the negative).
        """
        named = self.corpus.named.get(image_key(row), set()) | set(present)
        drawn = [
            {answer.turn: self._draw(row, answer, named, number, proposals or {}) for answer in answers}
            for number in range(self.count)
        ]
        drawn = [{turn: wrong for turn, wrong in wrongs.items() if wrong is not None} for wrongs in drawn]
        positives = {answer.turn: _tag_all(answer.text, answer.chunks) for answer in answers}
        for answer in answers:
            self.counts.answers[answer.kind] += 1
            self.counts.phrases["confident"] += len(answer.chunks)
            self.counts.notes["answers without a phrase"] += not answer.chunks
            self.counts.notes["answers without a negative"] += (
                bool(answer.chunks) and answer.turn not in drawn[0]
            )
        hints = {turn: wrong.text for turn, wrong in drawn[0].items()}
        yield self._row(row, "pos", answers, positives, hints)
        for number, wrongs in enumerate(drawn):
            if not wrongs:
                continue
            texts = dict(positives)
            for answer in answers:
                if answer.turn in wrongs:
                    wrong = wrongs[answer.turn]
                    texts[answer.turn] = _tag_until(answer, wrong)
                    self.counts.negatives[answer.kind, wrong.kind] += 1
                    self.counts.phrases["unconfident"] += 1
            yield self._row(row, f"neg{number}", answers, texts, {t: w.text for t, w in wrongs.items()})

    def found(self, row: dict, answers: Sequence[Answer], denied: Mapping[int, int]) -> dict:
        """The one row of a source row in which answers name what is not there: cut at the first such phrase.

        Args:
            denied: turn -> number of its first phrase that a checker denied.
        """
        texts, hints = {}, {}
        for answer in answers:
            self.counts.answers[answer.kind] += 1
            texts[answer.turn] = _tag_all(answer.text, answer.chunks)
            if answer.turn in denied:
                chunk = answer.chunks[denied[answer.turn]]
                texts[answer.turn] = _tag_until(answer, Negative(chunk, chunk.text, FOUND))
                hints[answer.turn] = chunk.text
                self.counts.negatives[answer.kind, FOUND] += 1
                self.counts.phrases["unconfident"] += 1
        return self._row(row, "found", answers, texts, hints)

    def _row(self, row: dict, suffix: str, answers, texts: dict[int, str], hints: dict[int, str]) -> dict:
        self.counts.rows["positive" if suffix == "pos" else "negative"] += 1
        kinds = {answer.turn: answer.kind for answer in answers}
        messages = [dict(message) for message in row["messages"]]
        for turn, text in texts.items():
            messages[turn] |= {"content": text, "answer_type": kinds[turn]}
            if turn in hints:
                messages[turn]["hint"] = hints[turn]
        return {"id": f"{row['id']}-{suffix}", "images": row["images"], "messages": messages}

    def _draw(
        self, row: dict, answer: Answer, named: set[str], number: int, proposals: Mapping
    ) -> Negative | None:
        proposal = proposals.get((answer.turn, number))
        if proposal is not None and self._good(proposal, answer, named):
            return proposal
        rng = random.Random(f"{self.seed}/{row['id']}/{answer.turn}/{number}")
        by_kind: dict[str, list[Negative]] = {}
        for chunk in answer.chunks:
            for wrong in by_rule(
                chunk, answer.question, answer.kind, lambda options: self.corpus.choose(options, rng)
            ):
                # "behind the desert" gives itself away where nobody says so of a desert
                if wrong.kind != "relation" or (wrong.place, chunk.head) in self.corpus.placed:
                    by_kind.setdefault(wrong.kind, []).append(wrong)
        if answer.kind not in ("yes_no", "choice") and any(chunk.noun for chunk in answer.chunks):
            by_kind["object"] = []  # drawn when its turn comes
        wanted = [kind for kind in sorted(by_kind) if kind in self.kinds]
        rng.shuffle(wanted)
        # the kind that the question asks for comes first: "how many" -> another number
        wanted.sort(key=lambda kind: kind != answer.kind)
        for kind in wanted:
            candidates = self._nouns(answer, named, rng) if kind == "object" else by_kind[kind]
            if kind != "object":
                rng.shuffle(candidates)
            for wrong in candidates:
                if self._good(wrong, answer, named):
                    return wrong
        return None

    def _nouns(self, answer: Answer, named: set[str], rng: random.Random) -> Iterator[Negative]:
        company = {chunk.head for chunk in answer.chunks if chunk.head}
        chunks = [chunk for chunk in answer.chunks if chunk.noun]
        rng.shuffle(chunks)
        for chunk in chunks:
            for _ in range(TRIES):
                drawn = self.corpus.draw(chunk, company, named, rng)
                if drawn is None:
                    break
                yield swap_noun(chunk, *drawn)

    def _good(self, wrong: Negative, answer: Answer, named: set[str]) -> bool:
        others = [chunk.text for chunk in answer.chunks if chunk is not wrong.chunk]
        reason = fault(wrong, Facts(named, others, words(answer.text)))
        if reason is not None:
            self.counts.faults[wrong.kind, reason] += 1
        return reason is None


def _tag_all(text: str, chunks: Sequence[Chunk]) -> str:
    return tag_ranges(text, [(chunk.start, chunk.end, True) for chunk in chunks])


def _tag_until(answer: Answer, wrong: Negative) -> str:
    """The answer up to the wrong phrase and no further: what follows it would build on it."""
    before = [chunk for chunk in answer.chunks if chunk.end <= wrong.chunk.start]
    return _tag_all(answer.text[: wrong.chunk.start], before) + format_span(wrong.text, False)


def teachable(answer: Answer) -> bool:
    """Whether a teacher is worth asking: free text with phrases. Rules do the rest without a mistake."""
    return answer.kind == GENERAL and bool(answer.chunks)
