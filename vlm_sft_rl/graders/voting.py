"""The majority vote over answers that a grader has read."""

from collections import Counter
from collections.abc import Sequence


def majority_index(keys: Sequence[str | None]) -> int | None:
    """Index of the first answer with the most frequent key; a tie goes to the key that came first.

    Args:
        keys: normal forms of the answers (`Grade.key`); None is an unreadable one, which has no vote.

    Returns:
        None where no answer is readable.
    """
    votes = Counter(key for key in keys if key is not None)
    # max takes the first of equals, and a Counter keeps the order in which keys came
    return list(keys).index(max(votes, key=votes.__getitem__)) if votes else None
