"""Rows mixed into the locator steps of SC-Tune."""

import copy
from functools import partial

import families
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from regions import caption_rows, config, trainer
from transformers import TrainerCallback

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.sc_tune.batches import answer_log_probs, answers_of, drawn


def test_replayed_rows_join_locator_steps_at_their_share_and_are_counted_apart(tmp_path):
    shown = caption_rows(5)
    made = trainer(
        tmp_path,
        replay_dataset=shown,
        replay_share=0.6,
        describer_steps=0,
        max_steps=3,
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="sgd",
    )
    collate, locating, drawn, boxes, before = made._collate_replay, made._locating, [], [], []
    made._collate_replay = lambda rows: drawn.append([row["id"] for row in rows]) or collate(rows)
    made._locating = lambda *own: boxes.append(locating(*own)) or boxes[-1]
    made.add_callback(Before(before))
    made.train()
    # ceil(0.6 * 4) rows a step, others each time
    assert [len(rows) for rows in drawn] == [3, 3, 3] and len({tuple(rows) for rows in drawn}) > 1
    rows = {row["id"]: row for row in shown}
    for step, (names, micro, model) in enumerate(zip(drawn, boxes, before, strict=True)):
        batch = VisionCollator(made.processing_class)([rows[name] for name in names])
        batch.pop("loss_weights")
        counts = [int((batch["labels"] != -100).sum()), int(micro.mask.sum())]
        stock, located = model(**batch).loss, -answer_log_probs(model, micro).sum() / counts[1]
        entry = made.state.log_history[step]
        assert entry["locator/replay_loss"] == pytest.approx(float(stock.detach()), rel=1e-4)
        assert entry["locator/loss"] == pytest.approx(float(located.detach()), rel=1e-4)
        joint = (stock * counts[0] + located * counts[1]) / sum(counts)
        assert entry["loss"] == pytest.approx(float(joint.detach()), rel=1e-4)
        joint.backward()
        after = dict((before[step + 1] if step < 2 else made.model).named_parameters())
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                wanted = parameter.detach() - 2e-3 * parameter.grad
                torch.testing.assert_close(after[name].detach(), wanted, atol=1e-6, rtol=1e-4)


class Before(TrainerCallback):
    """Copies of the model as it is at the beginning of every step."""

    def __init__(self, copies: list):
        self.copies = copies

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.copies.append(copy.deepcopy(model))


def test_a_bad_row_of_the_replay_is_named(tmp_path):
    rows = caption_rows(2)
    rows[1]["images"] = ["missing.png"]
    with pytest.raises(UserError, match=r"caption-r1.*missing\.png"):
        trainer(tmp_path, replay_dataset=rows)
    path = tmp_path / "replay.jsonl"
    path.write_text('{"id": "a", "images": [], "text": "no turns"}\n')
    with pytest.raises(UserError, match=r"replay\.jsonl:1.*unknown row"):
        list(read_rows(path))
    with pytest.raises(UserError, match="0 without locator steps"):
        config(tmp_path, replay_file=str(path), locator_steps=0)


def test_what_is_mixed_in_depends_on_the_step_alone_and_is_shared_out(tmp_path):
    draw = partial(drawn, 50, 0.5, name="replay", seed=3)
    whole = draw(8, step=7, processes=1, rank=0)
    assert whole == draw(8, step=7, processes=1, rank=0) != draw(8, step=8, processes=1, rank=0)
    assert whole == [pair for rank in (0, 1) for pair in draw(4, step=7, processes=2, rank=rank)]
    other = drawn(50, 0.5, 8, name="rec", seed=3, step=7, processes=1, rank=0)
    assert [one.row for one in whole] != [one.row for one in other]
    assert len(drawn(50, 0.3, 4, name="rec", seed=3, step=7, processes=1, rank=0)) == 2


@given(st.integers(0, 40), st.integers(1, 24), st.integers(1, 8))
def test_processes_draw_together_what_one_draws_and_equally_many(hundredths, boxes, processes):
    """Processes with different numbers of passes would wait for each other; what fills them up does not count."""
    draw = partial(drawn, 50, hundredths / 100, name="replay", seed=3, step=7)
    alone = draw(boxes * processes, processes=1, rank=0)
    assert len(alone) == -(-hundredths * boxes * processes // 100) and all(one.weight == 1 for one in alone)
    shared = [draw(boxes, processes=processes, rank=rank) for rank in range(processes)]
    assert len({len(own) for own in shared}) == 1
    assert [one for own in shared for one in own if one.weight] == alone


def test_a_row_that_fills_up_has_no_loss():
    _, processor = families.llava()
    batch = VisionCollator(processor, padding_side="left")(caption_rows(3))
    made = answers_of(batch, [1.0, 0.0, 1.0], torch.device("cpu"), torch.float32)
    whole = answers_of(batch, [1.0] * 3, torch.device("cpu"), torch.float32)
    assert (
        torch.equal(made.mask[[0, 2]], whole.mask[[0, 2]]) and whole.mask[1].sum() > 0 == made.mask[1].sum()
    )
