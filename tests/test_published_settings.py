"""Recipes beside the published runs: settings that were published, and a header that names what differs."""

import pytest
import yaml
from recipe_headers import advised_launch

from vlm_sft_rl import recipes

LORA = {"use_peft": True, "lora_dropout": 0.05}
REVERSE = {"num_train_epochs": 1, "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "optim": "adamw_torch"}
REVERSE |= {
    "hint_probability": 0.2,
    "freeze_vision": True,
    "train_projector": True,
    "dtype": "bfloat16",
    "rows": 128,
}
LLAVA = (
    REVERSE | LORA | {"lora_r": 128, "lora_alpha": 256, "projector_learning_rate": 2e-5, "weight_decay": 0.0}
)
LLAVA |= {"max_length": 2048, "save_steps": 1000, "max_grad_norm": 1.0}
QWEN = REVERSE | {
    "learning_rate": 5e-5,
    "projector_learning_rate": 5e-5,
    "weight_decay": 0.1,
    "subsample": 100_000,
}
QWEN |= {"min_pixels": 512 * 28 * 28, "max_pixels": 1280 * 28 * 28, "save_steps": 2000, "max_grad_norm": 1.0}
R3V = {"num_train_epochs": 3, "learning_rate": 3e-5, "lr_scheduler_type": "constant_with_warmup", "rows": 64}
R3V |= {
    "adam_beta1": 0.9,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "restart_from": "base",
    "freeze_vision": True,
}
R3V |= {
    "samples_per_question": 3,
    "sample_temperature": 0.9,
    "sample_top_p": 0.95,
    "sample_top_k": 50,
    "dtype": "bfloat16",
}
SCO = {
    "learning_rate": 1e-5,
    "num_train_epochs": 3,
    "epoch_decay": 0.85,
    "weight_decay": 0.0,
    "max_grad_norm": 0.0,
}
SCO |= {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "seed": 42,
    "gradient_checkpointing": True,
}
SC_TUNE = {
    "describer_steps": 200,
    "locator_steps": 100,
    "learning_rate": 5e-7,
    "locator_learning_rate": 1e-6,
    "rows": 128,
}
SC_TUNE |= {
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "kl_coef": 0.01,
    "clip_range": 0.2,
    "inner_epochs": 2,
    "top_p": 0.3,
}
SC_TUNE |= {
    "top_k": 100,
    "temperature": 1.0,
    "describe_max_new_tokens": 30,
    "min_new_tokens": 3,
    "save_steps": 300,
}
SC_TUNE |= {"save_total_limit": 10, "train_projector": True, "freeze_vision": True, "lr_scheduler_type": None}
PAIRS = LORA | {"lora_r": 128, "lora_alpha": 256, "rows": 64, "num_train_epochs": 1, "learning_rate": 2e-6}
PAIRS |= {
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.0,
    "loss_type": ["sigmoid"],
    "train_projector": False,
}
PUBLISHED = {
    "reverse/llava_1_5_7b_lora": LLAVA | {"learning_rate": 2e-4},
    "reverse/llava_more_8b_lora": LLAVA | {"learning_rate": 1e-4},
    "reverse/qwen2_5_vl_3b_full": QWEN,
    "reverse/qwen2_5_vl_3b_llava_ft": QWEN | {"hint_probability": None},
    "r3v/llava_1_5_7b_lora": R3V
    | LORA
    | {"lora_r": 128, "lora_alpha": 256, "weight_decay": 0.0, "warmup_steps": 0.03, "max_new_tokens": 384}
    | {"prompt_style": "plain", "num_rounds": 4, "start": "warmup"},
    "r3v/qwen2_vl_7b_warmup_lora": R3V
    | LORA
    | {"lora_r": 64, "lora_alpha": 16, "weight_decay": 0.05, "warmup_steps": 0.1, "max_new_tokens": 384}
    | {"prompt_style": "guided", "num_rounds": 4, "start": "warmup"},
    "r3v/qwen2_vl_7b_lora": R3V
    | {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "weight_decay": 0.05, "warmup_steps": 0.1}
    | {"max_new_tokens": 200, "min_rationale_chars": 50, "num_rounds": 3, "start": "cold"},
    "sco/llama_3_2_11b_llava_cot": SCO | {"rows": 32, "use_peft": None, "freeze_vision": False},
    "sco/llama_3_2v_11b_cot": SCO
    | LORA
    | {
        "rows": 8,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_modules": ["q_proj", "v_proj"],
        "attempt_loss": "all",
    },
    "sentinel/llava_1_5_7b_lora": PAIRS | {"beta": 0.1, "warmup_steps": 0},
    "chair_dpo/llava_1_5_7b_lora": PAIRS | {"beta": 0.2, "warmup_steps": 0.03, "seed": 42},
    "sc_tune/qwen2_vl_7b_full": SC_TUNE,
    "sc_tune/qwen2_5_vl_7b_full": SC_TUNE,
}
# what a header must name as its own deviation
NAMED = {
    "reverse/llava_1_5_7b_lora": [
        "start",
        "conversation",
        "images",
        "new token rows",
        "long rows",
        "sampling",
    ],
    "reverse/llava_more_8b_lora": ["start", "conversation", "new token rows", "long rows", "sampling"],
    "reverse/qwen2_5_vl_3b_full": ["subset", "new token rows", "kernels"],
    "reverse/qwen2_5_vl_3b_llava_ft": ["subset", "kernels"],
    "r3v/llava_1_5_7b_lora": ["prompts", "select rows", "DPO", "length", "grading"],
    "r3v/qwen2_vl_7b_warmup_lora": ["model", "prompts", "delimiters", "DPO", "length", "images"],
    "r3v/qwen2_vl_7b_lora": ["prompts", "DPO", "1,024", "precision", "validation", "options"],
    "sc_tune/qwen2_vl_7b_full": ["boxes, prompts", "images", "lengths", "leak guard", "log-probabilities"],
    "sc_tune/qwen2_5_vl_7b_full": ["boxes, prompts", "images", "lengths", "leak guard", "log-probabilities"],
    "sc_tune/qwen2_vl_7b_lora": ["boxes, prompts", "dropout 0.05", "`wte` and `lm_head`"],
    "sc_tune/qwen2_5_vl_3b_lora": ["boxes, prompts", "dropout 0.05", "`wte` and `lm_head`"],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_the_published_settings(name):
    recipe = yaml.safe_load(recipes.find("recipes", name).read_text("utf-8"))
    _, processes = advised_launch(name)
    recipe["rows"] = recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * processes
    assert {key: recipe.get(key) for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_header_names_what_differs(name):
    text = recipes.find("recipes", name).read_text("utf-8").split("\n\nmethod:")[0]
    words = [*NAMED[name], "normalisation", "wandb" if "qwen2_vl_7b_lora" not in name else "theirs"]
    if name.startswith(("reverse", "r3v/llava", "r3v/qwen2_vl_7b_warmup")):
        words.append("tf32")
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize("name", [n for n in recipes.names("recipes") if "/pocket" not in n])
def test_every_header_says_what_differs_or_where_it_is_said(name):
    text = " ".join(
        recipes.find("recipes", name).read_text("utf-8").split("\n\nmethod:")[0].replace("#", " ").split()
    )
    assert any(said in text for said in ("iffer", "Answers to no published figure", "Theirs averages")), name
