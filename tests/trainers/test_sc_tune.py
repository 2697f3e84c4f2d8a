"""The steps of `SCTuneTrainer`: what moves, what is learnt, and when nothing is."""

import copy
import math
from itertools import permutations

import families
import pytest
import torch
from peft import LoraConfig
from regions import always, by_length, opened, region_rows, trainer
from training import history, moved, trainable, weights
from transformers import TrainerCallback

from vlm_sft_rl.data.tags import NO_PHRASE, VERIFIED
from vlm_sft_rl.decoding.branches import ImageBranches
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.rewards.regions import iou
from vlm_sft_rl.trainers.sc_tune import policy, rollouts
from vlm_sft_rl.trainers.sc_tune.batches import Suppressed, answer_log_probs, describing
from vlm_sft_rl.trainers.sc_tune.rollouts import Description


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen2_vl", "idefics3"])
def test_both_phases_move_what_is_trained_and_nothing_else(tmp_path, family):
    convention = "llava" if family == "idefics3" else None
    tuned = trainer(tmp_path, family=family, reward_funcs=by_length, box_convention=convention)
    before = weights(tuned.model)
    tuned.train()
    assert moved(before, tuned.model) and moved(before, tuned.model) <= trainable(tuned.model)
    steps = tuned.state.log_history[:4]
    phases = [{key.split("/")[0] for key in entry if "/" in key} for entry in steps]
    assert phases == [{"describer"}, {"describer"}, {"locator"}, {"describer"}]
    assert [entry["learning_rate"] for entry in steps] == [1e-3, 1e-3, 2e-3, 1e-3]
    assert all(math.isfinite(value) for entry in tuned.state.log_history for value in entry.values())


