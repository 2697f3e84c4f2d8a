"""GRPO as a recipe runs it: questions in, a checkpoint and an honest count of tokens out."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import families
import pandas
import pytest
import staged_world
import torch
from json_lines import read_lines, write_lines
from safetensors.torch import load_file
from training import SETTINGS, written

from vlm_sft_rl import train
from vlm_sft_rl.correction.cost import parameter_count, training_cost
from vlm_sft_rl.data.images import open_image
from vlm_sft_rl.decoding import SamplingConfig, generate_plain
from vlm_sft_rl.io import read_json
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.models.sidecar import read_sidecar
from vlm_sft_rl.trainers.vllm_rollouts import EQUAL, UNEQUAL

QUESTIONS = 4
GUIDE = Path(__file__).parents[2] / "docs/sco.md"


@pytest.fixture
def folder(tmp_path):
    staged_world.write_checkpoint(tmp_path / "model")
    staged_world.write_questions(tmp_path / "data", QUESTIONS)
    return tmp_path


def run(folder, *words, **settings):
    recipe = {
        "method": "grpo",
        "model_name_or_path": str(folder / "model"),
        "train_file": str(folder / "data/questions.jsonl"),
        "output_dir": str(folder / "out"),
        "grader": "exact",
        "staged": False,
        "dtype": "float32",
        "num_generations": 2,
        "max_completion_length": 6,
        "gradient_checkpointing": False,
        **SETTINGS,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        **settings,
    }
    return train.main(["--config", written(recipe, folder), *words])


def history(folder):
    return read_json(folder / "out/trainer_state.json")["log_history"]


def greedy_answers(model, data):
    """Our own decoding of all questions, two tokens each."""
    rows = read_lines(data / "questions.jsonl")
    images = [[open_image(name, data) for name in row["images"]] or None for row in rows]
    asked = [row["question"] for row in rows]
    return generate_plain(*load_for_inference(model)[:2], images, asked, SamplingConfig(max_new_tokens=2))


# a random model is never right, so its gradient comes from the length
VARYING = {"rewards": ["answer", "length"], "reward_weights": [1.0, 0.1]}


def test_two_steps_move_the_language_model_alone(folder):
    assert run(folder, **VARYING, train_projector=False) == 0
    before, after = (load_file(folder / name / "model.safetensors") for name in ("model", "out"))
    moved = {name for name in before if not before[name].equal(after[name])}
    assert moved and all("language_model" in name or "lm_head" in name for name in moved), moved
    assert read_sidecar(folder / "out").recipe["grader"] == "exact"
    first, second, last = history(folder)
    assert first["rewards/answer/mean"] == 0 and first["rewards/length_reward/mean"] < 0
    assert first["reward"] == pytest.approx(0.1 * first["rewards/length_reward/mean"])
    # what was sampled was forwarded once, and trained on once
    sampled = second["num_tokens"]
    assert sampled > first["num_tokens"] > 4 * 4 * 4  # samples of more than the 4 image tokens each
    assert last["tokens_forwarded"] == last["tokens_trained"] == sampled
    cost = training_cost(folder / "out")
    assert cost["tokens"] == 2 * sampled and cost["seconds"] > 0
    assert cost["flops"] == (6 + 2) * parameter_count(folder / "out") * sampled


def test_every_pass_is_counted(folder):
    # a second epoch over the samples needs the sampling policy's log-probabilities, and beta the reference's
    assert run(folder, **VARYING, num_iterations=2, beta=0.1) == 0
    last = history(folder)[-1]
    sampled = max(entry.get("num_tokens", 0) for entry in history(folder))
    assert (last["tokens_forwarded"], last["tokens_trained"]) == (3 * sampled, 2 * sampled)


def test_the_model_sees_what_decoding_shows_it_and_is_paid_by_the_grader(folder):
    path = folder / "data/questions.jsonl"
    rows = read_lines(path)
    greedy = greedy_answers(folder / "model", folder / "data")
    said = {row["question"]: answer.text for row, answer in zip(rows, greedy, strict=True)}
    for number, row in enumerate(rows):
        row["answer"] = said[row["question"]] if number % 2 else "something else"
    write_lines(path, rows)
    # so cold that sampling is greedy
    settings = {"temperature": 1e-4, "max_completion_length": 2, "log_completions": True}
    assert run(folder, **settings, per_device_train_batch_size=8, max_steps=1) == 0
    (table,) = (folder / "out/completions").glob("*.parquet")
    found = pandas.read_parquet(table)
    paid = []
    for prompt, completion, reward in zip(found["prompt"], found["completion"], found["answer"], strict=True):
        question = next(part["text"] for part in prompt[0]["content"] if part["type"] == "text")
        assert completion[0]["content"].strip() == said[question]
        gold = next(row["answer"] for row in rows if row["question"] == question)
        assert reward == float(gold == said[question])
        paid.append(reward)
    assert sorted(paid) == [0.0] * 4 + [1.0] * 4


def test_lora_writes_an_adapter(folder):
    assert run(folder, **VARYING, use_peft=True, lora_r=4) == 0
    assert (folder / "out" / "adapter_model.safetensors").is_file()


def test_adapters_sample_in_the_precision_they_train_in(folder):
    """bfloat16 weights, and a projector in float32 beside them: `generate` of PEFT knows no autocast."""
    assert run(folder, **VARYING, use_peft=True, lora_r=4, dtype="bfloat16", bf16=True) == 0
    assert {t.dtype for t in load_file(folder / "out/adapter_model.safetensors").values()} == {torch.float32}


def test_a_stopped_run_goes_on_as_if_it_had_not_been(folder):
    settings = {**VARYING, "save_strategy": "steps", "save_steps": 1}
    assert run(folder, **settings) == 0
    whole, out = load_file(folder / "out/model.safetensors"), folder / "out"
    state = history(folder)
    shutil.rmtree(out / "checkpoint-2")
    assert run(folder, **settings) == 0
    again = load_file(out / "model.safetensors")
    assert all(again[name].equal(whole[name]) for name in whole)
    assert history(folder)[-1]["tokens_trained"] == state[-1]["tokens_trained"]


def test_the_dry_run_needs_no_weights(folder, capsys):
    (folder / "model/model.safetensors").unlink()
    assert run(folder, "--dry-run") == 0
    shown = capsys.readouterr().err
    assert "supervised tokens" in shown and "6 a row" in shown and "samples before it trains" in shown


@pytest.mark.parametrize(("first", "second"), [([], []), (["0.png"], ["1.png", "2.png"])])
def test_another_family_with_no_images_and_with_several(folder, first, second):
    families.save(*families.qwen2_5_vl(), folder / "qwen")
    ask_about(folder, [first, second])
    assert run(folder, model_name_or_path=str(folder / "qwen"), max_steps=1) == 0
    logged = history(folder)[0]
    prompts = logged["num_tokens"] - 4 * logged["completions/mean_length"]
    decoded = greedy_answers(folder / "qwen", folder / "data")
    assert prompts == 2 * sum(answer.counts.prompt_tokens for answer in decoded)


def ask_about(folder, images):
    """Leave one question for each of these lists of images."""
    path = folder / "data/questions.jsonl"
    rows = read_lines(path)[: len(images)]
    path.write_text(
        "".join(json.dumps({**row, "images": own}) + "\n" for row, own in zip(rows, images, strict=True))
    )


def test_questions_with_and_without_images_are_refused_together(folder, capsys):
    ask_about(folder, [["0.png"], []])
    assert run(folder) == 2
    assert "1 of 2 questions have no image" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"grader": None}, "Graders: "),
        ({"rewards": ["iou"]}, "answer, format, length, objects, verdicts"),
        ({"rewards": ["answer", "length"], "reward_weights": [1.0]}, "1 weights for 2 rewards"),
        ({"on_bad_row": "skip"}, "correct or remove"),
        ({"remove_unused_columns": True}, "set it to false"),
        ({"per_device_train_batch_size": 10}, "5 questions with 2 answers each, and there are 4"),
    ],
)
def test_what_cannot_work_is_one_message(folder, capsys, settings, complaint):
    for words in ([], ["--dry-run"]):
        assert run(folder, *words, **settings) == 2
        assert complaint in capsys.readouterr().err


def test_a_family_that_trl_cannot_train_is_refused_at_once(folder, capsys):
    families.save(*families.mllama(), folder / "mllama")
    assert run(folder, model_name_or_path=str(folder / "mllama")) == 2
    assert "aspect_ratio_ids" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "settings", "complaint"),
    [
        ("llava", {}, "'llava': vLLM 0.32 knows its vision tower by other names"),
        ("llava_next", {}, "'llava_next': vLLM 0.32 knows its vision tower by other names"),
        ("mllama", {}, "'mllama': its answers on vLLM were not compared"),
        ("qwen2_5_vl", {"vllm_mode": "server"}, "Set `vllm_mode: colocate`"),
        ("qwen2_5_vl", {"vllm_model_impl": "transformers"}, "Set `vllm_model_impl: vllm`"),
        ("qwen2_5_vl", {"use_peft": True, "load_in_4bit": True}, "quantised weights"),
        ("qwen2_5_vl", {}, "on a CPU" if find_spec("vllm") else "vlm-sft-rl[vllm]"),
    ],
)
def test_vllm_is_refused_before_a_weight_is_read_where_it_was_not_seen_to_agree(
    folder, capsys, family, settings, complaint
):
    model = families.save(*getattr(families, family)(), folder / "other")
    (model / "model.safetensors").unlink()
    assert run(folder, model_name_or_path=str(model), use_vllm=True, **settings) == 2
    assert complaint in capsys.readouterr().err


def test_a_dry_run_needs_no_vllm(folder):
    model = families.save(*families.qwen2_5_vl(), folder / "qwen")
    assert run(folder, "--dry-run", model_name_or_path=str(model), use_vllm=True) == 0


def test_the_guide_lists_the_families_that_sample_on_vllm():
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|.* \| (allowed|refused) \|$", GUIDE.read_text(), re.MULTILINE)
    assert {kind for kind, use in rows if use == "allowed"} == set(EQUAL)
    assert {kind for kind, use in rows if use == "refused"} >= set(UNEQUAL)
