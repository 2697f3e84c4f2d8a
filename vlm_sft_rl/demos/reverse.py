"""`vlm-sft-rl demo reverse`: REVERSE from base weights to a report, by the commands and files of real models.

Every stage writes its result and is left out when the result is there, so an interrupted demo goes on where it was.
The threshold is chosen on validation scenes; test scenes are only measured.
"""

import dataclasses
import json
import shutil
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as TerminalTable

from ..data.images import open_image
from ..decoding.trace import write_trace_html
from ..errors import UserError
from ..evaluation import plots, report
from ..evaluation.compare import compare
from ..evaluation.decoders import answer_of
from ..evaluation.metrics import load_metric
from ..evaluation.pages import answer_view
from ..evaluation.plots import run_point, sweep, useful_thresholds
from ..evaluation.report import interval_text
from ..evaluation.runner import evaluate_spec
from ..evaluation.scoring import phrase_verdicts
from ..evaluation.specs import EvalOptions, load_spec
from ..io import read_json, write_json
from ..launch import launch_training
from ..models.checkpoints import prepare
from ..models.sidecar import read_sidecar, write_sidecar
from ..pocket.dataset import build_world, ground_truth, write_on_policy_rows, write_rows
from ..recipes import find
from ..runs import Stages, read_samples, versions

BASE = Path(__file__).parents[1] / "pocket" / "base"
# grid of thresholds; the paper's 0.003 is below P(</UN>) of the right phrases of a model this size
THRESHOLDS = (0.05, 0.1, 0.3, 0.6)
VALIDATION_SCENES = 120
# a model this small is so sure of a companion that a temperature of 0.5 hardly ever leaves it out; and an answer whose
# attempts ran out is written to its end, with the doubtful phrase marked, instead of cut off
SCHEDULE = {"temperature_span": 1.0, "temperature_step": 0.25, "on_exhausted": "continue"}
# arXiv 2504.13169, section 4: temperature up to T0 + 0.5 in steps of 0.1, query rewriting
PAPER_SCHEDULE = {
    "rewrite_query": True,
    "temperature_span": 0.5,
    "temperature_step": 0.1,
    "on_exhausted": "finish",
}
BATCH = 64
# what the results of the stages depend on, besides the settings
WORLD = ("pocket/world.py", "pocket/render.py", "pocket/language.py", "pocket/dataset.py")
PREPARED = ("pocket/base", "models")
ROWS = (*WORLD, "data")
TRAINED = (*ROWS, *PREPARED, "trainers", "methods", "train.py", find("recipes", "reverse/pocket"))
SPECS = (find("eval", "pocket_captions"), find("eval", "pocket_yesno"))
MEASURED = (*TRAINED, "decoding", "evaluation", "demos/reverse.py", *SPECS)


