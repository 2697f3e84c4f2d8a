"""`vlm-sft-rl demo sc_tune`: a grounding model, the describer-locator loop on boxes without text, and what it changed.

`reproduce` asks which part of the loop does what: variants of it over several seeds.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from ..data.images import open_image
from ..evaluation import plots
from ..evaluation.bootstrap import Interval, bootstrap, paired, ratio
from ..evaluation.compare import compare
from ..evaluation.pages import sample_picture
from ..evaluation.report import (
    AnswerView,
    Example,
    Gallery,
    Panels,
    Piece,
    Section,
    Table,
    Text,
    interval_text,
)
from ..evaluation.results import INTERVAL
from ..io import read_jsonl, write_json, write_jsonl
from ..pocket.dataset import build_world
from ..pocket.language import CAPTION_PROMPT
from ..pocket.regions import build_regions, messages, scenes_of, thing_in
from ..pocket.warmup import warm_up
from ..pocket.world import Scene, picks_out
from ..recipes import find, load_recipe
from ..rewards.regions import iou
from ..shapes import COUNT, Map, read_object
from .frame import BASE, DRAWING, MEASURING, REMAKE, TRAINING, Demo, prose, shipped

RECIPE = "sc_tune/pocket"
RECIPE_FILE = find("recipes", RECIPE)
WARM_UP_STEPS = 200
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
# what terminal tables show of them
SHOWN = ("self_consistency_iou", "rec_acc50", "reg_exact", "caption_chair_i", "caption_coverage")
SYSTEMS = {"start": "start", "control": "control: more supervised steps", "tuned": "SC-Tune"}
CURVES = {
    "describer/reward": "IoU, sampled descriptions",
    "describer/baseline": "IoU, greedy baseline",
    "locator/loss": "Locator loss (nats per token)",
    "locator/replay_loss": "Replay loss (nats per token)",
}
# of `reproduce`: what each changes in the recipe
VARIANTS: dict[str, dict] = {
    "both": {},
    "describer_only": {"locator_steps": 0, "replay_share": 0},
    "no_replay": {"replay_share": 0},
    "locator_only": {"describer_steps": 0},
    "baseline_none": {"baseline": "none"},
    "baseline_greedy_live": {"baseline": "greedy_live"},
    "baseline_group": {"baseline": "group"},
    "kl_0": {"kl_coef": 0.0},
    "kl_start": {"kl_coef": 0.1, "kl_anchor": "start"},
    "giou": {"rewards": "giou"},
    "short": {"rewards": ["iou", "length"], "reward_weights": [1.0, 0.02]},
    "caption_filter": {"min_caption_iou": 0.5},
    "rec": {"rec_file": "annotated.jsonl"},
}
DRAWN = (*DRAWING, "pocket/regions.py")
WARMED = (*DRAWN, "pocket/base", "pocket/warmup.py", "data", "models")
CAPTIONED = (*WARMED, "decoding")
TRAINED = (*CAPTIONED, *TRAINING, RECIPE_FILE)
MEASURED = (*TRAINED, *MEASURING, *shipped(RECIPE, *SPECS))


class SCTune(Demo):
    """A demo folder with boxes on scenes of twins: models that describe and locate, tuned and measured there."""

    def __init__(
        self,
        folder: str | Path,
        *,
        seed: int = 0,
        scenes: int = 300,
        steps: int | None = None,
        warm_up_steps: int = WARM_UP_STEPS,
        **more,
    ):
        self.steps = steps if steps is not None else int(load_recipe(RECIPE_FILE)["max_steps"])
        self.scenes, self.warm_up_steps = scenes, warm_up_steps
        options = {"seed": seed, "scenes": scenes, "steps": self.steps}
        super().__init__("sc_tune", folder, options, further={"warm_up_steps": warm_up_steps}, **more)
        self.regions, self.world = self.folder / "regions", self.folder / "world"
        self.replay = self.folder / "replay.jsonl"

    def prepare(self) -> None:
        """Scenes, the start, and the start's captions: what every way of tuning begins with."""
        self.stage("draw scenes of twins", self.draw, *DRAWN)
        warm = partial(self.warm, "start", BASE, self.warm_up_steps)
        self.stage("warm up a grounding model", warm, *WARMED)
        self.stage("caption the loop's images with the start", self.caption, *CAPTIONED)

    def draw(self) -> None:
        build_regions(self.regions, seed=self.seed, sizes={"test": self.scenes})
        # captions of ordinary scenes: what the loop must not spoil
        build_world(self.world, seed=self.seed, sizes={"train": 1, "val": 1, "test": self.scenes})

    def caption(self) -> None:
        """Captions that the start itself writes, greedily, for the loop's images: what it shall not forget."""
        from ..decoding import SamplingConfig, generate_plain
        from ..models.load import load_for_inference

        model, processor, _ = load_for_inference(self.models / "start")
        paths = list(dict.fromkeys(row["image"] for _, row in read_jsonl(self.regions / "train.jsonl")))
        images = [open_image(path, self.regions) for path in paths]
        config = SamplingConfig(max_new_tokens=96, seed=self.seed)
        answers = generate_plain(
            model, processor, images, [CAPTION_PROMPT] * len(paths), config, batch_size=50
        )
        rows = [
            messages(f"{Path(path).stem}-caption", path, CAPTION_PROMPT, answer.text)
            for path, answer in zip(paths, answers, strict=True)
        ]
        write_jsonl(self.replay, rows)

    def warm(self, system: str, source: Path, steps: int, **settings) -> None:
        rows = self.regions / "warmup.jsonl"
        warm_up(source, self.models / system, rows, self.regions, steps=steps, seed=self.seed, **settings)

    def train_control(self) -> None:
        """As many updates as the loop makes, by its schedule, on the warm-up rows and its share of replayed ones."""
        steps = supervised_steps(self.steps)
        share = load_recipe(RECIPE_FILE)["replay_share"]
        settings = {"decay_steps": decay_steps(steps), "replay": (self.replay, share)}
        self.warm("control", self.models / "start", steps, **settings)

    def tune(self, system: str = "tuned", **overrides) -> None:
        settings = {
            "model_name_or_path": self.models / "start",
            "train_file": self.regions / "train.jsonl",
            "image_root": self.regions,
            "replay_file": self.replay,
            "max_steps": self.steps,
            **overrides,
        }
        decay = {"num_decay_steps": decay_steps(settings["max_steps"])}
        schedule = json.dumps(decay, separators=(",", ":"))
        self.train(RECIPE, system, **settings, lr_scheduler_kwargs=schedule)

    def control_stage(self) -> None:
        name = "train the control on the warm-up rows"
        self.stage(name, self.train_control, *CAPTIONED, RECIPE_FILE)

    def measure_stages(self, systems: Sequence[str]) -> None:
        for system in systems:
            self.stage(f"measure {system}", partial(self.measure, system), *MEASURED)

    def measure(self, system: str) -> None:
        """Self-consistency, REC and captions by their eval specs, and exact descriptions, into `eval/SYSTEM.json`."""
        metrics = {}
        for spec, names in SPECS.items():
            data_dir = self.world if spec == "pocket_captions" else self.regions
            options = {"rounds": ROUNDS, "batch_size": 32}
            summary = self.evaluate(spec, system, run_name(system, spec), data_dir, **options)
            metrics |= {name: summary["metrics"][key] for key, name in names.items()}
        samples = self.described(system)
        counts = exact_counts(samples, scenes_of(self.regions))
        metrics["reg_exact"] = bootstrap(counts, _share, ROUNDS, self.seed).to_json()
        write_json(self.folder / "eval" / f"{system}.json", {"metrics": metrics, "n": len(samples)})
        words = ", ".join(f"{name} {metrics[name]['value']:.3f}" for name in SHOWN)
        self.console.print(f"  {system}: {words}")

    def measured(self, system: str) -> dict:
        shape = {"metrics": Map(INTERVAL), "n": COUNT}
        return read_object(self.folder / "eval" / f"{system}.json", shape, REMAKE)

    def described(self, system: str) -> list[dict]:
        """The samples of self-consistency: every box with its description and where that led."""
        return self.samples(run_name(system, "pocket_self_consistency"))

    def differences(self, system: str, other: str) -> dict[str, dict]:
        """Paired differences of two systems, with whole images resampled together; names as in `LABELS`."""
        gaps = {}
        for spec, names in SPECS.items():
            runs = [self.run_dir(run_name(name, spec)) for name in (system, other)]
            metrics = compare(*runs, rounds=ROUNDS, seed=self.seed)["metrics"]
            gaps |= {name: metrics[key]["difference"] for key, name in names.items()}
        scenes = scenes_of(self.regions)
        counts = [exact_counts(self.described(name), scenes) for name in (system, other)]
        gaps["reg_exact"] = paired(*counts, _share, ROUNDS, self.seed).to_json()
        return gaps


