"""`vlm-sft-rl data correct`: correction rows from question files, with a model's own attempts and a teacher; resumable.

Attempts and the teacher's answers are sample stores (`OUT/attempts`, `OUT/teacher`), resumed by id, so that a killed run
asks only for what is missing; rows and rejects are then written anew from them.
"""

import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from ..data.corrections import CHECK_PROMPT, Draft, correction_row
from ..data.rows import IMAGE, read_raw, read_rows
from ..data.stages import STAGES, conclusion, problems
from ..errors import UserError
from ..graders import Grader, load_grader
from ..graders.grade import grade_staged
from ..io import write_json, write_jsonl
from ..runs import digest, model_digest
from ..self_training.pool import read_questions
from ..self_training.sampling import EndpointSampler, HFSampler, run_sampling, task

FORM = " ".join(f"<{stage}> … </{stage}>" for stage in STAGES)
MEANING = (
    "SUMMARY: how you will go about it. CAPTION: what in the image matters for the question. REASONING: the steps. "
    "CONCLUSION: the final answer alone, for a choice its option."
)


@dataclass(frozen=True)
class Attempt:
    """One answer of the model to a question: its text and grade status (`right`, `wrong`, `unreadable`)."""

    question: str
    index: int
    text: str
    status: str

    @property
    def right(self) -> bool:
        return self.status == "right"

    @property
    def place(self) -> tuple[str, int]:
        return self.question, self.index


def refine_prompt(question: str, attempt: str) -> str:
    """What a teacher is asked in refine mode."""
    return (
        f"Question: {question}\n\nAn answer to it, whose conclusion is right:\n{attempt}\n\nExamine this answer against the "
        "image. Write it anew and better: a sharper plan, a more exact and complete description of what matters in the "
        f"image, and above all sounder steps. Keep the conclusion. {_demand()}"
    )


def repair_prompt(question: str, attempt: str, answer: str) -> str:
    """What a teacher is asked in repair mode; it knows the true answer and must get there from the image."""
    return (
        f"Question: {question}\n\nAn answer to it, which is wrong:\n{attempt}\n\nThe right answer is: {answer}\n\nFind "
        "where the answer above leaves the image or the rules of sound reasoning, and write it anew from there, so that it "
        f"comes to the right answer by itself. Do not mention that you were told. {_demand()}"
    )


def _demand() -> str:
    return f"Reply with these four sections and nothing else: {FORM}\n{MEANING}"


def fault_of(text: str, grader: Grader | None, question: Mapping, *, equals: str | None = None) -> str | None:
    """Why a teacher's answer cannot be used, in a word or two; None when it can.

    Args:
        grader: its grade of the conclusion must be right (None: not asked).
        equals: the conclusion must be this one, but for case, blanks and a closing full stop.
    """
    if not text.strip():
        return "empty"
    if problems(text):
        return "not staged"
    if equals is not None and _plain(conclusion(text) or "") != _plain(equals):
        return "another conclusion"
    if grader is not None:
        status = grade_staged(grader, text, dict(question)).status
        if status != "right":
            return f"conclusion {status}"
    return None


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .")


def choose_attempts(
    attempts: Sequence[Attempt],
    *,
    wrong_share: float,
    per_question: int = 2,
    limit: int | None = None,
    seed: int = 0,
) -> list[Attempt]:
    """The attempts to learn from: as many as can be had with this share of wrong ones, in a seeded order.

    Args:
        wrong_share: wrong ones of all, in [0, 1]. Answers without a readable conclusion count as wrong.
        per_question: the most of each sort (right, wrong) from one question; equal texts count once.
        limit: at most this many in all.

    Raises:
        UserError: a share outside of [0, 1], or one sort is needed and there is none.
    """
    if not 0 <= wrong_share <= 1:
        raise UserError(f"`wrong_share` must lie in [0, 1], found {wrong_share!r}.")
    pools: dict[bool, list[Attempt]] = {True: [], False: []}
    taken: Counter = Counter()
    seen: set[tuple[str, str]] = set()
    for attempt in sorted(attempts, key=lambda a: (a.question, a.index)):
        key, sort = (attempt.question, attempt.text.strip()), (attempt.question, attempt.right)
        if key in seen:
            continue
        seen.add(key)
        if taken[sort] >= per_question:
            continue
        taken[sort] += 1
        pools[attempt.right].append(attempt)
    rng = random.Random(f"{seed}-attempts")
    for right in (False, True):
        rng.shuffle(pools[right])
    shares = {False: wrong_share, True: 1 - wrong_share}
    for right, share in shares.items():
        if share > 0 and not pools[right]:
            name = "right" if right else "wrong"
            raise UserError(
                f"There is no {name} attempt among {len(attempts)}, but `wrong_share: {wrong_share:g}` needs some. Draw "
                "more samples, change the temperature, or change the share."
            )
    total = min(len(pools[right]) / share for right, share in shares.items() if share > 0)
    total = total if limit is None else min(total, limit)
    # a hair more, because 0.7 * 10 / 0.7 is a little less than 10
    chosen = [a for right, share in shares.items() for a in pools[right][: int(total * share + 1e-6)]]
    rng.shuffle(chosen)
    return chosen