class Demo:
    """One demo folder: its stages, and the systems that were measured."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        scenes: int,
        on_policy: bool,
        steps: int | None,
        console: Console,
        keep_stale: bool = False,
    ):
        self.folder, self.seed, self.console, self.on_policy = folder, seed, console, on_policy
        self.world, self.models, self.rows = folder / "world", folder / "models", folder / "rows"
        self.limit, self.steps = scenes, steps
        self.command = f"vlm-sft-rl demo reverse --output-dir {folder} --seed {seed} --scenes {scenes}"
        self.command += (" --on-policy" if on_policy else "") + (f" --steps {steps}" if steps else "")
        settings = {"seed": seed, "scenes": scenes, "on_policy": on_policy, "steps": steps}
        path = folder / "demo.json"
        if path.exists() and read_json(path) != settings:
            raise UserError(
                f"{path}: this folder holds a demo with other settings ({json.dumps(read_json(path))}). Choose another "
                "--output-dir or delete the folder."
            )
        write_json(path, settings)
        self.stages = Stages(folder, console, keep_stale=keep_stale)

    def train(self, system: str) -> None:
        """Train in a process of its own through `accelerate launch`, as a user would."""
        overrides = {
            "model_name_or_path": self.models / "prepared",
            "train_file": self.rows / f"{system}.jsonl",
            "image_root": self.world,
            "output_dir": self.models / system,
            "seed": self.seed,
        }
        if self.steps is not None:
            overrides["max_steps"] = self.steps
        if system != "control":
            overrides |= {"probe_spec": "pocket_captions", "probe_data_dir": self.world}
            overrides |= {"probe_questions": "val_captions.jsonl", "probe_every": 100, "probe_limit": 96}
        words = [word for key, value in overrides.items() for word in (f"--{key}", str(value))]
        status = launch_training("reverse/pocket", words, "cpu")
        if status:
            raise UserError(f"training {system} failed with status {status}; the message is above.")

    def retrospective(
        self, system: str, model: str, threshold: float, *, split: str = "test", limit=None, **settings
    ) -> dict:
        """Evaluate retrospective resampling; `settings` are fields of `RetrospectiveConfig`."""
        settings = {"threshold": threshold, **settings}
        return self.evaluate(
            system, model, split=split, limit=limit, decoder="retrospective", settings=settings
        )

    def choice(self, system: str) -> dict:
        """What was chosen on validation scenes: `threshold` and `rewrite_query`."""
        sidecar = read_sidecar(self.models / system)
        return {"threshold": sidecar.threshold, "rewrite_query": sidecar.decoding["rewrite_query"]}

    def evaluate(
        self,
        system: str,
        model: str,
        spec: str = "pocket_captions",
        split: str = "test",
        limit: int | None = None,
        decoder: str = "greedy",
        settings: dict | None = None,
        greedy_run: Path | None = None,
    ) -> dict:
        spec = load_spec(spec)
        if split != "test":
            spec = dataclasses.replace(spec, questions=spec.questions.replace("test", split))
        name = f"{system}-{spec.name}-{split}"
        return evaluate_spec(
            spec,
            self.models / model,
            output_dir=self.folder / "eval" / name,
            data_dir=self.world,
            decoder=decoder,
            settings=settings,
            options=EvalOptions(
                limit=self.limit if spec.name == "pocket_captions" and split == "test" else limit,
                seed=self.seed,
                batch_size=BATCH,
                greedy_run=greedy_run,
            ),
            console=Console(quiet=True),
        )

    def run_dir(self, system: str, spec: str = "pocket_captions", split: str = "test") -> Path:
        return self.folder / "eval" / f"{system}-{spec}-{split}"

    def summary(self, system: str, spec: str = "pocket_captions", split: str = "test") -> dict:
        return read_json(self.run_dir(system, spec, split) / "summary.json")

    def samples(self, system: str, spec: str = "pocket_captions", split: str = "test") -> list[dict]:
        return read_samples(self.run_dir(system, spec, split))


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

    Raises:
        UserError: `output_dir` holds a demo with other settings or of other code, or a stage failed.
    """
    from transformers.utils import logging

    pass

    logging.disable_progress_bar()  # a bar for every loading of a small model hides the demo's own progress
    console = console or Console()
    demo = Demo(Path(output_dir), seed, scenes, on_policy, steps, console, keep_stale)
    stage = demo.stages.run
    stage("draw the world", lambda: build_world(demo.world, seed=seed), WORLD)
    stage(
        "add the verification tokens",
        lambda: prepare(BASE, demo.models / "prepared", init="semantic"),
        PREPARED,
    )
    stage("build the rows", lambda: console.print(write_rows(demo.world, demo.rows, seed=seed)), ROWS)
    stage("train the control", lambda: demo.train("control"), TRAINED)
    stage("train the verifier", lambda: demo.train("reverse"), TRAINED)
    if on_policy:
        captioned = (*TRAINED, "decoding", "demos/reverse.py")
        stage("caption the training images with the base", lambda: _caption_training_images(demo), captioned)
        stage("train on on-policy tags", lambda: demo.train("on_policy"), captioned)
    stage("choose the decoding on validation scenes", lambda: _choose(demo, "reverse"), MEASURED)
    if on_policy:
        stage("choose the on-policy decoding", lambda: _choose(demo, "on_policy"), MEASURED)
    stage("measure on test scenes", lambda: _measure(demo), MEASURED)
    return finish(demo)


def _caption_training_images(demo: Demo) -> None:
    """The base's own captions, greedy and at a temperature of 0.7, of the images that the other systems learn from."""
    from ..data.images import open_image
    from ..decoding import SamplingConfig, generate_plain
    from ..models.load import load_for_inference
    from ..pocket.language import CAPTION_PROMPT

    truth = {path: nouns for path, nouns in ground_truth(demo.world).items() if "/train/" in path}
    model, processor, _ = load_for_inference(BASE)
    images = [open_image(path, demo.world) for path in truth]
    samples = []
    for temperature in (0.0, 0.7):
        answers = generate_plain(
            model,
            processor,
            images,
            [CAPTION_PROMPT] * len(images),
            SamplingConfig(temperature=temperature, max_new_tokens=96, seed=demo.seed),
            batch_size=BATCH,
        )
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
    demo.console.print(write_on_policy_rows(demo.world, samples, demo.rows, seed=demo.seed))


