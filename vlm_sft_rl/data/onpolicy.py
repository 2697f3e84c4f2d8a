"""On-policy tagged rows: the model's own captions, each phrase graded against the ground truth and tagged.

REVERSE trains on synthetic negatives only. Phrases that the model itself would have said are harder and
closer to what it meets at test time. Generation is the caller's business: this takes samples and gives rows.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from .marks import GENERAL_ANSWER
from .phrases import ADJECTIVES, find_phrases
from .tags import format_span, strip_tags, tag_ranges

Grade = Callable[[str, Any], bool]


def on_policy_rows(
    samples: Iterable[dict],
    grade: Grade,
    nouns: Collection[str],
    adjectives: Collection[str] = ADJECTIVES,
    supervise: str = "all",
    notes: Counter | None = None,
) -> Iterator[dict]:
    """Tag own answers up to and including the first wrong phrase, or wholly when none is wrong.

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
        answer = strip_tags(sample["answer"]).strip()
        phrases = find_phrases(answer, nouns, adjectives)
        if not phrases:
            notes["no phrase"] += 1
            continue
        reference = sample.get("reference")
        wrong = next((k for k, p in enumerate(phrases) if not grade(p.text, reference)), None)
        right = [(p.start, p.end, True) for p in phrases[:wrong]]
        message = {"role": "assistant", "answer_type": GENERAL_ANSWER}
        if wrong is None:
            message["content"] = tag_ranges(answer, right)
        else:
            bad = phrases[wrong]
            message["content"] = tag_ranges(answer[: bad.start], right) + format_span(bad.text, False)
            message["hint"] = bad.text
        if supervise != "all":
            message["supervise"] = supervise
        images = list(sample.get("images") or [])
        key = hash((sample["prompt"], message["content"], *map(str, images)))
        if key in seen:
            notes["duplicate"] += 1
            continue
        seen.add(key)
        notes["right" if wrong is None else "wrong"] += 1
        messages = [{"role": "user", "content": sample["prompt"]}, message]
        yield {"id": str(sample["id"]), "messages": messages, "images": images}


def object_grader(nouns: Collection[str], adjectives: Collection[str] = ADJECTIVES) -> Grade:
    """A grader for references with `"objects": [noun, ...]`: right means that the noun is among them."""

    def grade(phrase: str, reference: Mapping) -> bool:
        present = set(reference["objects"])
        found = find_phrases(phrase, nouns, adjectives)
        return bool(found) and all(part.noun in present for part in found)

    return grade
