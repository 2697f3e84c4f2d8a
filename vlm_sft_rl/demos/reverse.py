"""`vlm-sft-rl demo reverse`: REVERSE from base weights to a report, by the commands and files of real models.

The threshold is chosen on validation scenes; test scenes are only measured.
"""

import dataclasses
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console

from ..data.images import open_image
from ..decoding.config import UNTRIED_FLOOR
from ..decoding.trace import write_trace_html
from ..errors import in_words
from ..evaluation import plots
from ..evaluation.compare import compare
from ..evaluation.decoders import answer_of
from ..evaluation.metrics import load_metric
from ..evaluation.metrics.counting import CountMetric
from ..evaluation.pages import answer_view
from ..evaluation.plots import run_point, sweep, useful_thresholds
from ..evaluation.report import (
    Cell,
    Example,
    Figure,
    Gallery,
    Panels,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    interval_text,
)
from ..evaluation.results import VERIFIER, read_results
from ..evaluation.scoring import phrase_verdicts, verdict_counts
from ..evaluation.specs import load_spec
from ..models.checkpoints import prepare
from ..models.sidecar import read_sidecar, write_sidecar
from ..pocket.dataset import build_world, ground_truth, write_on_policy_rows, write_rows
from ..pocket.language import CAPTION_PROMPT
from ..shapes import AMOUNT, COUNT, Map
from .frame import BASE, DRAWING, MEASURING, TRAINING, Demo, prose, shipped

RECIPE, CONTROL = "reverse/pocket", "reverse/pocket_control"
# grid of thresholds; the paper's 0.003 is below P(</UN>) of the right phrases of a model this size
THRESHOLDS = (0.05, 0.1, 0.3, 0.6)
VALIDATION_SCENES = 120
# a caption of a picture names a thing once; and an answer whose attempts ran out is written to its end, with the doubtful
# phrase marked, instead of cut off
CAPTIONS = {"reject_repeats": True, "on_exhausted": "continue"}
# temperatures of resampling, and what may be left of a rejected phrase: one of each is chosen on validation scenes
TEMPERATURES = (
    {"temperature_span": 0.5, "temperature_step": 0.1},
    {"temperature_span": 0.7, "temperature_step": 0.7},
    {"temperature_span": 1.0, "temperature_step": 0.25},
)
FLOORS = (0.2, 0.05, 0.4)
REPLACED = {"without_replacement": False, "reject_repeats": False, "untried_floor": UNTRIED_FLOOR}
# arXiv 2504.13169, section 4: temperature up to T0 + 0.5 in steps of 0.1, query rewriting
PAPER = {
    **TEMPERATURES[0],
    **REPLACED,
    "rewrite_query": True,
    "on_exhausted": "finish",
}
BATCH = 64
PREPARED = ("pocket/base", "models")
ROWS = (*DRAWING, "data")
TRAINED = (*ROWS, *PREPARED, *TRAINING, *shipped(RECIPE, "pocket_captions"), *shipped(CONTROL))
MEASURED = (*TRAINED, *MEASURING, *shipped(RECIPE, "pocket_captions", "pocket_yesno"), *shipped(CONTROL))
SYSTEMS = {
    "base": "base",
    "control": "control",
    "reverse_greedy": "REVERSE, greedy",
    "reverse_drop": "REVERSE + drop",
    "reverse_stop": "REVERSE + stop",
    "reverse_paper": "REVERSE + paper's resampling",
    "reverse_replaced": "REVERSE + resampling with replacement",
    "reverse_untried": "REVERSE + resampling without replacement",
    "reverse": "REVERSE + the same, repeats rejected",
}
COSTS = ("rejections_per_answer", "tokens_forwarded_per_kept_token")
RESAMPLED = ("reverse_paper", "reverse_replaced", "reverse_untried", "reverse")
ON_POLICY = {"on_policy_greedy": "on-policy, greedy", "on_policy": "on-policy + resampling"}
METRICS = ("chair_i", "chair_i_distinct", "chair_s", "coverage", "repeats", "length")
TRACES = 5