def _choose(demo: Demo, system: str) -> None:
    """Choose τ, and whether to rewrite the query, on validation scenes; the choice goes beside the checkpoint.

    The rule: the highest F1 of precision (1 − CHAIR-i) and recall (coverage); the lower τ where two are equal.
    """
    scores = {}
    for rewrite in (True, False):
        for tau in THRESHOLDS:
            metrics = demo.retrospective(
                f"{system}-{tau:g}-{'rewriting' if rewrite else 'plain'}",
                system,
                tau,
                split="val",
                limit=VALIDATION_SCENES,
                rewrite_query=rewrite,
                **SCHEDULE,
            )["metrics"]
            chair, coverage = (metrics[key]["value"] for key in ("chair_i", "coverage"))
            scores[tau, rewrite] = f1 = 2 * (1 - chair) * coverage / max(1e-9, 1 - chair + coverage)
            words = "with" if rewrite else "without"
            demo.console.print(
                f"  τ {tau:g} {words} rewriting: CHAIR-i {chair:.3f}, coverage {coverage:.3f}, F1 {f1:.3f}"
            )
    tau, rewrite = max(scores, key=lambda setting: (scores[setting], -setting[0]))
    folder = demo.models / system
    decoding = {"rewrite_query": rewrite, **SCHEDULE}
    write_sidecar(folder, dataclasses.replace(read_sidecar(folder), threshold=tau, decoding=decoding))
    demo.console.print(f"  chosen: τ {tau:g}, {'with' if rewrite else 'without'} rewriting")


def _measure(demo: Demo) -> None:
    def show(system: str, summary: dict) -> None:
        chair, coverage = (summary["metrics"][key]["value"] for key in ("chair_i", "coverage"))
        demo.console.print(f"  {system}: CHAIR-i {chair:.3f}, coverage {coverage:.3f}")

    for system, model in (("base", "prepared"), ("control", "control"), ("reverse_greedy", "reverse")):
        show(system, demo.evaluate(system, model, decoder="greedy"))
    greedy = demo.run_dir("reverse_greedy")
    tau = demo.choice("reverse")["threshold"]
    for mode in ("drop", "stop"):
        show(f"reverse_{mode}", demo.evaluate(f"reverse_{mode}", "reverse", decoder=mode, greedy_run=greedy))
    show("reverse", demo.retrospective("reverse", "reverse", tau))
    show("reverse_paper", demo.retrospective("reverse_paper", "reverse", tau, **PAPER_SCHEDULE))
    for point in THRESHOLDS:
        if point == tau:
            # the same run again
            shutil.copytree(demo.run_dir("reverse"), demo.run_dir(f"reverse-{point:g}"), dirs_exist_ok=True)
        else:
            show(f"reverse-{point:g}", demo.retrospective(f"reverse-{point:g}", "reverse", point))
    if demo.on_policy:
        show("on_policy_greedy", demo.evaluate("on_policy_greedy", "on_policy", decoder="greedy"))
        show("on_policy", demo.retrospective("on_policy", "on_policy", demo.choice("on_policy")["threshold"]))
    for system, model in (("base", "prepared"), ("control", "control"), ("reverse", "reverse")):
        metrics = demo.evaluate(system, model, spec="pocket_yesno", decoder="greedy")["metrics"]
        demo.console.print(f"  {system}: yes/no accuracy {metrics['accuracy']['value']:.3f}")


# What the demo shows at its end: a table on the terminal, summary.json, report.html with plots and traced examples.
SYSTEMS = {
    "base": "base",
    "control": "control",
    "reverse_greedy": "REVERSE, greedy",
    "reverse_drop": "REVERSE + drop",
    "reverse_stop": "REVERSE + stop",
    "reverse_paper": "REVERSE + paper's resampling",
    "reverse": "REVERSE + resampling",
}
ON_POLICY = {"on_policy_greedy": "on-policy, greedy", "on_policy": "on-policy + resampling"}
LEGEND = (
    "base and control: greedy captions, before and after fine-tuning on the same true captions without tags. drop leaves "
    "out every doubtful phrase of the greedy answer, stop ends before the first. The paper's resampling raises the "
    "temperature to at most 0.5 and rewrites the query; resampling is the setting chosen on validation scenes, with "
    "temperatures up to 1."
)
METRICS = ("chair_i", "chair_s", "coverage", "length")
TRACES = 5


