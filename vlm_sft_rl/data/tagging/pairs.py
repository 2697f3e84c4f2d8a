"""Preference pairs from answers of a model: what was rejected and what was accepted behind the same text.

A rewind of retrospective decoding is such a pair without anybody's label: the same picture, the same text before, a phrase
that the verifier doubted and the one that it let stand. With ground truth the same builder makes the published relatives:
pairs of sentences behind one context, the loser the first wrong one of its answer (SENTINEL, arXiv 2507.12455), and pairs
of whole answers by CHAIR (CHAIR-DPO, arXiv 2508.20181). Rows are those of `rows.preference_row`.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import Any

from ...errors import FORMAT, RowError, UserError
from ...io import read_jsonl, row_progress, rows_file
from ...runs import NO_ANSWER, answer_files
from ...shapes import COUNT, SHARE, require
from ..rows import DOUBT, ERROR, REPEAT, SIDES
from ..tags import CONFIDENT, OPEN, UNCONFIDENT, TagError, normalized, spans, strip_tags
from .config import PairConfig
from .phrases import find_phrases
from .verdicts import Scene, nouns_of, read_objects, read_vocabulary, scene_of

LINE = {
    "id": str,
    "images": list,
    "prompt": str,
    "answer": str,
    "tagged_answer": str,
    "ok": bool,
    "trace": [dict],
}
REJECT = {"reason": str, "text": str, "p_unconfident": (SHARE, None)}
ACCEPT = {"text": str, "p_unconfident": SHARE, "tokens": COUNT}
VERIFIED = {"spans": [{"p_unconfident": SHARE}]}
REWIND = {"to": COUNT, "removed": str}
CURE = "Lines are those of `vlm-sft-rl decode --traces` or of `samples.jsonl`."
_SENTENCE_END = re.compile(r"[.!?…]+(?=\s|$)|[。！？\n]")
_FIRST_PHRASE = re.compile(rf".*?(?:{CONFIDENT}|{UNCONFIDENT}|$)", re.DOTALL)
# counts of what was left out
NOT_VERIFIED, NO_TRACE = "answers that are not fully verified", "answers without a trace"
EMPTY = "answers that ended without text"
CUT = "verified answers that the length limit cut off"
CUT_SENTENCE = "answers whose last sentence has no end, and is not compared"
TAKEN_BACK = "rejections whose place was taken back later"
UNTAGGED = "answers without a phrase, in which nothing was verified"
ODD_TAGS = "answers whose tags do not pair up, and are no finished ones"
MALFORMED = "rejections of malformed text"
MALFORMED_ANSWER = "answers whose tags enclose no phrase"
LATER = "phrases rejected behind the first one of their place"
OTHER_PLACES = "places behind the first one of their answer"
REPEATED = "repeats"
NO_SUCCESS = "places where the answer ended instead"
UNVERIFIED = "pairs that differ in words outside of any phrase"
SAME_THING = "pairs whose phrases say the same in more or fewer words"
UNJUDGED, NO_WINNER, NO_LOSER = (
    "places with nothing to judge",
    "places with nothing right",
    "places with nothing wrong",
)
ALONE = "questions with one answer"
NO_CONTEXT = "wrong sentences behind which no other answer is right"
NO_MENTION = "answers that mention nothing"
EQUAL = "questions whose answers are equally right"

Right = Callable[["Attempt"], bool | None]


@dataclass(frozen=True)
class Attempt:
    """A phrase that was tried at a place.

    Attributes:
        text: the answer as far as this phrase, tags included.
        p: P(</UN>) at its closing tag.
        reason: why it was rejected, "unconfident" or "repeat"; None: it was accepted.
    """

    text: str
    phrase: str
    p: float
    reason: str | None = None


@dataclass(frozen=True)
class Place:
    """A place of a finished answer at which something was rejected.

    Attributes:
        number: how many phrases of the answer stand before it.
        context: the answer before it, tags included.
        rejected: in the order of trial; the first is what the model said by itself.
        accepted: the phrase that stands there; None: the answer ends without another.
        rest: the answer behind `context`.
    """

    number: int
    context: str
    rejected: tuple[Attempt, ...]
    accepted: Attempt | None
    rest: str

    def lead(self, attempt: Attempt) -> str:
        """What an attempt writes before its phrase."""
        return attempt.text[len(self.context) :].partition(OPEN)[0]


def places_of(line: Mapping, where: str, counts: Counter) -> list[Place]:
    """The places of an answer at which phrases were rejected, from its trace.

    A rejection counts where the text before it is that of the finished answer; those whose place a rewind to a sentence took
    back are counted and left out.

    Raises RowError: the trace is not one of this answer.
    """
    accepted: list[Mapping] = []
    rejected: list[tuple[int, Mapping, str]] = []  # number of phrases before it, event, text taken back
    last: Mapping | None = None
    for event in line["trace"]:
        kind = event.get("kind")
        if kind == "accept":
            accepted.append(require(event, ACCEPT, where, CURE))
        elif kind == "reject":
            last = require(event, REJECT, where, CURE)
        elif kind == "local_rewind" and last is not None:
            rejected.append((len(accepted), last, require(event, REWIND, where, CURE)["removed"]))
            last = None
        elif kind in ("sentence_rewind", "false_premise"):
            to = 0 if kind == "false_premise" else require(event, REWIND, where, CURE)["to"]
            accepted = [phrase for phrase in accepted if phrase["tokens"] <= to]
            kept = [entry for entry in rejected if entry[0] < len(accepted)]
            counts[TAKEN_BACK] += len(rejected) - len(kept) + (last is not None)
            rejected, last = kept, None
    answer = line["tagged_answer"]
    try:
        stands = spans(answer)
    except TagError:  # an empty phrase that was accepted
        counts[MALFORMED_ANSWER] += 1
        return []
    if [span.phrase for span in stands] != [phrase["text"] for phrase in accepted]:
        raise RowError(
            FORMAT, f"the phrases that `trace` accepted are not those of `tagged_answer`. {CURE}", where
        )
    tries: dict[int, list[Attempt]] = {}
    contexts = ["", *(answer[: span.end] for span in stands)]
    for number, event, removed in rejected:
        if event["reason"] not in ("unconfident", "repeat") or event["p_unconfident"] is None:
            counts[MALFORMED] += 1
            continue
        # with `rules: released` more may stand behind the phrase
        text = contexts[number] + _FIRST_PHRASE.match(removed)[0]
        attempt = Attempt(text, event["text"], event["p_unconfident"], event["reason"])
        tries.setdefault(number, []).append(attempt)
    ends: list[Attempt | None] = [
        Attempt(answer[: span.end], span.phrase, phrase["p_unconfident"])
        for span, phrase in zip(stands, accepted, strict=True)
    ]
    ends.append(None)
    return [
        Place(n, contexts[n], tuple(those), ends[n], answer[len(contexts[n]) :])
        for n, those in sorted(tries.items())
    ]


def words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


def same_thing(one: str, other: str) -> bool:
    """Whether all words of one phrase are in the other: a pair of them would teach detail or vagueness, not truth."""
    one_words, other_words = set(normalized(one).split()), set(normalized(other).split())
    return one_words <= other_words or other_words <= one_words


@dataclass(frozen=True)
class Choice:
    """What is preferred behind one text. `winner` None: the answer's end without a phrase."""

    winner: Attempt | None
    loser: Attempt
    weight: float
    kind: str


