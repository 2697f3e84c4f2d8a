"""`vlm-sft-rl demo sc_tune`: a grounding model, the describer-locator loop on boxes without text, and what it changed.

Every stage writes its result and is left out when the result is there, so an interrupted demo goes on where it was.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as TerminalTable

from ..data.images import open_image
from ..errors import UserError
from ..evaluation import plots
from ..evaluation.bootstrap import Interval, bootstrap, paired, ratio
from ..evaluation.compare import pair_runs
from ..evaluation.pages import sample_picture
from ..evaluation.report import (
    AnswerView,
    Example,
    Figure,
    Gallery,
    Piece,
    Table,
    Text,
    render_report,
)
from ..evaluation.runner import evaluate_spec
from ..evaluation.specs import EvalOptions
from ..io import read_json, read_jsonl, write_json, write_jsonl
from ..launch import launch_training
from ..pocket.dataset import build_world
from ..pocket.language import CAPTION_PROMPT
from ..pocket.regions import build_regions, messages, scenes_of, thing_in
from ..pocket.warmup import warm_up
from ..pocket.world import Scene, picks_out
from ..recipes import find, load_recipe
from ..rewards.regions import iou
from ..runs import Stages, read_samples, versions

# What the describer-locator demo measures: self-consistency and REC by their eval specs, exact descriptions, captions.
ROUNDS = 1000
# eval spec -> its metrics, by the names they have here
SPECS = {
    "pocket_self_consistency": {
        "mean_iou": "self_consistency_iou",
        "acc50": "self_consistency_acc50",
        "parse_rate": "parse_rate",
        "leak_rate": "leak_rate",
        "words": "words",
    },
    "pocket_rec": {"acc50": "rec_acc50"},
    "pocket_captions": {"chair_i": "caption_chair_i", "coverage": "caption_coverage"},
}
# what summaries and tables show of them
SHOWN = ("self_consistency_iou", "rec_acc50", "reg_exact", "caption_chair_i", "caption_coverage")
LABELS = {
    "self_consistency_iou": "Self-consistency, mean IoU",
    "self_consistency_acc50": "Self-consistency, acc@0.5",
    "rec_acc50": "REC acc@0.5",
    "reg_exact": "Descriptions that pick out the one thing",
    "parse_rate": "Located boxes that parse",
    "leak_rate": "Descriptions that spell coordinates",
    "words": "Words per description",
    "caption_chair_i": "Captions, CHAIR-i (lower is better)",
    "caption_coverage": "Captions, coverage",
}


def run_folder(folder: Path, system: str, spec: str) -> Path:
    """Where the demo keeps one evaluation."""
    return folder / "eval" / f"{system}-{spec.removeprefix('pocket_')}"


def measure(
    folder: Path, system: str, *, regions: Path, world: Path, scenes: Mapping[str, Scene], seed: int
) -> dict:
    """Evaluate `folder/models/system`; runs that are finished are read.

    Returns:
        `{"metrics": {name: {"value", "low", "high", "n"}}, "n": boxes}`, names as in `LABELS`.
    """
    options = EvalOptions(seed=seed, rounds=ROUNDS, batch_size=32)
    metrics = {}
    for spec, names in SPECS.items():
        out, data_dir = run_folder(folder, system, spec), world if spec == "pocket_captions" else regions
        summary = evaluate_spec(
            spec,
            folder / "models" / system,
            output_dir=out,
            data_dir=data_dir,
            options=options,
            console=Console(quiet=True),
        )
        metrics |= {ours: summary["metrics"][name] for name, ours in names.items()}
    samples = described(folder, system)
    metrics["reg_exact"] = bootstrap(exact_counts(samples, scenes), _share, ROUNDS, seed).to_json()
    return {"metrics": metrics, "n": len(samples)}


def described(folder: Path, system: str) -> list[dict]:
    """The samples of self-consistency: every box with its description and where that led."""
    return read_samples(run_folder(folder, system, "pocket_self_consistency"))


def exact_counts(samples: Sequence[dict], scenes: Mapping[str, Scene]) -> np.ndarray:
    """Per image, `(images, 2)`: descriptions that are true of the box's thing and of no other in its scene, and boxes."""
    counts: dict[str, list[int]] = {}
    for sample in samples:
        image = sample["reference"]["image"]
        own, thing = counts.setdefault(image, [0, 0]), thing_in(sample["reference"], scenes[image])
        own[0] += picks_out(sample["answer"], thing, scenes[image])
        own[1] += 1
    return np.array(list(counts.values()), dtype=float)


