"""What a reply says about how far its answer was verified. Pure functions of an `Answer`; no torch."""

from ..data.tags import phrase_ranges
from ..decoding.answers import Answer


def verification(answer: Answer) -> dict:
    """The reply's `verification`.

    Returns:
        `{"ok", "verdict", "threshold", "phrases"}`; each phrase is `{"text", "start", "end", "p_unconfident", "accepted",
        "attempts"}` with character offsets in `answer.text`. `ok` and `verdict` are None where the decoder verifies nothing:
        `accepted` is then the model's own closing tag.
    """
    ranges = phrase_ranges(answer.tagged_text)
    # a canned answer has no phrases of its own, and what an attempt limit cut off has no verdict
    phrases = [
        {
            "text": answer.text[start:end],
            "start": start,
            "end": end,
            "p_unconfident": span.p_unconfident,
            "accepted": span.accepted,
            "attempts": attempts,
        }
        for (start, end), span, attempts in zip(ranges, answer.spans, attempts_of(answer), strict=False)
    ]
    checked = answer.threshold is not None
    return {
        "ok": answer.ok if checked else None,
        "verdict": answer.verdict,
        "threshold": answer.threshold,
        "phrases": phrases,
    }


def attempts_of(answer: Answer) -> list[int]:
    """How often each phrase of an answer was drawn: 1 where its first draw stands.

    Counted are the draws at its place since the phrase before it was accepted, those of a place that a sentence rewind took
    back included.
    """
    counts: list[tuple[int, int]] = []  # (length of the answer behind the phrase, draws)
    draws = 0
    for event in answer.trace:
        kind = event["kind"]
        if kind == "reject":
            draws += 1
        elif kind in ("accept", "flag"):
            counts.append((event["tokens"], draws + 1))
            draws = 0
        elif kind == "sentence_rewind":
            draws += sum(count for length, count in counts if length > event["to"])
            counts = [(length, count) for length, count in counts if length <= event["to"]]
        elif kind == "false_premise":
            counts, draws = [], 0
    attempts = [count for _, count in counts]
    missing = len(answer.spans) - len(attempts)
    # the best effort ends with a phrase that was rejected; plain decoding notes no draws
    return attempts[: len(answer.spans)] + [draws or 1] * max(0, missing)