def repair_rows(
    chosen: Sequence[Attempt],
    questions: Mapping[str, dict],
    corrections: Mapping[tuple[str, int], str],
    prompt: str = CHECK_PROMPT,
    ask: str = "{question}",
    keep: str = "repeat",
) -> list[dict]:
    """Rows of chosen attempts: a wrong one is followed by its correction, a right one by itself.

    Args:
        keep: `teacher`: a right one is followed by its correction too.
        corrections: (question id, attempt index) -> valid correction; wrong attempts without one are left out.
        ask: how the first question is put.
    """
    rows = []
    for attempt in chosen:
        question = questions[attempt.question]
        target = attempt.text if attempt.right and keep == "repeat" else corrections.get(attempt.place)
        if target is not None:
            drafts = [Draft(attempt.text.strip(), attempt.right), Draft(target.strip(), True)]
            rows.append(_row(question, attempt.index, drafts, prompt, ask))
    return rows


def refine_rows(
    answers: Sequence[tuple[dict, str, str]], prompt: str = CHECK_PROMPT, ask: str = "{question}"
) -> list[dict]:
    """Rows of (question, right staged answer, refined answer)."""
    return [
        _row(question, 0, [Draft(first.strip(), True), Draft(second.strip(), True)], prompt, ask)
        for question, first, second in answers
    ]


def _row(question: dict, index: int, drafts: list[Draft], prompt: str, ask: str) -> dict:
    text = ask.replace("{question}", question["question"])
    return correction_row(f"{question['id']}/{index}", question["images"], text, drafts, prompt)


def read_source(
    path: str | Path, image_root: str | Path | None, grader: Grader | None, counts: Counter | None = None
) -> list[dict]:
    """Questions with `answer`, and with `staged` where the file has staged answers.

    Conversations give one question for every pair of turns (the released pipeline takes the first pair alone); the
    conclusion of a staged answer is the question's `answer`. Pairs without a conclusion are left out and counted.

    Raises:
        UserError: as `read_questions`, or no staged answer in a file of conversations.
    """
    _, first = next(read_raw(path), (0, {}))
    if not ("conversations" in first or "messages" in first):
        return read_questions(path, image_root, grader)
    counts = Counter() if counts is None else counts
    questions = []
    for number, row in enumerate(read_rows(path), 1):
        pairs = [
            p for p in pairwise(row["messages"]) if (p[0]["role"], p[1]["role"]) == ("user", "assistant")
        ]
        for k, (user, assistant) in enumerate(pairs):
            answer = conclusion(assistant["content"])
            if answer is None:
                counts["pairs without a conclusion"] += 1
                continue
            text = user["content"].replace(IMAGE, "").strip()
            questions.append(
                {
                    # ids of the published set have slashes; the row's number names it as well
                    "id": f"{number}-{k}",
                    "source_id": row["id"],
                    "images": row["images"],
                    "question": text,
                    "answer": answer,
                    "staged": assistant["content"].strip(),
                }
            )
    if not questions:
        raise UserError(
            f"{path}: no answer in it has a <CONCLUSION>. Give LLaVA-CoT rows, or a question file."
        )
    return questions


