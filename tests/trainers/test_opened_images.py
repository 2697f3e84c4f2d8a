"""Images opened once a step: the rollout's tensors and features serve the updates, and change nothing."""

import families
import pytest
import torch
from peft import LoraConfig
from regions import region_rows
from test_sc_tune import by_length, trainer, weights

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.data.collators import RegionCollator
from vlm_sft_rl.decoding.generate import encode_batch
from vlm_sft_rl.models.images import encode_images, is_pixels
from vlm_sft_rl.models.parts import LANGUAGE, PROJECTOR, VISION_NAMES, part_of, set_trainable
from vlm_sft_rl.trainers.sc_tune.batches import (
    answer_log_probs,
    complete,
    complete_prefixes,
    describing,
    image_prefixes,
)


@pytest.mark.parametrize("anchor", ["frozen", "start"])
@pytest.mark.parametrize("samples", [1, 3])
def test_kl_is_measured_against_its_anchor_whoever_read_the_description(tmp_path, anchor, samples):
    made = trainer(tmp_path, reward_funcs=by_length, num_generations=samples, kl_anchor=anchor, max_steps=3)
    made.train()  # two describer steps, a switch, a locator step: live, frozen and start differ
    rows = [row | {"resized": None} for row in made.data_collator(made.train_dataset[:3])["rows"]]
    rollouts = made.rollouts.describer(made.model, rows, made._frozen, made._start, 7)
    copies = {"frozen": made._frozen, "start": made._start}
    made.model.eval()
    for rollout in rollouts:
        for one in rollout.samples:
            prefixes = [rollout.prefix]
            batch = describing(
                made.prompts, [rollout.row], [one.ids], prefixes, made.args.device, torch.float32
            )
            with copies[anchor].active(), torch.no_grad():
                wanted = answer_log_probs(made.model, batch, *made.rollouts.barred(made.model))[0]
            torch.testing.assert_close(one.reference, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("projector", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_frozen_tower_encodes_each_image_once_a_step_and_nothing_else_changes(
    tmp_path, family, projector, monkeypatch
):
    runs = []
    for once in (True, False):
        pair = getattr(families, family)()
        # a reward that random models earn: describer steps without signal make no updates
        settings = {"reward_funcs": by_length, "num_generations": 2, "max_steps": 3}
        made = trainer(tmp_path / str(once), family=family, pair=pair, **settings)
        set_trainable(made.model, vision=False, projector=projector, language=True)
        if not once:
            monkeypatch.setattr("vlm_sft_rl.trainers.sc_tune.rollouts.trained_projectors", lambda model: None)
        encoded = []
        tower = next(m for name, m in made.model.named_modules() if name.split(".")[-1] in VISION_NAMES)
        tower.register_forward_hook(lambda *own, encoded=encoded: encoded.append(1))
        made.train()
        runs.append((len(encoded), weights(made.model)))
    # a step encodes its boxes once (the first once more, to compare with a pass over pixels); otherwise live and frozen
    # model each do, and every pass of every update
    assert runs[0][0] == 1 + 3 and runs[1][0] > 9
    # a projector runs picture by picture: its rounding is another one, and Adam makes the most of it
    tolerance = 1e-5 if projector else 1e-6
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, atol=tolerance, rtol=1e-4)


def test_a_projector_beside_adapters_runs_anew_in_the_precision_of_the_run(tmp_path):
    """LoRA over float32 weights, the projector trained whole, bfloat16 by autocast: what the tower made is bfloat16."""
    config = LoraConfig(target_modules=".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])
    made = trainer(tmp_path, pair=families.llava(), peft_config=config, bf16=True, max_steps=3)
    before = weights(made.model)
    made.train()
    assert made.rollouts.takes_images
    moved = {name for name, value in weights(made.model).items() if not torch.equal(before[name], value)}
    assert {part_of(name) for name in moved} == {PROJECTOR, LANGUAGE}
    assert all("lora" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3"])
def test_updates_on_opened_images_equal_those_that_prepare_them_again(family):
    model, processor = getattr(families, family)()
    set_trainable(model, vision=False, projector=False, language=True)
    pictures = [row["picture"] for row in RegionCollator()(region_rows(3))["rows"]]
    first = [prompting.render(processor, q, 1) for q in ("What is it?", "And this thing?", "Who?")]
    inputs = encode_batch(model, processor, first, [[picture] for picture in pictures])
    tails = [prompting.tail_ids(processor, text) for text in first]
    prefixes = image_prefixes(inputs, tails, encode_images(model, inputs, 3))
    # other questions, in another order, one image twice, a forced opening
    order, opening, answers = [2, 0, 2], [70, 71], [[80, 81, 82], [83], [84, 85]]
    texts = [prompting.render(processor, q, 1) for q in ("Where is the long one?", "Where?", "Where is it?")]
    wanted = complete(
        processor, opening, texts, [pictures[i] for i in order], answers, model.device, torch.float32
    )
    asked = [prompting.tail_ids(processor, text) + opening for text in texts]
    found = complete_prefixes([prefixes[i] for i in order], asked, answers, processor.tokenizer.pad_token_id)
    assert torch.equal(found.mask, wanted.mask)
    assert torch.equal(found.tokens[found.mask > 0], wanted.tokens[wanted.mask > 0])
    assert set(found.features) == {name for name in wanted.features if not is_pixels(name)}
    one, other = answer_log_probs(model, found), answer_log_probs(model, wanted)
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_steps_in_parts_and_beside_annotated_rows_equal_those_that_encode_each_pass(tmp_path, monkeypatch):
    runs = []
    for once in (True, False):
        made = trainer(
            tmp_path / str(once),
            pair=families.llava(),
            reward_funcs=by_length,
            rollout_batch_size=1,
            rec_dataset=[row | {"expressions": ["the thing"]} for row in region_rows(3)],
            rec_share=0.5,
            max_steps=4,
        )
        set_trainable(made.model, vision=False, projector=False, language=True)
        if not once:
            monkeypatch.setattr("vlm_sft_rl.trainers.sc_tune.rollouts.trained_projectors", lambda model: None)
        made.train()
        assert made.rollouts.takes_images is (True if once else None)
        runs.append(weights(made.model))
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, atol=1e-6, rtol=1e-4)
