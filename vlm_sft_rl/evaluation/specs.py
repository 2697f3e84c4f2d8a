"""Eval specs: one YAML per benchmark that says which files, which prompt, which decoding and which metric."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..endpoint import EndpointSettings, completions_url
from ..errors import UserError
from ..settings import Checked, configured, setting
from .decoders import DECODERS, EngineOptions, check_settings
from .metrics import NAMES
from .readers import NAMES as READERS

# questions about boxes: task -> the metric that scores it
METRICS = {"locate": ("rec", "ref_adv"), "describe": ("reg",), "describe_and_locate": ("self_consistency",)}


@dataclass(frozen=True)
class Regions(Checked):
    """Questions about boxes. A prompt or a box convention that is null here is the checkpoint's own."""

    task: str = setting(
        help="`locate` an expression (REC), `describe` a box (REG), or `describe_and_locate`: find again by its own "
        "description (self-consistency)",
        choices=METRICS,
    )
    describe_prompt: str | dict[str, str] | None = setting(
        None,
        "one text, or a text per `model_type` with an optional `default`; for checkpoints that were not trained with a "
        "prompt of their own",
        holds="{box}",
    )
    locate_prompt: str | dict[str, str] | None = setting(None, "as describe_prompt", holds="{description}")
    box_convention: str | None = setting(
        None, "overrides the checkpoint's or its family's, see models/boxes.py"
    )
    locate_max_new_tokens: int = setting(48, "longest box of `describe_and_locate`, in tokens", least=1)

    @property
    def describes(self) -> bool:
        return self.task != "locate"

    @property
    def locates(self) -> bool:
        return self.task != "describe"

    def prompt(self, name: str, model_type: str) -> str | None:
        """`describe_prompt` or `locate_prompt` for this family of models."""
        value = getattr(self, name)
        return value.get(model_type, value.get("default")) if isinstance(value, dict) else value


def check_task(regions: Regions, decoder: str) -> None:
    """Raises UserError: a decoder that does not make answers of this task; located boxes are always greedy."""
    known = [name for name, d in DECODERS.items() if d.describes_boxes] if regions.describes else ["greedy"]
    if decoder not in known:
        raise UserError(
            f"--decoder {decoder} does not work for the task {regions.task!r}. Decoders for it: {', '.join(known)}."
        )


@dataclass(frozen=True)
class Decoding(Checked):
    """Decoding defaults of a benchmark; every one can be overridden on the command line."""

    max_new_tokens: int = setting(512, "longest answer, in tokens", least=1)
    threshold: float | dict[str, float | None] | None = setting(
        None,
        "tau on P(</UN>): one number, or a number per `model_type` with an optional `default`; null takes the model's own. "
        "REVERSE uses 0.003 for captions and 0.5 for yes/no questions",
        above=0,
        below=1,
    )
    sample_temperature: float = setting(1.0, "temperature of --decoder sample", above=0)
    retrospective: dict[str, Any] = setting({}, "further settings of --decoder retrospective")
    candidates: dict[str, dict[str, Any]] = setting(
        {}, "decoder (self-select, stage-beam, …) -> settings of it"
    )

    def __post_init__(self):
        """Raises UserError: a value out of range, or settings that are not those of a decoder."""
        super().__post_init__()
        for decoder, settings in {**self.candidates, "retrospective": self.retrospective}.items():
            check_settings(decoder, settings)

    def settings_for(self, decoder: str, model_type: str) -> dict[str, Any]:
        """What the spec sets of this decoder."""
        settings: dict[str, Any] = {"max_new_tokens": self.max_new_tokens}
        if decoder == "sample":
            settings["temperature"] = self.sample_temperature
        if decoder == "retrospective":
            settings |= self.retrospective
        settings |= self.candidates.get(decoder, {})
        if DECODERS[decoder].needs_tags and (tau := self.threshold_for(model_type)) is not None:
            settings["threshold"] = tau
        return settings

    def threshold_for(self, model_type: str) -> float | None:
        if isinstance(self.threshold, dict):
            return self.threshold.get(model_type, self.threshold.get("default"))
        return self.threshold


