"""GRPO on the shipped pocket verifier, whose answers have tagged phrases: what its verdicts and wrong phrases are given."""

import json
import random

import pytest
import torch
from json_lines import write_lines

from vlm_sft_rl import train
from vlm_sft_rl.data.tagging.phrases import find_phrases
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.methods import grpo
from vlm_sft_rl.pocket.language import CAPTION_PROMPT
from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import NOUNS, draw_scene
from vlm_sft_rl.trainers.grpo import VisionGRPOTrainer
from vlm_sft_rl.trainers.losses import span_advantages

SCENES = 4


@pytest.fixture
def world(tmp_path):
    """Caption questions about scenes with unusual company, where the verifier also names what is not there."""
    rng = random.Random(0)
    rows = []
    for number in range(SCENES):
        scene = draw_scene(rng, 0.0)
        render(scene, number).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "id": f"q{number}",
                "images": [f"{number}.png"],
                "question": CAPTION_PROMPT,
                "objects": list(scene.nouns),
            }
        )
    write_lines(tmp_path / "questions.jsonl", rows)
    (tmp_path / "nouns.txt").write_text("\n".join(NOUNS))
    return tmp_path


def recipe(world, **settings):
    return {
        "method": "grpo",
        "model_name_or_path": str(VERIFIER),
        "train_file": str(world / "questions.jsonl"),
        "nouns": str(world / "nouns.txt"),
        "output_dir": str(world / "out"),
        "dtype": "float32",
        "rewards": ["objects", "verdicts"],
        "num_generations": 4,
        "max_completion_length": 48,
        "per_device_train_batch_size": 16,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "seed": 0,
        **settings,
    }


def built(world, **settings) -> VisionGRPOTrainer:
    given = recipe(world, **settings)
    return grpo.build(given, *train.parse(given, [], "recipe"))


def scored(world, **settings):
    """A trainer, its rows and what it made of them."""
    trainer = built(world, **settings)
    rows = [trainer.train_dataset[i] for i in range(SCENES) for _ in range(4)]
    torch.manual_seed(1)
    return trainer, rows, trainer._generate_and_score_completions(rows)


def test_tokens_of_phrases_that_are_not_there_carry_a_lowered_advantage(world):
    _, _, plain = scored(world)
    trainer, rows, lowered = scored(world, span_credit=0.5)
    assert plain["completion_ids"].equal(lowered["completion_ids"]) and plain["advantages"].ndim == 1
    decode, tags = trainer.processing_class.tokenizer.decode, trainer.phrases.tags
    wrong = torch.zeros_like(lowered["completion_ids"], dtype=torch.bool)
    for number, (row, ids) in enumerate(zip(rows, lowered["completion_ids"].tolist(), strict=True)):
        opened = None
        for place, token in enumerate(ids):
            if token == tags.open:
                opened = place + 1
            elif token in tags.closing and opened is not None:
                nouns = {part.head for part in find_phrases(decode(ids[opened:place]), NOUNS)}
                wrong[number, opened:place] = bool(nouns - set(json.loads(row["row"])["objects"]))
                opened = None
    assert 0 < wrong.sum() < wrong.numel() / 2
    assert lowered["advantages"].equal(span_advantages(plain["advantages"], wrong, 0.5))


def test_a_step_is_trained_and_says_what_it_paid_for(world):
    trainer = built(world, span_credit=0.1)
    before = trainer.model.lm_head.weight.clone()
    trainer.train()
    first = trainer.state.log_history[0]
    assert not trainer.model.lm_head.weight.equal(before)
    assert 0 < first["span_credit/tokens"] < 0.5 and first["verdicts/unjudged"] == 0
    assert 0 < first["verdicts/wrong_phrases"] < 1 and 0.5 < first["verdicts/right"] <= 1
    assert first["reward"] == pytest.approx(first["rewards/objects/mean"] + first["rewards/verdicts/mean"])
    # verdicts are worth 1 or -1 each, averaged by answer
    assert first["rewards/verdicts/mean"] == pytest.approx(2 * first["verdicts/right"] - 1, abs=0.25)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rewards": ["verdict"]}, "answer, format, length, objects, verdicts"),
        ({"span_credit": -0.1}, "span_credit"),
        (
            {"check_question": "Is it there?"},
            "`check_question` is 'Is it there.', expected text with {phrase}",
        ),
        ({"checker": "http://127.0.0.1:1/v1"}, "name the model there by `checker_model`"),
    ],
)
def test_what_cannot_work_is_one_message(world, settings, complaint):
    with pytest.raises(train.UserError, match=complaint):
        built(world, **settings)
