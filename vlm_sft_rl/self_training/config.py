"""Settings of self-training: the keys that recipes with `method: r3v` or `rewind` have besides those of `sft`."""

from dataclasses import dataclass, fields
from typing import Any

from ..data.rows import BUILT_PAIRS
from ..data.tagging.config import PairConfig
from ..decoding.config import ENGINES
from ..errors import SECRET_OPTION, UserError
from ..graders import RULES
from ..graders.prompts import DATASETS, STYLES
from ..settings import check_factors, check_values, configured, setting
from .builders import BuildSettings

VARIANTS = (
    "full",
    "zero_shot",
    "distill",
    "star",
    "star_dpo",
    "no_refine",
    "no_select",
    "no_iteration",
)
OBJECTIVES = ("sft", "dpo", "sft+dpo")
STARTS = ("base", "previous")
HF_BATCH = 24  # three samples to each of eight questions

# what numbers must be; a recipe's fields are also argparse's, which knows no limits
LIMITS = {
    "samples_per_question": {"least": 1},
    "max_new_tokens": {"least": 1},
    "sample_batch_size": {"least": 1},
    "sample_processes": {"least": 1},
    "num_rounds": {"least": 0},
    "test_samples": {"least": 2},  # selection needs candidates
    "sample_temperature": {"above": 0},
    "pictures_per_round": {"least": 1},
    "test_limit": {"least": 1},
    "verifier_fall": {"least": 0},
    "bootstrap_rounds": {"least": 10},
}


@dataclass
class LoopConfig:
    """What all loops have."""

    num_rounds: int = setting(3, "Rounds of training behind round 0.")
    restart_from: str = setting(
        "previous",
        "What a round trains from: the `base`, or the `previous` round's model.",
        choices=[*STARTS],
    )
    round_objective: str = setting(
        "sft", "What a round trains by: `sft`, `dpo`, or one behind the other.", choices=[*OBJECTIVES]
    )
    dpo: dict[str, Any] | str | None = setting(
        None, "Keys of DPO training that differ from the SFT ones, for example {learning_rate: 1.0e-5}."
    )
    engine: str = setting(
        "hf",
        "What samples and answers: `hf` (transformers) or `vllm`, which takes whole models: adapters are merged before.",
        choices=[*ENGINES],
    )
    sample_batch_size: int | None = setting(
        None, f"Answers decoded side by side. None: {HF_BATCH}, with `engine: vllm` {ENGINES['vllm']}."
    )
    sample_processes: int = setting(1, "Processes that share the sampling, one for each GPU.")
    sample_ray: str | None = setting(
        None,
        "These processes are workers of a Ray cluster: its address (auto, HOST:6379), or local to start one here for each "
        "stage. None: processes of this machine.",
    )
    bootstrap_rounds: int = setting(1000, "Resamples of the intervals.")

    @property
    def loop(self) -> type["LoopConfig"]:
        """The class that has the loop's keys; a recipe's has those of its training, too."""
        raise NotImplementedError

    def loop_keys(self) -> list[str]:
        return [item.name for item in fields(self.loop)]

    def check_fields(self) -> None:
        """Raises UserError: a value of the wrong type or out of range."""
        values = {name: getattr(self, name) for name in self.loop_keys()}
        check_values(self.loop, values, "self-training", LIMITS)

    def needs(self, *names: str) -> None:
        """Raises UserError: a setting without a default is not set."""
        for name in names:
            if not getattr(self, name):
                raise UserError(f"`{name}` is not set. Name it in the recipe or with --{name}.")

    @property
    def rounds(self) -> int:
        """Rounds behind round 0."""
        return self.num_rounds

    @property
    def asked_file(self) -> str:
        """The file whose rows the loop answers and learns from; their images are beside it unless `image_root` is set."""
        raise NotImplementedError

    @property
    def uses_dpo(self) -> bool:
        return self.rounds > 0 and "dpo" in self.round_objective