def choices(place: Place, right: Right, config: PairConfig, counts: Counter) -> list[Choice]:
    """What loses at a place, and what is preferred to it; what makes no pair is counted.

    Args:
        right: the verdict on an attempt; None: it cannot be judged.
    """
    if place.accepted is None and not config.ends:
        counts[NO_SUCCESS] += 1
        return []
    rejected = [a for a in place.rejected if config.repeats or a.reason != "repeat"]
    counts[REPEATED] += len(place.rejected) - len(rejected)
    attempts = [*rejected, *([place.accepted] if place.accepted else [])]
    verdicts = {id(a): False if a.reason == "repeat" else right(a) for a in attempts}
    wrong: dict[str, Attempt] = {}
    for attempt in attempts:
        if verdicts[id(attempt)] is False:
            wrong.setdefault(normalized(attempt.phrase), attempt)
    losers = list(wrong.values())
    if not losers:
        counts[NO_LOSER if True in verdicts.values() else UNJUDGED] += bool(attempts)
        return []
    winner = place.accepted
    if winner is not None and not verdicts[id(winner)]:
        winner = next((a for a in rejected if verdicts[id(a)]), None)
        if winner is None:
            counts[NO_WINNER] += 1
            return []
    if config.tries == "first":
        counts[LATER] += len(losers) - 1
        losers = losers[:1]
    different = [a for a in losers if winner is None or not same_thing(winner.phrase, a.phrase)]
    counts[SAME_THING] += len(losers) - len(different)
    # nobody has verified what stands outside of phrases: to prefer it would teach to leave the tags out
    lead = words(place.rest if winner is None else place.lead(winner))
    fair = [a for a in different if lead == (() if winner is None else words(place.lead(a)))]
    counts[UNVERIFIED] += len(different) - len(fair)
    return [_choice(winner, loser, config) for loser in fair]


