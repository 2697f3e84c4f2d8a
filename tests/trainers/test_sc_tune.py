import copy
import math

import families
import pytest
import torch
from regions import region_rows, trainer
from transformers import TrainerCallback

from vlm_sft_rl.decoding.branches import ImageBranches
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.rewards.regions import iou
from vlm_sft_rl.trainers.sc_tune import policy, rollouts
from vlm_sft_rl.trainers.sc_tune.batches import Suppressed, answer_log_probs, describing
from vlm_sft_rl.trainers.sc_tune.rollouts import Description


def constant(value: float):
    def reward(completions, **columns):
        return [value] * len(completions)

    return reward


def by_length(completions, **columns):
    """A reward a random model can earn: shorter is better, and the boxes do not matter."""
    return [1.0 / (1 + len(text)) for text in completions]


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_vl", "idefics3"])
def test_both_phases_move_what_is_trained_and_nothing_else(tmp_path, family):
    made = trainer(
        tmp_path,
        family=family,
        reward_funcs=by_length,
        box_convention=None if family != "idefics3" else "llava",
    )
    before = weights(made.model)
    made.train()
    after = weights(made.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert moved and moved <= trainable
    phases = [{k.split("/")[0] for k in entry if "/" in k} for entry in made.state.log_history[:4]]
    assert phases == [{"describer"}, {"describer"}, {"locator"}, {"describer"}]
    rates = [entry["learning_rate"] for entry in made.state.log_history[:4]]
    assert rates == [1e-3, 1e-3, 2e-3, 1e-3]
    assert all(math.isfinite(value) for entry in made.state.log_history for value in entry.values())


def test_a_reward_that_equals_its_baseline_moves_nothing(tmp_path):
    made = trainer(tmp_path, reward_funcs=constant(0.7), kl_coef=0.0, weight_decay=0.0, max_steps=2)
    before = weights(made.model)
    made.train()
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())


@pytest.mark.slow
def test_the_policy_gradient_raises_what_is_rewarded(tmp_path):
    def low_ids(completion_ids, **columns):
        return [sum(token < 64 for token in ids) / len(ids) for ids in completion_ids]

    made = trainer(
        tmp_path,
        rows=region_rows(4),
        reward_funcs=low_ids,
        max_steps=30,
        locator_steps=0,
        describer_steps=10,
        num_generations=4,
        baseline="group",
        learning_rate=5e-3,
    )
    made.train()
    rewards = [entry["describer/reward"] for entry in made.state.log_history if "describer/reward" in entry]
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