def run_name(system: str, spec: str) -> str:
    return f"{system}-{spec.removeprefix('pocket_')}"


def exact_counts(samples: Sequence[dict], scenes: Mapping[str, Scene]) -> np.ndarray:
    """Per image, `(images, 2)`: descriptions that are true of the box's thing and of no other in its scene, and boxes."""
    counts: dict[str, list[int]] = {}
    for sample in samples:
        image = sample["reference"]["image"]
        count = counts.setdefault(image, [0, 0])
        count[0] += picks_out(sample["answer"], thing_in(sample["reference"], scenes[image]), scenes[image])
        count[1] += 1
    return np.array(list(counts.values()), dtype=float)


def _share(totals: np.ndarray) -> np.ndarray:
    return ratio(totals[..., 0], totals[..., 1])


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

    Raises UserError: `output_dir` holds a demo with other settings or of other code, or a stage failed.
    """
    settings = {"seed": seed, "scenes": scenes, "steps": steps, "warm_up_steps": warm_up_steps}
    demo = SCTune(output_dir, **settings, keep_stale=keep_stale, console=console)
    demo.prepare()
    demo.stage("close the loop on boxes without text", demo.tune, *TRAINED)
    demo.control_stage()
    demo.measure_stages(tuple(SYSTEMS))
    return _finish(demo)


def reproduce(
    output_dir: str | Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    scenes: int = 300,
    steps: int | None = None,
    warm_up_steps: int = WARM_UP_STEPS,
    console: Console | None = None,
) -> dict:
    """Run or resume every variant with every seed; writes `summary.json` with mean and range over seeds.

    `systems` holds the figures, `against_start` their paired differences to the start: per seed with intervals.

    The seed draws scenes, warms up the model and orders the boxes, so that runs of different seeds share nothing.
    """
    folder, console = Path(output_dir), console or Console()
    figures: dict[str, list[dict]] = {}
    gains: dict[str, list[dict]] = {}
    for seed in seeds:
        console.rule(f"seed {seed}")
        settings = {"seed": seed, "scenes": scenes, "steps": steps, "warm_up_steps": warm_up_steps}
        demo = SCTune(folder / f"seed-{seed}", **settings, console=console)
        demo.prepare()
        demo.control_stage()
        for name in variants:
            demo.stage(f"tune {name}", partial(demo.tune, name, **overrides(name, demo)), *TRAINED)
        systems = ("start", "control", *variants)
        demo.measure_stages(systems)
        for name in systems:
            figures.setdefault(name, []).append(demo.measured(name)["metrics"])
        for name in systems[1:]:
            gains.setdefault(name, []).append(demo.differences(name, "start"))
    summary = {
        "systems": {name: _over_seeds(rows) for name, rows in figures.items()},
        "against_start": {name: _over_seeds(rows) for name, rows in gains.items()},
        "seeds": list(seeds),
        "scenes": scenes,
        "steps": demo.steps,
    }
    write_json(folder / "summary.json", summary)
    for key, words in (
        ("systems", "mean over seeds"),
        ("against_start", "minus the start, paired: mean over seeds"),
    ):
        rows = [
            [system, *(interval_text(row[name] | {"value": row[name]["mean"]}) for name in SHOWN)]
            for system, row in summary[key].items()
        ]
        title = f"SC-Tune on the pocket world: {words} [lowest, highest]"
        note = f"seeds {', '.join(map(str, seeds))}"
        console.print(Table(title, ["", *(LABELS[name] for name in SHOWN)], rows, note).terminal())
    return summary


def overrides(name: str, demo: SCTune) -> dict:
    """What a variant changes in the recipe for this demo's steps and files."""
    describer, locator = phase_steps(demo.steps)
    # a phase by itself takes as many steps as it has in the whole loop
    alone = {"describer_only": {"max_steps": describer}, "locator_only": {"max_steps": locator}}
    changes = VARIANTS[name] | alone.get(name, {})
    return changes | ({"rec_file": demo.regions / changes["rec_file"]} if "rec_file" in changes else {})


