"""The decoders: what each one does, its settings, and what it needs. A new decoder is an entry of `DECODERS`.

Command lines, specs, `run.json` and the bridges read the table. Light: torch is imported when a decoder is called.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import decoding
from ..data.conclusions import conclusion
from ..data.model_files import read_settings
from ..data.tags import VERIFICATION_TOKENS
from ..decoding.config import (
    ENGINES,
    CorrectionConfig,
    DecoderConfig,
    DoLaConfig,
    OperaConfig,
    RetrospectiveConfig,
    SamplingConfig,
    SearchConfig,
    VCDConfig,
    engine_version,
)
from ..errors import UserError
from ..graders.prompts import Prompts, load_prompts, plain_reflection
from ..io import read_text
from ..models.sidecar import Sidecar, read_sidecar
from ..settings import Checked, configured, setting
from .revisions import derive

if TYPE_CHECKING:
    from .metrics.counting import CountMetric


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplingConfig):
    """Plain sampling."""

    temperature: float = setting(0.7, "Sampling temperature.", above=0)


@dataclass(frozen=True, kw_only=True)
class RevisionConfig(SamplingConfig):
    """A greedy answer without what its verifier doubts."""

    threshold: float = setting(
        0.003, "tau: a phrase is taken out if P(</UN>) at its closing tag is above tau.", above=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class ReflectionConfig(SamplingConfig):
    """Answers that look at answers (R3V, arXiv 2411.00855), with its released sampling."""

    temperature: float = setting(0.9, "Temperature of the candidates.", above=0)
    top_p: float | None = setting(
        0.95, "Sample from the most likely tokens that reach this probability together. null: from all.", above=0, most=1
    )  # fmt: skip
    top_k: int | None = setting(50, "Sample from the k most likely tokens only. null: from all.", least=1)
    candidates: int = setting(3, "N: number of answers to choose from.", least=1)
    distinct: bool = setting(
        False,
        "Draw no answer twice. Votes are weighted to match; there may be fewer than N answers.",
    )
    prompts: str | None = setting(
        None,
        "Use the prompts of self-training on a data set: DATASET or DATASET/STYLE. Default: the benchmark's prompt, and a "
        "general request to compare or refine.",
    )
    fallback: str = setting(
        "none",
        "What counts if the model's choice is unreadable or none of the candidates. none: what the model says, as released. "
        "majority: the most frequent candidate.",
        choices=("none", "majority"),
    )
    kind: str = setting(
        "self-select", "What is made of the answers.", choices=("majority", "self-select", "self-refine")
    )

    def __post_init__(self):
        """Raises UserError: a value out of its range, or prompts that do not exist."""
        super().__post_init__()
        self.texts()

    def texts(self) -> Prompts:
        """What the model is asked when it looks at answers."""
        return plain_reflection() if self.prompts is None else load_prompts(*self.prompts.split("/", 1))

    @property
    def votes(self) -> bool:
        """Whether equal answers are counted, so that a metric must read answers from texts."""
        return self.kind == "majority" or (self.kind == "self-select" and self.fallback == "majority")


def generate_reflected(
    model, processor, images: list, prompts: list[str], config: ReflectionConfig, **options
) -> list:
    """Candidates, and what the model makes of them; a majority is left to whoever can read answers."""
    from ..decoding.search import sample_candidates, self_refine, self_select

    texts, n, distinct = config.texts(), config.candidates, config.distinct
    search = {
        "majority": lambda prompt, _: sample_candidates(prompt, n, distinct),
        "self-select": lambda prompt, _: self_select(prompt, n, texts.selecting, distinct),
        "self-refine": lambda prompt, _: self_refine(prompt, texts.refining),
    }[config.kind]
    return decoding.generate_by(model, processor, images, prompts, config.kind, search, config, **options)


def _lazy(name: str) -> Callable[..., list]:
    """The function of `decoding` with this name, imported when it is called."""

    def generate(*data, **options) -> list:
        return getattr(decoding, name)(*data, **options)

    return generate


@dataclass(frozen=True)
class Decoder:
    """One way to make answers.

    Attributes:
        help: what it does.
        config: its settings; every field is an option, except those of `fixed` and `unused`, and `seed`.
        generate: `(model, processor, images, prompts, config, *, ids, batch_size)` -> an `Answer` for each prompt.
        fixed: values that make it this decoder.
        unused: fields of `config` that have no effect on it.
        needs_tags: whether the checkpoint must know the verification tokens.
        describes_boxes: whether it also answers questions about boxes.
        on_vllm: whether tokens and their probabilities are all that it needs of a model.
        trained: what a checkpoint's sidecar says about how it is to be decoded.
        revise: `(sample, config, metric) -> sample`, what an evaluation makes of an answer.
    """

    help: str
    config: type[DecoderConfig]
    generate: Callable[..., list]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    needs_tags: bool = False
    describes_boxes: bool = False
    on_vllm: bool = True
    trained: Callable[[Sidecar], dict] = lambda sidecar: {}
    revise: Callable[[dict, Any, "CountMetric"], dict] | None = None

    def options(self) -> dict[str, Field]:
        """The fields that a user may set."""
        closed = {*self.fixed, *self.unused, "seed"}
        return {item.name: item for item in fields(self.config) if item.name not in closed}


def _trained_correction(sidecar: Sidecar) -> dict:
    recipe = sidecar.recipe or {}
    names = ("layout", "correction_prompt", "correction_line")
    return {name: recipe[name] for name in names if recipe.get(name) is not None}


_GREEDY = {"temperature": 0.0, "top_k": None, "top_p": None}
_SWIRES = ("threshold", "max_rounds", "captions", "kept", "reasonings", "finalists")
_plain = _lazy("generate_plain")


def _revising(mode: str, help: str) -> Decoder:
    def revise(sample: dict, config: RevisionConfig, metric: "CountMetric") -> dict:
        return derive(sample, mode, config.threshold)

    return Decoder(help, RevisionConfig, _plain, _GREEDY, needs_tags=True, revise=revise)


def _vote(sample: dict, config: ReflectionConfig, metric: "CountMetric") -> dict:
    from .votes import vote

    return vote(sample, metric, keep_selected=config.kind == "self-select") if config.votes else sample


def _searching(search: str, help: str, unused: tuple[str, ...] = _SWIRES) -> Decoder:
    return Decoder(help, SearchConfig, _lazy("generate_searched"), {"search": search}, unused)


DECODERS: dict[str, Decoder] = {
    "greedy": Decoder("the most likely answer", SamplingConfig, _plain, _GREEDY, describes_boxes=True),
    "sample": Decoder("an answer drawn at a temperature", SampleConfig, _plain, describes_boxes=True),
    "retrospective": Decoder(
        "rewinds and resamples phrases that the model doubts (REVERSE, arXiv 2504.13169)",
        RetrospectiveConfig,
        _lazy("generate_retrospective"),
        needs_tags=True,
        describes_boxes=True,
        trained=lambda sidecar: sidecar.decoding,
    ),
    "drop": _revising("drop", "greedy, then leaves out every phrase with P(</UN>) > tau"),
    "stop": _revising("stop", "greedy, then ends before the first phrase with P(</UN>) > tau"),
    "vcd": Decoder(
        "contrasts the picture with a noised one (arXiv 2311.16922), one prompt at a time",
        VCDConfig,
        _lazy("generate_vcd"),
        describes_boxes=True,
        on_vllm=False,
    ),
    "dola": Decoder(
        "contrasts the last layer with an earlier one (arXiv 2309.03883), one prompt at a time",
        DoLaConfig,
        _lazy("generate_dola"),
        describes_boxes=True,
        on_vllm=False,
    ),
    "opera": Decoder(
        "beam search that distrusts tokens everything else attends to (arXiv 2311.17911), one prompt at a time",
        OperaConfig,
        _lazy("generate_opera"),
        on_vllm=False,
    ),
    "correct": Decoder(
        "an answer, then corrections of it (LLaVA-SCo)",
        CorrectionConfig,
        _lazy("generate_corrected"),
        trained=_trained_correction,
    ),
    "majority": Decoder(
        "N samples; the first with the most frequent answer (R3V, arXiv 2411.00855)",
        ReflectionConfig,
        generate_reflected,
        {"kind": "majority"},
        unused=("fallback",),
        revise=_vote,
    ),
    "self-select": Decoder(
        "N samples, then the model answers once more in view of them (R3V)",
        ReflectionConfig,
        generate_reflected,
        {"kind": "self-select"},
        revise=_vote,
    ),
    "self-refine": Decoder(
        "a greedy answer, then another one in view of it (R3V)",
        ReflectionConfig,
        generate_reflected,
        {"kind": "self-refine"},
        unused=("candidates", "fallback", "distinct", *_GREEDY),
    ),
    "best-of-n": _searching(
        "best_of_n", "N whole answers; the model keeps one by comparing pairs (LLaVA-CoT, arXiv 2411.10440)"
    ),
    "sentence-beam": _searching("sentence_beam", "as best-of-n, after every sentence"),
    "stage-beam": _searching("stage_beam", "as best-of-n, after every stage"),
    "swires": _searching(
        "swires", "stage-wise retracing search, scored by mean log-probability", unused=("beams", "rules")
    ),
}


# --- Settings ---


def check_decoder(name: str) -> None:
    """Raises UserError: no such decoder."""
    if name not in DECODERS:
        raise UserError(f"--decoder {name!r} does not exist. Decoders: {', '.join(DECODERS)}.")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError: no such decoder, or an option that it does not use; the decoders that do are named."""
    check_decoder(name)
    decoder = DECODERS[name]
    for option, value in options.items():
        if option in decoder.options() or (option in decoder.fixed and decoder.fixed[option] == value):
            continue
        users = [other for other, entry in DECODERS.items() if option in entry.options()]
        if not users:
            raise UserError(
                f"There is no option {option!r} of a decoder. Those of {name}: {', '.join(decoder.options())}."
            )
        words = option.replace("_", "-")
        raise UserError(f"--{words} has no effect on --decoder {name}; it belongs to {', '.join(users)}.")


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raises UserError: settings of a file that are not those of a decoder."""
    check_options(name, settings)
    configured(DECODERS[name].config, settings, name)


def configure(
    name: str,
    folder: Path,
    options: Mapping[str, Any],
    *,
    spec: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> DecoderConfig:
    """The settings of a decoder: the user's options, over what the checkpoint says, over the spec's, over the defaults.

    A threshold is the user's, else the spec's, else the checkpoint's own.

    Raises UserError: an option without effect or out of range, or the checkpoint lacks what the decoder needs.
    """
    check_options(name, options)
    decoder, sidecar = DECODERS[name], read_sidecar(folder)
    values = {**(spec or {}), **(decoder.trained(sidecar) if sidecar else {}), **options, **decoder.fixed}
    if "seed" in {item.name for item in fields(decoder.config)}:
        values["seed"] = seed
    if decoder.needs_tags:
        # a value out of range is said before what the checkpoint lacks
        configured(decoder.config, values, name)
        check_model_folder(folder)
        _check_tags(name, folder, sidecar)
        if "threshold" not in values and sidecar is None:
            raise UserError(
                f"{folder}: no vlm_sft_rl.json gives a threshold for this model, nor does the spec. Give --threshold "
                "(REVERSE: 0.003 for captions on LLaVA, 0.01 on Qwen2.5-VL, 0.5 for yes/no questions)."
            )
        values.setdefault("threshold", sidecar.threshold if sidecar else None)
    return configured(decoder.config, values, name)


def _check_tags(name: str, folder: Path, sidecar: Sidecar | None) -> None:
    """Raises UserError: no verification tokens in the checkpoint's tokenizer.

    Every trainer writes a sidecar, also one whose model has no tags; the authors' own code writes none. An adapter's
    tokenizer may lie with its base.
    """
    for file in ("tokenizer.json", "added_tokens.json"):
        if (folder / file).is_file():
            text = read_text(folder / file)
            if all(json.dumps(token) in text for token in VERIFICATION_TOKENS):
                return
    if sidecar is None or (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder}: this model lacks the verification tokens, which --decoder {name} needs. Use --decoder greedy "
            "or sample, or add them with `vlm-sft-rl model prepare` and train with a `method: reverse` recipe."
        )


def recorded(name: str, config: DecoderConfig, seed: int) -> dict[str, Any]:
    """The settings as `run.json` holds them: everything that an answer depends on, and nothing else."""
    used = {key: value for key, value in asdict(config).items() if key not in DECODERS[name].unused}
    return {"decoder": name, "seed": seed, **used}


def needs_run(name: str, config: DecoderConfig) -> bool:
    """Whether answers of the model alone are not enough: an evaluation revises them, by a metric or a greedy run."""
    return DECODERS[name].revise is not None and getattr(config, "votes", True)


def check_engine(engine: str, name: str, config: DecoderConfig) -> str:
    """What the engine computes with, for the record (`decoding.config.engine_version`).

    Raises UserError: the engine is not installed, or cannot run this decoder.
    """
    if engine == "vllm":
        if not DECODERS[name].on_vllm:
            known = ", ".join(other for other, decoder in DECODERS.items() if decoder.on_vllm)
            raise UserError(
                f"--engine vllm gives tokens and their probabilities, and --decoder {name} needs more of the model. Use "
                f"--engine hf, or one of {known}."
            )
        if getattr(config, "parallel_attempts", 1) > 1:
            raise UserError(
                "--parallel-attempts copies cached keys, and --engine vllm gives none: leave it out, or use --engine hf."
            )
    return engine_version(engine)


def check_alone(name: str, config: DecoderConfig) -> None:
    """Raises UserError: the answers are not ready before an evaluation has revised them."""
    if needs_run(name, config):
        known = [
            other for other, entry in DECODERS.items() if not needs_run(other, entry.config(**entry.fixed))
        ]
        raise UserError(
            f"--decoder {name} works in `vlm-sft-rl eval run` only: it revises answers there. Use {', '.join(known)}."
        )


def check_readable(config: DecoderConfig, metric: "CountMetric", name: str) -> None:
    """Raises UserError: answers must be counted, but the metric reads none from a text."""
    if getattr(config, "votes", False) and not metric.reads_answers:
        raise UserError(
            f"{name}: a majority vote counts equal answers, and its metric reads none from a text (it judges the whole of "
            "it). Use --decoder self-select or best-of-n, or a spec with short answers."
        )


# --- A checkpoint, and its answers ---


def check_model_folder(model: str | Path) -> Path:
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such model folder. Give the folder that training or `vlm-sft-rl merge` wrote."
        )
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: neither config.json nor adapter_config.json is in it, so this is no model folder."
        )
    return folder


def model_type(folder: Path) -> str:
    """`model_type` of the checkpoint, or of an adapter's base; empty where the base is not on this machine."""
    config = folder / "config.json"
    if not config.is_file():
        base = Path(str(read_settings(folder / "adapter_config.json").get("base_model_name_or_path", "")))
        config = base / "config.json"
        if not config.is_absolute() and not config.is_file():
            config = folder / config
    return str(read_settings(config).get("model_type", "")) if config.is_file() else ""


