"""What every demo has: a folder that is resumed, stages, trainings and evaluations as a user starts them, and its results.

Every stage writes its result and is left out when the result is there, so an interrupted demo goes on where it was.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from ..errors import UserError
from ..evaluation.report import Section, Table, Text, render_report
from ..evaluation.results import read_samples
from ..evaluation.runner import evaluate_spec
from ..evaluation.specs import EvalOptions, EvalSpec
from ..io import write_json
from ..launch import launch_training
from ..recipes import find
from ..runs import PACKAGE, Stages, keep_manifest, training_log, versions

REMAKE = "It was edited or cut off: delete the folder of the demo to make it anew."
BASE = PACKAGE / "pocket" / "base"
VERIFIER = PACKAGE / "pocket" / "verifier"
# parts of the package that the results of stages depend on, besides the settings
DRAWING = ("pocket/world.py", "pocket/render.py", "pocket/language.py", "pocket/dataset.py")
TRAINING = ("data", "models", "packing", "rewards", "trainers", "methods", "launch.py", "train.py")
MEASURING = ("data", "models", "decoding", "graders", "rewards", "evaluation", "roc.py", "runs.py")


def shipped(recipe: str, *specs: str) -> tuple[Path, ...]:
    """The files of a recipe and of eval specs, as parts that a stage depends on."""
    return (find("recipes", recipe), *(find("eval", name) for name in specs))


def prose(name: str, **values: str) -> Text:
    """What a demo did, in the words of its Markdown file with the values filled in."""
    text = Path(__file__).with_name(f"{name}.md").read_text(encoding="utf-8").format(**values)
    return Text("What was done", "\n\n".join(" ".join(part.split()) for part in text.split("\n\n")))


class Demo:
    """One demo folder.

    Args:
        name: that of the command, and of the demo's file.
        options: the settings that are options of the command.
        further: settings without an option.
        keep_stale: go on with stages that another version of this package finished.

    Attributes:
        command: what makes the demo again.

    Raises UserError: the folder holds a demo with other settings.
    """

    def __init__(
        self,
        name: str,
        folder: str | Path,
        options: Mapping,
        *,
        further: Mapping | None = None,
        keep_stale: bool = False,
        console: Console | None = None,
    ):
        from transformers.utils import logging

        logging.disable_progress_bar()  # a bar for every loading of a small model hides the demo's own progress
        self.folder, self.console, self.seed = Path(folder), console or Console(), options["seed"]
        self.models, self.rows = self.folder / "models", self.folder / "rows"
        keep_manifest(
            self.folder / "demo.json",
            {**options, **(further or {})},
            "holds a demo with other settings",
            "Choose another --output-dir or delete the folder.",
        )
        self.stages = Stages(self.folder, self.console, keep_stale=keep_stale)
        self.code = ("demos/frame.py", f"demos/{name}.py")
        words = [f"vlm-sft-rl demo {name} --output-dir {self.folder}"]
        for key, value in options.items():
            if value is True:
                words.append("--" + key.replace("_", "-"))
            elif value is not None and value is not False:
                words.append(f"--{key.replace('_', '-')} {value}")
        self.command = " ".join(words)

    def stage(self, name: str, action: Callable[[], object], *uses: str | Path) -> None:
        """Run `action` unless it was finished before by the code that is here now.

        Args:
            uses: files and folders that the result depends on, beside the demo's own; text is relative to the package.
        """
        self.stages.run(name, action, (*self.code, *uses))

    def train(self, recipe: str, system: str, **overrides) -> None:
        """Train `models/SYSTEM` in a process of its own through `accelerate launch`, as a user would."""
        words = []
        for key, value in {"output_dir": self.models / system, "seed": self.seed, **overrides}.items():
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{key}", *map(str, values)]
        if status := launch_training(recipe, words, "cpu"):
            raise UserError(f"training {system} failed with status {status}; the message is above.")

    def evaluate(
        self,
        spec: str | EvalSpec,
        model: str,
        run: str,
        data_dir: Path,
        *,
        decoder: str = "greedy",
        settings: dict | None = None,
        **options,
    ) -> dict:
        """Evaluate `models/MODEL` into `eval/RUN`; a finished run is read.

        Args:
            settings: fields of the decoder's config.
            options: fields of `EvalOptions`.
        """
        return evaluate_spec(
            spec,
            self.models / model,
            output_dir=self.run_dir(run),
            data_dir=data_dir,
            decoder=decoder,
            settings=settings,
            options=EvalOptions(seed=self.seed, **options),
            console=Console(quiet=True),
        )

    def run_dir(self, run: str) -> Path:
        return self.folder / "eval" / run

    def history(self, system: str) -> list[dict]:
        """What was logged while a system was trained."""
        return training_log(self.models / system, REMAKE)

    def samples(self, run: str) -> list[dict]:
        return read_samples(self.run_dir(run))

    def finish(
        self, summary: dict, table: Table, title: str, sections: Sequence[Section], subtitle: str
    ) -> dict:
        """Write summary.json and report.html, print the table; returns the summary."""
        summary = summary | {"versions": versions()}
        write_json(self.folder / "summary.json", summary)
        page = render_report(
            title, sections, self.folder / "report.html", subtitle=subtitle, command=self.command
        )
        self.console.print(table.terminal())
        self.console.print(f"Written to {page}", highlight=False)
        return summary