@pytest.mark.slow
def test_the_policy_gradient_raises_what_is_rewarded(tmp_path):
    def low_ids(completion_ids, **columns):
        return [sum(token < 64 for token in ids) / len(ids) for ids in completion_ids]

    tuned = trainer(
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
    tuned.train()
    rewards = history(tuned, "describer/reward")
    assert sum(rewards[-5:]) > 1.5 * sum(rewards[:5])


@pytest.mark.slow
def test_the_locator_learns_the_boxes_of_its_descriptions(tmp_path):
    rows = region_rows(4)
    settings = {"max_steps": 150, "describer_steps": 0, "locator_steps": 150, "locator_learning_rate": 1e-2}
    tuned = trainer(tmp_path, rows=rows, describe_max_new_tokens=3, locate_max_new_tokens=30, **settings)
    tuned.train()
    losses = history(tuned, "locator/loss")
    assert losses[-1] < 0.1 * losses[0]
    with tuned.decoding(tuned.model) as plain:
        # what it learnt from is the frozen copy's descriptions; its own have changed with the shared weights
        captions = tuned.rollouts.captions(plain, opened(tuned, rows), tuned.frozen, locate=False)
        questions = [rollout.row | {"expressions": [rollout.samples[0].text]} for rollout in captions]
        answers = tuned.rollouts.captions(plain, questions, None, locate=True, expressions=True)
    for answer in answers:
        assert iou(answer.boxes[answer.row["expressions"][0]], answer.row["box"]) > 0.9


def by_orders(masses: list[float], rewards: list[float]) -> list[tuple[float, float]]:
    """(weight, baseline) of draws without replacement, over all orders they can have been drawn in."""
    orders = {}
    for order in permutations(range(len(masses))):
        p, left = 1.0, 1.0
        for i in order:
            p, left = p * masses[i] / left, left - masses[i]
        orders[order] = p
    pairs = []
    for first, mass in enumerate(masses):
        begun = {order: p for order, p in orders.items() if order[0] == first}
        total = sum(begun.values())
        second = sum(p * rewards[order[1]] for order, p in begun.items()) / total
        pairs.append((total / sum(orders.values()), mass * rewards[first] + (1 - mass) * second))
    return pairs


@pytest.mark.parametrize(
    ("temperature", "distinct"),
    [(1.0, None), (0.7, None), (1.0, "group"), (0.7, "greedy_live")],
)
def test_one_update_is_the_hand_written_one(tmp_path, temperature, distinct):
    """A describer step of the trainer against plain autograd on the samples it drew."""
    more = {"without_replacement": True, "num_generations": 3, "baseline": distinct} if distinct else {}
    tuned = trainer(
        tmp_path,
        **more,
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
    model = copy.deepcopy(tuned.model)
    steps = spied(tuned.rollouts, "describer")
    tuned.train()
    suppressed = tuned.rollouts.suppressed(model)
    processor, total, tokens = tuned.processing_class, 0, 0
    for rollout in steps[0]:
        scores = []
        for sample in rollout.samples:
            prompt = [tuned.prompts.describe(rollout.row)], [rollout.row["picture"]]
            inputs = processor(
                text=prompt[0], images=prompt[1], return_tensors="pt", add_special_tokens=False
            )
            n = len(sample.ids)
            ids = torch.cat([inputs["input_ids"], torch.tensor([sample.ids])], 1)
            inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
            logits = model(**inputs).logits[0, -n - 1 : -1].float() / temperature
            logits[:, suppressed.never] = float("-inf")
            logits[: suppressed.before, suppressed.ends] = float("-inf")
            scores.append(logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None]).sum())
        rewards = by_length([sample.text for sample in rollout.samples])
        counted = [(1.0, None)]
        if distinct:
            assert len({tuple(sample.ids) for sample in rollout.samples}) == 3
            counted = by_orders([score.exp().item() for score in scores], rewards)
        for score, reward, (weight, baseline) in zip(scores, rewards, counted, strict=True):
            if distinct != "group":
                (baseline,) = by_length([rollout.greedy.text])
            total = total - weight * (reward - baseline) * score
        lengths = [len(sample.ids) for sample in rollout.samples]
        tokens += sum(weight * n for (weight, _), n in zip(counted, lengths, strict=True))
    (total / tokens).backward()
    trained = dict(tuned.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = parameter.detach() - 0.5 * parameter.grad
            torch.testing.assert_close(trained[name].detach(), expected, atol=1e-5, rtol=1e-4)


def spied(owner, name: str) -> list:
    """What a method returns from now on."""
    results, method = [], getattr(owner, name)

    def spy(*args, **kwargs):
        results.append(method(*args, **kwargs))
        return results[-1]

    setattr(owner, name, spy)
    return results


def test_what_a_describer_cannot_say_gets_no_gradient(tmp_path):
    """A policy that is punished would else move to an end of turn that `min_new_tokens` forbids, and fall silent."""
    tuned = trainer(tmp_path, min_new_tokens=3)
    model = tuned.model
    rows = opened(tuned, tuned.train_dataset[:2])
    answers = [[70, 71, 72], [80, 81, 82]]
    batch = describing(tuned.prompts, rows, answers, [None], tuned.args.device, torch.float32)
    suppressed = tuned.rollouts.suppressed(model)
    assert suppressed.before == 3 and suppressed.ends and suppressed.never
    gradients = []
    for left_out in (suppressed, Suppressed()):
        model.zero_grad()
        answer_log_probs(model, batch, left_out).sum().backward()
        gradients.append(model.lm_head.weight.grad[[*suppressed.ends, *suppressed.never]].abs().sum(-1))
    assert (gradients[0] == 0).all() and (gradients[1] > 0).all()


# with Adam a gradient of 1e-9 moves a weight by a whole step, and clipping would hide a wrong scale
EXACT = {"optim": "sgd", "max_grad_norm": 0.0, "learning_rate": 0.1, "locator_learning_rate": 0.1}


def assert_close(one: dict, other: dict, atol: float = 1e-6):
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=atol, rtol=1e-4)


def test_accumulation_makes_the_step_of_one_large_batch(tmp_path):
    results = []
    for name, settings in {
        "one": {"per_device_train_batch_size": 8},
        "two": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "parts": {"per_device_train_batch_size": 8, "rollout_batch_size": 3},
    }.items():
        tuned = trainer(tmp_path / name, rows=region_rows(16), reward_funcs=by_length, **EXACT, **settings)
        tuned.train()
        results.append(weights(tuned.model))
    assert_close(results[0], results[1], atol=1e-5)
    assert_close(results[0], results[2], atol=1e-5)


