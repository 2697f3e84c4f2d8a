"""From answers, their phrases and verdicts to tagged rows: everything confident, and copies that stop at something wrong.

A negative keeps the text before its wrong phrase and stops right after `</UN>`: what follows would build on it (REVERSE,
arXiv 2504.13169, section 3.1 and appendix B). Three sources of verdicts: ground truth with an absent noun drawn from a
prior (`synthetic_rows`), a grader of a model's own answers (`on_policy_rows`), and plain answers of unknown truth, with
negatives by rule or teacher and an optional checker (`RowBuilder`).
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice

from ...errors import FORMAT, TAGS, RowError, short
from ..messages import IMAGE
from ..tags import VERIFICATION_TOKENS, format_span, strip_tags, tag_ranges
from .config import KINDS
from .negatives import GENERAL, Corpus, Negative, Prior, answer_type, by_rule, draw_absent, fault
from .phrases import ADJECTIVES, YES_NO, Phrase, find_phrases, words
from .verdicts import Grade, Scene

REPEATED = "rows with the id of a row before, told apart by ~2, ~3, …"
FOUND = "found"  # a negative that the data set had itself, and a checker denied
TRIES = 8  # draws of a noun before a phrase counts as having none


@dataclass(frozen=True)
class Answer:
    """One assistant message, by number, with its question, its phrases and its type."""

    turn: int
    question: str
    text: str
    phrases: Sequence[Phrase]
    kind: str = GENERAL


def tagged_row(
    row: dict,
    suffix: str,
    answers: Sequence[Answer],
    negatives: Mapping[int, Negative],
    hints: Mapping[int, Negative] | None = None,
) -> dict:
    """A copy of the row with tagged answers: every phrase confident, or cut at the wrong phrase.

    Args:
        negatives: by the number of the message.
        hints: what answers are told to avoid. None: as `negatives`.
    """
    messages = [dict(message) for message in row["messages"]]
    for answer in answers:
        text, phrases, end = answer.text, answer.phrases, ""
        if (negative := negatives.get(answer.turn)) is not None:
            text = text[: negative.phrase.start]
            phrases = [phrase for phrase in phrases if phrase.end <= negative.phrase.start]
            end = format_span(negative.text, False)
        tagged = tag_ranges(text, [(phrase.start, phrase.end, True) for phrase in phrases]) + end
        messages[answer.turn] |= {"content": tagged, "answer_type": answer.kind}
        if (hint := (negatives if hints is None else hints).get(answer.turn)) is not None:
            messages[answer.turn]["hint"] = hint.text
    return {**row, "id": f"{row['id']}{suffix}", "messages": messages}


def positive_and_negatives(
    row: dict, answers: Sequence[Answer], draws: Sequence[Mapping[int, Negative]]
) -> Iterator[dict]:
    """`{id}-pos`, then `{id}-neg0`, … for each draw that has a negative."""
    # where a negative goes wrong, the positive is told what to avoid
    yield tagged_row(row, "-pos", answers, {}, draws[0] if draws else {})
    for number, negatives in enumerate(draws):
        if negatives:
            yield tagged_row(row, f"-neg{number}", answers, negatives)


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
        answers = [
            Answer(turn, "", m["content"], find_phrases(m["content"], nouns, adjectives))
            for turn, m in enumerate(row["messages"])
            if m["role"] == "assistant"
        ]
        places = [(answer.turn, phrase) for answer in answers for phrase in answer.phrases]
        if not places:
            notes["no phrase"] += 1
            continue
        if any(phrase.head not in scene.objects for _, phrase in places):
            notes["untrue caption"] += 1
            continue
        draws: list[dict[int, Negative]] = []
        for number in range(max(1, negatives)):
            rng = random.Random(f"{seed}/{row['id']}/{number}")
            turn, phrase = rng.choice(places)
            negative = draw_absent(phrase, scene, nouns, prior, rng)
            if negative is not None and {turn: negative} in draws:
                notes["duplicate negative"] += 1
            elif negative is not None:
                draws.append({turn: negative})
        if not draws:
            notes["no absent noun"] += 1
        yield from islice(positive_and_negatives(row, answers, draws), 1 + negatives)


def yes_no_rows(rows: Iterable[dict], notes: Counter | None = None) -> Iterator[dict]:
    """For each yes/no question row with a true answer: `<SPAN> Yes </CN>` and the flipped `<SPAN> No </UN>`.

    What follows the word ("Yes, there is.") stays in the positive and is cut in the negative.

    Raises RowError: an answer begins with neither yes nor no.
    """
    for row in rows:
        answers, flipped = [], {}
        for turn, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            match = YES_NO.match(message["content"])
            if not match:
                raise RowError(
                    FORMAT,
                    f"expected an answer that begins with yes or no, found {short(message['content'])}.",
                    row.get("source") or f"row {row.get('id')}",
                )
            word = match.group(1).capitalize()
            phrase = Phrase(0, len(word), word)
            answers.append(Answer(turn, "", word + message["content"][match.end() :], [phrase], "yes_no"))
            flipped[turn] = Negative(phrase, "No" if word == "Yes" else "Yes", "yes_no")
        if notes is not None:
            notes["questions"] += len(answers)
        yield tagged_row(row, "-pos", answers, {}, {})
        yield tagged_row(row, "-neg0", answers, flipped, {})


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
        negatives = {} if denied is None else {1: Negative(denied, denied.text, FOUND)}
        answer = {"role": "assistant", "answer_type": GENERAL, "content": text}
        row = {
            "id": sample["id"],
            "messages": [{"role": "user", "content": sample["prompt"]}, answer],
            "images": list(sample.get("images") or []),
        }
        row = tagged_row(row, "", [Answer(1, sample["prompt"], text, phrases)], negatives)
        if supervise != "all":
            row["messages"][1]["supervise"] = supervise
        key = hash((sample["prompt"], row["messages"][1]["content"], *map(str, row["images"])))
        if key in seen:
            notes["duplicate"] += 1
            continue
        seen.add(key)
        notes["wrong" if negatives else "right"] += 1
        yield row


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


def plain_rows(rows: Iterable[dict], seen: set[str], notes: Counter | None = None) -> Iterator[dict]:
    """Rows to be tagged, each with an id of its own: that of a row whose id came before gets `~2`, `~3`, …

    Args:
        seen: ids of rows before these; the ones of these are added.

    Raises RowError: an answer has tags already.
    """
    for row in rows:
        for turn, message in enumerate(row["messages"]):
            tag = next((t for t in VERIFICATION_TOKENS if t in message["content"]), None)
            if message["role"] == "assistant" and tag:
                reason = f"message {turn + 1} has the tag {tag} already. Tag plain answers."
                raise RowError(TAGS, reason, row.get("source", ""))
        yield {**row, "id": own_id(row["id"], seen, notes)}


def own_id(name: str, seen: set[str], notes: Counter | None = None) -> str:
    """The id, or, where it came before, the id and `~2`, `~3`, …"""
    names = (name if number == 1 else f"{name}~{number}" for number in count(1))
    free = next(name for name in names if name not in seen)
    seen.add(free)
    if notes is not None and free != name:
        notes[REPEATED] += 1
    return free


def answers_of(row: dict, phrases: Mapping[int, Sequence[Phrase]]) -> list[Answer]:
    """The answers of a row."""
    answers, question = [], ""
    for turn, message in enumerate(row["messages"]):
        if message["role"] == "user":
            question = message["content"].replace(IMAGE, "").strip()
        elif message["role"] == "assistant":
            text = message["content"]
            answers.append(Answer(turn, question, text, phrases.get(turn, ()), answer_type(question, text)))
    return answers


@dataclass
class Plan:
    """A row to be built: what is known of it before its negatives are drawn.

    Attributes:
        present: nouns known to be in its images, beside those named in answers.
        denied: turn -> number of its first phrase that a checker denied.
        proposals: a teacher's negatives by (turn, number of the negative).
    """

    row: dict
    answers: list[Answer]
    present: set[str]
    denied: dict[int, int]
    proposals: dict[tuple[int, int], Negative | None] = field(default_factory=dict)


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

    def rows(self, plan: Plan) -> Iterator[dict]:
        """`{id}-pos`, then `{id}-neg0`, … Each negative row has a wrong phrase in every answer that allows one.

        Of a plan with denied phrases there is one row, `{id}-found`, whose answers are cut at these phrases.
        """
        row, answers = plan.row, plan.answers
        self.counts.answers.update(answer.kind for answer in answers)
        if plan.denied:
            phrases = {a.turn: a.phrases[plan.denied[a.turn]] for a in answers if a.turn in plan.denied}
            negatives = {turn: Negative(phrase, phrase.text, FOUND) for turn, phrase in phrases.items()}
            self._count(answers, [negatives])
            yield tagged_row(row, f"-{FOUND}", answers, negatives)
            return
        named = self.corpus.named.get(image_key(row), set()) | plan.present
        draws: list[dict[int, Negative]] = []
        for number in range(self.negatives):
            drawn = {a.turn: self._choose(plan, a, named, number) for a in answers}
            draws.append({turn: negative for turn, negative in drawn.items() if negative is not None})
        self.counts.rows["positive"] += 1
        for answer in answers:
            has_phrases = bool(answer.phrases)
            self.counts.phrases["confident"] += len(answer.phrases)
            self.counts.notes["answers without a phrase"] += not has_phrases
            self.counts.notes["answers without a negative"] += has_phrases and answer.turn not in draws[0]
        self._count(answers, draws)
        yield from positive_and_negatives(row, answers, draws)

    def _count(self, answers: Sequence[Answer], draws: Sequence[Mapping[int, Negative]]) -> None:
        for negatives in draws:
            if negatives:
                self.counts.rows["negative"] += 1
                self.counts.phrases["unconfident"] += len(negatives)
                kinds = ((a.kind, negatives[a.turn].kind) for a in answers if a.turn in negatives)
                self.counts.negatives.update(kinds)

    def _choose(self, plan: Plan, answer: Answer, named: set[str], number: int) -> Negative | None:
        """The teacher's proposal, else the first candidate of a kind drawn by chance, that has no fault."""
        proposal = plan.proposals.get((answer.turn, number))
        if proposal is not None and self._good(proposal, answer, named):
            return proposal
        rng = random.Random(f"{self.seed}/{plan.row['id']}/{answer.turn}/{number}")
        by_kind: dict[str, list[Negative]] = {}
        for phrase in answer.phrases:
            for negative in by_rule(
                phrase, answer.question, answer.kind, lambda options: self.corpus.choose(options, rng)
            ):
                # "behind the desert" gives itself away where nobody says so of a desert
                if negative.kind != "relation" or (negative.place, phrase.head) in self.corpus.placed:
                    by_kind.setdefault(negative.kind, []).append(negative)
        if answer.kind not in ("yes_no", "choice") and any(phrase.noun for phrase in answer.phrases):
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
            for negative in candidates:
                if self._good(negative, answer, named):
                    return negative
        return None

    def _other_nouns(self, answer: Answer, named: set[str], rng: random.Random) -> Iterator[Negative]:
        company = {phrase.head for phrase in answer.phrases if phrase.head}
        phrases = [phrase for phrase in answer.phrases if phrase.noun]
        rng.shuffle(phrases)
        for phrase in phrases:
            for _ in range(TRIES):
                negative = self.corpus.draw(phrase, company, named, rng)
                if negative is None:
                    break
                yield negative

    def _good(self, negative: Negative, answer: Answer, named: set[str]) -> bool:
        others = [phrase.text for phrase in answer.phrases if phrase is not negative.phrase]
        reason = fault(negative, named, others, words(answer.text))
        if reason is not None:
            self.counts.faults[negative.kind, reason] += 1
        return reason is None
