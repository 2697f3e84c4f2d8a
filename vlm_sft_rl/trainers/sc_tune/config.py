"""Settings of `SCTuneTrainer`; the defaults are the published ones (arXiv 2403.13263 and its released code), but for the
length of a located box."""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from ...errors import UserError
from ...models.regions import DESCRIBE, LOCATE
from ..base import OpenPrecision

BASELINES = ("greedy", "greedy_live", "group", "none")
ANCHORS = ("frozen", "start")
DESCRIBERS = ("plain", "retrospective")


@dataclass
class SCTuneConfig(OpenPrecision, TrainingArguments):
    """TRL-style training arguments plus those of the describer-locator loop.

    One step is one batch of boxes, as in the released code: a describer step makes up to `inner_epochs` updates of the
    weights, a locator step one. `per_device_train_batch_size` x `gradient_accumulation_steps` x processes is the
    number of boxes a step (128 published); a pass of a describer step holds `num_generations` descriptions of each of
    its boxes. `learning_rate` is the describer's. `num_train_epochs` counts only with `max_steps: -1`.
    """

    learning_rate: float = field(default=5e-7, metadata={"help": "Learning rate of describer steps."})
    locator_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of locator steps."})
    lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of both learning rates."})
    adam_beta2: float = field(default=0.95, metadata={"help": "As published."})
    weight_decay: float = field(default=0.1, metadata={"help": "As published."})
    max_steps: int = field(
        default=1800,
        metadata={"help": "Steps; the authors saw their best at 1200 or 1800, and decline past 2400."},
    )
    save_steps: float = field(default=300, metadata={"help": "One cycle of both phases."})
    bf16: bool | None = field(
        default=None, metadata={"help": "Compute in bfloat16. None: on a GPU that has it."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must stay false: the collator reads the rows as they are."}
    )
    describer_steps: int = field(default=200, metadata={"help": "Steps of a describer phase; 0: none."})
    locator_steps: int = field(default=100, metadata={"help": "Steps of a locator phase; 0: none."})
    reset_optimizer: bool = field(
        default=True, metadata={"help": "Forget Adam's moments when a phase ends, as published."}
    )
    describe_prompt: str = field(
        default=DESCRIBE, metadata={"help": "Question for a description; `{box}` is the region."}
    )
    locate_prompt: str = field(
        default=LOCATE, metadata={"help": "Question for a box; `{description}` is what to find."}
    )
    box_convention: str | None = field(
        default=None,
        metadata={
            "help": "How boxes are written (vlm_sft_rl.models.boxes). None: the checkpoint's or its family's."
        },
    )
    describe_max_new_tokens: int = field(default=30, metadata={"help": "Longest description, in tokens."})
    locate_max_new_tokens: int = field(
        default=32,
        metadata={
            "help": "Longest located box, in tokens, after the forced opening. Published: 20, enough for Qwen-VL's boxes."
        },
    )
    min_new_tokens: int = field(
        default=3,
        metadata={
            "help": "Shortest description, in tokens, without the end of turn. Nothing with `describer: retrospective`."
        },
    )
    temperature: float = field(
        default=1.0,
        metadata={
            "help": "Of sampled descriptions; log-probabilities are taken at it. `top_k` and `top_p` are not in them, as "
            "published."
        },
    )
    top_k: int | None = field(default=100, metadata={"help": "Of sampled descriptions. null: off."})
    top_p: float | None = field(
        default=0.3,
        metadata={"help": "Of sampled descriptions. null: off. The published 0.3 explores little."},
    )
    num_generations: int = field(default=1, metadata={"help": "Sampled descriptions per box."})
    baseline: str = field(
        default="greedy",
        metadata={
            "help": "What a description must beat: `greedy` = the frozen copy's greedy description (published), "
            "`greedy_live` = the trained model's own, `group` = the other samples of the box (needs "
            "num_generations >= 2), `none`.",
            "choices": list(BASELINES),
        },
    )
    kl_coef: float = field(default=0.01, metadata={"help": "Weight of the per-token KL in the return."})
    kl_anchor: str = field(
        default="frozen",
        metadata={
            "help": "What KL is measured against: the `frozen` copy of the last switch (published), or the `start`.",
            "choices": list(ANCHORS),
        },
    )
    clip_range: float = field(default=0.2, metadata={"help": "Half width of the clipping interval."})
    inner_epochs: int = field(default=2, metadata={"help": "Updates on one batch of descriptions."})
    early_stop: float = field(
        default=1.5,
        metadata={
            "help": "No further update on a batch once mean log p_old - log p_new exceeds this. .inf: off."
        },
    )
    max_ratio: float = field(
        default=10.0,
        metadata={
            "help": "A micro-batch whose mean probability ratio exceeds this gets no gradient. .inf: off."
        },
    )
    rewards: list[str] = field(
        default_factory=lambda: ["iou"],
        metadata={
            "help": "Reward functions by name (vlm_sft_rl.rewards.regions): iou, giou, hit, parse, length, iou@0.7."
        },
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per reward function. None: 1 each."}
    )
    leak_guard: bool = field(
        default=True,
        metadata={
            "help": "A description that spells coordinates earns nothing, and the locator never learns from it."
        },
    )
    min_caption_iou: float = field(
        default=0.0,
        metadata={
            "help": "The locator learns only from descriptions by which the frozen copy finds the box at least this well. "
            "0 (published): from all."
        },
    )
    rec_file: str | None = field(
        default=None,
        metadata={
            "help": "Region rows with `expressions`, mixed into locator steps. None (published): no such rows."
        },
    )
    rec_share: float = field(
        default=0.25,
        metadata={
            "help": "With rec_file: rows of it per box of a locator step, rounded up over all processes."
        },
    )
    replay_file: str | None = field(
        default=None,
        metadata={
            "help": "SFT rows (`messages` + `images`) mixed into locator steps, so that what they show is not forgotten. "
            "None (published): no such rows."
        },
    )
    replay_share: float = field(
        default=0.25,
        metadata={
            "help": "With replay_file: rows of it per box of a locator step, rounded up over all processes."
        },
    )
    rollout_batch_size: int | None = field(
        default=None, metadata={"help": "Boxes decoded together. None: all boxes of a step on this process."}
    )
    describer: str = field(
        default="plain",
        metadata={
            "help": "How descriptions are decoded: `plain`, or `retrospective` for a REVERSE model that verifies its "
            "own phrases.",
            "choices": list(DESCRIBERS),
        },
    )
    verification_threshold: float | None = field(
        default=None, metadata={"help": "With describer: retrospective: tau. None: the checkpoint's own."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Dropout off: ratio and KL compare one and the same network."}
    )

    def __post_init__(self):
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            # reentrant checkpoints lose the gradient of adapters behind frozen embeddings
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        """Raises UserError: a setting is out of range or contradicts another."""
        for name in SCTuneConfig.__annotations__:
            value = getattr(self, name)
            # without end, `early_stop` and `max_ratio` are off
            off = value == math.inf and name in ("early_stop", "max_ratio")
            if isinstance(value, float) and not math.isfinite(value) and not off:
                raise UserError(f"`{name}` = {value!r}: a finite number is needed.")
        wrong = {
            "describer_steps": (
                min(self.describer_steps, self.locator_steps) < 0
                or self.describer_steps + self.locator_steps < 1,
                "phases must not be negative, and one of them must have steps",
            ),
            "baseline": (self.baseline not in BASELINES, f"choose one of {', '.join(BASELINES)}"),
            "kl_anchor": (
                self.kl_anchor not in ANCHORS or (self.kl_anchor == "start" and self.kl_coef == 0),
                f"choose one of {', '.join(ANCHORS)}; `start` needs a `kl_coef` above 0",
            ),
            "num_generations": (
                self.num_generations < (2 if self.baseline == "group" else 1),
                "at least 1, and at least 2 for the baseline `group`",
            ),
            "inner_epochs": (self.inner_epochs < 1, "at least 1"),
            "clip_range": (not 0 < self.clip_range < 1, "strictly between 0 and 1"),
            "kl_coef": (self.kl_coef < 0, "0 or more"),
            "max_ratio": (self.max_ratio <= 1, "above 1, where every batch begins"),
            "early_stop": (self.early_stop <= 0, "above 0"),
            "temperature": (self.temperature <= 0, "above 0"),
            "top_k": (self.top_k is not None and self.top_k < 1, "at least 1; null turns it off"),
            "top_p": (
                self.top_p is not None and not 0 < self.top_p <= 1,
                "above 0 and at most 1; null turns it off",
            ),
            "rollout_batch_size": (
                self.rollout_batch_size is not None and self.rollout_batch_size < 1,
                "at least 1; null: all boxes of a step",
            ),
            "describer": (self.describer not in DESCRIBERS, f"choose one of {', '.join(DESCRIBERS)}"),
            "verification_threshold": (
                self.verification_threshold is not None
                and not (self.describer == "retrospective" and 0 < self.verification_threshold < 1),
                "strictly between 0 and 1, and only with `describer: retrospective`",
            ),
            "learning_rate": (
                self.learning_rate <= 0 or self.locator_learning_rate <= 0,
                "both learning rates must be above 0",
            ),
            "min_caption_iou": (
                not 0 <= self.min_caption_iou <= 1 or (self.min_caption_iou > 0 and not self.locator_steps),
                "from 0 to 1; and 0 without locator steps (`locator_steps: 0`), whose descriptions it chooses",
            ),
            "rec_share": (
                self.rec_share < 0
                or (self.rec_file is not None and self.rec_share > 0 and not self.locator_steps),
                "0 or more; and 0 without locator steps (`locator_steps: 0`), for they are what `rec_file` is mixed into",
            ),
            "replay_share": (
                self.replay_share < 0
                or (self.replay_file is not None and self.replay_share > 0 and not self.locator_steps),
                "0 or more; and 0 without locator steps (`locator_steps: 0`), for they are what `replay_file` is mixed into",
            ),
            "locate_max_new_tokens": (self.locate_max_new_tokens < 1, "at least 1"),
            "describe_max_new_tokens": (
                not 0 <= self.min_new_tokens < self.describe_max_new_tokens,
                "above `min_new_tokens`, which must not be negative",
            ),
            "remove_unused_columns": (
                self.remove_unused_columns,
                "must be false, the collator reads the rows",
            ),
        }
        for name, (bad, expected) in wrong.items():
            if bad:
                raise UserError(f"`{name}` = {getattr(self, name)!r}: {expected}.")

    @property
    def prompts(self) -> dict[str, str]:
        """The two questions, by the names under which evaluation finds them in a checkpoint's sidecar."""
        return {"describe_prompt": self.describe_prompt, "locate_prompt": self.locate_prompt}


def phase_at(step: int, describer_steps: int, locator_steps: int) -> tuple[str, int]:
    """The phase of a step (from 0) and its place in the phase; a function of the step alone, so a resume needs no more.

    Every phase that has steps is followed by the other one that has, or by itself.
    """
    place = step % (describer_steps + locator_steps)
    return ("describer", place) if place < describer_steps else ("locator", place - describer_steps)