def _over_seeds(rows: list[dict]) -> dict:
    figures = {}
    for name in SHOWN:
        values = [row[name]["value"] for row in rows]
        mean = float(np.mean(values))
        seeds = [row[name] for row in rows]
        figures[name] = {"mean": mean, "low": min(values), "high": max(values), "seeds": seeds}
    return figures


# --- What the demo shows at its end: a table, summary.json, report.html with drawn boxes and curves ---


def _finish(demo: SCTune) -> dict:
    measured = {system: demo.measured(system) for system in SYSTEMS}
    minus = {other: demo.differences("tuned", other) for other in ("start", "control")}
    summary = {system: row["metrics"] for system, row in measured.items()}
    summary |= {
        "n": measured["tuned"]["n"],
        "scenes": demo.scenes,
        "steps": demo.steps,
        "seed": demo.seed,
        "tuned_minus": minus,
        "seconds": demo.stages.seconds,
        "stale": demo.stages.stale,
    }
    note = (
        f"n = {summary['n']} boxes on {demo.scenes} held-out scenes, 95 % bootstrap intervals over images, seed "
        f"{demo.seed}"
    )
    return demo.finish(
        summary,
        _table("SC-Tune on the pocket world", summary, SHOWN, note),
        "SC-Tune on the pocket world",
        _sections(demo, summary),
        "box → description → box, without text (arXiv 2403.13263)",
    )