class Reverse(Demo):
    """A demo folder with the pocket world: models that tag their phrases, trained and measured there."""

    def __init__(self, name: str, folder: str | Path, options: dict, **more):
        super().__init__(name, folder, options, **more)
        self.world, self.options = self.folder / "world", options

    def draw(self) -> None:
        """The stages that every set of rows begins with."""
        self.stage("draw the world", lambda: build_world(self.world, seed=self.seed), *DRAWING)
        self.stage("add the verification tokens", self.prepare, *PREPARED)

    def prepare(self) -> None:
        target = self.models / "prepared"
        shutil.rmtree(target, ignore_errors=True)  # of an earlier code
        prepare(BASE, target, init="semantic")

    def write_rows(self) -> None:
        self.console.print(f"  {in_words(write_rows(self.world, self.rows, seed=self.seed))}")

    def teach(self, system: str) -> None:
        overrides = {
            "model_name_or_path": self.models / "prepared",
            "train_file": self.rows / f"{system}.jsonl",
            "image_root": self.world,
        }
        if self.options["steps"] is not None:
            overrides["max_steps"] = self.options["steps"]
        if system != "control":
            overrides |= {"probe_spec": "pocket_captions", "probe_data_dir": self.world}
            overrides |= {"probe_questions": "val_captions.jsonl", "probe_every": 100, "probe_limit": 96}
        self.train(CONTROL if system == "control" else RECIPE, system, **overrides)

    def choose(self, system: str) -> None:
        """Choose the settings of resampling on validation scenes; the choice goes beside the checkpoint.

        First τ and whether to rewrite the query, then temperatures and floor. The rule: the highest F1 of precision
        (1 − CHAIR-i over distinct objects) and recall (coverage); the earlier one where two are equal.
        """
        first = [
            {"threshold": tau, "rewrite_query": rewrite, **TEMPERATURES[0], "untried_floor": FLOORS[0]}
            for tau in THRESHOLDS
            for rewrite in (True, False)
        ]
        scores = [self.score(system, settings) for settings in first]
        chosen = first[int(np.argmax(scores))]
        second = [
            {**chosen, **schedule, "untried_floor": floor} for schedule in TEMPERATURES for floor in FLOORS
        ]
        scores = [max(scores), *(self.score(system, settings) for settings in second[1:])]
        chosen = second[int(np.argmax(scores))]
        self.console.print(f"  chosen: {settings_text(chosen)}")
        folder, tau = self.models / system, chosen.pop("threshold")
        decoding = {**chosen, **CAPTIONS}
        write_sidecar(folder, dataclasses.replace(read_sidecar(folder), threshold=tau, decoding=decoding))

    def score(self, system: str, settings: dict) -> float:
        """F1 of captions of validation scenes."""
        spec = load_spec("pocket_captions")
        spec = dataclasses.replace(spec, questions=spec.questions.replace("test", "val"))
        metrics = self.evaluate(
            spec,
            system,
            f"{system}-{'-'.join(f'{float(value):g}' for value in settings.values())}-pocket_captions-val",
            self.world,
            decoder="retrospective",
            settings={**settings, **CAPTIONS},
            limit=VALIDATION_SCENES,
            batch_size=BATCH,
        )["metrics"]
        chair, coverage = (metrics[key]["value"] for key in ("chair_i_distinct", "coverage"))
        f1 = 2 * (1 - chair) * coverage / max(1e-9, 1 - chair + coverage)
        self.console.print(
            f"  {settings_text(settings)}: CHAIR-i {chair:.3f}, coverage {coverage:.3f}, F1 {f1:.3f}"
        )
        return f1

    def threshold(self, system: str) -> float:
        """The chosen one."""
        return read_sidecar(self.models / system).threshold

    def caption(
        self,
        system: str,
        model: str,
        decoder: str = "greedy",
        settings: dict | None = None,
        greedy_run: Path | None = None,
    ) -> None:
        """Measure captions of the test scenes."""
        metrics = self.evaluate(
            "pocket_captions",
            model,
            captions(system),
            self.world,
            decoder=decoder,
            settings=settings,
            limit=self.options["scenes"],
            batch_size=BATCH,
            greedy_run=greedy_run,
        )["metrics"]
        chair, coverage = (metrics[key]["value"] for key in ("chair_i", "coverage"))
        self.console.print(f"  {system}: CHAIR-i {chair:.3f}, coverage {coverage:.3f}")

    def summary(self, run: str) -> dict:
        return read_results(self.run_dir(run), cost=Map(AMOUNT), verifier=(VERIFIER, None), n_not_ok=COUNT)


