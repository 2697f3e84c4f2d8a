"""Images opened once a step: the rollout's tensors and features serve the updates, and change nothing."""

import families
import pytest
import torch
from peft import LoraConfig
from regions import by_length, opened, region_rows, trainer
from training import moved, weights

from vlm_sft_rl.decoding.generate import encode_batch
from vlm_sft_rl.models.boxes import convention_for
from vlm_sft_rl.models.images import encode_images, is_pixels
from vlm_sft_rl.models.parts import LANGUAGE, PROJECTOR, VISION_NAMES, part_of, set_trainable
from vlm_sft_rl.models.regions import RegionPrompts
from vlm_sft_rl.trainers.sc_tune.batches import answer_log_probs, complete, describing, image_prefixes

TRAINED_PROJECTORS = "vlm_sft_rl.trainers.sc_tune.rollouts.trained_projectors"


@pytest.mark.parametrize("anchor", ["frozen", "start"])
@pytest.mark.parametrize("samples", [1, 3])
def test_kl_is_measured_against_its_anchor_whoever_read_the_description(tmp_path, anchor, samples):
    tuned = trainer(tmp_path, reward_funcs=by_length, num_generations=samples, kl_anchor=anchor, max_steps=3)
    tuned.train()  # two describer steps, a switch, a locator step: live, frozen and start differ
    rows = opened(tuned, tuned.train_dataset[:3])
    rollouts = tuned.rollouts.describer(tuned.model, rows, tuned.frozen, tuned.start, 7)
    copy = {"frozen": tuned.frozen, "start": tuned.start}[anchor]
    suppressed, device = tuned.rollouts.suppressed(tuned.model), tuned.args.device
    tuned.model.eval()
    for rollout in rollouts:
        for sample in rollout.samples:
            batch = describing(
                tuned.prompts, [rollout.row], [sample.ids], [rollout.prefix], device, torch.float32
            )
            with copy.active(), torch.no_grad():
                expected = answer_log_probs(tuned.model, batch, suppressed)[0]
            torch.testing.assert_close(sample.reference, expected, atol=1e-5, rtol=1e-4)


def runs_with_and_without(tmp_path, monkeypatch, *, family="llava", projector=False, **settings) -> list:
    """The trainer of a run that encodes its images once a step and of one that encodes them in each pass, with the number
    of passes through the tower. With SGD: Adam makes a whole step of rounding."""
    runs = []
    for once in (True, False):
        pair = getattr(families, family)()
        options = {"reward_funcs": by_length, "optim": "sgd", "learning_rate": 0.1, **settings}
        tuned = trainer(tmp_path / str(once), family=family, pair=pair, **options)
        set_trainable(tuned.model, vision=False, projector=projector, language=True)
        if not once:
            monkeypatch.setattr(TRAINED_PROJECTORS, lambda model: None)
        passes = []
        tower = next(m for name, m in tuned.model.named_modules() if name.split(".")[-1] in VISION_NAMES)
        tower.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        before = weights(tuned.model)
        tuned.train()
        assert moved(before, tuned.model)
        runs.append((tuned, len(passes)))
    for name, value in weights(runs[0][0].model).items():
        torch.testing.assert_close(weights(runs[1][0].model)[name], value, atol=1e-6, rtol=1e-4)
    return runs


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_frozen_tower_encodes_each_image_once_a_step_and_nothing_else_changes(
    tmp_path, family, projector, monkeypatch
):
    settings = {"family": family, "projector": projector, "num_generations": 2, "max_steps": 3}
    (_, once), (_, often) = runs_with_and_without(tmp_path, monkeypatch, **settings)
    # a step encodes its boxes once (the first once more, to compare with a pass over pixels); otherwise live and frozen
    # model each do, and every pass of every update
    assert once == 1 + 3 and often > 9


def test_steps_in_parts_and_beside_annotated_rows_equal_those_that_encode_each_pass(tmp_path, monkeypatch):
    annotated = [row | {"expressions": ["the thing"]} for row in region_rows(3)]
    settings = {"rollout_batch_size": 1, "rec_dataset": annotated, "rec_share": 0.5, "max_steps": 4}
    runs = runs_with_and_without(tmp_path, monkeypatch, **settings)
    assert [tuned.rollouts.takes_images for tuned, _ in runs] == [True, None]


def test_a_projector_beside_adapters_runs_anew_in_the_precision_of_the_run(tmp_path):
    """LoRA over float32 weights, the projector trained whole, bfloat16 by autocast: what the tower made is bfloat16."""
    lora = LoraConfig(target_modules=".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    tuned = trainer(tmp_path, peft_config=lora, bf16=True, max_steps=3)
    before = weights(tuned.model)
    tuned.train()
    assert tuned.rollouts.takes_images
    changed = moved(before, tuned.model)
    assert {part_of(name) for name in changed} == {PROJECTOR, LANGUAGE}
    assert all("lora" in name or "modules_to_save" in name for name in changed)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3"])
def test_updates_on_opened_images_equal_those_that_prepare_them_again(family):
    model, processor = getattr(families, family)()
    set_trainable(model, vision=False, projector=False, language=True)
    prompts = RegionPrompts(processor, convention_for(model, "llava"))
    rows = [row | {"picture": row["image"], "resized": None} for row in region_rows(3)]
    texts = [prompts.describe(row) for row in rows]
    inputs = encode_batch(model, processor, texts, [[row["picture"]] for row in rows])
    tails = [prompts.describe_tail(row) for row in rows]
    prefixes = image_prefixes(inputs, tails, encode_images(model, inputs, 3))
    # other questions, in another order, one image twice, a forced opening
    order, answers = [2, 0, 2], [[80, 81, 82], [83], [84, 85]]
    tails = [[*prompts.locate_tail(text), 70, 71] for text in ("the long one", "it", "that one there")]
    prepared, kept = (
        complete(prompts, [rows[i] for i in order], tails, answers, known, model.device, torch.float32)
        for known in ([None], [prefixes[i] for i in order])
    )
    assert torch.equal(kept.mask, prepared.mask)
    assert torch.equal(kept.tokens[kept.mask > 0], prepared.tokens[prepared.mask > 0])
    assert set(kept.features) == {name for name in prepared.features if not is_pixels(name)}
    # what the processor itself makes of the first question, its padding aside
    alone = processor(
        text=texts[2], images=[rows[2]["picture"]], return_tensors="pt", add_special_tokens=False
    )
    behind = [*tails[0], *answers[0]]
    ids = prepared.features["input_ids"][0][prepared.features["attention_mask"][0] > 0].tolist()
    start = alone["input_ids"][0].tolist()
    assert ids == start[: len(start) - len(prompts.describe_tail(rows[2]))] + behind
    one, other = answer_log_probs(model, kept), answer_log_probs(model, prepared)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
