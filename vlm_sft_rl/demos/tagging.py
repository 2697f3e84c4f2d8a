"""`vlm-sft-rl demo tagging`: are rows that `data tag` makes of plain captions as good as rows made from ground truth?

Three training sets over the same images and the same number of steps: exact (phrases and negatives from the world's
ground truth), plain (captions and questions as they are, through `data tag`), and checked (the same, with the base's own
yes/no answers as checker). The captions name what is typical and absent, as the web's do.
"""

from collections import Counter
from pathlib import Path

from rich.console import Console

from ..data.rows import read_rows
from ..data.tagging.config import TagConfig
from ..data.tagging.phrases import SpacyTagger
from ..data.tagging.pipeline import tag
from ..data.tagging.verdicts import ModelChecker
from ..data.tags import spans
from ..errors import in_words
from ..evaluation.report import Table, interval_text
from ..io import write_json, write_jsonl
from ..pocket.dataset import ground_truth
from ..pocket.world import NOUNS
from .frame import BASE
from .reverse import MEASURED, PREPARED, ROWS, TRAINED, Reverse, captions

# the world's tokenizer knows few words: the question is the world's own
CHECK_QUESTION = "Is there {phrase}?"
SYSTEMS = {"reverse": "exact rows", "checked": "data tag, checked by the base", "plain": "data tag"}
TAGGED = (*ROWS, *PREPARED, "decoding", "demos/reverse.py")


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

    Raises UserError: `output_dir` holds a demo with other settings or of other code, spaCy is missing, or a stage failed.
    """
    options = {"seed": seed, "scenes": scenes, "on_policy": False, "steps": steps}
    demo = Reverse("tagging", output_dir, options, keep_stale=keep_stale, console=console)
    demo.draw()
    demo.stage("build the exact rows", demo.write_rows, *ROWS)
    demo.stage("tag the plain captions", lambda: _tag(demo, "plain"), *TAGGED)
    demo.stage("tag and check the plain captions", lambda: _tag(demo, "checked"), *TAGGED)
    measured = (*TAGGED, *MEASURED)
    for system, name in SYSTEMS.items():
        demo.stage(f"train on {name}", lambda system=system: demo.teach(system), *TAGGED, *TRAINED)
        demo.stage(f"choose the decoding: {name}", lambda system=system: demo.choose(system), *measured)
        demo.stage(f"measure: {name}", lambda system=system: _measure(demo, system), *measured)
    return _finish(demo)


def _tag(demo: Reverse, system: str) -> None:
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
    demo.console.print(f"  {in_words(report['rows'])}; answers: {in_words(report['answer_types'])}")


def _measure(demo: Reverse, system: str) -> None:
    demo.caption(f"{system}_greedy", system)
    demo.caption(system, system, "retrospective", {"threshold": demo.threshold(system)})


def _finish(demo: Reverse) -> dict:
    """Figures of each system, and how true its labels are."""
    truth, systems, rows = ground_truth(demo.world), {}, []
    for system, name in SYSTEMS.items():
        greedy, resampled = demo.summary(captions(f"{system}_greedy")), demo.summary(captions(system))
        area = (greedy["verifier"] or {}).get("auc")
        labels = label_truth(demo.rows / f"{system}.jsonl", truth)
        systems[name] = {
            "threshold": demo.threshold(system),
            "greedy": {key: greedy["metrics"][key] for key in ("chair_i", "coverage")},
            "retrospective": {key: resampled["metrics"][key] for key in ("chair_i", "coverage")},
            "verifier_auc": area,
            "labels": labels,
        }
        rows.append(
            [
                name,
                f"{systems[name]['threshold']:g}",
                interval_text(greedy["metrics"]["chair_i"]),
                interval_text(resampled["metrics"]["chair_i"]),
                interval_text(resampled["metrics"]["coverage"]),
                "-" if area is None else interval_text(area),
                f"{labels['false']} of {labels['false'] + labels['true']}",
            ]
        )
    summary = {
        "seed": demo.seed,
        "stale": demo.stages.stale,
        "n": demo.options["scenes"],
        "steps": demo.options["steps"],
        "systems": systems,
    }
    write_json(demo.folder / "summary.json", summary)
    columns = ["rows", "τ", "CHAIR-i greedy", "CHAIR-i", "coverage", "verifier AUC", "false labels"]
    title = f"{summary['n']} test scenes, seed {demo.seed}, 95 % intervals"
    demo.console.print(Table(title, columns, rows).terminal())
    return summary


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