def settings_text(settings: dict) -> str:
    """One line of the settings that are chosen."""
    return (
        f"τ {settings['threshold']:g} {'with' if settings['rewrite_query'] else 'without'} rewriting, temperature up to "
        f"{settings['temperature_span']:g} by {settings['temperature_step']:g}, floor {settings['untried_floor']:g}"
    )


def captions(system: str) -> str:
    """The run of a system on the captions of test scenes."""
    return f"{system}-pocket_captions-test"


def run(
    output_dir: str | Path,
    *,
    seed: int = 0,
    scenes: int = 400,
    on_policy: bool = False,
    steps: int | None = None,
    keep_stale: bool = False,
    console: Console | None = None,
) -> dict:
    """Run or resume the demo and return its summary.

    Args:
        keep_stale: go on with stages that another version of this package finished.

    Raises UserError: `output_dir` holds a demo with other settings or of other code, or a stage failed.
    """
    options = {"seed": seed, "scenes": scenes, "on_policy": on_policy, "steps": steps}
    demo = Reverse("reverse", output_dir, options, keep_stale=keep_stale, console=console)
    demo.draw()
    demo.stage("build the rows", demo.write_rows, *ROWS)
    demo.stage("train the control", lambda: demo.teach("control"), *TRAINED)
    demo.stage("train the verifier", lambda: demo.teach("reverse"), *TRAINED)
    if on_policy:
        captioned = (*TRAINED, "decoding")
        demo.stage(
            "caption the training images with the base", lambda: _caption_training_images(demo), *captioned
        )
        demo.stage("train on on-policy tags", lambda: demo.teach("on_policy"), *captioned)
    demo.stage("choose the decoding on validation scenes", lambda: demo.choose("reverse"), *MEASURED)
    if on_policy:
        demo.stage("choose the on-policy decoding", lambda: demo.choose("on_policy"), *MEASURED)
    demo.stage("measure on test scenes", lambda: _measure(demo), *MEASURED)
    return _finish(demo)


def _caption_training_images(demo: Reverse) -> None:
    """The base's own captions, greedy and at a temperature of 0.7, of the images that the other systems learn from."""
    from ..decoding import SamplingConfig, generate_plain
    from ..models.load import load_for_inference

    truth = {path: nouns for path, nouns in ground_truth(demo.world).items() if "/train/" in path}
    model, processor, _ = load_for_inference(BASE)
    images = [open_image(path, demo.world) for path in truth]
    samples = []
    for temperature in (0.0, 0.7):
        config = SamplingConfig(temperature=temperature, max_new_tokens=96, seed=demo.seed)
        prompts = [CAPTION_PROMPT] * len(images)
        answers = generate_plain(model, processor, images, prompts, config, batch_size=BATCH)
        samples += [
            {
                "id": f"{Path(path).stem}-{temperature}",
                "images": [path],
                "prompt": CAPTION_PROMPT,
                "answer": answer.text,
                "reference": {"objects": truth[path]},
            }
            for path, answer in zip(truth, answers, strict=True)
        ]
    counts = write_on_policy_rows(demo.world, samples, demo.rows, seed=demo.seed)
    demo.console.print(f"  {in_words(counts)}")


