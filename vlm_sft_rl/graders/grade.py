"""The verdict of a grader."""

from dataclasses import asdict, dataclass

RIGHT, WRONG, FORMAT = "right", "wrong", "format"


@dataclass(frozen=True)
class Grade:
    """What an output answered.

    Attributes:
        answer: the answer as it was written; None when none could be read.
        key: the same for answers that mean the same; what a majority vote counts. None when `answer` is.
        status: `right`, `wrong`, or `format` (no answer could be read, which is not the same as a wrong one).
    """

    answer: str | None
    key: str | None
    status: str

    @property
    def correct(self) -> bool:
        return self.status == RIGHT

    def to_json(self) -> dict:
        return asdict(self)


UNREADABLE = Grade(None, None, FORMAT)


def verdict(answer: str, key: str, correct: bool) -> Grade:
    return Grade(answer, key, RIGHT if correct else WRONG)