@pytest.mark.slow
def test_the_locator_learns_the_boxes_of_its_descriptions(tmp_path):
    rows = region_rows(4)
    settings = {"max_steps": 150, "describer_steps": 0, "locator_steps": 150, "locator_learning_rate": 1e-2}
    made = trainer(tmp_path, rows=rows, describe_max_new_tokens=3, locate_max_new_tokens=30, **settings)
    made.train()
    losses = [entry["locator/loss"] for entry in made.state.log_history if "locator/loss" in entry]
    assert losses[-1] < 0.1 * losses[0]
    opened = made.prompts.with_sizes(made.data_collator(rows)["rows"])
    with made.decoding(made.model) as plain:
        # what it learnt from is the frozen copy's descriptions; its own have changed with the shared weights
        learnt = made.rollouts.captions(plain, opened, made.frozen, locate=False)
        asked = [r.row | {"expressions": [r.samples[0].text]} for r in learnt]
        located = made.rollouts.captions(plain, asked, None, locate=True, expressions=True)
    assert all(iou(r.boxes[r.row["expressions"][0]], r.row["box"]) > 0.9 for r in located)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_update_is_the_hand_written_one(tmp_path, temperature):
    """A describer step of the trainer against plain autograd on the samples it drew."""
    made = trainer(
        tmp_path,
        temperature=temperature,
        rows=region_rows(4),
        reward_funcs=by_length,
        inner_epochs=1,
        max_steps=1,
        kl_coef=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="sgd",
        learning_rate=0.5,
    )
    model = copy.deepcopy(made.model)
    seen = {}
    describe = made.rollouts.describer

    def spy(*args):
        seen["rollouts"] = describe(*args)
        return seen["rollouts"]

    made.rollouts.describer = spy
    made.train()
    processor, total, tokens = made.processing_class, 0, 0
    for rollout in seen["rollouts"]:
        one = rollout.samples[0]
        gain = by_length([one.text])[0] - by_length([rollout.greedy.text])[0]
        inputs = dict(
            processor(
                text=[made.prompts.describe(rollout.row)],
                images=[rollout.row["picture"]],
                return_tensors="pt",
                add_special_tokens=False,
            )
        )
        n = len(one.ids)
        ids = torch.cat([inputs["input_ids"], torch.tensor([one.ids])], 1)
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        logits = model(**inputs).logits[0, -n - 1 : -1].float() / temperature
        suppressed = made.rollouts.suppressed(model)
        logits[:, suppressed.never] = float("-inf")
        logits[: suppressed.before, suppressed.ends] = float("-inf")
        log_probs = logits.log_softmax(-1)
        total = total - gain * log_probs.gather(1, torch.tensor(one.ids)[:, None]).sum()
        tokens += n
    (total / tokens).backward()
    trained = dict(made.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            wanted = parameter.detach() - 0.5 * parameter.grad
            torch.testing.assert_close(trained[name].detach(), wanted, atol=1e-5, rtol=1e-4)


def test_what_a_describer_cannot_say_gets_no_gradient(tmp_path):
    """A policy that is punished would else move to an end of turn that `min_new_tokens` forbids, and fall silent."""
    made = trainer(tmp_path, min_new_tokens=3)
    model = made.model
    rows = [row | {"resized": None} for row in made.data_collator(made.train_dataset[:2])["rows"]]
    answers = [[70, 71, 72], [80, 81, 82]]
    batch = describing(made.prompts, rows, answers, [None], made.args.device, torch.float32)
    suppressed = made.rollouts.suppressed(model)
    assert suppressed.before == 3 and suppressed.ends and suppressed.never
    gradients = []
    for left_out in (suppressed, Suppressed()):
        model.zero_grad()
        answer_log_probs(model, batch, left_out).sum().backward()
        gradients.append(model.lm_head.weight.grad[[*suppressed.ends, *suppressed.never]].abs().sum(-1))
    assert (gradients[0] == 0).all() and (gradients[1] > 0).all()


def test_accumulation_makes_the_step_of_one_large_batch(tmp_path):
    results = []
    for name, settings in {
        "one": {"per_device_train_batch_size": 8},
        "two": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "parts": {"per_device_train_batch_size": 8, "rollout_batch_size": 3},
    }.items():
        # clipping would hide a wrong scale
        settings |= {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "locator_learning_rate": 0.1}
        made = trainer(tmp_path / name, rows=region_rows(16), reward_funcs=by_length, **settings)
        made.train()
        results.append(weights(made.model))
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, other[name], atol=1e-5, rtol=1e-3)


def test_guessed_descriptions_and_boxes_change_no_step(tmp_path, monkeypatch):
    made = [trainer(tmp_path / "guessed", reward_funcs=by_length, num_generations=2, min_caption_iou=0.01)]
    made[0].train()
    ask, guessed = ImageBranches.ask, []

    def alone(self, questions, draws, limit, at_least=0, guesses=None, judge=False):
        guessed.append(guesses)
        return ask(self, questions, draws, limit, at_least)

    monkeypatch.setattr(ImageBranches, "ask", alone)
    made.append(trainer(tmp_path / "alone", reward_funcs=by_length, num_generations=2, min_caption_iou=0.01))
    made[1].train()
    assert any(guesses is not None for guesses in guessed)
    one, other = (weights(each.model) for each in made)
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-6, rtol=1e-5)


def test_the_frozen_copy_is_the_model_of_the_last_switch(tmp_path):
    made = trainer(tmp_path, reward_funcs=by_length, max_steps=3)
    start = weights(made.model)
    made.train()
    trainable = [name for name, p in made.model.named_parameters() if p.requires_grad]
    live = weights(made.model)
    with made.frozen.active():
        frozen = weights(made.model)
    assert all(torch.equal(live[name], weights(made.model)[name]) for name in live)
    # the switch after two describer steps renewed it; the locator step after it moved the live model only
    assert any(not torch.equal(frozen[name], start[name]) for name in trainable)
    assert any(not torch.equal(frozen[name], live[name]) for name in trainable)
    made.state.global_step = 3
    made.begin_step()
    with made.frozen.active():
        assert all(torch.equal(live[name], p) for name, p in made.model.named_parameters())
    assert not made.optimizer.optimizer.state


def test_an_early_stop_saves_updates_and_the_ratio_guard_holds_the_weights(tmp_path):
    made = trainer(tmp_path / "a", reward_funcs=by_length, inner_epochs=4, max_steps=1)
    made.args.early_stop = -1.0  # what nobody may set, to stop at once
    made.train()
    assert made.state.log_history[0]["describer/updates"] == 1
    made = trainer(tmp_path / "b", reward_funcs=by_length, inner_epochs=4, early_stop=1e9, max_steps=1)
    made.train()
    assert made.state.log_history[0]["describer/updates"] == 4
    made = trainer(tmp_path / "c", reward_funcs=by_length, weight_decay=0.0, max_steps=1, locator_steps=0)
    made.args.max_ratio = 0.5  # every batch begins at 1
    before = weights(made.model)
    made.train()
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())