def _measure(demo: Reverse) -> None:
    greedy, tau = demo.run_dir(captions("reverse_greedy")), demo.threshold("reverse")
    demo.caption("base", "prepared")
    demo.caption("control", "control")
    demo.caption("reverse_greedy", "reverse")
    for mode in ("drop", "stop"):
        demo.caption(f"reverse_{mode}", "reverse", mode, greedy_run=greedy)
    demo.caption("reverse", "reverse", "retrospective", {"threshold": tau})
    demo.caption("reverse_untried", "reverse", "retrospective", {"threshold": tau, "reject_repeats": False})
    demo.caption("reverse_replaced", "reverse", "retrospective", {"threshold": tau, **REPLACED})
    demo.caption("reverse_paper", "reverse", "retrospective", {"threshold": tau, **PAPER})
    for point in THRESHOLDS:
        if point == tau:
            # the same run again
            again = demo.run_dir(captions(f"reverse-{point:g}"))
            shutil.copytree(demo.run_dir(captions("reverse")), again, dirs_exist_ok=True)
        else:
            demo.caption(f"reverse-{point:g}", "reverse", "retrospective", {"threshold": point})
    if "on_policy" in _systems(demo):
        demo.caption("on_policy_greedy", "on_policy")
        settings = {"threshold": demo.threshold("on_policy")}
        demo.caption("on_policy", "on_policy", "retrospective", settings)
    for system, model in (("base", "prepared"), ("control", "control"), ("reverse", "reverse")):
        run = f"{system}-pocket_yesno-test"
        metrics = demo.evaluate("pocket_yesno", model, run, demo.world, batch_size=BATCH)["metrics"]
        demo.console.print(f"  {system}: yes/no accuracy {metrics['accuracy']['value']:.3f}")


def _systems(demo: Reverse) -> dict[str, str]:
    return SYSTEMS | (ON_POLICY if demo.options["on_policy"] else {})


# --- What the demo shows at its end: a table on the terminal, summary.json, report.html with traced examples ---


def _finish(demo: Reverse) -> dict:
    runs = {name: demo.summary(captions(name)) for name in _systems(demo)}
    resampled, greedy = runs["reverse"], runs["reverse_greedy"]
    cost = {k: resampled["cost"][k] for k in ("tokens_forwarded_per_kept_token", "image_encodes_per_answer")}
    cost["greedy_tokens_forwarded_per_kept_token"] = runs["control"]["cost"][
        "tokens_forwarded_per_kept_token"
    ]
    yes_no = {name: demo.summary(f"{name}-pocket_yesno-test") for name in ("base", "control", "reverse")}
    differences = {}
    for other in ("base", "control"):
        folders = [demo.run_dir(captions(name)) for name in ("reverse", other)]
        metrics = compare(*folders, seed=demo.seed)["metrics"]
        differences[f"reverse_minus_{other}"] = {n: _short(metrics[n]["difference"]) for n in METRICS}
    summary = {
        "method": "reverse",
        "n": resampled["n"],
        "seed": demo.seed,
        "seconds": round(sum(demo.stages.seconds.values()), 1),
        "threshold": resampled["threshold"],
        "decoding": read_sidecar(demo.models / "reverse").decoding,
        "systems": {name: {key: _short(r["metrics"][key]) for key in METRICS} for name, r in runs.items()},
        "resampling": {name: _resampling(demo, name, runs[name]) for name in RESAMPLED},
        "yes_no": {
            n: {key: _short(r["metrics"][key]) for key in ("accuracy", "f1")} for n, r in yes_no.items()
        },
        "differences": differences,
        "verifier": greedy["verifier"],
        "cost": cost,
        "not_fully_verified": resampled["n_not_ok"],
        "nothing_to_verify": verdict_counts(demo.samples(captions("reverse")))["nothing_to_verify"],
        "stages": demo.stages.seconds,
        "stale_stages": demo.stages.stale,
    }
    demo.console.print(
        f"τ = {summary['threshold']:g}; {cost['tokens_forwarded_per_kept_token']:.2f} tokens forwarded per kept token "
        f"(greedy {cost['greedy_tokens_forwarded_per_kept_token']:.2f}), {cost['image_encodes_per_answer']:.2f} image "
        f"encodes per answer; {summary['not_fully_verified']} answers not fully verified, {summary['nothing_to_verify']} "
        f"with nothing to verify; {summary['seconds']:.0f} s"
    )
    spec = load_spec("pocket_captions")
    metric = load_metric(spec.metric, spec.metric_options)
    title = f"Captions of {summary['n']} unbiased test scenes (95 % bootstrap intervals)"
    return demo.finish(
        summary,
        _table(
            demo,
            summary,
            title,
            {
                "chair_i": "CHAIR-i ↓",
                "chair_i_distinct": "distinct ↓",
                "coverage": "coverage ↑",
                "repeats": "repeats ↓",
            },
        ),
        "REVERSE on the pocket world",
        _sections(demo, summary, metric),
        f"{summary['n']} test scenes, seed {summary['seed']}, {summary['seconds'] / 60:.1f} minutes"
        + (f"; by another version: {', '.join(summary['stale_stages'])}" if summary["stale_stages"] else ""),
    )


