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
from vlm_sft_rl.trainers.sc_tune import trainer as module
from vlm_sft_rl.trainers.sc_tune.batches import answer_log_probs, draw_rows, from_collator


class Before(TrainerCallback):
    """Copies of the model as it is at the beginning of every step."""

    def __init__(self):
        self.models = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.models.append(copy.deepcopy(model))


def test_replayed_rows_join_locator_steps_at_their_share_and_are_counted_apart(tmp_path, monkeypatch):
    rows = {row["id"]: row for row in caption_rows(5)}
    settings = {
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "describer_steps": 0,
        "max_steps": 3,
    }
    tuned = trainer(tmp_path, replay_dataset=list(rows.values()), replay_share=0.6, **settings)
    drawn, boxes, before = [], [], Before()
    collate, locating = tuned.replay_collator, module.locating
    tuned.replay_collator = lambda rows: drawn.append([row["id"] for row in rows]) or collate(rows)
    monkeypatch.setattr(module, "locating", lambda *args: boxes.append(locating(*args)) or boxes[-1])
    tuned.add_callback(before)
    tuned.train()
    # ceil(0.6 * 4) rows a step, others each time
    assert [len(names) for names in drawn] == [3, 3, 3] and len(set(map(tuple, drawn))) > 1
    models = [*before.models, tuned.model]
    for step, (names, micro) in enumerate(zip(drawn, boxes, strict=True)):
        model, after = models[step], dict(models[step + 1].named_parameters())
        batch = VisionCollator(tuned.processing_class)([rows[name] for name in names])
        batch.pop("loss_weights")
        counts = [int((batch["labels"] != -100).sum()), int(micro.mask.sum())]
        stock, located = model(**batch).loss, -answer_log_probs(model, micro).sum() / counts[1]
        joint = (stock * counts[0] + located * counts[1]) / sum(counts)
        entry = tuned.state.log_history[step]
        for figure, loss in (("locator/replay_loss", stock), ("locator/loss", located), ("loss", joint)):
            assert entry[figure] == pytest.approx(float(loss.detach()), rel=1e-4)
        joint.backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected = parameter.detach() - 2e-3 * parameter.grad
                torch.testing.assert_close(after[name].detach(), expected, atol=1e-6, rtol=1e-4)


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
    draw = partial(draw_rows, 50, 0.5, name="replay", seed=3)
    whole = draw(8, step=7, processes=1, rank=0)
    assert whole == draw(8, step=7, processes=1, rank=0) != draw(8, step=8, processes=1, rank=0)
    assert whole == [pair for rank in (0, 1) for pair in draw(4, step=7, processes=2, rank=rank)]
    other = draw_rows(50, 0.5, 8, name="rec", seed=3, step=7, processes=1, rank=0)
    assert [draw.row for draw in whole] != [draw.row for draw in other]
    assert len(draw_rows(50, 0.3, 4, name="rec", seed=3, step=7, processes=1, rank=0)) == 2


@given(st.integers(0, 40), st.integers(1, 24), st.integers(1, 8))
def test_processes_draw_together_what_one_draws_and_equally_many(hundredths, boxes, processes):
    """Processes with different numbers of passes would wait for each other; what fills them up does not count."""
    draw = partial(draw_rows, 50, hundredths / 100, name="replay", seed=3, step=7)
    alone = draw(boxes * processes, processes=1, rank=0)
    assert len(alone) == -(-hundredths * boxes * processes // 100) and all(draw.weight == 1 for draw in alone)
    shared = [draw(boxes, processes=processes, rank=rank) for rank in range(processes)]
    assert len({len(share) for share in shared}) == 1
    assert [draw for share in shared for draw in share if draw.weight] == alone


def test_a_row_that_fills_up_has_no_loss():
    _, processor = families.llava()
    batch = VisionCollator(processor, padding_side="left")(caption_rows(3))
    part, whole = (
        from_collator(batch, weights, torch.device("cpu"), torch.float32)
        for weights in ([1.0, 0.0, 1.0], [1.0] * 3)
    )
    assert torch.equal(part.mask[[0, 2]], whole.mask[[0, 2]])
    assert whole.mask[1].sum() > 0 == part.mask[1].sum()