MODES = ("repair", "refine")
KEEPS = ("repeat", "teacher")
GOLD, OWN = "gold", "own"  # teachers that are asked nothing


@dataclass(frozen=True)
class BuildConfig:
    """Settings of the builder.

    Attributes:
        mode: `repair` or `refine`.
        teacher: `gold` (the question's own `staged` answer), `own` (repair: a right attempt of the model at the same
            question), or a model folder, or the address of an OpenAI-compatible endpoint.
        gold_field: the field of a question that the teacher `gold` answers with.
        keep: repair: what follows a right attempt: the same text again (`repeat`), or an answer of the teacher with the same
            conclusion (`teacher`), so that every attempt is looked at anew.
        teacher_model: the endpoint's name of the model.
        model: repair: whose attempts are corrected.
        grader: repair: judges conclusions, by name.
        samples, temperature, top_p, max_new_tokens: of the attempts.
        wrong_share, per_question, limit: see `choose_attempts`.
        tries, teacher_temperature: the teacher's samples to a prompt; the first valid one is taken.
        prompt: what the user asks before a correction. ask: how a question is put to the model.
        input_price, output_price, budget: of the endpoint, per million tokens.
    """

    mode: str = "repair"
    teacher: str = GOLD
    gold_field: str = "staged"
    keep: str = "repeat"
    teacher_model: str | None = None
    model: str | None = None
    grader: str = "choice"
    samples: int = 4
    temperature: float = 0.8
    top_p: float | None = 0.95
    max_new_tokens: int = 512
    wrong_share: float = 0.5
    per_question: int = 1
    limit: int | None = None
    tries: int = 2
    teacher_temperature: float = 0.7
    prompt: str = CHECK_PROMPT
    ask: str = "{question}"
    input_price: float = 0.0
    output_price: float = 0.0
    budget: float | None = None
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self):
        """Raises UserError: settings that do not exist or do not go together."""
        if self.mode not in MODES:
            raise UserError(f"--mode is {self.mode!r}, expected one of {', '.join(MODES)}.")
        if self.keep not in KEEPS:
            raise UserError(f"--keep is {self.keep!r}, expected one of {', '.join(KEEPS)}.")
        if self.mode == "repair" and not self.model:
            raise UserError("--mode repair corrects a model's own attempts: name it with --model.")
        if self.mode == "refine" and self.teacher == OWN:
            raise UserError(
                "--teacher own gives right attempts, which --mode refine has already. Choose another."
            )
        if self.is_endpoint and not self.teacher_model:
            raise UserError(
                "--teacher is an endpoint: say which of its models answers, with --teacher-model."
            )
        if "{question}" not in self.ask:
            raise UserError(f"--ask must contain {{question}}, found {self.ask!r}.")

    @property
    def is_endpoint(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))


def build_corrections(
    questions_file: str | Path,
    output_dir: str | Path,
    config: BuildConfig,
    *,
    image_root: str | Path | None = None,
    console: Console | None = None,
) -> dict:
    """Write `rows.jsonl`, `rejects.jsonl` and `summary.json`; returns the summary. Run again to go on.

    Questions are `{"id", "images", "question", "answer"}` rows. Refine mode needs a staged answer in the field `staged`.

    Raises:
        UserError: bad questions, a folder of another configuration, a teacher that does not answer, too few attempts.
    """
    started = time.monotonic()
    output, counts = Path(output_dir), Counter()
    root = image_root or Path(questions_file).parent
    # refined answers keep their conclusion, which needs no grader
    grader = load_grader(config.grader) if config.mode == "repair" else None
    questions = read_source(questions_file, root, grader, counts)
    counts["questions"] = len(questions)
    builder = _Builder(config, questions, grader, output, root, console or Console())
    rows = builder.repair(counts) if config.mode == "repair" else builder.refine()
    reasons = dict(Counter(reject["reason"] for reject in builder.rejects))
    if not rows:
        raise UserError(
            f"No row could be built: {reasons}. Look at {output}/teacher, then change the teacher or its prompts."
        )
    counts["rows"] = len(rows)
    counts["rows repairing"] = sum(m.get("weight") == 0 for row in rows for m in row["messages"])
    summary = {
        "mode": config.mode,
        "counts": dict(sorted(counts.items())),
        "rejected": reasons,
        "cost": {"attempts": dict(builder.attempts_cost), "teacher": dict(builder.teacher_cost)},
        "config": asdict(config),
        "seconds": round(time.monotonic() - started, 1),
    }
    write_jsonl(output / "rows.jsonl", rows)
    write_jsonl(output / "rejects.jsonl", builder.rejects)
    write_json(output / "summary.json", summary)
    return summary