@dataclass(frozen=True)
class EngineOptions(Checked):
    """What computes, where, and how many answers at a time."""

    engine: str = setting(
        "hf",
        "Library that runs the model: hf (transformers) or vllm. Answers are the same where nothing is drawn at random.",
        choices=ENGINES,
    )
    batch_size: int | None = setting(
        None, f"Answers decoded side by side. Default: {ENGINES['hf']}; with --engine vllm {ENGINES['vllm']}.", least=1
    )  # fmt: skip
    device: str | None = setting(None, "None: this process's GPU, or the CPU.")
    dtype: str = setting("auto", "auto: bfloat16 on a GPU, float32 on a CPU.")

    @property
    def side_by_side(self) -> int:
        """The batch size, or the engine's default."""
        return self.batch_size or ENGINES[self.engine]

    def load(self, folder: Path) -> tuple:
        """As `load_model_and_processor`."""
        return load_model_and_processor(folder, self.device, self.dtype, self.engine, self.side_by_side)


def load_model_and_processor(
    folder: Path, device=None, dtype="auto", engine: str = "hf", in_flight: int | None = None, **vllm: Any
) -> tuple:
    """What `answer_batch` asks, on this process's own GPU.

    Args:
        in_flight: with `engine: vllm`, the most answers it works on at a time.
        vllm: with that engine, further arguments of its `EngineArgs`.

    Raises UserError: a checkpoint that cannot be loaded, by this engine or at all.
    """
    if engine == "vllm":
        from ..decoding.vllm_engine import load_vllm

        return load_vllm(folder, device, dtype, in_flight or ENGINES["vllm"], **vllm)
    from ..models.load import load_for_inference

    return load_for_inference(folder, device, dtype)[:2]


