"""Synthetic tagged rows: captions and yes/no answers with ground truth -> rows with verification tags.

After REVERSE (arXiv 2504.13169, section 3.1 and appendix B): every noun phrase of a true answer is
confident; a negative swaps one phrase for something absent, keeps the text before it, and stops right after
`</UN>`.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..errors import FORMAT, RowError
from .marks import GENERAL_ANSWER
from .phrases import ADJECTIVES, Phrase, find_phrases, replace_noun
from .tags import format_span, tag_ranges

YES_NO = "yes_no"


@dataclass(frozen=True)
class Scene:
    """Ground truth of an image: the nouns that are in it, and its theme (background), if it has one."""

    objects: Collection[str]
    theme: str | None = None


Prior = Callable[[Scene], Mapping[str, float]] | Mapping[str | None, Mapping[str, float]]


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
    that background and that company: were absent nouns drawn uniformly, "unusual here" would predict `</UN>`
    and the model would learn not to look. Without a prior they are uniform.

    Every row carries the wrong phrase as `hint` (the phrase to avoid) and `answer_type` "general_answer".
    The draw depends on `(seed, row id)` alone.

    Args:
        rows: rows whose assistant messages are captions without tags. One that names something absent is left
            out: `onpolicy.on_policy_rows` takes captions that may be wrong.
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
        found = {
            i: find_phrases(m["content"], nouns, adjectives)
            for i, m in enumerate(row["messages"])
            if m["role"] == "assistant"
        }
        places = [(i, k) for i, phrases in found.items() for k in range(len(phrases))]
        if not places:
            notes["no phrase"] += 1
            continue
        if any(p.noun not in scene.objects for phrases in found.values() for p in phrases):
            notes["untrue caption"] += 1
            continue
        draws = []
        for n in range(max(1, negatives)):
            rng = random.Random(f"{seed}/{row['id']}/{n}")
            i, k = rng.choice(places)
            noun = draw_absent(scene, nouns, prior, rng)
            if noun is not None:
                phrase = found[i][k]
                draw = (i, k, replace_noun(phrase.text, phrase.noun, noun))
                if draw in draws:
                    notes["duplicate negative"] += 1
                else:
                    draws.append(draw)
        if not draws:
            notes["no absent noun"] += 1
        tagged = {i: _tag_all(row["messages"][i]["content"], phrases) for i, phrases in found.items()}
        # where a negative goes wrong, the positive is told what to avoid
        hints = {i: wrong for i, _, wrong in draws[:1]}
        yield _with_answers(row, "pos", tagged, hints)
        for n, (i, k, wrong) in enumerate(draws[:negatives]):
            cut = _tag_until(row["messages"][i]["content"], found[i], k, wrong)
            yield _with_answers(row, f"neg{n}", {**tagged, i: cut}, {i: wrong})


def draw_absent(scene: Scene, nouns: Collection[str], prior: Prior | None, rng: random.Random) -> str | None:
    """A noun that the image lacks, drawn from the prior; None where every weight is zero."""
    if prior is None:
        weights: Mapping[str, float] = dict.fromkeys(nouns, 1.0)
    elif callable(prior):
        weights = prior(scene)
    else:
        weights = prior[scene.theme]
    present = set(scene.objects)
    absent = sorted(noun for noun, weight in weights.items() if weight > 0 and noun not in present)
    return rng.choices(absent, [weights[noun] for noun in absent])[0] if absent else None


def yes_no_rows(rows: Iterable[dict], notes: Counter | None = None) -> Iterator[dict]:
    """For each yes/no question row with a true answer: `<SPAN> Yes </CN>` and the flipped `<SPAN> No </UN>`.

    What follows the word ("Yes, there is.") stays in the positive and is cut in the negative.

    Raises:
        RowError: an answer begins with neither yes nor no.
    """
    for row in rows:
        true, flipped = {}, {}
        for i, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            found = re.match(r"\s*(yes|no)\b", message["content"], re.IGNORECASE)
            if not found:
                raise RowError(
                    FORMAT,
                    f"expected an answer that begins with yes or no, found {message['content']!r:.80}.",
                    row.get("source") or f"row {row.get('id')}",
                )
            word = found.group(1)
            other = "No" if word.lower() == "yes" else "Yes"
            rest = message["content"][found.end() :]
            true[i] = format_span(word.capitalize(), True) + rest
            flipped[i] = format_span(other, False)
        if notes is not None:
            notes["questions"] += len(true)
        yield _with_answers(row, "pos", true, {}, YES_NO)
        yield _with_answers(row, "neg0", flipped, {}, YES_NO)


def _tag_all(text: str, phrases: list[Phrase]) -> str:
    return tag_ranges(text, [(p.start, p.end, True) for p in phrases])


def _tag_until(text: str, phrases: list[Phrase], k: int, wrong: str) -> str:
    before = text[: phrases[k].start]
    return _tag_all(before, phrases[:k]) + format_span(wrong, False)


def _with_answers(
    row: dict, suffix: str, answers: dict[int, str], hints: dict[int, str], kind: str = GENERAL_ANSWER
) -> dict:
    messages = [dict(message) for message in row["messages"]]
    for i, text in answers.items():
        messages[i] = {**messages[i], "content": text, "answer_type": kind}
        if i in hints:
            messages[i]["hint"] = hints[i]
    return {**row, "id": f"{row['id']}-{suffix}", "messages": messages}
