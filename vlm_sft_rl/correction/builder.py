"""`vlm-sft-rl data correct`: correction rows from question files, with a model's own attempts and a teacher; resumable.

Attempts and the teacher's answers are sample stores (`OUT/attempts`, `OUT/teacher`), resumed by id, so that a killed run
asks only for what is missing; rows and rejects are then written anew from them.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from rich.console import Console

from ..data.conclusions import conclusion, without_thinking
from ..data.messages import IMAGE
from ..data.rows import question_text, read_raw, read_rows
from ..data.stages import final_block
from ..errors import UserError
from ..evaluation.decoders import EngineOptions
from ..graders import Grader, load_grader
from ..graders.grade import grade_staged
from ..io import write_json, write_jsonl
from ..locks import sole_use
from ..runs import digest, model_digest
from ..self_training.pool import read_questions
from ..self_training.sampling import CheckpointSampler, EndpointSampler, run_sampling, task
from .attempts import (
    Attempt,
    choose_attempts,
    fault_of,
    refine_prompt,
    refine_rows,
    repair_prompt,
    repair_rows,
)
from .config import GOLD, OWN, BuildConfig


def read_source(
    path: str | Path, image_root: str | Path | None, grader: Grader | None, counts: Counter | None = None
) -> list[dict]:
    """Questions with `answer`, and with `staged` where the file has staged answers.

    Conversations give one question for every pair of turns (the released pipeline takes the first pair alone); the
    conclusion of a staged answer is the question's `answer`. Pairs without a conclusion are left out and counted.

    Raises UserError: as `read_questions`, or no staged answer in a file of conversations.
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
            answer = conclusion(assistant["content"]).text
            if not answer or final_block(assistant["content"], "CONCLUSION") is None:
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

    Raises UserError: bad questions, a folder of another configuration, a teacher that does not answer, too few attempts.
    """
    started = time.monotonic()
    output, counts = Path(output_dir), Counter()
    root = image_root or Path(questions_file).parent
    # refined answers keep their conclusion, which needs no grader
    grader = load_grader(config.grader) if config.mode == "repair" else None
    questions = read_source(questions_file, root, grader, counts)
    counts["questions"] = len(questions)
    with sole_use(output):
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
                prompts[question["id"]] = refine_prompt(question_text(question), answer)
        if config.teacher == GOLD:
            answers = {key: [_staged_answer(self.by_id[key], config.gold_field)] for key in prompts}
        else:
            answers = self._ask_teacher({key: (self.by_id[key], text) for key, text in prompts.items()})
        refined = []
        for key in prompts:
            question, answer = self.by_id[key], _staged_answer(self.by_id[key])
            kept = conclusion(answer).text
            faults = [(text, fault_of(text, None, {}, equals=kept)) for text in answers[key]]
            text = self._first_valid(key, faults)
            if text is not None:
                refined.append((question, answer, text))
        return refine_rows(refined, config.prompt, config.ask)

    def _draw_attempts(self) -> list[Attempt]:
        config = self.config
        tasks = [task(q, config.ask.replace("{question}", question_text(q))) for q in self.questions]
        settings = _sampling(config, config.temperature, config.top_p)
        sampler = CheckpointSampler(
            config.model, self.image_root, EngineOptions(batch_size=config.batch_size)
        )
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
                prompt = refine_prompt(question_text(question), a.text)
            else:
                prompt = repair_prompt(question_text(question), a.text, question["answer"])
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
            from ..teacher import EndpointClient

            with EndpointClient(
                config.teacher,
                config.teacher_model,
                ledger=self.output / "teacher-ledger.jsonl",
                **config.client_options(),
            ) as client:
                sampler = EndpointSampler(client, self.image_root)
                name = f"{config.teacher} {config.teacher_model}"
                lines = self._sample("teacher", sampler, name, tasks, settings, config.tries)
                self.teacher_cost.update({k: v for k, v in client.spent().to_json().items() if v})
        else:
            sampler = CheckpointSampler(
                config.teacher, self.image_root, EngineOptions(batch_size=config.batch_size)
            )
            lines = self._sample("teacher", sampler, config.teacher, tasks, settings, config.tries)
            _count(self.teacher_cost, lines)
        answers: dict[str, list[str]] = {key: [] for key in prompts}
        for line in lines:
            if "error" not in line:
                answers[line["question_id"]].append(without_thinking(line["answer"]))
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
