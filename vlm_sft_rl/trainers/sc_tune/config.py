"""Settings of `SCTuneTrainer`; the defaults are the published ones (arXiv 2403.13263 and its released code), but for the
length of a located box."""

from dataclasses import dataclass

from transformers import TrainingArguments

from ...errors import UserError
from ...models.regions import DESCRIBE, LOCATE
from ...settings import check_values, setting
from ..base import OpenPrecision

BASELINES = ("greedy", "greedy_live", "group", "none")
ANCHORS = ("frozen", "start")
DESCRIBERS = ("plain", "retrospective")

# what numbers must be; a recipe's fields are also argparse's, which knows no limits
LIMITS = {
    **{name: {"least": 0} for name in ("describer_steps", "locator_steps", "min_new_tokens", "kl_coef")},
    **{name: {"least": 0} for name in ("rec_share", "replay_share")},
    **{name: {"least": 1} for name in ("num_generations", "inner_epochs", "top_k", "rollout_batch_size")},
    **{name: {"least": 1} for name in ("locate_max_new_tokens", "describe_max_new_tokens")},
    **{name: {"above": 0} for name in ("temperature", "learning_rate", "locator_learning_rate")},
    **{name: {"above": 0, "below": 1} for name in ("clip_range", "verification_threshold")},
    "top_p": {"above": 0, "most": 1},
    "min_caption_iou": {"least": 0, "most": 1},
    "max_ratio": {"above": 1, "infinite": True},  # 1 is where every batch begins
    "early_stop": {"above": 0, "infinite": True},
}