def test_guessed_descriptions_and_boxes_change_no_step(tmp_path, monkeypatch):
    settings = {"reward_funcs": by_length, "num_generations": 2, "min_caption_iou": 0.01, **EXACT}
    tuned = trainer(tmp_path / "guessed", **settings)
    tuned.train()
    ask, guessed = ImageBranches.ask, []

    def alone(self, questions, draws, limit, at_least=0, guesses=None, judge=False):
        guessed.append(guesses)
        return ask(self, questions, draws, limit, at_least)

    monkeypatch.setattr(ImageBranches, "ask", alone)
    other = trainer(tmp_path / "alone", **settings)
    other.train()
    assert any(guesses is not None for guesses in guessed)
    assert_close(weights(tuned.model), weights(other.model))


def test_the_frozen_copy_is_the_model_of_the_last_switch(tmp_path):
    tuned = trainer(tmp_path, reward_funcs=by_length, max_steps=3)
    start = weights(tuned.model)
    tuned.train()
    live = weights(tuned.model)
    with tuned.frozen.active():
        frozen = weights(tuned.model)
    assert not moved(live, tuned.model)
    # the switch after two describer steps renewed it; the locator step after it moved the live model only
    for other in (start, live):
        assert any(not torch.equal(frozen[name], other[name]) for name in trainable(tuned.model))
    tuned.state.global_step = 3
    tuned.begin_step()
    with tuned.frozen.active():
        assert not moved(live, tuned.model)
    assert not tuned.optimizer.optimizer.state


def test_an_early_stop_saves_updates_and_the_ratio_guard_holds_the_weights(tmp_path):
    for early_stop, updates in ((-1.0, 1), (1e9, 4)):
        tuned = trainer(tmp_path / str(updates), reward_funcs=by_length, inner_epochs=4, max_steps=1)
        tuned.args.early_stop = early_stop  # below 0, which nobody may set, it stops at once
        tuned.train()
        assert history(tuned, "describer/updates") == [updates]
    tuned = trainer(tmp_path / "c", reward_funcs=by_length, weight_decay=0.0, max_steps=1, locator_steps=0)
    tuned.args.max_ratio = 0.5  # every batch begins at 1
    before = weights(tuned.model)
    tuned.train()
    assert not moved(before, tuned.model)


def test_options_of_baseline_anchor_filter_and_mix_in_run(tmp_path):
    tuned = trainer(
        tmp_path,
        baseline="greedy_live",
        num_generations=2,
        kl_anchor="start",
        kl_coef=0.1,
        min_caption_iou=0.9,
        rec_dataset=region_rows(3, seed=9, expressions=True),
        reward_funcs=["giou", "length"],
        reward_weights=[1.0, 0.01],
        eval_dataset=region_rows(3, seed=5, expressions=True),
        eval_strategy="steps",
        eval_steps=2,
    )
    tuned.train()
    assert history(tuned, "locator/kept")[0] == 0.0 and history(tuned, "locator/loss")[0] > 0
    assert history(tuned, "describer/rewards/length_reward")[0] < 0
    assert history(tuned, "eval_iou")


@pytest.mark.parametrize("baseline", ["group", "greedy"])
def test_a_box_of_which_little_can_be_said_has_fewer_descriptions_that_weigh_as_much(tmp_path, baseline):
    """Two tokens at each of two places: four descriptions at most, three where one of them is an end."""

    def by_ids(completion_ids, **columns):
        return [sum(ids) % 7 / 7 for ids in completion_ids]

    tuned = trainer(
        tmp_path,
        num_generations=6,
        without_replacement=True,
        baseline=baseline,
        top_k=2,
        describe_max_new_tokens=2,
        reward_funcs=by_ids,
        max_steps=2,
    )
    steps = spied(tuned.rollouts, "describer")
    before = weights(tuned.model)
    tuned.train()
    assert moved(before, tuned.model)
    for rollout in (rollout for step in steps for rollout in step):
        assert len(rollout.samples) == len({tuple(sample.ids) for sample in rollout.samples}) in (3, 4)
        # all of the mass is drawn: each stands for what it is probable
        assert sum(sample.weight for sample in rollout.samples) == pytest.approx(6, rel=1e-5)
        masses = [sample.weight / 6 for sample in rollout.samples]
        assert [sample.probability for sample in rollout.samples] == pytest.approx(masses, rel=1e-4)


