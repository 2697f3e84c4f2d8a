"""What every engine is asked to train, and what it refuses: the one place that says what of the engines is tested."""

from dataclasses import dataclass, field

ENGINES = ("ddp", "zero2", "zero3", "fsdp2")
STEPS, HALFWAY = 3, 2
BATCH = 4  # rows of a step, over all processes
COUNT = 16  # rows in a file
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
REGIONS = {
    "box_convention": "llava", "describer_steps": 1, "locator_steps": 1, "locator_learning_rate": 2e-3,
    "describe_max_new_tokens": 6, "locate_max_new_tokens": 8, "min_new_tokens": 1, "num_generations": 2,
    "rewards": ["giou", "length"], "reward_weights": [1.0, 0.1], "rec_share": 0.5,
}  # fmt: skip
TERMS = {"image_weight": 0.5, "anchor_weight": 0.3}
VERDICTS = {"phrases_only": True, "verdict_weight": 0.5}
QUESTIONS = {
    "grader": "exact", "staged": False, "rewards": ["answer", "length"], "reward_weights": [1.0, 0.1],
    "num_generations": 2, "max_completion_length": 6, "beta": 0.1,
}  # fmt: skip


CREDIT = QUESTIONS | {
    "grader": None, "rewards": ["objects", "verdicts"], "span_credit": 0.5, "max_completion_length": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A line of the table in docs/distributed.md.

    Attributes:
        name: as the table has it.
        method: of the recipe.
        rows: the file that `write_rows` writes for it.
        settings: keys of the recipe beside those that all runs have.
    """

    name: str
    method: str
    rows: str
    settings: dict = field(default_factory=dict)


METHODS = {
    "reverse": Method("REVERSE, full", "reverse", "tagged", {"gradient_checkpointing": True}),
    "reverse_lora": Method("REVERSE, LoRA with token rows", "reverse", "tagged", LORA),
    "reverse_lora_only": Method(
        "REVERSE, LoRA without token rows", "reverse", "tagged", LORA | {"train_new_tokens": False}
    ),
    "sft": Method("SFT, full", "sft", "tagged", {"gradient_accumulation_steps": 2}),
    "sft_doubts": Method("SFT, full, with `doubts`", "sft", "doubted"),
    "sft_packed": Method("SFT, full, packed by image", "sft", "tagged", {"vision_packing": "image"}),
    "dpo": Method("reflection DPO, full, with the terms of mDPO", "reflection_dpo", "pairs", TERMS),
    "dpo_lora": Method("reflection DPO, LoRA", "reflection_dpo", "pairs", LORA),
    "dpo_verdicts": Method(
        "reflection DPO, full, with `verdict_weight`", "reflection_dpo", "pairs", VERDICTS
    ),
    "dpo_verdicts_lora": Method(
        "reflection DPO, LoRA, with `verdict_weight`", "reflection_dpo", "pairs", VERDICTS | TERMS | LORA
    ),
    "sco": Method("self-correction, full", "sco", "corrections"),
    "sc_tune": Method("SC-Tune, full", "sc_tune", "regions", REGIONS),
    "sc_tune_lora": Method("SC-Tune, LoRA", "sc_tune", "regions", REGIONS | LORA),
    "grpo": Method("GRPO, full", "grpo", "questions", QUESTIONS),
    "grpo_lora": Method("GRPO, LoRA", "grpo", "questions", QUESTIONS | LORA),
    "grpo_credit": Method("GRPO, full, with `verdicts` and `span_credit`", "grpo", "captions", CREDIT),
}
# what an engine refuses before a weight is read, and the beginning of what it says
_ROWS = "LoRA with trainable token rows does not work under"
_HEAD = "`verdict_weight` does not work under"
_DOUBTS = "`doubts` in a row do not work under"
_COPY = "SC-Tune "
REFUSED = {
    ("zero3", "reverse_lora"): _ROWS,
    ("fsdp2", "reverse_lora"): _ROWS,
    ("zero3", "sft_doubts"): _DOUBTS,
    ("fsdp2", "sft_doubts"): _DOUBTS,
    ("zero3", "dpo_verdicts"): _HEAD,
    ("fsdp2", "dpo_verdicts"): _HEAD,
    ("zero3", "dpo_verdicts_lora"): _HEAD,
    ("fsdp2", "dpo_verdicts_lora"): _HEAD,
    ("zero3", "sc_tune"): _COPY,
    ("fsdp2", "sc_tune"): _COPY,
    ("zero3", "sc_tune_lora"): _COPY,
    ("fsdp2", "sc_tune_lora"): _COPY,
}
# LLaVA's embeddings are untied, Qwen's tied; of the other families an engine sees the classes and the names alone
# the pocket verifier closes its phrases by tags
FAMILIES = {
    "llava": [name for name in METHODS if name != "grpo_credit"],
    "pocket": ["grpo_credit"],
    "qwen2_5_vl": ["reverse", "reverse_lora", "sft", "dpo"],
}
OTHERS = "llava_mistral llava_more llava_next qwen2_vl qwen3_vl mllama idefics3 smolvlm internvl"
FAMILIES |= {family: ["reverse"] for family in OTHERS.split()}
RUNS = [(family, method) for family, methods in FAMILIES.items() for method in methods]
# these are also resumed, merged and reloaded
RESUMED = [
    (family, name)
    for family, name in RUNS
    if (family == "llava" and "verdict_weight" not in METHODS[name].settings)
    or (family, name) == ("qwen2_5_vl", "reverse")
]