def test_options_of_baseline_anchor_filter_and_mix_in_run(tmp_path):
    from vlm_sft_rl.rewards.regions import giou_reward, length_reward

    made = trainer(
        tmp_path,
        baseline="greedy_live",
        num_generations=2,
        kl_anchor="start",
        kl_coef=0.1,
        min_caption_iou=0.9,
        rec_dataset=region_rows(3, seed=9, expressions=True),
        reward_funcs=[giou_reward, length_reward],
        reward_weights=[1.0, 0.01],
        eval_dataset=region_rows(3, seed=5, expressions=True),
        eval_strategy="steps",
        eval_steps=2,
    )
    made.train()
    history = made.state.log_history
    located = next(entry for entry in history if "locator/loss" in entry)
    assert located["locator/kept"] == 0.0 and located["locator/loss"] > 0
    described = next(entry for entry in history if "describer/reward" in entry)
    assert described["describer/rewards/length_reward"] < 0
    assert any("eval_iou" in entry for entry in history)


def test_a_leak_earns_what_a_miss_earns_where_misses_are_negative(tmp_path):
    made = trainer(tmp_path, reward_funcs=["giou", "length"], reward_weights=[1.0, 0.1])
    rows = made.prompts.with_sizes(made.data_collator(region_rows(1))["rows"]) * 3
    box = tuple(map(float, rows[0]["box"]))
    near = (box[0], box[1], box[2] + 30, box[3] + 30)
    said = [
        Description([70], text, located)
        for text, located in (("red", near), ("[0.10, 0.20, 0.30, 0.40]", box), ("red one", None))
    ]
    (honest, leak, missed), _ = made.earn(rows, said)
    assert honest > leak and leak == pytest.approx(-1.4) and missed == pytest.approx(-1.2)


@pytest.mark.parametrize("anchor", ["frozen", "start"])
def test_kl_is_exactly_nothing_while_its_anchor_is_the_live_model(tmp_path, monkeypatch, anchor):
    made = trainer(
        tmp_path,
        reward_funcs=by_length,
        temperature=0.6,
        kl_coef=0.5,
        kl_anchor=anchor,
        num_generations=2,
        baseline="group",
        max_steps=5,
    )
    scored, score = [], ImageBranches.score

    def spy(branches, *args):
        scored.append(made.state.global_step)
        return score(branches, *args)

    monkeypatch.setattr(ImageBranches, "score", spy)
    made.train()
    kl = [entry["describer/kl"] for entry in made.state.log_history if "describer/kl" in entry]
    # steps 0, 1, 3 and 4; before 3 the frozen copy is renewed, the start stays what it was
    assert [value == 0 for value in kl] == [True, False, anchor == "frozen", False]
    assert scored == ([1, 4] if anchor == "frozen" else [1, 3, 4])


def test_a_rounded_mean_of_equal_rewards_is_no_signal(tmp_path):
    made = trainer(tmp_path, reward_funcs=constant(0.7), baseline="group", num_generations=4, max_steps=2)
    before = weights(made.model)
    made.train()
    assert all(torch.equal(before[name], p) for name, p in made.model.named_parameters())


def adam(made) -> list[dict]:
    return copy.deepcopy(
        [made.optimizer.state[p] for p in made.model.parameters() if p in made.optimizer.state]
    )


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_without_signal_changes_neither_weights_nor_moments_and_is_counted(tmp_path, max_grad_norm):
    def first_step_alone(completions, trainer_state, **columns):
        return by_length(completions) if trainer_state.global_step == 0 else [0.7] * len(completions)

    made = trainer(
        tmp_path,
        reward_funcs=first_step_alone,
        kl_coef=0.0,
        describer_steps=3,
        max_steps=5,
        max_grad_norm=max_grad_norm,
        lr_scheduler_type="linear",
        gradient_accumulation_steps=2,
        per_device_train_batch_size=2,
    )
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seen.append((weights(made.model), adam(made)))

    made.add_callback(Watch())
    made.train()
    (first, moments), (_, others), (third, last), (fourth, _) = seen[:4]
    assert moments and all(torch.equal(first[name], third[name]) for name in first)
    assert any(not torch.equal(third[name], fourth[name]) for name in first)
    for one, other, late in zip(moments, others, last, strict=True):
        assert all(torch.equal(one[name], other[name]) and torch.equal(one[name], late[name]) for name in one)
    history = made.state.log_history[:5]
    assert [entry["describer/skipped"] for entry in history[:3]] == [0, 1, 1]
    assert [entry["describer/updates"] for entry in history[:3]] == [2, 0, 0]
    # the schedule goes on: 1e-3 for describer steps, twice as much for locator steps, to 0 in five steps
    rates = [1e-3, 0.8e-3, 0.6e-3, 0.8e-3, 0.2e-3]
    assert [entry["learning_rate"] for entry in history] == pytest.approx(rates)