@dataclass(frozen=True)
class SourceFile(Checked):
    """A file the benchmark needs, and where its owners publish it."""

    path: str
    source: str


@dataclass(frozen=True)
class Published(Checked):
    """A published result to print beside ours, as published, in the metric's own units."""

    system: str
    source: str
    values: dict[str, float] = setting({}, "metric -> figure over all questions")
    by_category: dict[str, dict[str, float]] = setting({}, "category -> metric -> figure")


@dataclass(frozen=True)
class Judge(Checked):
    """The language model that grades the answers of a benchmark. Which model it is, is said at run time."""

    prompt: str = setting(
        help="`{question}`, `{response}` (the answer under test) and the metric's reference fields are filled in",
        holds="{response}",
    )
    published: str = setting("", "the judge behind the published figures")
    max_tokens: int = setting(512, "longest reply", least=1)


@dataclass(frozen=True)
class EvalSpec(Checked):
    """A benchmark. Paths are relative to the data folder given at run time."""

    name: str
    description: str
    questions: str | dict[str, str] = setting(
        help="the question file (for `reader: rows` JSONL); or a map of category to file"
    )
    metric: str = setting(choices=NAMES)
    metric_options: dict[str, Any] = setting({})
    reader: str = setting("rows", "whose schema the question file has", choices=READERS)
    reader_options: dict[str, Any] = setting({}, "further files and settings of the reader")
    image_root: str = "."
    prompt: str = setting(
        "{question}",
        "`{question}` and `{choices}` (A. one, a line each) are filled in from the row",
        holds="{question}",
    )
    open_prompt: str | None = setting(
        None, "prompt of rows without choices, where the two kinds are mixed", holds="{question}"
    )
    categories: tuple[str, ...] = setting(
        (), "only questions of these categories, or of these of the question files"
    )
    regions: Regions | None = setting(None, "for questions about boxes")
    judge: Judge | None = None
    decoding: Decoding = setting(Decoding())
    files: tuple[SourceFile, ...] = ()
    published: tuple[Published, ...] = ()

    def __post_init__(self):
        """Raises UserError: a value out of range, categories that no file has, or a metric that does not fit."""
        super().__post_init__()
        self.require(self.questions, "questions", "a file, or a map of category to file")
        if not self.question_files():
            raise UserError(
                f"no question file is of {', '.join(self.categories)}. There are {', '.join(self.questions)}."
            )
        task = self.regions.task if self.regions else None
        needed = next((name for name, metrics in METRICS.items() if self.metric in metrics), None)
        if task != needed:
            fit = f"it needs `regions: {{task: {needed}}}`"
            if task:
                fit = f"the metric of task {task!r} is {' or '.join(map(repr, METRICS[task]))}"
            raise UserError(f"metric {self.metric!r} does not fit: {fit}.")
        if task and self.prompt != "{question}":
            raise UserError(
                "'prompt' has no effect on questions about boxes: give regions: describe_prompt or locate_prompt."
            )

    def to_json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    def question_files(self) -> dict[str | None, str]:
        """Category (None where the spec names one file) -> question file; those that `categories` leaves."""
        if not isinstance(self.questions, dict):
            return {None: self.questions}
        if not self.categories:
            return self.questions
        # a file whose rows have categories of their own: `refcoco` with `refcoco_val` and `refcoco_testA`
        return {
            name: path
            for name, path in self.questions.items()
            if any(f"{category}_".startswith(f"{name}_") for category in self.categories)
        }

    def source_of(self, path: str) -> str:
        for entry in self.files:
            if path == entry.path or path.startswith(entry.path.rstrip("/") + "/"):
                return entry.source
        return ""


def check_judge_prompt(text: Any, where: str) -> None:
    """Raises UserError: a judge's prompt that does not show the judge the answer."""
    if not isinstance(text, str) or "{response}" not in text:
        raise UserError(
            f"{where}: the judge's prompt must contain {{response}}, the place of the answer under test."
        )