class _Builder:
    """One building of rows: asks the model and the teacher, checks what they answer, and keeps account.

    Attributes:
        rejects: `{"id", "reason"}` of attempts without a usable correction.
        attempts_cost, teacher_cost: what was asked in this and earlier runs into the same folder; money only where an
            endpoint counts it.
    """

    def __init__(
        self,
        config: BuildConfig,
        questions: list[dict],
        grader: Grader | None,
        output: Path,
        image_root: str | Path,
        console: Console,
    ):
        self.config, self.questions, self.grader = config, questions, grader
        self.output, self.image_root, self.console = output, image_root, console
        self.by_id = {question["id"]: question for question in questions}
        self.rejects: list[dict] = []
        self.attempts_cost: Counter = Counter()
        self.teacher_cost: Counter = Counter()

    def repair(self, counts: Counter) -> list[dict]:
        """Rows from the model's own attempts; `counts` is told how many of them were right."""
        config = self.config
        attempts = self._draw_attempts()
        counts.update(f"attempts {attempt.status}" for attempt in attempts)
        chosen = choose_attempts(
            attempts,
            wrong_share=config.wrong_share,
            per_question=config.per_question,
            limit=config.limit,
            seed=config.seed,
        )
        to_correct = [attempt for attempt in chosen if not attempt.right or config.keep == "teacher"]
        candidates = self._candidates(to_correct, attempts)
        corrections = {}
        for attempt in to_correct:
            question = self.by_id[attempt.question]
            faults = [(text, fault_of(text, self.grader, question)) for text in candidates[attempt.place]]
            text = self._first_valid(f"{attempt.question}/{attempt.index}", faults)
            if text is not None:
                corrections[attempt.place] = text
        return repair_rows(chosen, self.by_id, corrections, config.prompt, config.ask, keep=config.keep)

    def refine(self) -> list[dict]:
        """Rows from staged answers that are right, each followed by a better one with the same conclusion."""
        config, prompts = self.config, {}
        for question in self.questions[: config.limit]:
            answer = _staged_answer(question)
            if fault := fault_of(answer, None, {}):
                self.rejects.append({"id": question["id"], "reason": f"own answer: {fault}"})
            else:
                prompts[question["id"]] = refine_prompt(question["question"], answer)
        if config.teacher == GOLD:
            answers = {key: [_staged_answer(self.by_id[key], config.gold_field)] for key in prompts}
        else:
            answers = self._ask_teacher({key: (self.by_id[key], text) for key, text in prompts.items()})
        refined = []
        for key in prompts:
            question, answer = self.by_id[key], _staged_answer(self.by_id[key])
            kept = conclusion(answer)
            faults = [(text, fault_of(text, None, {}, equals=kept)) for text in answers[key]]
            text = self._first_valid(key, faults)
            if text is not None:
                refined.append((question, answer, text))
        return refine_rows(refined, config.prompt, config.ask)

    def _draw_attempts(self) -> list[Attempt]:
        config = self.config
        tasks = [task(q, config.ask.replace("{question}", q["question"])) for q in self.questions]
        settings = _sampling(config, config.temperature, config.top_p)
        sampler = HFSampler(config.model, self.image_root, batch_size=config.batch_size)
        lines = self._sample("attempts", sampler, config.model, tasks, settings, config.samples)
        _count(self.attempts_cost, lines)
        attempts = []
        for line in lines:
            question = self.by_id[line["question_id"]]
            status = grade_staged(self.grader, line["answer"], question).status
            attempts.append(Attempt(line["question_id"], line["index"], line["answer"], status))
        return attempts

    def _candidates(
        self, to_correct: Sequence[Attempt], attempts: Sequence[Attempt]
    ) -> dict[tuple[str, int], list[str]]:
        """The teacher's answers to each attempt."""
        config = self.config
        if config.teacher == GOLD:
            return {a.place: [_staged_answer(self.by_id[a.question], config.gold_field)] for a in to_correct}
        if config.teacher == OWN:
            right: dict[str, list[str]] = {}
            for attempt in attempts:
                if attempt.right:
                    right.setdefault(attempt.question, []).append(attempt.text)
            return {a.place: right.get(a.question, []) for a in to_correct}
        prompts = {}
        for a in to_correct:
            question = self.by_id[a.question]
            if a.right:
                prompt = refine_prompt(question["question"], a.text)
            else:
                prompt = repair_prompt(question["question"], a.text, question["answer"])
            prompts[f"{a.question}-{a.index}"] = (question, prompt)
        answers = self._ask_teacher(prompts)
        return {a.place: answers[f"{a.question}-{a.index}"] for a in to_correct}

    def _ask_teacher(self, prompts: dict[str, tuple[dict, str]]) -> dict[str, list[str]]:
        """The teacher's answers to prompts, each with its question, by the same keys."""
        config = self.config
        tasks = [
            {"id": key, "images": list(question["images"]), "prompt": prompt}
            for key, (question, prompt) in prompts.items()
        ]
        settings = _sampling(config, config.teacher_temperature, None)
        if config.is_endpoint:
            from ..endpoint import EndpointClient

            with EndpointClient(
                config.teacher,
                config.teacher_model,
                ledger=self.output / "teacher-ledger.jsonl",
                input_price=config.input_price,
                output_price=config.output_price,
                budget=config.budget,
            ) as client:
                sampler = EndpointSampler(client, self.image_root)
                name = f"{config.teacher} {config.teacher_model}"
                lines = self._sample("teacher", sampler, name, tasks, settings, config.tries)
                self.teacher_cost.update({k: v for k, v in client.usage.to_json().items() if v})
        else:
            sampler = HFSampler(config.teacher, self.image_root, batch_size=config.batch_size)
            lines = self._sample("teacher", sampler, config.teacher, tasks, settings, config.tries)
            _count(self.teacher_cost, lines)
        answers: dict[str, list[str]] = {key: [] for key in prompts}
        for line in lines:
            answers[line["question_id"]].append(line["answer"])
        return answers

    def _sample(
        self, name: str, sampler, model: str, tasks: list[dict], settings: dict, n: int
    ) -> list[dict]:
        """`n` answers to each task, kept in the folder `name`, which belongs to this model, these tasks and settings."""
        manifest = {
            "model": model_digest(model) if Path(model).is_dir() else model,
            "sampling": {**settings, "stop": []},
            "seed": self.config.seed,
            "tasks": digest(tasks),
        }
        return run_sampling(
            self.output / name,
            tasks,
            n,
            manifest,
            sampler,
            sampling=settings,
            seed=self.config.seed,
            label=name,
            console=self.console,
        )

    def _first_valid(self, key: str, faults: Sequence[tuple[str, str | None]]) -> str | None:
        """The first text without a fault; without one, `key` is rejected for the last one's fault."""
        for text, fault in faults:
            if fault is None:
                return text
        self.rejects.append({"id": key, "reason": faults[-1][1] if faults else "no answer"})
        return None


def _staged_answer(question: dict, field: str = "staged") -> str:
    text = question.get(field)
    if not isinstance(text, str) or not text.strip():
        raise UserError(
            f"question {question['id']!r}: no staged answer in the field `{field}`. Give a file of staged "
            "conversations (LLaVA-CoT-100k), or name a teacher."
        )
    return text


def _sampling(config: BuildConfig, temperature: float, top_p: float | None) -> dict:
    return {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": None,
        "max_new_tokens": config.max_new_tokens,
        "stop": (),
    }


def _count(cost: Counter, lines: Sequence[dict]) -> None:
    cost["answers"] += len(lines)
    cost["completion_tokens"] += sum(line.get("tokens", 0) for line in lines)
    cost["prompt_tokens"] += sum(line.get("prompt_tokens", 0) for line in lines if line.get("index") == 0)