def test_the_first_of_distinct_descriptions_is_the_independent_one(tmp_path):
    drawn = []
    for settings in ({}, {"num_generations": 2, "without_replacement": True}):
        tuned = trainer(tmp_path, max_steps=1, **settings)
        steps = spied(tuned.rollouts, "describer")
        tuned.train()
        drawn.append([rollout.samples[0].ids for rollout in steps[0]])
    assert drawn[0] == drawn[1]


def test_a_leak_earns_what_a_miss_earns_where_misses_are_negative(tmp_path):
    tuned = trainer(tmp_path, reward_funcs=["giou", "length"], reward_weights=[1.0, 0.1])
    rows = opened(tuned, region_rows(1)) * 3
    box = tuple(map(float, rows[0]["box"]))
    near = (box[0], box[1], box[2] + 30, box[3] + 30)
    places = (("red", near), ("[0.10, 0.20, 0.30, 0.40]", box), ("red one", None))
    (honest, leak, missed), _ = tuned.earn(rows, [Description([70], *place) for place in places])
    assert honest > leak and leak == pytest.approx(-1.4) and missed == pytest.approx(-1.2)


@pytest.mark.parametrize("anchor", ["frozen", "start"])
def test_kl_is_exactly_nothing_while_its_anchor_is_the_live_model(tmp_path, monkeypatch, anchor):
    settings = {"temperature": 0.6, "kl_coef": 0.5, "kl_anchor": anchor, "max_steps": 5}
    tuned = trainer(tmp_path, reward_funcs=by_length, num_generations=2, baseline="group", **settings)
    scored, score = [], ImageBranches.score

    def spy(branches, *args):
        scored.append(tuned.state.global_step)
        return score(branches, *args)

    monkeypatch.setattr(ImageBranches, "score", spy)
    tuned.train()
    # steps 0, 1, 3 and 4; before 3 the frozen copy is renewed, the start stays what it was
    assert [kl == 0 for kl in history(tuned, "describer/kl")] == [True, False, anchor == "frozen", False]
    assert scored == ([1, 4] if anchor == "frozen" else [1, 3, 4])


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": 0.0, "weight_decay": 0.0},
        # a rounded mean of equal rewards is no signal
        {"baseline": "group", "num_generations": 4},
    ],
)
def test_a_reward_that_equals_its_baseline_moves_nothing(tmp_path, settings):
    tuned = trainer(tmp_path, reward_funcs=always(0.7), max_steps=2, **settings)
    before = weights(tuned.model)
    tuned.train()
    assert not moved(before, tuned.model)