def parse_spec(raw: dict[str, Any], where: str) -> EvalSpec:
    """A spec from the keys and values of its YAML file.

    Raises UserError: an unknown or missing key, or a value out of range; the message starts with `where`.
    """
    raw = dict(raw)
    for key, cls in (("decoding", Decoding), ("regions", Regions), ("judge", Judge)):
        if raw.get(key) is not None:
            raw[key] = _build(cls, raw[key], f"{where}: {key}")
    for key, cls in (("files", SourceFile), ("published", Published)):
        if isinstance(entries := raw.get(key, []), list):
            raw[key] = tuple(_build(cls, entry, f"{where}: {key}[{i}]") for i, entry in enumerate(entries))
    if isinstance(raw.get("categories"), list):
        raw["categories"] = tuple(raw["categories"])
    return _build(EvalSpec, raw, where)


def _build(cls: type, values: Any, where: str):
    try:
        return configured(cls, values, where)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from error


def load_spec(name_or_path: str | Path) -> EvalSpec:
    """The spec of that file, or the shipped one of that name (`pocket_captions`)."""
    from ..recipes import find, read_yaml

    path = find("eval", name_or_path)
    return parse_spec(read_yaml(path), str(path))


def with_metric_options(spec: EvalSpec, changes: Sequence[str]) -> EvalSpec:
    """The spec with `KEY=VALUE` texts over its metric_options; values are read as YAML.

    Raises UserError: no `=`, or a value that is not YAML.
    """
    options = dict(spec.metric_options)
    for change in changes:
        key, mark, text = change.partition("=")
        if not mark or not key:
            raise UserError(f"--metric-option {change!r}: expected KEY=VALUE, for example rules=released.")
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--metric-option {change!r}: the value is not valid YAML ({error}).") from error
    return replace(spec, metric_options=options)


def with_categories(spec: EvalSpec, names: Sequence[str]) -> EvalSpec:
    """The spec with these categories only; none leaves it as it is.

    Raises UserError: no question file can have them.
    """
    try:
        return replace(spec, categories=tuple(names)) if names else spec
    except UserError as error:
        raise UserError(f"--category: {error}") from error


# --- How a benchmark is run ---


@dataclass(frozen=True)
class EvalOptions(EngineOptions):
    """What a run is asked for beside its decoder. Neither the batch size nor the number of processes changes an answer."""

    limit: int | None = setting(None, "Answer only the first N questions. Default: all.", least=1)
    seed: int = setting(0, "Seed of everything that is drawn at random, the bootstrap included.")
    rounds: int = setting(100, "Bootstrap rounds of the intervals.", least=10)
    greedy_run: str | Path | None = setting(
        None,
        "With --decoder drop or stop: output folder of a greedy run that the answers are derived from, without a model.",
    )
    answers_only: bool = setting(
        False,
        "For benchmarks with a judge: write the answers only. The same command without this option judges them later.",
    )
    overwrite: bool = setting(False, "Delete results of other settings in the output folder.")
    report: bool = setting(True, "Write report.html.")


@dataclass(frozen=True)
class JudgeSettings(EndpointSettings):
    """Which model judges, and where it is served."""

    url: str = setting(
        help="Address of the judge, for benchmarks that have one: an OpenAI-compatible endpoint, for example http://host:8000/v1."
    )
    model: str = setting(help="Name of the judge model at that endpoint.")
    prompt_file: str | Path | None = setting(
        None,
        "Text file with a prompt for the judge, with the placeholders of the spec's prompt. Default: the spec's.",
    )
    ledger: str | Path | None = setting(
        None,
        "File that keeps paid verdicts; several runs may use it, one after the other. Default: a file in the output folder.",
    )

    def __post_init__(self):
        """Raises UserError: a value of the wrong type or out of range, or an address that is none or holds a secret."""
        super().__post_init__()
        completions_url(self.url)
