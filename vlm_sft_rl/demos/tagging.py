"""`vlm-sft-rl demo tagging`: are rows that `data tag` makes of plain captions as good as rows made from ground truth?

Three training sets over the same images and the same number of steps: exact (phrases and negatives from the world's
ground truth), plain (captions and questions as they are, through `data tag`), and checked (the same, with the base's own
yes/no answers as checker). The captions name what is typical and absent, as the web's do.
"""

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..data.rows import read_rows
from ..data.tagging.config import TagConfig
from ..data.tagging.phrases import SpacyTagger
from ..data.tagging.pipeline import tag
from ..data.tagging.verdicts import ModelChecker
from ..data.tags import spans
from ..io import write_json, write_jsonl
from ..models.checkpoints import prepare
from ..pocket.dataset import build_world, ground_truth, write_rows
from ..pocket.world import NOUNS
from .reverse import BASE, MEASURED, PREPARED, ROWS, TRAINED, WORLD, Demo, _choose

# the world's tokenizer knows few words: the question is the world's own
CHECK_QUESTION = "Is there {phrase}?"
SYSTEMS = {"reverse": "exact rows", "checked": "data tag, checked by the base", "plain": "data tag"}


def run(
    output_dir: str | Path,
    *,
    seed: int = 0,
    scenes: int = 300,
    steps: int | None = None,
    keep_stale: bool = False,
    console: Console | None = None,
) -> dict:
    """Run or resume the comparison; `summary.json` and a table on the terminal.

    Args:
        keep_stale: go on with stages that another version of this package finished.

    Raises:
        UserError: `output_dir` holds a demo with other settings or of other code, spaCy is missing, or a stage failed.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    console = console or Console()
    demo = Demo(Path(output_dir), seed, scenes, False, steps, console, keep_stale)
    stage = demo.stages.run
    stage("draw the world", lambda: build_world(demo.world, seed=seed), WORLD)
    stage(
        "add the verification tokens",
        lambda: prepare(BASE, demo.models / "prepared", init="semantic"),
        PREPARED,
    )
    stage("build the exact rows", lambda: console.print(write_rows(demo.world, demo.rows, seed=seed)), ROWS)
    tagged = (*ROWS, *PREPARED, "decoding", "demos/tagging.py")
    stage("tag the plain captions", lambda: _tag(demo, "plain"), tagged)
    stage("tag and check the plain captions", lambda: _tag(demo, "checked"), tagged)
    measured = (*tagged, *MEASURED)
    for system, name in SYSTEMS.items():
        stage(f"train on {name}", lambda system=system: demo.train(system), (*tagged, *TRAINED))
        stage(f"choose the decoding: {name}", lambda system=system: _choose(demo, system), measured)
        stage(f"measure: {name}", lambda system=system: _measure(demo, system), measured)
    return _finish(demo)


def _tag(demo: Demo, system: str) -> None:
    """Captions and, as in the exact rows, a quarter as many questions."""
    captions, questions = (
        [
            {k: v for k, v in row.items() if k != "source"}
            for row in read_rows(demo.world / f"train_{name}.json")
        ]
        for name in ("captions", "questions")
    )
    source = write_jsonl(demo.rows / "source.jsonl", captions + questions[: len(questions) // 4])
    checker = ModelChecker(BASE, CHECK_QUESTION, demo.world) if system == "checked" else None
    report = tag(
        source,
        demo.rows / f"{system}.jsonl",
        SpacyTagger(),
        TagConfig(seed=demo.seed),
        checker=checker,
        progress=not demo.console.quiet,
    )
    demo.console.print(report["rows"], report["answer_types"])


def _measure(demo: Demo, system: str) -> None:
    demo.evaluate(f"{system}_greedy", system, decoder="greedy")
    choice = demo.choice(system)
    demo.retrospective(system, system, choice["threshold"])


def _finish(demo: Demo) -> dict:
    """Figures of each system, and how true its labels are."""
    result = {
        "seed": demo.seed,
        "stale": demo.stages.stale,
        "n": demo.limit,
        "steps": demo.steps,
        "systems": {},
    }
    for system, name in SYSTEMS.items():
        metrics = demo.summary(system)["metrics"]
        greedy = demo.summary(f"{system}_greedy")
        result["systems"][name] = {
            "threshold": demo.choice(system)["threshold"],
            "greedy": {key: greedy["metrics"][key] for key in ("chair_i", "coverage")},
            "retrospective": {key: metrics[key] for key in ("chair_i", "coverage")},
            "verifier_auc": (greedy["verifier"] or {}).get("auc"),
            "labels": label_truth(demo.rows / f"{system}.jsonl", ground_truth(demo.world)),
        }
    write_json(demo.folder / "summary.json", result)
    table = Table(title=f"{demo.limit} test scenes, seed {demo.seed}, 95 % intervals", title_justify="left")
    for column in ("rows", "τ", "CHAIR-i greedy", "CHAIR-i", "coverage", "verifier AUC", "false labels"):
        table.add_column(column)
    for name, figures in result["systems"].items():
        labels = figures["labels"]
        table.add_row(
            name,
            f"{figures['threshold']:g}",
            _interval(figures["greedy"]["chair_i"]),
            _interval(figures["retrospective"]["chair_i"]),
            _interval(figures["retrospective"]["coverage"]),
            _interval(figures["verifier_auc"]),
            f"{labels['false']} of {labels['false'] + labels['true']}",
        )
    demo.console.print(table)
    return result


def label_truth(rows: Path, truth: dict[str, list[str]]) -> dict[str, int]:
    """How many tags on object phrases agree with the ground truth (`true`) and how many do not (`false`)."""
    counts = Counter({"true": 0, "false": 0})
    for row in read_rows(rows):
        present = truth[row["images"][0]]
        for message in row["messages"]:
            if message["role"] != "assistant":
                continue
            for span in spans(message["content"]):
                noun = span.phrase.split()[-1]
                if noun in NOUNS:
                    counts["true" if (noun in present) == span.confident else "false"] += 1
    return dict(counts)


def _interval(value: dict | None) -> str:
    if value is None:
        return "-"
    return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