def _table(title: str, summary: dict, names: Sequence[str], note: str = "") -> Table:
    rows = [[LABELS[n], *(interval_text(summary[system][n]) for system in SYSTEMS)] for n in names]
    return Table(title, ["", *SYSTEMS.values()], rows, note)


def _sections(demo: SCTune, summary: dict) -> list[Section]:
    history = demo.history("tuned")
    intervals = {
        label: {name: Interval(**value) for name, value in summary[system].items()}
        for system, label in SYSTEMS.items()
    }
    gaps = {}
    for other, differences in summary["tuned_minus"].items():
        texts = (f"{LABELS[name]}: {interval_text(differences[name], sign='+')}" for name in SHOWN)
        gaps[other] = "; ".join(texts)
    return [
        prose("sc_tune"),
        _table("Held-out scenes", summary, tuple(LABELS)),
        Text(
            "Differences, paired",
            f"SC-Tune minus start. {gaps['start']}.\n\nSC-Tune minus control. {gaps['control']}.",
        ),
        Panels(
            "Intervals",
            plots.intervals_by_system(intervals, ["self_consistency_iou", "rec_acc50", "reg_exact"]),
            f"Dots are values, bars 95 % bootstrap intervals over {demo.scenes} images.",
            wide=True,
        ),
        Panels("Training", plots.training_curves(history, CURVES), "Over steps of the loop."),
        _gallery(demo),
    ]


def _gallery(demo: SCTune) -> Gallery:
    """Boxes by the start and by SC-Tune; the boxes drawn are those of SC-Tune."""
    start = {sample["id"]: sample for sample in demo.described("start")}
    examples = []
    for sample in changed_examples(start, demo.described("tuned")):
        views = [
            AnswerView(SYSTEMS[system], [Piece(answered["answer"], truth=hit(answered))])
            for system, answered in (("start", start[sample["id"]]), ("tuned", sample))
        ]
        picture = sample_picture(sample, demo.regions)
        examples.append(Example(picture, sample["reference"]["captions"][0], views))
    note = (
        "Green: the region. Red: where SC-Tune's own description led it. First regions that the start could not find "
        "again and SC-Tune can, then regions that SC-Tune still misses. The heading is the shortest expression that "
        "picks the thing out."
    )
    return Gallery("Boxes", examples, note, legend=False)


def changed_examples(start: Mapping[str, dict], tuned: Sequence[dict], count: int = 8) -> list[dict]:
    """Samples for the page, one an image: boxes that only `tuned` finds again, then boxes that it misses."""
    images, repaired, missed = set(), [], []
    for sample in tuned:
        if sample["reference"]["image"] in images:
            continue
        if not hit(sample):
            missed.append(sample)
        elif not hit(start[sample["id"]]):
            repaired.append(sample)
        else:
            continue
        images.add(sample["reference"]["image"])
    half = count // 2
    return [*repaired[: count - min(half, len(missed))], *missed[:half]]


def hit(sample: dict) -> bool:
    """Did the description lead back to its box?"""
    return iou(sample["located"], sample["reference"]["box"]) >= 0.5