def finish(demo) -> dict:
    """Write summary.json, the traces and report.html; print the table; return the summary."""
    pass

    systems = SYSTEMS | (ON_POLICY if demo.on_policy else {})
    runs = {name: demo.summary(name) for name in systems}
    main = runs["reverse"]
    summary = {
        "method": "reverse",
        "n": main["n"],
        "seed": demo.seed,
        "seconds": round(sum(demo.stages.seconds.values()), 1),
        "threshold": main["threshold"],
        "rewrite_query": demo.choice("reverse")["rewrite_query"],
        "systems": {
            name: {key: _short(run["metrics"][key]) for key in METRICS} for name, run in runs.items()
        },
        "yes_no": {
            name: {
                key: _short(demo.summary(name, "pocket_yesno")["metrics"][key]) for key in ("accuracy", "f1")
            }
            for name in ("base", "control", "reverse")
        },
        "differences": _differences(demo),
        "verifier": runs["reverse_greedy"]["verifier"],
        "cost": {
            key: main["cost"][key] for key in ("tokens_forwarded_per_kept_token", "image_encodes_per_answer")
        }
        | {
            "greedy_tokens_forwarded_per_kept_token": runs["control"]["cost"][
                "tokens_forwarded_per_kept_token"
            ]
        },
        "not_fully_verified": main["n_not_ok"],
        "stages": demo.stages.seconds,
        "stale_stages": demo.stages.stale,
        "versions": versions(),
    }
    write_json(demo.folder / "summary.json", summary)
    spec = load_spec("pocket_captions")
    metric = load_metric(spec.metric, spec.metric_options)
    traces = _write_traces(demo, metric, main["threshold"])
    page = _write_report(demo, systems, summary, metric, traces, THRESHOLDS)
    _print(demo, systems, summary, page)
    return summary


def _short(interval: dict) -> dict:
    return {key: interval[key] for key in ("value", "low", "high")}


def _differences(demo) -> dict:
    """Paired differences, question by question, of retrospective resampling against base and control."""
    found = {}
    for other in ("base", "control"):
        result = compare(demo.run_dir("reverse"), demo.run_dir(other), seed=demo.seed)
        found[f"reverse_minus_{other}"] = {
            name: _short(result["metrics"][name]["difference"]) for name in METRICS
        }
    return found


def _write_traces(demo, metric, threshold: float) -> list[tuple[dict, Path]]:
    """Pages of the first answers in which something was rejected and the control hallucinates."""
    plain = {sample["id"]: sample for sample in demo.samples("control")}

    def shows_help(sample: dict) -> bool:
        if not any(event["kind"] == "reject" for event in sample["trace"]):
            return False
        control = metric.counts([plain[sample["id"]]["answer"]], [sample["reference"]["objects"]])[0]
        return metric.badness(control)[0] > 0

    chosen = islice(filter(shows_help, demo.samples("reverse")), TRACES)
    pages = []
    for number, sample in enumerate(chosen, 1):
        path = demo.folder / "traces" / f"{number}-{sample['id']}.html"
        write_trace_html(answer_of(sample, threshold), open_image(sample["images"][0], demo.world), path)
        pages.append((sample, path))
    return pages