def _choice(winner: Attempt | None, loser: Attempt, config: PairConfig) -> Choice:
    if loser.reason == "repeat":
        return Choice(winner, loser, 1.0, REPEAT)
    if config.judge == "truth":
        return Choice(winner, loser, 1.0, ERROR)
    weight = loser.p - (winner.p if winner else 0.0) if config.weights == "difference" else 1.0
    return Choice(winner, loser, weight, DOUBT)


def phrase_pairs(
    line: Mapping, where: str, right: Right, config: PairConfig, counts: Counter
) -> Iterator[dict]:
    """The pairs of one answer with its trace, in the order of its places."""
    if not line["ok"]:
        counts[NOT_VERIFIED] += 1
        return
    if not line["trace"]:
        counts[NO_TRACE] += 1
        return
    if _cut(line):  # counted with the finished answers
        return
    if not _text(line).strip():
        counts[EMPTY] += 1
        return
    places = places_of(line, where, counts)
    for number, place in enumerate(places):
        pairs = choices(place, right, config, counts)
        for index, choice in enumerate(pairs):
            chosen = chosen_text(line["tagged_answer"], choice.winner, config.chosen)
            rejected = _closed(choice.loser.text, choice.loser.reason == "repeat")
            name = f"{line['id']}/{place.number}" + (f".{index}" if index else "")
            unfinished = SIDES if chosen.rstrip() != line["tagged_answer"].rstrip() else ("rejected",)
            yield pair_row(line, name, chosen, rejected, choice.kind, choice.weight, unfinished)
        if pairs and config.places == "first":
            counts[OTHER_PLACES] += len(places) - number - 1
            return


def chosen_text(answer: str, winner: Attempt | None, extent: str) -> str:
    """The chosen side: the answer, or the winner's text to the end of its phrase or sentence."""
    if winner is None or (winner.reason is None and extent == "answer"):
        return answer
    if winner.reason is not None or extent == "phrase":  # nothing stands behind a rejected phrase
        return _closed(winner.text, True)
    start = len(winner.text)
    for match in _SENTENCE_END.finditer(answer, start):
        between = answer[start : match.end()]
        if between.count(OPEN) == between.count(CONFIDENT):  # no mark inside of a phrase
            return answer[: match.end()]
    return answer


def _closed(text: str, confident: bool) -> str:
    """The text with the closing tag at its end that the verdict asks for."""
    text = text.rstrip()
    tag = next((tag for tag in (CONFIDENT, UNCONFIDENT) if text.endswith(tag)), None)
    return text if tag is None else text.removesuffix(tag) + (CONFIDENT if confident else UNCONFIDENT)


# --- Several answers to one question, by ground truth ---


