"""The memory that the recipes' headers name is what `--dry-run` prints at the published sizes."""

import pytest
from json_lines import write_lines
from PIL import Image
from published_sizes import CHECKPOINTS, checkpoint
from recipe_headers import advised_launch, estimate_of

from vlm_sft_rl import recipes
from vlm_sft_rl.models.load import VLMModelConfig
from vlm_sft_rl.models.memory import gib, meta_model
from vlm_sft_rl.train import parse, run

RECIPES = [name for name in recipes.names("recipes") if "/pocket" not in name]
QUICK = (
    "reverse/qwen2_5_vl_3b_full",
    "r3v/qwen2_vl_7b_qlora",
    "sc_tune/qwen2_vl_7b_full",
    "sco/llama_3_2v_11b_cot_qlora",
)
QUESTIONS = 16  # of a step of GRPO


def write_rows(folder, method: str, filler: int) -> str:
    Image.new("RGB", (640, 480), "white").save(folder / "a.png")
    text = "x" * filler  # the tokenizer has a token for each byte
    if method == "sc_tune":
        rows = [{"id": "1", "image": "a.png", "width": 640, "height": 480, "box": [9, 9, 99, 99]}]
        rows[0]["expressions"] = ["it" + text]
    elif method == "reflection_dpo":
        sides = {"chosen": "A <SPAN>short answer</CN>", "rejected": "A <SPAN>wrong answer</UN>"}
        rows = [{"id": "1", "images": ["a.png"], "prompt": "What is there?" + text, **sides}]
    elif method == "grpo":
        asked = {
            "images": ["a.png"],
            "question": "What is there?" + text,
            "answer": "yes",
            "objects": ["cat"],
        }
        rows = [{"id": str(number), **asked} for number in range(QUESTIONS)]
    else:
        answer = "A short answer of some fifty bytes."
        if method == "reverse":
            answer = "A <SPAN>short answer</CN> of some fifty byte"  # as many tokens: a tag is one
        staged = "<SUMMARY> a </SUMMARY><CAPTION> b </CAPTION><REASONING> c </REASONING><CONCLUSION> d </CONCLUSION>"
        messages = [
            {"role": "user", "content": "What is there?" + text},
            {"role": "assistant", "content": staged if method == "sco" else answer},
        ]
        rows = [{"id": "1", "images": ["a.png"], "messages": messages}]
    path = folder / f"rows{filler}.jsonl"
    write_lines(path, rows)
    return str(path)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RECIPES]
)
def test_the_header_says_what_the_dry_run_prints(name, tmp_path):
    path = recipes.find("recipes", name)
    recipe = {k: v for k, v in recipes.load_recipe(path).items() if k != "subsample"}  # there is one row
    total, batch, tokens = estimate_of(name)
    # a pair is two rows, and four with its damaged pictures
    rows = {"reflection_dpo": 4 if recipe.get("image_weight") else 2}.get(recipe["method"], 1)
    assert batch == recipe["per_device_train_batch_size"] * rows
    config, gpus = advised_launch(name)
    start = checkpoint(recipe["model_name_or_path"], tmp_path / "model")

    def dry_run_of(filler: int) -> dict:
        words = ["--model_name_or_path", str(start), "--image_root", str(tmp_path)]
        words += ["--train_file", write_rows(tmp_path, recipe["method"], filler)]
        words += ["--output_dir", str(tmp_path / "out"), "--bf16", "false", "--index_dir", str(tmp_path)]
        return run(recipe, *parse(recipe, words, name), dry_run=True, gpus=gpus)

    short = dry_run_of(0)
    report = dry_run_of(tokens - short["longest_row"])
    assert report["longest_row"] == tokens
    strategy = "ddp" if config == "single_gpu" else config
    assert gib(report["memory"][strategy].total) == total
    assert strategy not in report["refused"]


def test_every_start_of_a_recipe_has_a_size():
    starts = {recipes.load_recipe(recipes.find("recipes", n))["model_name_or_path"] for n in RECIPES}
    assert starts == set(CHECKPOINTS)


# billions of weights, by the model cards
PUBLISHED = {
    "llava-hf/llava-1.5-7b-hf": 7.06,
    "Qwen/Qwen2-VL-7B-Instruct": 8.29,
    "Qwen/Qwen2.5-VL-3B-Instruct": 3.75,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8.29,
    "checkpoints/qwen3-vl-4b-verify": 4.44,
    "Qwen/Qwen3-VL-8B-Instruct": 8.77,
    "meta-llama/Llama-3.2-11B-Vision-Instruct": 10.6,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_sizes_are_the_published_ones(name, tmp_path):
    args = VLMModelConfig(model_name_or_path=str(checkpoint(name, tmp_path)), dtype="bfloat16")
    counted = sum(p.numel() for p in meta_model(args, ()).parameters())
    assert counted / 1e9 == pytest.approx(PUBLISHED[name], rel=0.005)