def _write_report(demo, systems: dict, summary: dict, metric, traces: list, thresholds) -> Path:
    greedy = demo.samples("reverse_greedy")
    curves = {"retrospective": [run_point(demo.run_dir(f"reverse-{tau:g}")) for tau in thresholds]}
    taus = useful_thresholds(greedy)
    for mode in ("drop", "stop"):
        curves[mode] = sweep(greedy, metric, mode, taus, seed=demo.seed)
    points = {name: run_point(demo.run_dir(name)) for name in ("base", "control")}
    points["REVERSE greedy"] = run_point(demo.run_dir("reverse_greedy"))
    history = read_json(demo.models / "reverse" / "trainer_state.json")["log_history"]
    rows = [
        [
            label,
            *(report.Cell(interval_text(summary["systems"][name][key]), _tone(name)) for key in METRICS),
        ]
        for name, label in systems.items()
    ]
    tiles = [
        report.Tile(label, f"{100 * summary['systems'][name]['chair_i']['value']:.1f} %", note, tone)
        for label, name, note, tone in (
            ("Base", "base", "of named objects are not there", "bad"),
            ("Control", "control", "after plain fine-tuning", "bad"),
            ("REVERSE", "reverse", "with retrospective resampling", "good"),
        )
    ]
    area = (summary["verifier"] or {}).get("auc")
    sections = [
        report.Tiles("Hallucinated objects (CHAIR-i)", tiles),
        report.Text(
            "What was done",
            "A small vision-language model, pre-trained on rendered scenes in which some objects usually stand together, "
            "names the partner of an object even where it is missing. REVERSE (arXiv 2504.13169) teaches it to close each "
            "phrase with </CN> (grounded) or </UN> (hallucinated), and rewinds whatever is doubtful while it answers.\n\n"
            "The control saw the same images and the same true captions for as many steps, without tags. The threshold "
            f"τ = {summary['threshold']:g} and decoding {'with' if summary['rewrite_query'] else 'without'} query rewriting "
            "were chosen on validation scenes. These are results of the pocket model: they "
            "show the direction of the method, not the figures of a 7B model.",
        ),
        report.Table(
            "Systems",
            ["system", *METRICS],
            rows,
            f"n = {summary['n']} unbiased test scenes, seed {summary['seed']}; 95 % percentile bootstrap over scenes. "
            + LEGEND,
        ),
        report.Figure(
            "",
            partial(
                plots.intervals_by_system,
                {label: _intervals(demo, name) for name, label in systems.items()},
                ("chair_i", "chair_s", "coverage"),
            ),
        ),
        report.Figure(
            "What a threshold buys and costs",
            partial(plots.tau_tradeoff, curves, points),
            "Down is fewer hallucinations, right is more objects named. Each line follows τ on the test scenes; the "
            "threshold of the table was chosen elsewhere.",
        ),
        *_verifier(area, demo, metric),
        report.Figure(
            "Training",
            partial(
                plots.training_curves,
                history,
                {
                    "verifier_auc": "ROC area at own phrases",
                    "verifier_p_wrong": "P(</UN>) on wrong phrases",
                    "verifier_p_right": "P(</UN>) on right phrases",
                },
            ),
            "Measured every 100 steps on validation scenes.",
        ),
        _gallery(demo, metric, traces),
        report.Table(
            "Stages",
            ["stage", "seconds"],
            [[k, f"{v:.0f}"] for k, v in demo.stages.seconds.items()],
            folded=True,
        ),
    ]
    return report.render_report(
        "REVERSE on the pocket world",
        sections,
        demo.folder / "report.html",
        subtitle=f"{summary['n']} test scenes, seed {summary['seed']}, {summary['seconds'] / 60:.1f} minutes"
        + "".join(f"; by another version: {name}" for name in summary["stale_stages"]),
        command=demo.command,
    )


def _verifier(area: dict | None, demo, metric) -> list:
    if not area or area["low"] is None:
        text = "All phrases of the greedy captions are right, or all are wrong: no ROC curve can be drawn."
        return [report.Text("The verifier", text)]
    verdicts = np.concatenate(phrase_verdicts(demo.samples("reverse_greedy"), metric))
    curves = {"own phrases": (verdicts[:, 0], verdicts[:, 1] > 0.5)}
    caption = f"P(</UN>) as a detector of wrong phrases in the model's own greedy captions; area {interval_text(area)}."
    return [report.Figure("The verifier", partial(plots.verifier_roc, curves), caption)]


def _tone(name: str) -> str:
    return "strong" if name == "reverse" else "plain"


def _intervals(demo, name: str) -> dict:
    return run_point(demo.run_dir(name)).metrics


def _gallery(demo, metric, traces: list) -> report.Gallery:
    answers = {name: {s["id"]: s for s in demo.samples(name)} for name in ("base", "control")}
    examples = []
    for sample, path in traces:
        views = [answer_view(name, answers[name][sample["id"]], metric) for name in answers]
        views.append(answer_view("REVERSE", sample, metric))
        truth = ", ".join(sample["reference"]["objects"])
        examples.append(
            report.Example(
                open_image(sample["images"][0], demo.world),
                f"{sample['prompt']}  (there: {truth})",
                views,
                "how this answer came about",
                f"traces/{path.name}",
            )
        )
    note = "The first test scenes in which the control is wrong and the verifier rejected something, in file order."
    return report.Gallery("Examples", examples, note)


def _print(demo, systems: dict, summary: dict, page: Path) -> None:
    table = TerminalTable(title=f"Captions of {summary['n']} unbiased test scenes (95 % bootstrap intervals)")
    for column in ("system", "CHAIR-i ↓", "CHAIR-s ↓", "coverage ↑"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, label in systems.items():
        values = [interval_text(summary["systems"][name][key]) for key in METRICS[:3]]
        table.add_row(label, *values, style="bold green" if name == "reverse" else "")
    demo.console.print(table)
    cost = summary["cost"]
    demo.console.print(
        f"τ = {summary['threshold']:g}; {cost['tokens_forwarded_per_kept_token']:.2f} tokens forwarded per kept token "
        f"(greedy {cost['greedy_tokens_forwarded_per_kept_token']:.2f}), {cost['image_encodes_per_answer']:.2f} image "
        f"encodes per answer; {summary['seconds']:.0f} s"
    )
    demo.console.print(f"Report: {page}", highlight=False)