@dataclass
class SelfTrainingConfig(LoopConfig):
    """R3V (arXiv 2411.00855); defaults are those of the released code where it has them."""

    train_questions: str | None = setting(
        None, "Training questions: JSONL of `id`, `images`, `question`, `answer` (and `choices`, `unit`)."
    )
    test_questions: str | None = setting(None, "Test questions, same format.")
    warmup_file: str | None = setting(
        None, "Warm-up: question rows with a `rationale` each (for example a teacher's)."
    )
    dataset: str = setting("pocket", "Grader and prompts of this data set.", choices=[*DATASETS])
    rules: str = setting(
        "ours", "`released` grades as the released code does, defects included.", choices=[*RULES]
    )
    prompt_style: str = setting(
        "guided", "`guided` says how to write the answer, `plain` is the classic line.", choices=[*STYLES]
    )
    num_rounds: int = setting(
        4, "Rounds of self-training behind round 0 (5 iterations in the released code)."
    )
    start: str = setting(
        "warmup",
        "`warmup`: round 0 trains on direct answers and `warmup_file`. `cold`: round 0 samples from the base.",
        choices=["warmup", "cold"],
    )
    restart_from: str = setting(
        "base",
        "What a round trains from: `base` (as published; of `round_objective: dpo`, round 0's model) or the "
        "`previous` round's model.",
        choices=[*STARTS],
    )
    variant: str = setting(
        "full", "The method, a baseline or an ablation on the same data.", choices=[*VARIANTS]
    )
    round_objective: str = setting(
        "sft",
        "`sft` (as published), `dpo` on pairs of the pool, or `sft+dpo`: both, one behind the other.",
        choices=[*OBJECTIVES],
    )
    pair_kinds: list[str] = setting(
        ["cot"], f"Kinds of preference pairs: {', '.join(BUILT_PAIRS)}.", choices=[*BUILT_PAIRS]
    )
    pair_weights: dict[str, Any] | str | None = setting(
        None, "Factor on the loss of each kind of pair, such as {refine: 0.5}. None: 1 for all."
    )
    samples_per_question: int = setting(3, "Samples per training question and round.")
    test_samples: int = setting(3, "Samples per test question for voting and self-select; 10 for a curve.")
    sample_temperature: float = setting(0.9, "Temperature of samples; equal ones teach nothing.")
    sample_top_p: float | None = setting(0.95, "Nucleus of samples.")
    sample_top_k: int | None = setting(50, "Likeliest tokens of samples.")
    max_new_tokens: int = setting(384, "Longest answer in tokens.")
    stop: list[str] = setting([], "Strings at which an answer ends (left out of it).")
    serve: str | None = setting(
        None,
        "Command of an OpenAI-compatible server to sample from, for example `vllm serve {model} --port {port}`. "
        "It is started for each round's model and stopped before the next training. None: `engine`, without a server.",
    )
    serve_timeout: float = setting(900.0, "Seconds until the server must answer.")
    serve_concurrency: int = setting(32, "Requests sent at the same time.")
    use_direct: bool = setting(True, "Direct-answer rows in every round.")
    select_sizes: list[int] = setting(
        [3], "Numbers of candidates of self-select rows. [2, 3, 4, 5, 6] for scaling."
    )
    deduplicate: bool = setting(False, "Of candidates with the same text keep the newest.")
    balance: bool = setting(False, "Cap the model's own rows of frequent answers at the mean over answers.")
    max_solve_rate: float | None = setting(
        None, "Leave out questions of which more candidates are right than this share."
    )
    min_rationale_chars: int = setting(0, "Leave out samples that are shorter (50 in the Qwen2-VL code).")
    max_row_tokens: int | None = setting(
        None,
        "Longer refine and select rows lose candidates or their beginnings, never the target. None: no limit.",
    )

    def check_self_training(self) -> None:
        """Raises UserError for settings that exclude each other or are out of range."""
        self.check_fields()
        check_factors(self.pair_weights or {}, BUILT_PAIRS, "pair_weights")
        if option := SECRET_OPTION.search(self.serve or ""):
            raise UserError(
                f"`serve` gives a secret on its command line (`{option[1]}`), which would come into records and logs. Set "
                "it in the environment, for vLLM as VLLM_API_KEY, and the same as OPENAI_API_KEY for the requests."
            )
        if self.serve and self.sample_ray:
            raise UserError("`serve` and `sample_ray` are two ways to sample: remove one of them.")
        if self.serve and self.engine != "hf":
            raise UserError(
                f"`serve` and `engine: {self.engine}` are two ways to sample: remove one of them."
            )
        self.build_settings(0)  # of its own fields it says itself what is wrong
        self.needs("train_questions", "test_questions")
        if self.start == "cold" and self.warmup_file:
            raise UserError("`start: cold` uses no warm-up: remove `warmup_file`, or set `start: warmup`.")
        if self.start == "warmup" and not self.warmup_file and not self.use_direct:
            raise UserError(
                "`start: warmup` has nothing to train on: set `warmup_file` or `use_direct: true`, or use `start: cold`."
            )
        if self.variant == "star_dpo" and (self.round_objective != "sft" or self.num_rounds < 1):
            raise UserError(
                "`variant: star_dpo` is rounds of SFT and one DPO stage behind the last: set `round_objective: sft` and "
                f"`num_rounds` of at least 1, found {self.round_objective!r} and {self.num_rounds}."
            )
        if self.round_objective == "dpo" and self.start == "cold" and self.restart_from == "base":
            raise UserError(
                "`round_objective: dpo` from an untuned base every round: set `restart_from: previous`, or `sft+dpo`."
            )

    @property
    def rounds(self) -> int:
        """Rounds behind round 0 that this variant has."""
        if self.variant in ("zero_shot", "distill"):
            return 0
        return min(1, self.num_rounds) if self.variant == "no_iteration" else self.num_rounds

    @property
    def samples_now(self) -> int:
        """Samples per question and round; without iteration all of them are drawn from round 0."""
        return self.samples_per_question * (self.num_rounds if self.variant == "no_iteration" else 1)

    @property
    def uses_refine(self) -> bool:
        return self.variant not in ("star", "star_dpo", "no_refine")

    @property
    def uses_select(self) -> bool:
        return self.variant not in ("star", "star_dpo", "no_select")

    def build_settings(self, seed: int) -> BuildSettings:
        """What the rows of a round are made of."""
        return BuildSettings(
            direct=self.use_direct,
            refine=self.uses_refine,
            select=self.uses_select,
            select_sizes=tuple(self.select_sizes),
            max_solve_rate=self.max_solve_rate,
            balance=self.balance,
            seed=seed,
        )

    @property
    def uses_dpo(self) -> bool:
        return self.variant == "star_dpo" or super().uses_dpo

    @property
    def asked_file(self) -> str:
        return self.train_questions

    @property
    def loop(self) -> type[LoopConfig]:
        return SelfTrainingConfig

    def made_with(self, round_: int) -> dict:
        """The settings that a round's rows and grades depend on."""
        names = ["dataset", "rules", "prompt_style", "use_direct", "max_row_tokens"]
        if round_ > 0:  # round 0 has no pool behind it, so ablations may share it
            names += ["uses_refine", "uses_select", "select_sizes", "max_solve_rate", "balance"]
            names += ["deduplicate", "min_rationale_chars"]
            names += ["round_objective", "pair_kinds", "pair_weights"]
        return {name: getattr(self, name) for name in names}

    def sampling(self) -> dict:
        """The settings samples depend on."""
        return {
            "temperature": self.sample_temperature,
            "top_p": self.sample_top_p,
            "top_k": self.sample_top_k,
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
        }


