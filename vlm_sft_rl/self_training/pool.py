"""The pool: every graded sample of every round, by question, oldest first."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data.images import locate
from ..data.messages import IMAGE
from ..data.rows import question_row, read_raw
from ..errors import FORMAT, RowError, UserError, short
from ..graders import RIGHT, UNREADABLE, Grader


@dataclass(frozen=True)
class Candidate:
    """One graded sample.

    Attributes:
        question: id of its question.
        round: the round whose model wrote it; index: its number among that round's samples of the question.
        text: the output.
        answer: the answer as written, key: its normal form (see `Grade`); status: right, wrong or unreadable.
    """

    question: str
    round: int
    index: int
    text: str
    answer: str | None
    key: str | None
    status: str

    @property
    def right(self) -> bool:
        return self.status == RIGHT

    def to_json(self) -> dict:
        return asdict(self)


Pool = dict[str, list[Candidate]]


def grade_samples(
    samples: Iterable[dict], questions: Sequence[dict], grader: Grader, *, round_: int
) -> list[Candidate]:
    """Grade samples (`question_id`, `index`, `answer`) of one round.

    Raises UserError: a sample of an unknown question, or a grader that fails; question and output are named.
    """
    by_id = {question["id"]: question for question in questions}
    graded = []
    for sample in samples:
        question = by_id.get(sample["question_id"])
        if question is None:
            raise UserError(
                f"sample {sample['id']!r}: its question {sample['question_id']!r} is not in the question file. Was "
                "the file changed since? Use a new output_dir."
            )
        text = sample["answer"]
        try:
            grade = grader(text, question)
        except UserError:
            raise
        except Exception as error:  # a grader is user code
            raise UserError(
                f"the grader failed on sample {sample['id']!r} ({type(error).__name__}: {error}); output: "
                f"{short(text, 200)}. The samples are kept: correct the grader and give the same command again."
            ) from error
        graded.append(
            Candidate(question["id"], round_, sample["index"], text, grade.answer, grade.key, grade.status)
        )
    return graded


def build_pool(
    candidates: Iterable[Candidate], *, deduplicate: bool = False, min_chars: int = 0
) -> tuple[Pool, Counter]:
    """Candidates by question, oldest first, and what was left out.

    Args:
        deduplicate: of candidates with the same text keep the newest.
        min_chars: leave out shorter texts and those that begin with the answer: they hold no rationale (50 in the
            released Qwen2-VL code, 0 in the main one).
    """
    pool: Pool = {}
    counts: Counter = Counter()
    for candidate in sorted(candidates, key=lambda c: (c.round, c.index)):
        text = candidate.text.strip()
        if not text:
            counts["empty"] += 1
        elif IMAGE in text:
            counts["image placeholder"] += 1
        elif min_chars and (len(text) <= min_chars or text.startswith("Answer")):
            counts["no rationale"] += 1
        else:
            pool.setdefault(candidate.question, []).append(candidate)
    if deduplicate:
        for identity, group in pool.items():
            newest = {candidate.text.strip(): candidate for candidate in group}  # the last one stays
            kept = [c for c in group if newest[c.text.strip()] is c]
            counts["duplicate"] += len(group) - len(kept)
            pool[identity] = kept
    return pool, counts


def pool_figures(candidates: Sequence[Candidate], questions: int) -> dict[str, float | int]:
    """How good a round's samples are: shares of right, wrong and unreadable ones, and of questions solved at least once,
    always and never."""
    by_question: dict[str, list[bool]] = {}
    status: Counter = Counter()
    for candidate in candidates:
        status[candidate.status] += 1
        by_question.setdefault(candidate.question, []).append(candidate.right)
    total = max(1, len(candidates))
    solved = [any(rights) for rights in by_question.values()]
    return {
        "samples": len(candidates),
        "right": round(status[RIGHT] / total, 4),
        "unreadable": round(status[UNREADABLE] / total, 4),
        "questions": questions,
        "questions_solved": round(sum(solved) / max(1, questions), 4),
        "questions_all_right": round(sum(map(all, by_question.values())) / max(1, questions), 4),
        "questions_mixed": round(
            sum(any(rights) and not all(rights) for rights in by_question.values()) / max(1, questions), 4
        ),
    }


def read_questions(
    path: str | Path,
    image_root: str | Path | None,
    grader: Grader | None = None,
    *,
    fields: Sequence[str] = ("answer",),
    read: Callable[[dict, str], dict] = question_row,
) -> list[dict]:
    """All questions (`id`, `images`, `question`, `answer`, `choices`?, `unit`?, …) of a file, checked as a whole.

    Args:
        image_root: folder that image paths start from.
        grader: asked once for every question, so that unusable gold answers are found now.
        fields: what every row must have, of `answer` and `rationale`.
        read: `(raw row, file:number) -> row`.

    Raises UserError: a field is missing or of the wrong type, an id comes twice, an image is missing, or the file is empty.
    """
    questions, seen = [], {}
    for number, raw in read_raw(path):
        where = f"{path}:{number}"
        row = read(raw, where)
        if missing := [name for name in fields if name not in row]:
            raise RowError(
                FORMAT, f"no field `{missing[0]}`, which is needed to learn from the question.", where
            )
        if row["id"] in seen:
            raise UserError(f"{where}: the id {row['id']!r} is already that of row {seen[row['id']]}.")
        seen[row["id"]] = number
        try:
            for name in row["images"]:
                locate(name, image_root)
        except RowError as error:
            raise error.at(where) from error
        if grader is not None:
            try:
                grader("", row)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error
            except Exception as error:  # a grader is user code
                raise UserError(
                    f"{where}: the grader failed on an empty output ({type(error).__name__}: {error}). Correct the row "
                    "or the grader."
                ) from error
        questions.append(row)
    if not questions:
        raise UserError(f"{path}: there is no question in it.")
    return questions


def check_apart(train: Sequence[dict], test: Sequence[dict], where: str) -> None:
    """Raises UserError when a test question is also a training question (same images and text)."""
    known = {(tuple(q["images"]), q["question"]) for q in train}
    both = [q["id"] for q in test if (tuple(q["images"]), q["question"]) in known]
    if both:
        raise UserError(
            f"{where}: {len(both)} test questions are training questions too, the first is {both[0]!r}. Remove them from "
            "one of the files."
        )