@dataclass
class SCTuneConfig(OpenPrecision, TrainingArguments):
    """TRL-style training arguments plus those of the describer-locator loop.

    One step is one batch of boxes, as in the released code: a describer step makes up to `inner_epochs` updates of the
    weights, a locator step one. `per_device_train_batch_size` x `gradient_accumulation_steps` x processes is the
    number of boxes a step (128 published); a pass of a describer step holds `num_generations` descriptions of each of
    its boxes. `learning_rate` is the describer's. `num_train_epochs` counts only with `max_steps: -1`.
    """

    learning_rate: float = setting(5e-7, "Learning rate of describer steps.")
    locator_learning_rate: float = setting(1e-6, "Learning rate of locator steps.")
    lr_scheduler_type: str = setting("constant", "Schedule of both learning rates.")
    adam_beta2: float = setting(0.95, "As published.")
    weight_decay: float = setting(0.1, "As published.")
    max_steps: int = setting(
        1800, "Steps; the authors saw their best at 1200 or 1800, and decline past 2400."
    )
    save_steps: float = setting(300, "One cycle of both phases.")
    bf16: bool | None = setting(None, "Compute in bfloat16. None: on a GPU that has it.")
    logging_steps: float = setting(10, "Log every so many steps.")
    remove_unused_columns: bool = setting(False, "Must stay false: the collator reads the rows as they are.")
    describer_steps: int = setting(200, "Steps of a describer phase; 0: none.")
    locator_steps: int = setting(100, "Steps of a locator phase; 0: none.")
    reset_optimizer: bool = setting(True, "Forget Adam's moments when a phase ends, as published.")
    describe_prompt: str = setting(DESCRIBE, "Question for a description; `{box}` is the region.")
    locate_prompt: str = setting(LOCATE, "Question for a box; `{description}` is what to find.")
    box_convention: str | None = setting(
        None, "How boxes are written (vlm_sft_rl.models.boxes). None: the checkpoint's or its family's."
    )
    describe_max_new_tokens: int = setting(30, "Longest description, in tokens.")
    locate_max_new_tokens: int = setting(
        32,
        "Longest located box, in tokens, after the forced opening. Published: 20, enough for Qwen-VL's boxes.",
    )
    min_new_tokens: int = setting(
        3,
        "Shortest description, in tokens, without the end of turn. Nothing with `describer: retrospective`.",
    )
    temperature: float = setting(
        1.0,
        "Of sampled descriptions; log-probabilities are taken at it. `top_k` and `top_p` are not in them, as "
        "published.",
    )
    top_k: int | None = setting(100, "Of sampled descriptions. null: off.")
    top_p: float | None = setting(
        0.3, "Of sampled descriptions. null: off. The published 0.3 explores little."
    )
    num_generations: int = setting(1, "Sampled descriptions per box.")
    without_replacement: bool = setting(
        False,
        "Draw the descriptions of a box without replacement, so that no two are the same; each counts with the weight that "
        "keeps the gradient unbiased (arXiv 2002.06043). Needs num_generations of at least 2.",
    )
    baseline: str = setting(
        "greedy",
        "What a description must beat: `greedy` = the frozen copy's greedy description (published), "
        "`greedy_live` = the trained model's own, `group` = the other samples of the box (needs "
        "num_generations >= 2), `none`.",
        choices=list(BASELINES),
    )
    kl_coef: float = setting(0.01, "Weight of the per-token KL in the return.")
    kl_anchor: str = setting(
        "frozen",
        "What KL is measured against: the `frozen` copy of the last switch (published), or the `start`.",
        choices=list(ANCHORS),
    )
    clip_range: float = setting(0.2, "Half width of the clipping interval.")
    inner_epochs: int = setting(2, "Updates on one batch of descriptions.")
    early_stop: float = setting(
        1.5,
        "No further update on a batch once mean log p_old - log p_new exceeds this. .inf: off.",
    )
    max_ratio: float = setting(
        10.0,
        "A micro-batch whose mean probability ratio exceeds this gets no gradient. .inf: off.",
    )
    rewards: list[str] = setting(
        ["iou"],
        "Reward functions by name (vlm_sft_rl.rewards.regions): iou, giou, hit, parse, length, iou@0.7.",
    )
    reward_weights: list[float] | None = setting(None, "One weight per reward function. None: 1 each.")
    leak_guard: bool = setting(
        True, "A description that spells coordinates earns nothing, and the locator never learns from it."
    )
    min_caption_iou: float = setting(
        0.0,
        "The locator learns only from descriptions by which the frozen copy finds the box at least this well. "
        "0 (published): from all.",
    )
    rec_file: str | None = setting(
        None, "Region rows with `expressions`, mixed into locator steps. None (published): no such rows."
    )
    rec_share: float = setting(
        0.25, "With rec_file: rows of it per box of a locator step, rounded up over all processes."
    )
    replay_file: str | None = setting(
        None,
        "SFT rows (`messages` + `images`) mixed into locator steps, so that what they show is not forgotten. "
        "None (published): no such rows.",
    )
    replay_share: float = setting(
        0.25, "With replay_file: rows of it per box of a locator step, rounded up over all processes."
    )
    rollout_batch_size: int | None = setting(
        None, "Boxes decoded together. None: all boxes of a step on this process."
    )
    describer: str = setting(
        "plain",
        "How descriptions are decoded: `plain`, or `retrospective` for a REVERSE model that verifies its "
        "own phrases.",
        choices=list(DESCRIBERS),
    )
    verification_threshold: float | None = setting(
        None, "With describer: retrospective: tau. None: the checkpoint's own."
    )
    use_vllm: bool = setting(
        False, "Must stay false: a step's answers branch off cached keys, which vLLM does not give."
    )
    disable_dropout: bool = setting(True, "Dropout off: ratio and KL compare one and the same network.")

    def __post_init__(self):
        super().__post_init__()
        self._check()

    def _check(self) -> None:
        """Raises UserError: a setting is out of range or contradicts another."""
        values = {name: getattr(self, name) for name in (*SCTuneConfig.__annotations__, "learning_rate")}
        check_values(SCTuneConfig, values, "sc_tune", LIMITS)
        steps, mixed = (
            self.locator_steps,
            "0 without locator steps (`locator_steps: 0`), which it is mixed into",
        )
        needs = {
            "describer_steps": (self.describer_steps + steps > 0, "one of the phases must have steps"),
            "kl_anchor": (
                self.kl_anchor == "frozen" or self.kl_coef > 0,
                "`start` needs a `kl_coef` above 0",
            ),
            "num_generations": (
                self.num_generations > 1 or self.baseline != "group",
                "at least 2 for the baseline `group`",
            ),
            "without_replacement": (
                not self.without_replacement or self.num_generations > 1,
                "needs `num_generations` of at least 2",
            ),
            "describer": (
                not self.without_replacement or self.describer == "plain",
                "`without_replacement` knows the law of plain descriptions alone",
            ),
            "verification_threshold": (
                self.verification_threshold is None or self.describer == "retrospective",
                "only with `describer: retrospective`",
            ),
            "min_caption_iou": (
                steps > 0 or self.min_caption_iou == 0,
                "0 without locator steps (`locator_steps: 0`), whose descriptions it chooses",
            ),
            "rec_share": (steps > 0 or not self.rec_file or self.rec_share == 0, mixed),
            "replay_share": (steps > 0 or not self.replay_file or self.replay_share == 0, mixed),
            "describe_max_new_tokens": (
                self.min_new_tokens < self.describe_max_new_tokens,
                "above `min_new_tokens`",
            ),
            "use_vllm": (
                not self.use_vllm,
                "must be false. A step's greedy descriptions, boxes and log-probabilities branch off the cached keys of one "
                "pass over the picture, and vLLM gives no keys; it could draw the samples alone, which were not compared "
                "with the trainer. Leave it out",
            ),
            "remove_unused_columns": (
                not self.remove_unused_columns,
                "must be false, the collator reads the rows",
            ),
        }
        for name, (is_fine, need) in needs.items():
            if not is_fine:
                raise UserError(f"`{name}` = {getattr(self, name)!r}: {need}.")

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