def answer_batch(
    loaded: tuple,
    decoder: Decoder,
    config: DecoderConfig,
    images: Sequence[list | None],
    prompts: Sequence[str],
    ids: Sequence[str],
    batch_size: int,
) -> list[dict]:
    """`Answer.to_json()` of every prompt. `text` is an answer's conclusion alone, by which it is scored (in stages, in a
    wrapper, behind thinking); the whole of it stays in `tagged_text`."""
    made = decoder.generate(
        *loaded, list(images), list(prompts), config, ids=list(ids), batch_size=batch_size
    )
    answers = json.loads(json.dumps([item.to_json() for item in made]))
    return [{**answer, "text": conclusion(answer["text"]).text} for answer in answers]


def answer_of(sample: dict, threshold: float | None = None):
    """The decoder's `Answer` that a line of samples.jsonl was made from."""
    from ..decoding.answers import Answer, Counts, SpanRecord

    return Answer(
        text=sample["answer"],
        tagged_text=sample["tagged_answer"],
        ok=sample["ok"],
        accepted_text=sample["accepted_answer"],
        best_effort_text=sample["best_effort_answer"],
        spans=[SpanRecord(**span) for span in sample["spans"]],
        trace=sample["trace"],
        counts=Counts(**sample["counts"]),
        prompt=sample["prompt"],
        id=sample["id"],
        threshold=threshold,
    )


def trace_writer(
    output: Path, image_root: Path, threshold: float | None = None
) -> Callable[[int, dict], str]:
    """(index, sample) -> the page about how the answer came about, written below `output`; "" where it came in one go.

    A page is written for answers on the way to which something was rejected, drawn to choose from, or asked again; its
    address is relative to `output`.
    """
    from ..data.images import open_image
    from ..decoding.trace import write_trace_html

    def write(index: int, sample: dict) -> str:
        if not any(
            event.get("kind") in ("reject", "candidates", "turn", "locate") for event in sample["trace"]
        ):
            return ""
        answer = answer_of(sample, threshold)
        images = [open_image(name, image_root) for name in sample["images"]]
        path = write_trace_html(answer, images, output / "traces" / f"{index}.html")
        return path.relative_to(output).as_posix()

    return write