@dataclass(frozen=True)
class Judge:
    """Ground truth: which of the nouns that a text mentions are in the picture."""

    nouns: Sequence[str]

    def mentions(self, text: str) -> list[str]:
        return [phrase.head for phrase in find_phrases(strip_tags(text), self.nouns)]

    def right(self, text: str, scene: Scene) -> bool | None:
        """None: nothing is mentioned."""
        share = self.wrong_share(text, scene)
        return None if share is None else share == 0

    def wrong_share(self, text: str, scene: Scene) -> float | None:
        """CHAIR-i of one text."""
        heads = self.mentions(text)
        return sum(head not in scene.objects for head in heads) / len(heads) if heads else None


def sentences(text: str) -> list[str]:
    """The sentences of an answer; joined they are the answer."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    edges = [0, *ends, *([len(text)] if not ends or text[ends[-1] :].strip() else [])]
    return [text[a:b] for a, b in pairwise(edges)]


@dataclass(frozen=True)
class Question:
    """A question with all its answers; of their lines nothing else is held.

    Attributes:
        answers: id, text and ground truth of each.
    """

    images: list[str]
    prompt: str
    answers: list[tuple[str, str, Scene]] = field(default_factory=list)

    def add(self, name: str, text: str, scene: Scene) -> None:
        if any(name == other for other, *_ in self.answers):  # of another seed
            name = f"{name}#{len(self.answers)}"
        same = self.answers and self.answers[-1][2] == scene  # held once
        self.answers.append((name, text, self.answers[-1][2] if same else scene))

    def pair(
        self, name: str, chosen: str, rejected: str, weight: float, unfinished: Sequence[str] = ()
    ) -> dict:
        line = {"images": self.images, "prompt": self.prompt}
        return pair_row(line, name, chosen, rejected, ERROR, weight, unfinished)


def sentence_pairs(question: Question, judge: Judge, counts: Counter) -> Iterator[dict]:
    """For each answer with a wrong sentence: the first one, against a right one that another answer has behind the same
    text (SENTINEL, arXiv 2507.12455)."""
    answers = [(name, scene, sentences(text)) for name, text, scene in question.answers]
    for _, _, parts in answers:
        if not _ends(parts[-1]):
            counts[CUT_SENTENCE] += 1
            parts.pop()
    for name, scene, parts in answers:
        first = next((k for k, part in enumerate(parts) if judge.right(part, scene) is False), None)
        if first is None:
            counts[NO_LOSER] += 1
            continue
        context = "".join(parts[:first])
        others = (
            o for _, _, o in answers if len(o) > first and "".join(o[:first]).split() == context.split()
        )
        winner = next((o[first] for o in others if judge.right(o[first], scene)), None)
        if winner is None:
            counts[NO_CONTEXT] += 1
            continue
        # as the authors train: a sentence that the answer goes on behind says nothing about where to end
        yield question.pair(f"{name}/{first}", context + winner, context + parts[first], 1.0, SIDES)


def answer_pairs(question: Question, judge: Judge, config: PairConfig, counts: Counter) -> Iterator[dict]:
    """The answer with the lowest share of wrong mentions against the one with the highest (CHAIR-DPO, arXiv 2508.20181).

    No preference falls on the end of one that may have been cut off, see `_ends`.
    """
    judged = [(judge.wrong_share(text, scene), name, text) for name, text, scene in question.answers]
    counts[NO_MENTION] += sum(share is None for share, *_ in judged)
    judged = [entry for entry in judged if entry[0] is not None]
    if len(judged) < 2:
        counts[ALONE] += 1
        return
    share = itemgetter(0)
    (best, name, winner), (worst, _, loser) = min(judged, key=share), max(judged, key=share)
    if best == worst:
        counts[EQUAL] += 1
        return
    weight = worst - best if config.weights == "difference" else 1.0
    cut = [side for side, text in zip(SIDES, (winner, loser), strict=True) if not _ends(text)]
    yield question.pair(name, winner, loser, weight, cut)


def _text(line: Mapping) -> str:
    return line["tagged_answer"] or line["answer"]


def _cut(line: Mapping) -> bool:
    """Whether the length limit ended the answer, as far as its trace tells."""
    return any(event.get("kind") == "finish" and event.get("reason") == "length" for event in line["trace"])


def _unverified(line: Mapping) -> str | None:
    """Why no phrase of this answer, or not all of it, was verified."""
    try:
        phrases = spans(line["tagged_answer"])
    except TagError:
        return ODD_TAGS
    if not phrases:
        return UNTAGGED
    return None if len(phrases) == len(line["spans"]) else ODD_TAGS


def _ends(text: str) -> bool:
    """Whether a text ends as a sentence does. Plain decoders do not say whether the length limit cut it off."""
    return bool(_SENTENCE_END.search(text.rstrip("\"')”’» \n")[-1:]))


def pair_row(
    line: Mapping, name: str, chosen: str, rejected: str, kind: str, weight: float, unfinished: Sequence[str]
) -> dict:
    """A preference row. `unfinished`: the sides that stop before their answer does."""
    return {
        "id": name,
        "images": list(line["images"]),
        "prompt": [{"role": "user", "content": line["prompt"]}],
        "chosen": [_side(chosen, "chosen" in unfinished)],
        "rejected": [_side(rejected, "rejected" in unfinished)],
        "pair_kind": kind,
        "pair_weight": round(weight, 6),
    }


def _side(text: str, unfinished: bool) -> dict:
    message = {"role": "assistant", "content": text.strip()}
    # no preference on the end of what is no end
    return message | {"supervise": "text"} if unfinished else message


def finished_row(line: Mapping) -> dict:
    """A verified answer as an SFT row. All its verdicts are `</CN>` and would teach not to doubt: P(`</UN>`) is taught as it
    was."""
    doubts = [phrase["p_unconfident"] for phrase in line["spans"]]
    answer = {"role": "assistant", "content": _text(line).strip(), "doubts": doubts}
    messages = [{"role": "user", "content": line["prompt"]}, answer]
    return {"id": str(line["id"]), "images": list(line["images"]), "messages": messages}


# --- Files ---


class NoPairs(UserError):
    """Answers that make no pair."""


def write_pairs(
    traces: str | Path,
    target: str | Path | None,
    config: PairConfig,
    finished: str | Path | None = None,
    *,
    progress: bool = False,
) -> dict[str, int]:
    """Answers of `decode` or `eval` -> preference rows.

    With `level: phrase` one line is held at a time; by ground truth without `vocabulary` and `objects` the files are read
    twice, first for the nouns. The other levels hold the texts of all answers.

    Args:
        traces: a JSONL file or a folder, see `runs.answer_files`. `level: phrase` needs the `--traces` of `decode`; the
            other levels take several answers to a question, told apart by nothing but their text.
        target: JSONL of pairs, replaced when all went well. None: no pairs are made.
        finished: also write the fully verified answers there, as SFT rows: what plain training on them is weighed by.
        progress: show on standard error how many answers were read.

    Returns:
        Counts: "answers", "pairs", "pairs: KIND", "finished answers", and what was left out and why.

    Raises UserError: a file is missing or named twice, answers are not finished, a line is not of this kind or has no
        ground truth, there is no pair (NoPairs).
    """
    files = answer_files(traces)
    named = Counter(Path(path).resolve() for path in (*files, target, finished) if path is not None)
    if twice := [path for path, times in named.items() if times > 1]:
        raise UserError(
            f"{twice[0]}: named twice, to be read or written. Choose another file for one of them."
        )
    counts: Counter = Counter({NO_ANSWER: 0, "answers": 0})
    with (
        nullcontext() if target is None else rows_file(target) as write,
        nullcontext() if finished is None else rows_file(finished) as keep,
        row_progress(progress, "answers") as advance,
    ):

        def lines() -> Iterator[tuple[str, dict]]:
            for where, line in _answers(files, counts):
                advance()
                counts["answers"] += 1
                counts[CUT] += (cut := line["ok"] and _cut(line))
                if keep is not None and line["ok"] and not cut and _text(line).strip():
                    if (fault := _unverified(require(line, VERIFIED, where, CURE))) is None:
                        keep(finished_row(line))
                    counts[fault or "finished answers"] += 1
                yield where, line

        if write is None:
            deque(lines(), maxlen=0)  # all of them are read
            pairs = iter(())
        else:
            pairs = _pairs(files, lines(), config, counts)
        for row in pairs:
            if row["chosen"][0]["content"].split() == row["rejected"][0]["content"].split():
                counts[SAME_THING] += 1
                continue
            write(row)
            counts["pairs"] += 1
            counts[f"pairs: {row['pair_kind']}"] += 1
        if write is not None and not counts["pairs"]:
            told = ", ".join(f"{count} {what}" for what, count in counts.items() if count) or "no answers"
            raise NoPairs(f"{traces}: there is no pair in it ({told}). {_cure(counts, config)}")
    counts["finished answers"] = counts.pop("finished answers", 0)  # told last
    return {name: count for name, count in counts.items() if count}


def _cure(counts: Counter, config: PairConfig) -> str:
    """What to do where there is no pair."""
    if not counts["answers"] or counts[NO_TRACE]:
        return "Give what `vlm-sft-rl decode --traces` wrote."
    if counts[NOT_VERIFIED] == counts["answers"]:
        return "Let decoding doubt less (a higher `threshold`)."
    if config.judge == "verifier":
        return "Nothing was taken back that teaches: let decoding doubt more (a lower `threshold`)."
    return "Give more answers to each question, or the nouns that they may name (`vocabulary`)."


def _pairs(
    files: Sequence[Path], lines: Iterable[tuple[str, dict]], config: PairConfig, counts: Counter
) -> Iterator[dict]:
    if config.judge == "verifier":
        for where, line in lines:
            yield from phrase_pairs(line, where, lambda a: a.reason is None, config, counts)
        return
    truth = None if config.objects is None else read_objects(config.objects)
    scene_in = _scene_reader(config, truth)
    if config.level == "phrase":
        if config.vocabulary is None and truth is None and not all(map(Path.is_file, files)):
            raise UserError(f"{files[0]}: a pipe, which cannot be read twice. Give a file, or --vocabulary.")
        scenes = (scene_in(line, where) for where, line in _answers(files, Counter()))
        judge = Judge(read_vocabulary(config.vocabulary, truth.values() if truth else scenes))
        for where, line in lines:
            scene = scene_in(line, where)
            right = lambda a, scene=scene: judge.right(a.phrase, scene)  # noqa: E731
            yield from phrase_pairs(line, where, right, config, counts)
        return
    questions: dict[tuple, Question] = {}
    for where, line in lines:
        key = (*map(str, line["images"]), line["prompt"])
        question = questions.setdefault(key, Question(line["images"], line["prompt"]))
        question.add(line["id"], _text(line), scene_in(line, where))
    answered = (scene for q in questions.values() for *_, scene in q.answers)
    judge = Judge(read_vocabulary(config.vocabulary, truth.values() if truth else answered))
    for question in questions.values():
        if len({text for _, text, _ in question.answers}) < 2:
            counts[ALONE] += 1
        elif config.level == "sentence":
            yield from sentence_pairs(question, judge, counts)
        else:
            yield from answer_pairs(question, judge, config, counts)


def _scene_reader(config: PairConfig, truth: Mapping[str, Scene] | None) -> Callable[[Mapping, str], Scene]:
    """Gives the ground truth of a line; raises RowError: it has none."""

    def scene_in(line: Mapping, where: str) -> Scene:
        if truth is not None:
            return scene_of(line["images"], truth, config.objects, where)
        reference: Any = line.get("reference")
        if not isinstance(reference, dict) or reference.get("objects") is None:
            message = "no `reference.objects`, so nothing can be judged. Give --objects FILE."
            raise RowError(FORMAT, message, where)
        return Scene(nouns_of(reference["objects"], where))

    return scene_in


def _answers(files: Sequence[Path], counts: Counter) -> Iterator[tuple[str, dict]]:
    """`(file:line, answer)` of every line that has one."""
    for path in files:
        for number, line in read_jsonl(path):
            if "error" in line:
                counts[NO_ANSWER] += 1
                continue
            where = f"{path}:{number}"
            yield where, require(line, LINE, where, CURE)