def differences(
    folder: Path, ours: str, theirs: str, scenes: Mapping[str, Scene], seed: int
) -> dict[str, Interval]:
    """Paired differences of two systems, with whole images resampled together; names as in `LABELS`."""
    found = {}
    for spec, names in SPECS.items():
        both = [run_folder(folder, system, spec) for system in (ours, theirs)]
        metrics = pair_runs(*both, rounds=ROUNDS, seed=seed).result["metrics"]
        found |= {own: Interval(**metrics[name]["difference"]) for name, own in names.items()}
    counts = [exact_counts(described(folder, system), scenes) for system in (ours, theirs)]
    found["reg_exact"] = paired(*counts, _share, ROUNDS, seed)
    return found


def _share(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


BASE = Path(__file__).parents[1] / "pocket" / "base"
RECIPE = "sc_tune/pocket"
SYSTEMS = ("start", "control", "tuned")
WARM_UP_STEPS = 200
WORLD = ("pocket/world.py", "pocket/render.py", "pocket/regions.py")
WARMED = (*WORLD, "pocket/base", "pocket/warmup.py", "data/collators.py")
CAPTIONED = (*WARMED, "decoding", "demos/sc_tune.py")
RECIPE_FILE = find("recipes", RECIPE)
TRAINED = (*CAPTIONED, "trainers", "rewards", "methods/sc_tune.py", RECIPE_FILE)
MEASURED = (
    *TRAINED,
    "evaluation",
    *(find("eval", name) for name in SPECS),
)


class Demo:
    """One demo folder: where its parts are, and how they are made."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        seed: int = 0,
        scenes: int = 300,
        steps: int | None = None,
        warm_up_steps: int = WARM_UP_STEPS,
        keep_stale: bool = False,
    ):
        self.folder, self.console, self.seed, self.scenes = folder, console, seed, scenes
        self.steps = steps if steps is not None else int(load_recipe(RECIPE_FILE)["max_steps"])
        self.regions, self.world, self.models = folder / "regions", folder / "world", folder / "models"
        self.warm_up_steps = warm_up_steps
        settings = {"seed": seed, "scenes": scenes, "steps": self.steps, "warm_up_steps": warm_up_steps}
        path = folder / "demo.json"
        if path.exists() and read_json(path) != settings:
            raise UserError(
                f"{path}: this folder holds a demo with other settings ({read_json(path)}). Choose another "
                "--output-dir or delete the folder."
            )
        write_json(path, settings)
        self.stages = Stages(folder, console, keep_stale=keep_stale)

    def prepare(self) -> None:
        """Scenes, the start, and the start's captions: what every way of tuning begins with."""
        self.stages.run("draw scenes of twins", self.draw, WORLD)
        warm = partial(self.warm, "start", BASE, self.warm_up_steps)
        self.stages.run("warm up a grounding model", warm, WARMED)
        self.stages.run("caption the loop's images with the start", self.caption, CAPTIONED)

    def draw(self) -> None:
        build_regions(self.regions, seed=self.seed, sizes={"test": self.scenes})
        # captions of ordinary scenes: what the loop must not spoil
        build_world(self.world, seed=self.seed, sizes={"train": 1, "val": 1, "test": self.scenes})

    @property
    def replay(self) -> Path:
        return self.folder / "replay.jsonl"

    def caption(self) -> None:
        """Captions that the start itself writes, greedily, for the loop's images: what it shall not forget."""
        from ..decoding import SamplingConfig, generate_plain
        from ..models.load import load_for_inference

        model, processor, _ = load_for_inference(self.models / "start")
        paths = list(dict.fromkeys(row["image"] for _, row in read_jsonl(self.regions / "train.jsonl")))
        answers = generate_plain(
            model,
            processor,
            [open_image(path, self.regions) for path in paths],
            [CAPTION_PROMPT] * len(paths),
            SamplingConfig(max_new_tokens=96, seed=self.seed),
            batch_size=50,
        )
        pairs = zip(paths, answers, strict=True)
        rows = [messages(f"{Path(path).stem}-caption", path, CAPTION_PROMPT, one.text) for path, one in pairs]
        write_jsonl(self.replay, rows)

    def warm(self, system: str, source: Path, steps: int, **settings) -> None:
        rows = self.regions / "warmup.jsonl"
        warm_up(source, self.models / system, rows, self.regions, steps=steps, seed=self.seed, **settings)

    def train_control(self) -> None:
        """As many updates as the loop makes, by its schedule, on the warm-up rows and its share of replayed ones."""
        share = load_recipe(RECIPE_FILE)["replay_share"]
        steps = supervised_steps(self.steps)
        settings = {"decay_steps": decay_steps(steps), "replay": self.replay, "replay_share": share}
        self.warm("control", self.models / "start", steps, **settings)

    def tune(self, system: str = "tuned", **overrides) -> None:
        """Train in a process of its own through `accelerate launch`, as a user would."""
        settings = {
            "model_name_or_path": self.models / "start",
            "train_file": self.regions / "train.jsonl",
            "image_root": self.regions,
            "replay_file": self.replay,
            "output_dir": self.models / system,
            "max_steps": self.steps,
            "seed": self.seed,
            **overrides,
        }
        decay = {"num_decay_steps": decay_steps(settings["max_steps"])}
        settings["lr_scheduler_kwargs"] = json.dumps(decay, separators=(",", ":"))
        words = [word for key, value in settings.items() for word in (f"--{key}", *str(value).split())]
        if status := launch_training(RECIPE, words, "cpu"):
            raise UserError(f"training {system} failed with status {status}; the message is above.")

    def measure(self, system: str) -> None:
        scenes = scenes_of(self.regions)
        places = {"regions": self.regions, "world": self.world}
        found = measure(self.folder, system, **places, scenes=scenes, seed=self.seed)
        write_json(self.folder / "eval" / f"{system}.json", found)
        words = ", ".join(f"{name} {found['metrics'][name]['value']:.3f}" for name in SHOWN)
        self.console.print(f"  {system}: {words}")


def phase_steps(steps: int) -> tuple[int, int]:
    """Describer and locator steps among the first `steps` of the recipe's loop."""
    recipe = load_recipe(RECIPE_FILE)
    describing, locating = recipe["describer_steps"], recipe["locator_steps"]
    full, rest = divmod(steps, describing + locating)
    describer = full * describing + min(rest, describing)
    return describer, steps - describer


def decay_steps(steps: int) -> int:
    """Over how many of the last of `steps` updates the learning rate falls: the recipe's share of them."""
    recipe = load_recipe(RECIPE_FILE)
    return round(steps * recipe["lr_scheduler_kwargs"]["num_decay_steps"] / recipe["max_steps"])


def supervised_steps(steps: int) -> int:
    """How many updates the control gets: as many as the loop makes, inner ones included."""
    describer, locator = phase_steps(steps)
    return describer * load_recipe(RECIPE_FILE).get("inner_epochs", 2) + locator


def run(
    output_dir: str | Path,
    *,
    seed: int = 0,
    scenes: int = 300,
    steps: int | None = None,
    warm_up_steps: int = WARM_UP_STEPS,
    keep_stale: bool = False,
    console: Console | None = None,
) -> dict:
    """Run or resume the demo and return its summary.

    Args:
        scenes: test scenes (some five boxes each); steps: of the loop, None takes the recipe's.

    Raises:
        UserError: `output_dir` holds a demo with other settings or of other code, or a stage failed.
    """
    from transformers.utils import logging

    pass

    logging.disable_progress_bar()
    demo = Demo(
        Path(output_dir),
        console or Console(),
        seed=seed,
        scenes=scenes,
        steps=steps,
        warm_up_steps=warm_up_steps,
        keep_stale=keep_stale,
    )
    demo.prepare()
    stages = demo.stages
    stages.run("close the loop on boxes without text", demo.tune, TRAINED)
    stages.run("train the control on the warm-up rows", demo.train_control, (*CAPTIONED, RECIPE_FILE))
    for system in SYSTEMS:
        stages.run(f"measure {system}", lambda system=system: demo.measure(system), MEASURED)
    return finish(demo)


# What the describer-locator demo shows at its end: a table, summary.json, report.html with drawn boxes and curves.
NAMES = {"start": "start", "control": "control: more supervised steps", "tuned": "SC-Tune"}
CURVES = {
    "describer/reward": "IoU, sampled descriptions",
    "describer/baseline": "IoU, greedy baseline",
    "locator/loss": "Locator loss (nats per token)",
    "locator/replay_loss": "Replay loss (nats per token)",
}


def finish(demo) -> dict:
    """Print the table, write `summary.json` and `report.html`; returns the summary."""
    found = {system: read_json(demo.folder / "eval" / f"{system}.json") for system in NAMES}
    systems = {
        NAMES[system]: {name: Interval(**value) for name, value in row["metrics"].items()}
        for system, row in found.items()
    }
    scenes = scenes_of(demo.regions)
    minus = {
        other: {
            name: interval.to_json()
            for name, interval in differences(demo.folder, "tuned", other, scenes, demo.seed).items()
        }
        for other in ("start", "control")
    }
    summary = {system: row["metrics"] for system, row in found.items()}
    summary |= {
        "n": found["tuned"]["n"],
        "scenes": demo.scenes,
        "steps": demo.steps,
        "seed": demo.seed,
        "tuned_minus": minus,
        "seconds": demo.stages.seconds,
        "stale": demo.stages.stale,
        "versions": versions(),
    }
    write_json(demo.folder / "summary.json", summary)
    _report(demo, systems, minus)
    _print(demo, systems, summary)
    return summary


def _print(demo, systems: dict, summary: dict) -> None:
    table = TerminalTable(
        title="SC-Tune on the pocket world",
        caption=f"n = {summary['n']} boxes on {demo.scenes} held-out scenes, 95 % bootstrap intervals over images, seed "
        f"{demo.seed}",
    )
    table.add_column("")
    for name in systems:
        table.add_column(name, justify="right")
    for key in SHOWN:
        table.add_row(LABELS[key], *(row[key].format() for row in systems.values()))
    demo.console.print(table)
    demo.console.print(f"Report: {demo.folder / 'report.html'}")


def changed_examples(start: list[dict], tuned: list[dict], count: int = 8) -> list[str]:
    """Boxes for the page: repaired, broken and unchanged failures in the order and proportion they occur, by image."""
    before = {sample["id"]: hit(sample) for sample in start}
    seen, repaired, others = set(), [], []
    for sample in tuned:
        image = sample["reference"]["image"]
        if image in seen:
            continue
        now, then = hit(sample), before[sample["id"]]
        if now and not then:
            repaired.append(sample["id"])
        elif not now:
            others.append(sample["id"])
        else:
            continue
        seen.add(image)
    half = count // 2
    return [*repaired[: count - min(half, len(others))], *others[:half]]


def _figures(systems: dict) -> Table:
    names = [name for name in LABELS if any(name in row for row in systems.values())]
    rows = [[LABELS[name], *(row[name].format() for row in systems.values())] for name in names]
    return Table("Held-out scenes", ["", *systems], rows)


def _gallery(samples: dict[str, list[dict]], ids: list[str], demo, note: str) -> Gallery:
    """The same boxes by several systems; the boxes drawn are those of the last system."""
    indexed = {system: {sample["id"]: sample for sample in own} for system, own in samples.items()}
    examples = []
    for key in ids:
        views = [
            AnswerView(NAMES[system], [Piece(own[key]["answer"], truth=hit(own[key]))])
            for system, own in indexed.items()
        ]
        last = list(indexed.values())[-1][key]
        examples.append(Example(sample_picture(last, demo.regions), last["reference"]["captions"][0], views))
    return Gallery("Boxes", examples, note, legend=False)


def hit(sample: dict) -> bool:
    """Did the description lead back to its box?"""
    return iou(sample["located"], sample["reference"]["box"]) >= 0.5


def _listed(differences: dict) -> str:
    found = ((LABELS[key], differences[key]) for key in SHOWN)
    return "; ".join(f"{name}: {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for name, d in found)


def _report(demo, systems: dict, minus: dict) -> Path:
    samples = {system: described(demo.folder, system) for system in ("start", "tuned")}
    history = read_json(demo.models / "tuned" / "trainer_state.json")["log_history"]
    sections = [
        Text(
            "What was done",
            "In each scene two or three things share a noun and differ in colour. The start is the pocket base after a "
            "short supervised warm-up: its describer learnt from annotators who mostly say the noun alone, so what it says "
            "is often true of several things. SC-Tune then saw only boxes on fresh scenes, no text: a description earns "
            "the overlap of the box it leads a frozen copy to, and the locator learns from the descriptions. The control "
            "made as many updates on the warm-up rows. Both also saw captions that the start itself had written, so that "
            "they still caption.\n\nA box of the pocket world is a cell of its grid, as fine as the model sees, so the "
            "IoU of two boxes is 0 or 1 here.",
        ),
        _figures(systems),
        Text(
            "Differences, paired",
            f"SC-Tune minus start. {_listed(minus['start'])}.\n\nSC-Tune minus control. {_listed(minus['control'])}.",
        ),
        Figure(
            "Intervals",
            partial(plots.intervals_by_system, systems, ["self_consistency_iou", "rec_acc50", "reg_exact"]),
            f"Dots are values, bars 95 % bootstrap intervals over {demo.scenes} images.",
        ),
        Figure("Training", partial(plots.training_curves, history, CURVES), "Over steps of the loop."),
        _gallery(
            samples,
            changed_examples(samples["start"], samples["tuned"]),
            demo,
            "Green: the region. Red: where SC-Tune's own description led it. First regions that the start could not find "
            "again and SC-Tune can, then regions that SC-Tune still misses. The heading is the shortest expression that "
            "picks the thing out.",
        ),
    ]
    command = f"vlm-sft-rl demo sc_tune --output-dir {demo.folder} --seed {demo.seed}"
    return render_report(
        "SC-Tune on the pocket world",
        sections,
        demo.folder / "report.html",
        subtitle="box → description → box, without text (arXiv 2403.13263)",
        command=command,
    )