@dataclass
class RewindLoopConfig(LoopConfig):
    """Rounds on rewinds: a REVERSE model learns from what it took back in its answers to pictures without labels."""

    pictures: str | None = setting(
        None, "Rows to answer: JSONL of `id`, `images` and what is asked; no labels are read."
    )
    pictures_per_round: int | None = setting(
        None,
        "Rows of `pictures` for a round, each round the next ones of the file. None: all of them in every round.",
    )
    decoding: dict[str, Any] | str | None = setting(
        None,
        "Settings of retrospective decoding over those of the model, for the rounds' answers and for the test.",
    )
    pairs: dict[str, Any] | str | None = setting(
        None, "Settings of `data pairs`, for example {places: first, ends: false}."
    )
    test_spec: str | None = setting(None, "Eval spec that every round's model is measured by.")
    test_data_dir: str = setting(".", "Folder the spec's files are in.")
    test_limit: int | None = setting(None, "Only the first questions of the spec. None: all.")
    verifier_fall: float = setting(
        0.02,
        "Warn where the area under the ROC curve of P(</UN>), at the phrases that the model said before the first round, "
        "has fallen by more than this.",
    )

    def check_self_training(self) -> None:
        """Raises UserError for settings that are missing, out of range, or not those of a loop without labels."""
        self.check_fields()
        self.needs("pictures", "test_spec")
        if self.pair_config.judge != "verifier":
            raise UserError(
                "`pairs`: the pictures have no labels, so the verifier alone can judge. Leave `judge` out."
            )

    @property
    def asked_file(self) -> str:
        return self.pictures

    @property
    def loop(self) -> type[LoopConfig]:
        return RewindLoopConfig

    @property
    def pair_config(self) -> PairConfig:
        return configured(PairConfig, self.pairs or {}, "`pairs`")
