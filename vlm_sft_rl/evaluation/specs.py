"""Eval specs: one YAML per benchmark that says which files, which prompt, which decoding and which metric."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError
from .decoders import DECODERS, check_settings
from .metrics import NAMES
from .readers import NAMES as READERS

# questions about boxes: task -> the metric that scores it
METRICS = {"locate": "rec", "describe": "reg", "describe_and_locate": "self_consistency"}


@dataclass(frozen=True)
class Regions:
    """Questions about boxes. A prompt or a box convention that is null here is the checkpoint's own."""

    task: str = field(
        metadata={
            "help": "`locate` an expression (REC), `describe` a box (REG), or `describe_and_locate`: find again by its own "
            "description (self-consistency)"
        }
    )
    describe_prompt: str | dict[str, str] | None = field(
        default=None,
        metadata={
            "help": "with {box}: one text, or a text per `model_type` with an optional `default`; for checkpoints that were "
            "not trained with a prompt of their own"
        },
    )
    locate_prompt: str | dict[str, str] | None = field(
        default=None, metadata={"help": "with {description}: as describe_prompt"}
    )
    box_convention: str | None = field(
        default=None, metadata={"help": "overrides the checkpoint's or its family's, see models/boxes.py"}
    )
    locate_max_new_tokens: int = field(
        default=48, metadata={"help": "longest box of `describe_and_locate`, in tokens"}
    )

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


def check_regions(regions: Regions | None, metric: str, prompt: str, where: str) -> None:
    """Raises UserError: a value out of range, or a metric that does not score the task."""
    task = None if regions is None else regions.task
    if task is not None and task not in METRICS:
        raise UserError(f"{where}: regions: 'task' must be one of {', '.join(METRICS)}, found {task!r}.")
    wanted = next((name for name, own in METRICS.items() if own == metric), None)
    if task != wanted:
        fit = (
            f"the metric of task {task!r} is {METRICS[task]!r}"
            if task
            else f"it needs `regions: {{task: {wanted}}}`"
        )
        raise UserError(f"{where}: metric {metric!r} does not fit: {fit}.")
    if regions is None:
        return
    if prompt != "{question}":
        raise UserError(
            f"{where}: 'prompt' has no effect on questions about boxes: give regions: describe_prompt or locate_prompt."
        )
    for name, mark in (("describe_prompt", "{box}"), ("locate_prompt", "{description}")):
        value = getattr(regions, name)
        for text in value.values() if isinstance(value, dict) else [value] if value is not None else []:
            if not isinstance(text, str) or mark not in text:
                raise UserError(f"{where}: regions: {name!r} must contain {mark}, found {text!r}.")
    longest = regions.locate_max_new_tokens
    if not isinstance(longest, int) or longest < 1:
        raise UserError(
            f"{where}: regions: 'locate_max_new_tokens' must be a positive number, found {longest!r}."
        )


def check_task(regions: Regions, decoder: str) -> None:
    """Raises UserError: a decoder that does not make answers of this task; located boxes are always greedy."""
    known = [name for name, d in DECODERS.items() if d.describes_boxes] if regions.describes else ["greedy"]
    if decoder not in known:
        raise UserError(
            f"--decoder {decoder} does not work for the task {regions.task!r}. Decoders for it: {', '.join(known)}."
        )


@dataclass(frozen=True)
class Decoding:
    """Decoding defaults of a benchmark; every one can be overridden on the command line."""

    max_new_tokens: int = field(default=512, metadata={"help": "longest answer, in tokens"})
    threshold: float | dict[str, float] | None = field(
        default=None,
        metadata={
            "help": "tau on P(</UN>): one number, or a number per `model_type` with an optional `default`; "
            "null takes the model's own"
        },
    )
    sample_temperature: float = field(default=1.0, metadata={"help": "temperature of --decoder sample"})
    retrospective: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further fields of RetrospectiveConfig"}
    )
    candidates: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "decoder (self-select, stage-beam, …) -> settings of it"},
    )

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
class SourceFile:
    """A file the benchmark needs, and where its owners publish it."""

    path: str
    source: str


