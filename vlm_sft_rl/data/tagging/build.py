"""From answers, their phrases and verdicts to tagged rows: everything confident, and copies that stop at something wrong.

A negative keeps the text before its wrong phrase and stops right after `</UN>`: what follows would build on it (REVERSE,
arXiv 2504.13169, section 3.1 and appendix B). Three sources of verdicts: ground truth with an absent noun drawn from a
prior (`synthetic_rows`), a grader of a model's own answers (`on_policy_rows`), and plain answers of unknown truth, with
negatives by rule or teacher and an optional checker (`RowBuilder`).
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...errors import FORMAT, TAGS, RowError
from ..rows import IMAGE
from ..tags import VERIFICATION_TOKENS, format_span, strip_tags, tag_ranges
from .negatives import (
    GENERAL,
    KINDS,
    Corpus,
    Negative,
    Prior,
    Scene,
    answer_type,
    by_rule,
    draw_absent,
    fault,
)
from .phrases import ADJECTIVES, Phrase, find_phrases, words

YES_NO = "yes_no"
FOUND = "found"  # a negative that the data set had itself, and a checker denied
TRIES = 8  # draws of a noun before a phrase counts as having none
Grade = Callable[[str, Any], bool]


def tagged(text: str, phrases: Sequence[Phrase], wrong: Negative | None = None) -> str:
    """The answer with every phrase confident; with `wrong`, up to the wrong phrase and no further."""
    if wrong is None:
        return tag_ranges(text, [(phrase.start, phrase.end, True) for phrase in phrases])
    cut = wrong.phrase.start
    return tagged(text[:cut], [p for p in phrases if p.end <= cut]) + format_span(wrong.text, False)


def with_answers(
    row: dict, suffix: str, texts: Mapping[int, str], hints: Mapping[int, str], kinds: Mapping[int, str]
) -> dict:
    """A copy of the row with other answers, by number of the message; a hint is the wrong phrase to avoid."""
    messages = [dict(message) for message in row["messages"]]
    for turn, text in texts.items():
        messages[turn] |= {"content": text, "answer_type": kinds[turn]}
        if turn in hints:
            messages[turn]["hint"] = hints[turn]
    return {**row, "id": f"{row['id']}{suffix}", "messages": messages}


# --- Answers with ground truth ---


def synthetic_rows(
    rows: Iterable[dict],
    scene_of: Callable[[dict], Scene],
    nouns: Collection[str],
    prior: Prior | None = None,
    negatives: int = 1,
    seed: int = 0,
    adjectives: Collection[str] = ADJECTIVES,
    notes: Counter | None = None,
) -> Iterator[dict]:
    """For each caption row: one positive row and up to `negatives` negative rows.

    The absent noun is drawn from the prior, a mapping `theme -> {noun: weight}` or a function of the scene,
    restricted to what the image lacks. Give the distribution by which objects occur in training images with
    that background and that company. Without a prior all are alike.

    Every row carries the wrong phrase as `hint` (the phrase to avoid) and `answer_type` "general_answer".
    The draw depends on `(seed, row id)` alone.

    Args:
        rows: rows whose assistant messages are captions without tags. One that names something absent is left
            out: `on_policy_rows` takes captions that may be wrong.
        scene_of: row -> ground truth.
        nouns: vocabulary of the phrase tagger.
        notes: counts captions left out ("no phrase", "untrue caption"), those without a negative ("no absent
            noun"), and negatives that were drawn a second time and left out ("duplicate negative").

    Yields:
        Rows with ids `{id}-pos`, `{id}-neg0`, ...
    """
    notes = Counter() if notes is None else notes
    for row in rows:
        scene = scene_of(row)
        texts = {i: m["content"] for i, m in enumerate(row["messages"]) if m["role"] == "assistant"}
        phrases = {i: find_phrases(text, nouns, adjectives) for i, text in texts.items()}
        places = [(i, k) for i in phrases for k in range(len(phrases[i]))]
        if not places:
            notes["no phrase"] += 1
            continue
        if any(phrases[i][k].head not in scene.objects for i, k in places):
            notes["untrue caption"] += 1
            continue
        draws: list[tuple[int, Negative]] = []
        for n in range(max(1, negatives)):
            rng = random.Random(f"{seed}/{row['id']}/{n}")
            i, k = rng.choice(places)
            draw = i, draw_absent(phrases[i][k], scene, nouns, prior, rng)
            if draw in draws:
                notes["duplicate negative"] += 1
            elif draw[1] is not None:
                draws.append(draw)
        if not draws:
            notes["no absent noun"] += 1
        kinds = dict.fromkeys(texts, GENERAL)
        positive = {i: tagged(text, phrases[i]) for i, text in texts.items()}
        # where a negative goes wrong, the positive is told what to avoid
        hints = {i: wrong.text for i, wrong in draws[:1]}
        yield with_answers(row, "-pos", positive, hints, kinds)
        for n, (i, wrong) in enumerate(draws[:negatives]):
            negative = {**positive, i: tagged(texts[i], phrases[i], wrong)}
            yield with_answers(row, f"-neg{n}", negative, {i: wrong.text}, kinds)


def yes_no_rows(rows: Iterable[dict], notes: Counter | None = None) -> Iterator[dict]:
    """For each yes/no question row with a true answer: `<SPAN> Yes </CN>` and the flipped `<SPAN> No </UN>`.

    What follows the word ("Yes, there is.") stays in the positive and is cut in the negative.

    Raises:
        RowError: an answer begins with neither yes nor no.
    """
    for row in rows:
        positive, negative = {}, {}
        for i, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            answer = re.match(r"\s*(yes|no)\b", message["content"], re.IGNORECASE)
            if not answer:
                raise RowError(
                    FORMAT,
                    f"expected an answer that begins with yes or no, found {message['content']!r:.80}.",
                    row.get("source") or f"row {row.get('id')}",
                )
            word = answer.group(1).capitalize()
            positive[i] = format_span(word, True) + message["content"][answer.end() :]
            negative[i] = format_span("No" if word == "Yes" else "Yes", False)
        if notes is not None:
            notes["questions"] += len(positive)
        kinds = dict.fromkeys(positive, YES_NO)
        yield with_answers(row, "-pos", positive, {}, kinds)
        yield with_answers(row, "-neg0", negative, {}, kinds)


def on_policy_rows(
    samples: Iterable[dict],
    grade: Grade,
    nouns: Collection[str],
    adjectives: Collection[str] = ADJECTIVES,
    supervise: str = "all",
    notes: Counter | None = None,
) -> Iterator[dict]:
    """Tag a model's own answers up to and including the first wrong phrase, or wholly when none is wrong.

    REVERSE trains on synthetic negatives only. Phrases that the model itself would have said are harder and closer to
    what it meets at test time.

    Args:
        samples: `{"id", "images", "prompt", "answer", "reference"}`, as in samples.jsonl.
        grade: `(phrase, reference) -> is it right?`; ground truth, a detector or a judge.
        nouns: vocabulary of the phrase tagger.
        supervise: "all" learns the right text too; "verdicts" only the closing tags, which teaches to verify
            without teaching the model its own style again.
        notes: counts "right" and "wrong" answers, and those left out: "no phrase", and "duplicate" (the same row about
            the same images again, as several samples of one question give).

    Yields:
        Rows with the sample's id and images; a wrong phrase is also the `hint`.
    """
    notes = Counter() if notes is None else notes
    seen: set[int] = set()
    for sample in samples:
        text = strip_tags(sample["answer"]).strip()
        phrases = find_phrases(text, nouns, adjectives)
        if not phrases:
            notes["no phrase"] += 1
            continue
        reference = sample.get("reference")
        denied = next((phrase for phrase in phrases if not grade(phrase.text, reference)), None)
        wrong = None if denied is None else Negative(denied, denied.text, FOUND)
        answer = {"role": "assistant", "answer_type": GENERAL, "content": text}
        row = {
            "id": sample["id"],
            "messages": [{"role": "user", "content": sample["prompt"]}, answer],
            "images": list(sample.get("images") or []),
        }
        hints = {} if wrong is None else {1: wrong.text}
        row = with_answers(row, "", {1: tagged(text, phrases, wrong)}, hints, {1: GENERAL})
        if supervise != "all":
            row["messages"][1]["supervise"] = supervise
        key = hash((sample["prompt"], row["messages"][1]["content"], *map(str, row["images"])))
        if key in seen:
            notes["duplicate"] += 1
            continue
        seen.add(key)
        notes["right" if wrong is None else "wrong"] += 1
        yield row


def object_grader(nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES) -> Grade:
    """A grader for references with `"objects": [noun, ...]`: right means that the noun is among them."""

    def grade(phrase: str, reference: Mapping) -> bool:
        present = set(reference["objects"])
        parts = find_phrases(phrase, nouns, adjectives)
        return bool(parts) and all(part.head in present for part in parts)

    return grade


# --- Plain answers ---


@dataclass
class Counts:
    """What was made: `answers` and `negatives` by answer type (and kind), `faults` of what was not used."""

    rows: Counter = field(default_factory=Counter)
    answers: Counter = field(default_factory=Counter)
    phrases: Counter = field(default_factory=Counter)
    negatives: Counter = field(default_factory=Counter)
    faults: Counter = field(default_factory=Counter)
    notes: Counter = field(default_factory=Counter)

    def to_json(self) -> dict:
        """The balance of the set: counts by answer type and kind, and the share of unconfident phrases."""
        unconfident = self.phrases["unconfident"]
        phrases = self.phrases["confident"] + unconfident
        by_type: dict[str, dict] = {}
        for kind, number in sorted(self.answers.items()):
            by_kind = {k: n for (answer, k), n in sorted(self.negatives.items()) if answer == kind}
            by_type[kind] = {"answers": number, "negatives": sum(by_kind.values()), "by_kind": by_kind}
        return {
            "rows": dict(self.rows),
            "phrases": dict(self.phrases),
            "unconfident_share": unconfident / phrases if phrases else 0.0,
            "answer_types": by_type,
            "not_used": {f"{kind}: {reason}": n for (kind, reason), n in sorted(self.faults.items())},
            "notes": {note: n for note, n in sorted(self.notes.items()) if n},
        }


@dataclass(frozen=True)
class Answer:
    """One assistant message, by number, with its question and phrases."""

    turn: int
    question: str
    text: str
    phrases: Sequence[Phrase]

    @property
    def kind(self) -> str:
        return answer_type(self.question, self.text)


def answers_of(row: dict, phrases: Mapping[int, Sequence[Phrase]]) -> list[Answer]:
    """The answers of a row. Raises RowError where one has tags already."""
    answers, question = [], ""
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
            answers.append(Answer(turn, question, message["content"], phrases.get(turn, ())))
    return answers


def image_key(row: dict) -> str:
    """What rows about the same image share; rows without an image stand alone."""
    return "|".join(map(str, row["images"])) or f"row {row['id']}"


class RowBuilder:
    """Makes the tagged rows of one row after another; nothing depends on their order.

    Args:
        corpus: closed counts over the whole data set.
        kinds: negatives wanted, of `negatives.KINDS`.
        negatives: negative rows for each row, at most.
        seed: draws depend on it, the row's id, the turn and the number of the negative alone.
    """

    def __init__(self, corpus: Corpus, kinds: Collection[str] = KINDS, negatives: int = 1, seed: int = 0):
        self.corpus, self.kinds, self.negatives, self.seed = corpus, frozenset(kinds), negatives, seed
        self.counts = Counts()

    def rows(
        self,
        row: dict,
        answers: Sequence[Answer],
        present: Collection[str] = (),
        proposals: Mapping[tuple[int, int], Negative | None] | None = None,
        denied: Mapping[int, int] | None = None,
    ) -> Iterator[dict]:
        """`{id}-pos`, then `{id}-neg0`, … Each negative row has a wrong phrase in every answer that allows one.

        Args:
            present: nouns known to be in the image, beside those named in answers.
            proposals: a teacher's negatives by (turn, number of the negative).
            denied: turn -> number of its first phrase that a checker denied. Then there is one row, `{id}-found`, whose
                answers are cut at these phrases.
        """
        for answer in answers:
            self.counts.answers[answer.kind] += 1
        if denied:
            wrongs = {}
            for answer in answers:
                if answer.turn in denied:
                    phrase = answer.phrases[denied[answer.turn]]
                    wrongs[answer.turn] = Negative(phrase, phrase.text, FOUND)
            yield self._negative(row, f"-{FOUND}", answers, wrongs)
            return
        named = self.corpus.named.get(image_key(row), set()) | set(present)
        draws: list[dict[int, Negative]] = []
        for number in range(self.negatives):
            wrongs = {}
            for answer in answers:
                proposal = (proposals or {}).get((answer.turn, number))
                wrong = self._choose(row, answer, named, number, proposal)
                if wrong is not None:
                    wrongs[answer.turn] = wrong
            draws.append(wrongs)
        for answer in answers:
            has_phrases = bool(answer.phrases)
            self.counts.phrases["confident"] += len(answer.phrases)
            self.counts.notes["answers without a phrase"] += not has_phrases
            self.counts.notes["answers without a negative"] += has_phrases and answer.turn not in draws[0]
        self.counts.rows["positive"] += 1
        texts = {answer.turn: tagged(answer.text, answer.phrases) for answer in answers}
        hints = {turn: wrong.text for turn, wrong in draws[0].items()}
        yield with_answers(row, "-pos", texts, hints, {answer.turn: answer.kind for answer in answers})
        for number, wrongs in enumerate(draws):
            if wrongs:
                yield self._negative(row, f"-neg{number}", answers, wrongs)

    def _negative(
        self, row: dict, suffix: str, answers: Sequence[Answer], wrongs: Mapping[int, Negative]
    ) -> dict:
        self.counts.rows["negative"] += 1
        for answer in answers:
            if answer.turn in wrongs:
                self.counts.negatives[answer.kind, wrongs[answer.turn].kind] += 1
                self.counts.phrases["unconfident"] += 1
        texts = {
            answer.turn: tagged(answer.text, answer.phrases, wrongs.get(answer.turn)) for answer in answers
        }
        hints = {turn: wrong.text for turn, wrong in wrongs.items()}
        return with_answers(row, suffix, texts, hints, {answer.turn: answer.kind for answer in answers})

    def _choose(
        self, row: dict, answer: Answer, named: set[str], number: int, proposal: Negative | None
    ) -> Negative | None:
        """The teacher's proposal, else the first candidate of a kind drawn by chance, that has no fault."""
        if proposal is not None and self._good(proposal, answer, named):
            return proposal
        rng = random.Random(f"{self.seed}/{row['id']}/{answer.turn}/{number}")
        by_kind: dict[str, list[Negative]] = {}
        for phrase in answer.phrases:
            for wrong in by_rule(
                phrase, answer.question, answer.kind, lambda options: self.corpus.choose(options, rng)
            ):
                # "behind the desert" gives itself away where nobody says so of a desert
                if wrong.kind != "relation" or (wrong.place, phrase.head) in self.corpus.placed:
                    by_kind.setdefault(wrong.kind, []).append(wrong)
        if answer.kind not in (YES_NO, "choice") and any(phrase.noun for phrase in answer.phrases):
            by_kind["object"] = []  # drawn when its turn comes
        order = [kind for kind in sorted(by_kind) if kind in self.kinds]
        rng.shuffle(order)
        # the kind that the question asks for comes first: "how many" -> another number
        order.sort(key=lambda kind: kind != answer.kind)
        for kind in order:
            if kind == "object":
                candidates: Iterable[Negative] = self._other_nouns(answer, named, rng)
            else:
                candidates = by_kind[kind]
                rng.shuffle(candidates)
            for wrong in candidates:
                if self._good(wrong, answer, named):
                    return wrong
        return None

    def _other_nouns(self, answer: Answer, named: set[str], rng: random.Random) -> Iterator[Negative]:
        company = {phrase.head for phrase in answer.phrases if phrase.head}
        phrases = [phrase for phrase in answer.phrases if phrase.noun]
        rng.shuffle(phrases)
        for phrase in phrases:
            for _ in range(TRIES):
                wrong = self.corpus.draw(phrase, company, named, rng)
                if wrong is None:
                    break
                yield wrong

    def _good(self, wrong: Negative, answer: Answer, named: set[str]) -> bool:
        others = [phrase.text for phrase in answer.phrases if phrase is not wrong.phrase]
        reason = fault(wrong, named, others, words(answer.text))
        if reason is not None:
            self.counts.faults[wrong.kind, reason] += 1
        return reason is None