def test_kl_alone_is_signal_unless_it_is_nothing(tmp_path, monkeypatch):
    for name, skipped in (("drifted", 0), ("equal", 1)):
        made = trainer(tmp_path / name, reward_funcs=constant(0.7), kl_coef=0.5, max_steps=1)
        made.make_copies()
        with torch.no_grad():
            made.model.lm_head.weight.mul_(1.1)
        if skipped:
            monkeypatch.setattr(policy, "token_kl", lambda log_probs, *_: torch.zeros_like(log_probs))
        before = weights(made.model)
        made.train()
        assert made.state.log_history[0]["describer/skipped"] == skipped
        moved = any(not torch.equal(before[name], p) for name, p in made.model.named_parameters())
        assert moved != bool(skipped)


def test_lora_keeps_a_frozen_adapter_and_no_second_model(tmp_path):
    from peft import LoraConfig

    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    made = trainer(
        tmp_path,
        reward_funcs=by_length,
        peft_config=peft_config,
        save_strategy="steps",
        save_steps=3,
        gradient_checkpointing=True,
    )
    base = {n: p.detach().clone() for n, p in made.model.named_parameters() if "lora" not in n}
    adapters = weights(made.model)
    made.train()
    # gradient checkpoints let the adapters learn, though the embeddings before them are frozen
    moving = [(n, p) for n, p in made.model.named_parameters() if "lora_B" in n and "language_model" in n]
    assert all(not torch.equal(adapters[n], p) for n, p in moving)
    assert made.frozen.names == {n for n, p in made.model.named_parameters() if p.requires_grad}
    assert all("lora" in name for name in made.frozen.names)
    assert all(torch.equal(base[n], p) for n, p in made.model.named_parameters() if n in base)
    saved = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "frozen_copy.safetensors", "vlm_sft_rl.json"} <= saved
    assert "2403.13263" in (tmp_path / "README.md").read_text()


def test_families_that_cannot_rewind_and_rows_without_expressions_are_refused(tmp_path):
    with pytest.raises(UserError, match="cannot share one prefill"):
        trainer(tmp_path, family="paligemma", box_convention="llava")
    with pytest.raises(UserError, match="expression"):
        trainer(tmp_path, rec_dataset=region_rows(2))
    rows = region_rows(2)
    rows[1]["width"] = 99
    with pytest.raises(UserError, match="99 x 56, but the image has 56 x 56"):
        trainer(tmp_path, rows=rows, per_device_train_batch_size=2).train()


def test_a_describer_that_verifies_its_own_phrases(tmp_path, monkeypatch):
    """REVERSE composed with SC-Tune: descriptions decoded retrospectively, both phases trained on what was kept."""
    model, processor = families.with_tags(families.llava())
    with torch.no_grad():  # tags are frequent, so that there is something to verify
        model.get_output_embeddings().weight[-3:] *= 4
    made = trainer(
        tmp_path,
        pair=(model, processor),
        describer="retrospective",
        verification_threshold=0.4,
        describer_steps=1,
        locator_steps=1,
        max_steps=2,
        describe_max_new_tokens=8,
        reward_funcs=by_length,
        num_generations=2,
        baseline="group",
    )
    seen, answers = [], []
    decode = rollouts.generate_retrospective
    monkeypatch.setattr(
        rollouts, "generate_retrospective", lambda *a, **k: answers.append(decode(*a, **k)) or answers[-1]
    )
    before = weights(made.model)
    made.train()
    # sampled descriptions for the policy gradient, greedy ones for the locator
    assert len(seen) == 2 and len(seen[0][0]) == 2 and len(seen[1][0]) == 1
    tags = set(processor.tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"]))
    said = [one for own in seen[0] for one in own]
    assert any(tags & set(one.ids) for one in said) and not any("<SPAN>" in one.text for one in said)
    # an end that never came is not learnt
    end = processor.tokenizer.eos_token_id
    reasons = [next(e["reason"] for e in one.trace if e["kind"] == "finish") for one in answers[0]]
    assert any(reason != "end" for reason in reasons)
    assert [one.ids[-1] == end for one in said] == [reason == "end" for reason in reasons]
    assert any(not torch.equal(before[name], p) for name, p in made.model.named_parameters())