@dataclass(frozen=True)
class Published:
    """A published result to print beside ours, as published, in the metric's own units.

    Attributes:
        values: metric -> figure over all questions.
        by_category: category -> metric -> figure.
    """

    system: str
    source: str
    values: dict[str, float] = field(default_factory=dict)
    by_category: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """The language model that grades the answers of a benchmark. Which model it is, is said at run time."""

    prompt: str = field(
        metadata={
            "help": "`{question}`, `{response}` (the answer under test) and the metric's reference fields are filled in"
        }
    )
    published: str = field(default="", metadata={"help": "the judge behind the published figures"})
    max_tokens: int = field(default=512, metadata={"help": "longest reply"})


@dataclass(frozen=True)
class EvalSpec:
    """A benchmark. Paths are relative to the data folder given at run time."""

    name: str
    description: str
    questions: str | dict[str, str] = field(
        metadata={"help": "the question file (for `reader: rows` JSONL); or a map of category to file"}
    )
    metric: str
    metric_options: dict[str, Any] = field(default_factory=dict)
    reader: str = field(default="rows", metadata={"help": "whose schema the question file has"})
    reader_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "further files and settings of the reader"}
    )
    image_root: str = "."
    prompt: str = field(
        default="{question}",
        metadata={"help": "`{question}` and `{choices}` (A. one, a line each) are filled in from the row"},
    )
    open_prompt: str | None = field(
        default=None, metadata={"help": "prompt of rows without choices, where the two kinds are mixed"}
    )
    categories: tuple[str, ...] = field(
        default=(), metadata={"help": "only questions of these categories, or of these of the question files"}
    )
    regions: Regions | None = field(default=None, metadata={"help": "for questions about boxes"})
    judge: Judge | None = None
    decoding: Decoding = field(default_factory=Decoding)
    files: tuple[SourceFile, ...] = ()
    published: tuple[Published, ...] = ()

    def to_json(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    def question_files(self) -> dict[str | None, str]:
        """Category (None where the spec names one file) -> question file; those that `categories` leaves."""
        if not isinstance(self.questions, dict):
            return {None: self.questions}
        if not self.categories:
            return self.questions
        # a file whose rows have categories of their own: `refcoco` with `refcoco_val` and `refcoco_testA`
        wanted = [
            name
            for name in self.questions
            if any(f"{own}_".startswith(f"{name}_") for own in self.categories)
        ]
        return {name: self.questions[name] for name in wanted}

    def source_of(self, path: str) -> str:
        for entry in self.files:
            if path == entry.path or path.startswith(entry.path.rstrip("/") + "/"):
                return entry.source
        return ""


# --- How a benchmark is run ---


@dataclass(frozen=True)
class EvalOptions:
    """What a run is asked for beside its decoder. Neither the batch size nor the number of processes changes an answer."""

    limit: int | None = field(default=None, metadata={"help": "Only the first questions."})
    batch_size: int = field(default=8, metadata={"help": "Answers decoded side by side."})
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn, the bootstrap included."})
    rounds: int = field(default=100, metadata={"help": "Bootstrap rounds."})
    greedy_run: str | Path | None = field(
        default=None,
        metadata={"help": "For drop and stop: derive from this finished greedy run, and generate nothing."},
    )
    answers_only: bool = field(
        default=False,
        metadata={"help": "Make the answers now; judge them by the same command without this, later."},
    )
    overwrite: bool = field(
        default=False, metadata={"help": "Throw away what another configuration left there."}
    )
    report: bool = field(default=True, metadata={"help": "Write report.html."})
    device: str | None = field(default=None, metadata={"help": "None: this process's GPU, or the CPU."})
    dtype: str = field(default="auto", metadata={"help": "auto: bfloat16 on a GPU, float32 on a CPU."})

    def __post_init__(self):
        """Raises UserError: a number out of range."""
        for name, least in (("batch_size", 1), ("rounds", 10)):
            if getattr(self, name) < least:
                raise UserError(
                    f"--{name.replace('_', '-')} must be at least {least}, found {getattr(self, name)}."
                )


@dataclass(frozen=True)
class JudgeSettings:
    """Which model judges, and where it is served."""

    url: str = field(
        metadata={
            "help": "OpenAI-compatible endpoint of the judge (http://host:8000/v1), for specs that have one."
        }
    )
    model: str = field(metadata={"help": "The judge's name there."})
    key_env: str | None = field(default=None, metadata={"help": "Environment variable with its API key."})
    prompt_file: str | Path | None = field(
        default=None, metadata={"help": "Prompt that replaces the spec's, with the same placeholders."}
    )
    ledger: str | Path | None = field(
        default=None,
        metadata={
            "help": "File of paid verdicts; it may serve many runs, one after the other. Default: in the output folder."
        },
    )
    concurrency: int = field(default=8, metadata={"help": "Requests at a time."})
    input_price: float = field(default=0.0, metadata={"help": "Price of a million tokens sent."})
    output_price: float = field(default=0.0, metadata={"help": "Price of a million tokens written."})
    budget: float | None = field(default=None, metadata={"help": "Stop when the judge has cost so much."})


def _build(cls, values: Any, where: str):
    """A dataclass from a mapping: unknown and missing keys are errors that name the place."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected a map of keys to values, found {type(values).__name__}.")
    known = {item.name: item for item in fields(cls)}
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}. Known keys: {', '.join(known)}.")
    try:
        return cls(**values)
    except TypeError as error:
        missing = str(error).split("argument", 1)[-1].lstrip("s: ")
        raise UserError(f"{where}: missing {missing}.") from error


def _check(spec: EvalSpec, where: str) -> EvalSpec:
    if isinstance(spec.questions, dict):
        if not spec.questions or not all(isinstance(path, str) and path for path in spec.questions.values()):
            raise UserError(f"{where}: 'questions' must be a file, or a map of category to file.")
        texts = ("name", "description", "metric", "reader", "image_root", "prompt")
    else:
        texts = ("name", "description", "questions", "metric", "reader", "image_root", "prompt")
    for name in texts:
        if not isinstance(getattr(spec, name), str) or not getattr(spec, name).strip():
            raise UserError(f"{where}: {name!r} must be text, found {getattr(spec, name)!r}.")
    if spec.metric not in NAMES:
        raise UserError(f"{where}: metric {spec.metric!r} does not exist. Metrics: {', '.join(NAMES)}.")
    if spec.reader not in READERS:
        raise UserError(f"{where}: reader {spec.reader!r} does not exist. Readers: {', '.join(READERS)}.")
    for name in ("metric_options", "reader_options"):
        if not isinstance(getattr(spec, name), dict):
            raise UserError(f"{where}: {name!r} must be a map.")
    for name in ("prompt", "open_prompt"):
        text = getattr(spec, name)
        if text is not None and (not isinstance(text, str) or "{question}" not in text):
            raise UserError(f"{where}: {name!r} must contain {{question}}, found {text!r}.")
    if spec.judge is not None:
        check_judge_prompt(spec.judge.prompt, f"{where}: judge")
    decoding = spec.decoding
    if not isinstance(decoding.max_new_tokens, int) or decoding.max_new_tokens < 1:
        raise UserError(
            f"{where}: 'max_new_tokens' must be a positive number, found {decoding.max_new_tokens!r}."
        )
    if not isinstance(decoding.sample_temperature, (int, float)) or decoding.sample_temperature <= 0:
        raise UserError(
            f"{where}: 'sample_temperature' must be above 0, found {decoding.sample_temperature!r}."
        )
    if not isinstance(decoding.candidates, dict):
        raise UserError(f"{where}: decoding: 'candidates' must be a map of decoder to settings.")
    for decoder, settings in decoding.candidates.items():
        check_settings(decoder, settings, f"{where}: decoding, candidates")
    check_settings("retrospective", decoding.retrospective, f"{where}: decoding")
    taus = decoding.threshold if isinstance(decoding.threshold, dict) else {"threshold": decoding.threshold}
    for family, tau in taus.items():
        if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 < tau < 1):
            raise UserError(
                f"{where}: decoding, {family}: the threshold on P(</UN>) must lie strictly between 0 and 1, found {tau!r}. "
                "REVERSE uses 0.003 for captions and 0.5 for yes/no questions."
            )
    for row in spec.published:
        maps = [row.values, *(row.by_category.values() if isinstance(row.by_category, dict) else [None])]
        if not all(isinstance(m, dict) and all(isinstance(v, int | float) for v in m.values()) for m in maps):
            raise UserError(f"{where}: published values of {row.system!r} must be a map of metric to number.")
    if not isinstance(spec.categories, tuple) or not all(isinstance(name, str) for name in spec.categories):
        raise UserError(f"{where}: 'categories' must be a list of names.")
    if not spec.question_files():
        raise UserError(
            f"{where}: no question file is of {', '.join(spec.categories)}. There are {', '.join(spec.questions)}."
        )
    check_regions(spec.regions, spec.metric, spec.prompt, where)
    return spec


def check_judge_prompt(text: Any, where: str) -> None:
    """Raises UserError: a judge's prompt that does not show the judge the answer."""
    if not isinstance(text, str) or "{response}" not in text:
        raise UserError(
            f"{where}: the judge's prompt must contain {{response}}, the place of the answer under test."
        )


def parse_spec(raw: dict[str, Any], where: str) -> EvalSpec:
    """A spec from the keys and values of its YAML file.

    Raises:
        UserError: an unknown or missing key, or a value out of range; the message starts with `where`.
    """
    raw = dict(raw)
    if "decoding" in raw:
        raw["decoding"] = _build(Decoding, raw["decoding"], f"{where}: decoding")
    if raw.get("regions") is not None:
        raw["regions"] = _build(Regions, raw["regions"], f"{where}: regions")
    if isinstance(raw.get("categories"), list):
        raw["categories"] = tuple(raw["categories"])
    if raw.get("judge") is not None:
        raw["judge"] = _build(Judge, raw["judge"], f"{where}: judge")
    for key, cls in (("files", SourceFile), ("published", Published)):
        entries = raw.get(key, [])
        if not isinstance(entries, list):
            raise UserError(f"{where}: {key!r} must be a list.")
        raw[key] = tuple(_build(cls, entry, f"{where}: {key}[{i}]") for i, entry in enumerate(entries))
    return _check(_build(EvalSpec, raw, where), where)


def load_spec(name_or_path: str | Path) -> EvalSpec:
    """The spec of that file, or the shipped one of that name (`pocket_captions`)."""
    from ..recipes import find, read_yaml

    path = find("eval", name_or_path)
    return parse_spec(read_yaml(path), str(path))


def read_pairs(option: str, changes: Sequence[str], example: str) -> dict[str, Any]:
    """`KEY=VALUE` texts of an option as a map; values are read as YAML.

    Raises:
        UserError: no `=`, or a value that is not YAML.
    """
    values = {}
    for change in changes:
        key, mark, text = change.partition("=")
        if not mark or not key:
            raise UserError(f"{option} {change!r}: expected KEY=VALUE, for example {example}.")
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{option} {change!r}: the value is not valid YAML ({error}).") from error
    return values


def with_metric_options(spec: EvalSpec, changes: Sequence[str]) -> EvalSpec:
    """The spec with `KEY=VALUE` texts over its metric_options.

    Raises:
        UserError: as `read_pairs`.
    """
    values = read_pairs("--metric-option", changes, "rules=released")
    return replace(spec, metric_options=spec.metric_options | values)


def with_categories(spec: EvalSpec, names: Sequence[str]) -> EvalSpec:
    """The spec with these categories only; none leaves it as it is.

    Raises:
        UserError: no question file can have them.
    """
    return _check(replace(spec, categories=tuple(names)), "--category") if names else spec