class Watch(TrainerCallback):
    """The weights and Adam's moments behind every step."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, []

    def on_step_end(self, *args, **kwargs):
        model, state = self.trainer.model, self.trainer.optimizer.state
        moments = [copy.deepcopy(state[p]) for p in model.parameters() if p in state]
        self.steps.append((weights(model), moments))


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_without_signal_changes_neither_weights_nor_moments_and_is_counted(tmp_path, max_grad_norm):
    def first_step_alone(completions, trainer_state, **columns):
        return by_length(completions) if trainer_state.global_step == 0 else [0.7] * len(completions)

    tuned = trainer(
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
    watch = Watch(tuned)
    tuned.add_callback(watch)
    tuned.train()
    (first, moments), (_, others), (third, last), (fourth, _) = watch.steps[:4]
    assert moments and all(torch.equal(first[name], third[name]) for name in first)
    assert any(not torch.equal(third[name], fourth[name]) for name in first)
    for one, other, late in zip(moments, others, last, strict=True):
        assert all(torch.equal(one[name], other[name]) and torch.equal(one[name], late[name]) for name in one)
    assert history(tuned, "describer/skipped")[:3] == [0, 1, 1]
    assert history(tuned, "describer/updates")[:3] == [2, 0, 0]
    # the schedule goes on: 1e-3 for describer steps, twice as much for locator steps, to 0 in five steps
    rates = [1e-3, 0.8e-3, 0.6e-3, 0.8e-3, 0.2e-3]
    assert history(tuned, "learning_rate")[:5] == pytest.approx(rates)


@pytest.mark.parametrize("drifted", [True, False])
def test_kl_alone_is_signal_unless_it_is_nothing(tmp_path, monkeypatch, drifted):
    tuned = trainer(tmp_path, reward_funcs=always(0.7), kl_coef=0.5, max_steps=1)
    tuned.make_copies()
    with torch.no_grad():
        tuned.model.lm_head.weight.mul_(1.1)
    if not drifted:
        monkeypatch.setattr(policy, "token_kl", lambda log_probs, *_: torch.zeros_like(log_probs))
    before = weights(tuned.model)
    tuned.train()
    assert history(tuned, "describer/skipped") == [0 if drifted else 1]
    assert bool(moved(before, tuned.model)) == drifted


def test_lora_keeps_a_frozen_adapter_and_no_second_model(tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_checkpointing": True}
    tuned = trainer(tmp_path, reward_funcs=by_length, peft_config=lora, **settings)
    before = weights(tuned.model)
    tuned.train()
    changed = moved(before, tuned.model)
    # gradient checkpoints let the adapters learn, though the embeddings before them are frozen
    assert {name for name in before if "lora_B" in name and "language_model" in name} <= changed
    assert all("lora" in name for name in changed)
    assert tuned.frozen.names == trainable(tuned.model) and all("lora" in n for n in tuned.frozen.names)
    files = {path.name for path in (tmp_path / "checkpoint-3").iterdir()}
    assert {"adapter_model.safetensors", "frozen_copy.safetensors", "vlm_sft_rl.json"} <= files
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


def test_a_describer_that_verifies_its_own_phrases(tmp_path):
    """REVERSE composed with SC-Tune: descriptions decoded retrospectively, both phases trained on what was kept."""
    model, processor = families.with_tags(families.llava())
    with torch.no_grad():  # tags are frequent, so that there is something to verify
        model.get_output_embeddings().weight[-3:] *= 4
    tuned = trainer(
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
    described, captioned = (spied(tuned.rollouts, name) for name in ("describer", "captions"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollouts, "generate_retrospective", rollouts.generate_retrospective)
        answers = spied(rollouts, "generate_retrospective")
        before = weights(tuned.model)
        tuned.train()
    # sampled descriptions for the policy gradient, greedy ones for the locator
    samples = [sample for rollout in described[0] for sample in rollout.samples]
    assert len(samples) == 8 and [len(rollout.samples) for rollout in captioned[0]] == [1] * 4
    tags = set(processor.tokenizer.convert_tokens_to_ids(["<SPAN>", "</CN>", "</UN>"]))
    assert any(tags & set(sample.ids) for sample in samples)
    assert not any("<SPAN>" in sample.text for sample in samples)
    # an end that never came is not learnt
    reasons = [next(e["reason"] for e in answer.trace if e["kind"] == "finish") for answer in answers[0]]
    assert any(reason != "end" for reason in reasons)
    ended = [sample.ids[-1] == processor.tokenizer.eos_token_id for sample in samples]
    assert ended == [reason == "end" for reason in reasons]
    # a description without a phrase was verified by nothing
    verdicts = [answer.verdict for answer in answers[0]]
    assert NO_PHRASE in verdicts and [sample.verdict for sample in samples] == verdicts
    logged = tuned.state.log_history[0]
    for name, verdict in (("verified_rate", VERIFIED), ("no_phrase_rate", NO_PHRASE)):
        assert logged[f"describer/{name}"] == pytest.approx(verdicts.count(verdict) / 8)
    assert moved(before, tuned.model)
