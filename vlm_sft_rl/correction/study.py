"""The questions that LLaVA-SCo's authors left open, each as a command with a report.

(a) more tasks, (b) where correction makes answers worse, (c) where the correction stands and how many turns, (d) what kind
of error it is, (e) what a point costs beside other ways to gain it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from ..data.images import open_image
from ..data.rows import question_text
from ..decoding.config import CorrectionConfig
from ..errors import UserError
from ..evaluation import plots, report
from ..evaluation.results import SAMPLE, read_manifest, read_run
from ..evaluation.specs import EvalOptions
from ..evaluation.turns import RIGHT, TurnGrades, by_turn, drafts, grade_turns, turn_summary
from ..graders import load_grader
from ..io import write_json
from ..runs import (
    BATCHES_PER_CALL,
    answer_all,
    claim,
    digest,
    model_digest,
    versions,
)
from ..self_training.pool import read_questions
from ..workers import Engine
from .config import StudyConfig
from .cost import System, cost_table
from .error_types import GIVEN, TYPES, error_figures, swap_stages
from .report import answer_view, group_table, percent, turns_table


# When to stop correcting: always K turns, when the answer repeats itself, or when an oracle says it is right.
def always(grade: TurnGrades, turns: int) -> int:
    """The turn whose answer stands after `turns` corrections."""
    return grade.at(turns)


def self_stopped(grade: TurnGrades, turns: int) -> int:
    """Stops after the first correction that repeats the answer before it."""
    last = grade.at(turns)
    for turn in range(1, last + 1):
        if grade.keys[turn] is not None and grade.keys[turn] == grade.keys[turn - 1]:
            return turn
    return last


def oracle(grade: TurnGrades, turns: int) -> int:
    """Stops at the first right answer: the most that any stopping rule could reach."""
    last = grade.at(turns)
    return next((turn for turn in range(last + 1) if grade.statuses[turn] == RIGHT), last)


RULES = {"always": always, "self-stopped": self_stopped, "oracle": oracle}


def stopping_table(grades: Sequence[TurnGrades], most: int) -> list[dict]:
    """Accuracy and mean number of corrections for K = 0 … `most` under each rule."""
    n = max(1, len(grades))
    rows = []
    for turns in range(most + 1):
        for name, rule in RULES.items():
            stopped = [rule(grade, turns) for grade in grades]
            right = sum(g.statuses[t] == RIGHT for g, t in zip(grades, stopped, strict=True))
            rows.append(
                {"turns": turns, "rule": name, "accuracy": right / n, "corrections": sum(stopped) / n}
            )
    return rows


# a line of the answers of one model, as `_sample` writes it
DRAFTED = {key: SAMPLE[key] for key in ("id", "images", "prompt", "answer", "ok", "counts", "trace")} | {
    "reference": dict
}


# Answers with their correction turns on a set of questions: samples.jsonl in a folder, resumable; and their grades.
def measure_corrections(
    model: str | Path,
    questions: Sequence[dict],
    folder: str | Path,
    settings: dict,
    *,
    image_root: str | Path | None = None,
    batch_size: int = 16,
    device: str | None = None,
    console: Console | None = None,
) -> list[dict]:
    """Answer and correct; returns the samples in the order of `questions`. A folder never mixes two settings.

    Args:
        questions: rows with `id`, `images`, `question`; the whole row is kept as the sample's `reference`.
        settings: fields of `decoding.CorrectionConfig`.

    Raises UserError: `folder` belongs to another model, other questions or settings; the disk is full.
    """
    from ..decoding import generate_corrected
    from ..models.load import load_for_inference

    config = CorrectionConfig(**settings)

    def load() -> Engine:
        loaded = load_for_inference(model, device)[:2]

        def answer(opened: Sequence[dict]) -> Iterator[list[dict]]:
            part = [item["row"] for item in opened]
            answers = generate_corrected(
                *loaded,
                [item["pictures"] for item in opened],
                [question_text(q) for q in part],
                config,
                ids=[q["id"] for q in part],
                batch_size=batch_size,
            )
            yield [_sample(question, answer) for question, answer in zip(part, answers, strict=True)]

        return answer

    def open(question: dict) -> dict:
        pictures = [open_image(name, image_root) for name in question["images"]] or None
        return {"row": question, "pictures": pictures}

    manifest = {
        "model": model_digest(model),
        "decoding": asdict(config),
        "questions": digest(list(questions)),
    }
    run = claim(folder, manifest, DRAFTED)
    per_call = BATCHES_PER_CALL * batch_size
    return answer_all(run, questions, load, per_call=per_call, open=open, console=console).lines


def _sample(question: dict, answer) -> dict:
    return {
        "id": question["id"],
        "images": question["images"],
        "prompt": question_text(question),
        "answer": answer.text,
        "ok": answer.ok,
        "counts": asdict(answer.counts),
        "trace": answer.trace,
        "reference": {k: v for k, v in question.items() if k not in ("id", "images", "question")},
    }


def grades_of(samples: Iterable[dict], grader: str, *, staged: bool = True) -> dict[str, TurnGrades]:
    """The grades of every turn, by question id."""
    judge = load_grader(grader)
    grades = {}
    for sample in samples:
        question = {"id": sample["id"], "question": sample["prompt"], **sample["reference"]}
        grades[sample["id"]] = grade_turns(judge, drafts(sample), question, staged=staged)
    return grades


ROUNDS = 1000
COST_COLUMNS = (
    "system",
    "accuracy (%)",
    "gain (points)",
    "tokens per answer",
    "GFLOPs per answer",
    "training tokens",
    "training TFLOPs",
    "training seconds",
    "TFLOPs per point",
    "seconds per point",
)


def where_it_declines(runs: Sequence[str | Path], output_dir: str | Path, *, seed: int = 0) -> dict:
    """(a, b) Flips of finished `--decoder correct` runs by task, category and confidence; writes summary.json, report.html.

    Raises UserError: a run of another decoder, or of a metric that judges no whole answers alone.
    """
    tasks: dict[str, dict] = {}
    for folder in runs:
        run = read_run(folder)
        if (decoder := run.manifest["decoding"]["decoder"]) != "correct":
            raise UserError(f"{folder}: decoded by {decoder}; give runs of `--decoder correct`.")
        name = run.spec.name if run.spec.name not in tasks else f"{run.spec.name} ({folder})"
        tasks[name] = turn_summary(run.samples, run.metric, ROUNDS, seed)
    judged = {name: task for name, task in tasks.items() if "flips" in task}
    sections: list[report.Section] = [
        report.Table(
            "Every task: last turn against the first",
            ["task", "metric", "turn 1", "last turn", "difference"],
            [
                [
                    name,
                    metric,
                    report.interval_text(first["metrics"][metric]),
                    report.interval_text(last["metrics"][metric]),
                    report.interval_text(gap),
                ]
                for name, task in tasks.items()
                for first, last in [(task["turns"][0], task["turns"][-1])]
                for metric, gap in last["minus_turn_1"].items()
            ],
            note="Shares, not per cent. 95 % bootstrap intervals over questions; differences are paired.",
        )
    ]
    if judged:
        sections.append(turns_table("Answers that changed (%)", {n: t["flips"] for n, t in judged.items()}))
    for name, task in judged.items():
        if "by_category" in task:
            sections.append(group_table(f"{name}: by category (%)", task["by_category"]))
        groups = task["by_confidence"]
        sections.append(group_table(f"{name}: by confidence of the first answer (%)", groups))
        curve = {
            "net flips": [(k + 1, g["net_flips"]) for k, g in enumerate(groups.values())],
            "right to wrong": [(k + 1, g["right_to_wrong"]) for k, g in enumerate(groups.values())],
        }
        sections.append(
            report.Figure(
                f"{name}: flips by quarter of confidence",
                lambda dark, c=curve: plots.lines_with_intervals(
                    c, x="Quarter, least sure first", y="Questions (%)", dark=dark
                ),
            )
        )
    return _finish(
        output_dir, {"tasks": tasks, "seed": seed}, "Where correction helps and where it harms", sections
    )


def every_task(
    specs: Sequence[str],
    model: str | Path,
    data_dirs: Sequence[str | Path],
    output_dir: str | Path,
    *,
    settings: Mapping | None = None,
    options: EvalOptions | None = None,
) -> dict:
    """(a) Run each eval spec with corrections, then report as `where_it_declines`.

    Args:
        data_dirs: one folder for all specs, or one each.
        settings: fields of `decoding.CorrectionConfig`.

    Raises UserError: numbers of folders and specs that do not fit, or as `evaluate_spec`.
    """
    from ..evaluation.runner import evaluate_spec

    if len(data_dirs) not in (1, len(specs)):
        raise UserError(
            f"{len(specs)} specs but {len(data_dirs)} data folders: give one for all, or one each."
        )
    folders = list(data_dirs) * (len(specs) if len(data_dirs) == 1 else 1)
    runs = []
    for spec, folder in zip(specs, folders, strict=True):
        runs.append(Path(output_dir) / "eval" / Path(spec).stem)
        evaluate_spec(
            spec,
            model,
            output_dir=runs[-1],
            data_dir=folder,
            decoder="correct",
            settings=settings,
            options=options,
        )
    return where_it_declines(runs, output_dir, seed=options.seed if options else 0)


def error_types(
    model: str | Path,
    questions_file: str | Path,
    output_dir: str | Path,
    config: StudyConfig,
) -> dict:
    """(d) Which stage an error comes from, by giving the model the true stages one by one.

    Raises UserError: questions without staged answers.
    """
    from ..models.load import load_for_inference

    root = config.image_root or Path(questions_file).parent
    judge = load_grader(config.grader)
    questions = read_questions(questions_file, root, judge)[: config.limit]
    loaded = load_for_inference(model)[:2]
    images = [[open_image(name, root) for name in q["images"]] or None for q in questions]
    options = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}
    errors = swap_stages(*loaded, questions, judge, images=images, **options)
    figures = error_figures(errors, ROUNDS, config.seed)
    sections: list[report.Section] = [
        report.Table(
            "Kinds of error (% of all questions)",
            ["", "share"],
            [[t, percent(figures["types"][t])] for t in TYPES],
        ),
        report.Table(
            "Accuracy when the answer begins with true stages (%)",
            ["given up to", "accuracy"],
            [[g.lower(), percent(figures["given"][g])] for g in GIVEN],
            note="Greedy. The rest of the answer is the model's own.",
        ),
        *_error_examples(errors, questions, root),
    ]
    each = [{k: f[k] for k in ("id", "type", "statuses")} for f in errors]
    summary = {**figures, "model": str(model), "seed": config.seed, "questions": each}
    return _finish(output_dir, summary, "Where answers go wrong", sections)


def _error_examples(errors: Sequence[dict], questions: Sequence[dict], root) -> list[report.Section]:
    views = []
    for kind in TYPES[1:]:
        chosen = next((k for k, f in enumerate(errors) if f["type"] == kind), None)
        if chosen is not None:
            error, question = errors[chosen], questions[chosen]
            turn = {"number": 1, "text": error["texts"]["nothing"]}
            image = open_image(question["images"][0], root) if question["images"] else None
            note = f"{kind}. Right answer: {question['answer']}"
            views.append(
                report.Example(
                    image,
                    question_text(question),
                    [answer_view(turn, error["statuses"]["nothing"])],
                    note=note,
                )
            )
    return [report.Gallery("One of each kind", views, legend=False)] if views else []


def turns_and_stops(
    model: str | Path,
    questions_file: str | Path,
    output_dir: str | Path,
    config: StudyConfig,
    *,
    most: int = 3,
    settings: Mapping | None = None,
    console: Console | None = None,
) -> dict:
    """(c) One model with 0 to `most` corrections: accuracy by turn, and always against self-stopped against an oracle.

    Models that were trained with other layouts or positions are compared by one such run each.

    Args:
        settings: fields of `CorrectionConfig` besides the number of corrections and those of `config`.
    """
    root = config.image_root or Path(questions_file).parent
    questions = read_questions(questions_file, root, load_grader(config.grader))[: config.limit]
    common = {"corrections": most, "seed": config.seed, "max_new_tokens": config.max_new_tokens}
    decoding = asdict(CorrectionConfig(**common | dict(settings or {})))
    samples = measure_corrections(
        model,
        questions,
        Path(output_dir) / "samples",
        decoding,
        image_root=root,
        batch_size=config.batch_size,
        console=console,
    )
    grades = list(grades_of(samples, config.grader).values())
    turns, rules = by_turn(grades, ROUNDS, config.seed)["turns"], stopping_table(grades, most)
    curve = {"accuracy": [(t["turn"] - 1, t["after"]) for t in turns]}
    sections: list[report.Section] = [
        turns_table("By turn (%)", {Path(model).name: turns}),
        report.Figure(
            "Accuracy by number of corrections",
            lambda dark: plots.lines_with_intervals(curve, x="Corrections", y="Accuracy (%)", dark=dark),
        ),
        report.Table(
            "Stopping rules",
            ["corrections at most", *[f"{rule}: accuracy (corrections)" for rule in RULES]],
            [
                [
                    str(k),
                    *[
                        f"{100 * r['accuracy']:.1f} ({r['corrections']:.2f})"
                        for r in rules
                        if r["turns"] == k
                    ],
                ]
                for k in range(most + 1)
            ],
            note="The oracle stops at the first right answer; no rule can do better.",
        ),
    ]
    summary = {
        "turns": turns,
        "stops": rules,
        "model": str(model),
        "decoding": decoding,
        "n": len(grades),
        "seed": config.seed,
    }
    return _finish(output_dir, summary, "How many corrections, and when to stop", sections)


def cost_of_points(systems: Sequence[System], output_dir: str | Path, *, seed: int = 0) -> dict:
    """(e) What a point of accuracy costs: correction beside any other way (search, RL, more supervision) to gain it.

    Args:
        systems: finished evaluations of one benchmark, the baseline first.

    Raises UserError: fewer than two systems, or runs that cannot be compared.
    """
    if len(systems) < 2:
        raise UserError("Give at least two systems, the baseline first.")
    metric = read_run(systems[0].run).metric
    models = {s.name: Path(read_manifest(s.run)["model"]) for s in systems}
    rows = cost_table(systems, metric, models, ROUNDS, seed)
    table = report.Table(
        "Gain and cost",
        COST_COLUMNS,
        [
            [
                r["system"],
                percent(r["accuracy"]),
                percent(r["gain"]),
                f"{r['tokens_per_answer']:.0f}",
                f"{r['flops_per_answer'] / 1e9:.2f}",
                _number(r["training"]["tokens"]),
                _number(r["training"]["flops"], 1e12),
                f"{r['training']['seconds']:.0f}",
                *(
                    ["", ""]
                    if r["training_per_point"] is None
                    else [
                        _number(r["training_per_point"]["flops"], 1e12),
                        f"{r['training_per_point']['seconds']:.0f}",
                    ]
                ),
            ]
            for r in rows
        ],
        note="Gains are paired over questions. FLOPs: 2 a parameter and token forwarded, 6 a token trained on; training "
        "tokens count both, so RL's samples twice. Seconds are of the machine that trained. No entry per point where "
        "nothing was gained.",
    )  # fmt: skip
    systems_json = [{**asdict(s), "run": str(s.run), "trained": [str(t) for t in s.trained]} for s in systems]
    return _finish(
        output_dir, {"rows": rows, "systems": systems_json, "seed": seed}, "What a point costs", [table]
    )


def _number(value: float | None, unit: float = 1) -> str:
    return "not counted" if value is None else f"{value / unit:.3g}"


def _finish(output_dir: str | Path, summary: dict, title: str, sections: Sequence[report.Section]) -> dict:
    output = Path(output_dir)
    summary = {**summary, "versions": versions()}
    write_json(output / "summary.json", summary)
    report.render_report(title, sections, output / "report.html", command="vlm-sft-rl correction")
    return summary