def _resampling(demo: Reverse, system: str, result: dict) -> dict:
    """What resampling came to in a run, and what it cost."""
    samples = demo.samples(captions(system))
    rejections = sum(event["kind"] == "reject" for sample in samples for event in sample["trace"])
    return {
        "verified": 1 - result["n_not_ok"] / result["n"],
        "rejections_per_answer": rejections / len(samples),
        "tokens_forwarded_per_kept_token": result["cost"]["tokens_forwarded_per_kept_token"],
    }


def _short(interval: dict) -> dict:
    return {key: interval[key] for key in ("value", "low", "high")}


def _table(demo: Reverse, summary: dict, title: str, metrics: dict[str, str], note: str = "") -> Table:
    rows = []
    for name, label in _systems(demo).items():
        tone = "good" if name == "reverse" else "plain"
        figures = [interval_text(summary["systems"][name][key]) for key in metrics]
        rows.append([Cell(label, tone), *(Cell(text, tone) for text in figures)])
    return Table(title, ["system", *metrics.values()], rows, note)


def _sections(demo: Reverse, summary: dict, metric: CountMetric) -> list[Section]:
    greedy = demo.samples(captions("reverse_greedy"))
    points = {name: run_point(demo.run_dir(captions(name))) for name in _systems(demo)}
    curves = {"retrospective": [run_point(demo.run_dir(captions(f"reverse-{tau:g}"))) for tau in THRESHOLDS]}
    for mode in ("drop", "stop"):
        curves[mode] = sweep(greedy, metric, mode, useful_thresholds(greedy), seed=demo.seed)
    lone = {"base": points["base"], "control": points["control"], "REVERSE greedy": points["reverse_greedy"]}
    intervals = {label: points[name].metrics for name, label in _systems(demo).items()}
    history = demo.history("reverse")
    probes = {
        "verifier_auc": "ROC area at own phrases",
        "verifier_p_wrong": "P(</UN>) on wrong phrases",
        "verifier_p_right": "P(</UN>) on right phrases",
    }
    tiles = [
        Tile(label, f"{100 * summary['systems'][name]['chair_i']['value']:.1f} %", note, tone)
        for label, name, note, tone in (
            ("Base", "base", "of named objects are not there", "bad"),
            ("Control", "control", "after plain fine-tuning", "bad"),
            ("REVERSE", "reverse", "with retrospective resampling", "good"),
        )
    ]
    return [
        Tiles("Hallucinated objects (CHAIR-i)", tiles),
        prose(
            "reverse",
            settings=settings_text({"threshold": summary["threshold"], **summary["decoding"]}),
        ),
        _table(
            demo,
            summary,
            "Systems",
            {name: name for name in METRICS},
            f"n = {summary['n']} unbiased test scenes, seed {summary['seed']}; 95 % percentile bootstrap over scenes. base "
            "and control: greedy captions, before and after fine-tuning on the same true captions without tags. drop leaves "
            "out every doubtful phrase of the greedy answer, stop ends before the first. The paper's resampling rewrites "
            "the query and cuts an answer off where attempts ran out; the rows behind it have the settings chosen on "
            "validation scenes. With replacement, a rejected continuation may be drawn again; the last row also rejects a "
            "phrase that the answer has already. chair_i_distinct counts every object of a caption once, repeats the "
            "captions that name an object twice.",
        ),
        Table(
            "What resampling cost",
            ["system", "all verified", "rejections an answer", "tokens forwarded per kept token"],
            [
                [SYSTEMS[name], f"{row['verified']:.1%}", *(f"{row[key]:.2f}" for key in COSTS)]
                for name, row in summary["resampling"].items()
            ],
        ),
        Panels("", plots.intervals_by_system(intervals, METRICS[1:5]), wide=True),
        Figure(
            "What a threshold buys and costs",
            partial(plots.tau_tradeoff, curves, lone),
            "Down is fewer hallucinations, right is more objects named. Each line follows τ on the test scenes; the "
            "threshold of the table was chosen elsewhere.",
        ),
        _verifier((summary["verifier"] or {}).get("auc"), greedy, metric),
        Panels(
            "Training",
            plots.training_curves(history, probes),
            "Over training steps, measured every 100 of them on validation scenes.",
        ),
        _examples(demo, metric, summary["threshold"]),
        Table(
            "Stages",
            ["stage", "seconds"],
            [[name, f"{seconds:.0f}"] for name, seconds in demo.stages.seconds.items()],
            folded=True,
        ),
    ]


def _verifier(area: dict | None, greedy: list[dict], metric: CountMetric) -> Section:
    if not area or area["low"] is None:
        text = "All phrases of the greedy captions are right, or all are wrong: no ROC curve can be drawn."
        return Text("The verifier", text)
    verdicts = np.concatenate(phrase_verdicts(greedy, metric))
    draw = partial(plots.verifier_roc, {"own phrases": (verdicts[:, 0], verdicts[:, 1] > 0.5)})
    caption = f"P(</UN>) as a detector of wrong phrases in the model's own greedy captions; area {interval_text(area)}."
    return Figure("The verifier", draw, caption)


def _examples(demo: Reverse, metric: CountMetric, threshold: float) -> Gallery:
    """The first answers in which something was rejected and the control hallucinates, each with a page of its trace."""
    others = {name: {s["id"]: s for s in demo.samples(captions(name))} for name in ("base", "control")}

    def shows_help(sample: dict) -> bool:
        if not any(event["kind"] == "reject" for event in sample["trace"]):
            return False
        answer = others["control"][sample["id"]]["answer"]
        return metric.badness(metric.counts([answer], [sample["reference"]["objects"]])[0])[0] > 0

    examples = []
    chosen = islice(filter(shows_help, demo.samples(captions("reverse"))), TRACES)
    for number, sample in enumerate(chosen, 1):
        path = demo.folder / "traces" / f"{number}-{sample['id']}.html"
        image = open_image(sample["images"][0], demo.world)
        write_trace_html(answer_of(sample, threshold), image, path)
        views = [answer_view(name, answers[sample["id"]], metric) for name, answers in others.items()]
        views.append(answer_view("REVERSE", sample, metric, verifies=True))
        question = f"{sample['prompt']}  (there: {', '.join(sample['reference']['objects'])})"
        link = f"traces/{path.name}"
        examples.append(Example(image, question, views, "how this answer came about", link))
    note = "The first test scenes in which the control is wrong and the verifier rejected something, in file order."
    return Gallery("Examples", examples, note)
