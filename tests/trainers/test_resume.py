"""A run goes on from all of a checkpoint: state, optimizer, schedule, random numbers; or it is refused in one message."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tagged_rows import prepared
from training import loaded_trainer

from vlm_sft_rl.errors import UserError


class Run:
    """What a stranger's pickle would do."""

    def __reduce__(self):
        return (pytest.fail, ("a checkpoint ran code",))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trainer and its first checkpoint, of two steps."""
    folder = tmp_path_factory.mktemp("run")
    trainer, _ = loaded_trainer(
        prepared(folder),
        folder,
        use_peft=True,
        lora_r=2,
        training={"save_strategy": "steps", "save_steps": 1},
    )
    trainer.train()
    return trainer, Path(trainer.args.output_dir) / "checkpoint-1"


@pytest.fixture
def checkpoint(run, tmp_path):
    return Path(shutil.copytree(run[1], tmp_path / "checkpoint-1"))


def state(value):
    def change(folder: Path):
        path = folder / "trainer_state.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | value if isinstance(value, dict) else value)
        )

    return change


def optimizer(change):
    def with_changed(folder: Path):
        saved = torch.load(folder / "optimizer.pt")
        change(saved)
        torch.save(saved, folder / "optimizer.pt")

    return with_changed


def moments(change):
    return optimizer(lambda saved: saved["state"][0].update(exp_avg=change(saved["state"][0]["exp_avg"])))


def running(**value):
    return lambda folder: torch.save({"world_size": 1} | value, folder / "running_state_0.pth")


BROKEN = {
    "sums": (running(sums="x", metrics={}), r"running_state_0\.pth cannot be taken"),
    "a sum": (running(sums={"_tr_loss": "x"}, metrics={}), r"running_state_0\.pth cannot be taken"),
    "a figure": (running(sums={}, metrics={"train": {"a": ["x"]}}), r"running_state_0\.pth cannot be taken"),
    "no sums": (running(), r"running_state_0\.pth cannot be taken"),
    "a list": (state([]), r"trainer_state\.json: expected an object"),
    "null": (state(None), r"trainer_state\.json: expected an object"),
    "step as text": (state({"global_step": "x"}), "field `global_step`"),
    "step below 0": (state({"global_step": -3}), "field `global_step`"),
    "step NaN": (state({"global_step": float("nan")}), "field `global_step`"),
    "batch null": (state({"train_batch_size": None}), "field `train_batch_size`"),
    "log as text": (state({"log_history": "x"}), "field `log_history`"),
    "callbacks": (state({"stateful_callbacks": [1]}), "field `stateful_callbacks`"),
    "a newer version": (state({"news": 1}), "'news' is unknown to this version of transformers"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), r"no optimizer\.pt.*save_only_model"),
    "no schedule": (lambda folder: (folder / "scheduler.pt").unlink(), r"no scheduler\.pt"),
    "truncated": (
        lambda folder: (folder / "optimizer.pt").write_bytes(b"PK\3\4"),
        "cannot be taken into this run",
    ),
    "empty": (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "cannot be taken into this run"),
    "text": (lambda folder: (folder / "scheduler.pt").write_text("hello"), "cannot be taken into this run"),
    "a list as schedule": (
        lambda folder: torch.save([1], folder / "scheduler.pt"),
        "cannot be taken into this run",
    ),
    "code": (lambda folder: torch.save(Run(), folder / "optimizer.pt"), "cannot be taken into this run"),
    "code in a bare pickle": (
        lambda folder: (folder / "rng_state.pth").write_bytes(pickle.dumps(Run())),
        r"rng_state\.pth cannot be taken",
    ),
    "random numbers": (
        lambda folder: torch.save({"python": 1}, folder / "rng_state.pth"),
        r"rng_state\.pth cannot be",
    ),
    "another shape": (moments(lambda value: value[:1]), "has shape .* of another model"),
    "NaN": (moments(lambda value: value * float("nan")), "numbers that are not finite"),
    "another optimizer": (
        optimizer(lambda saved: saved["param_groups"][0].pop("betas")),
        "another optimizer, without `betas`",
    ),
    "fewer weights": (
        optimizer(lambda saved: saved["param_groups"][0]["params"].pop()),
        "cannot be taken into this run",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_a_run_cannot_go_on_from_is_refused(run, checkpoint, name):
    change, reason = BROKEN[name]
    change(checkpoint)
    with pytest.raises(UserError, match=rf"(?s){checkpoint}.*{reason}.*Take another checkpoint"):
        run[0].train(resume_from_checkpoint=str(checkpoint))


def test_what_is_missing_but_not_needed_is_said(run, checkpoint, caplog):
    (checkpoint / "rng_state.pth").unlink()
    run[0].train(resume_from_checkpoint=str(checkpoint))
    assert f"{checkpoint}: no rng_state.pth" in caplog.text and "nothing is trained" not in caplog.text
    state({"global_step": 3})(checkpoint)
    run[0].train(resume_from_checkpoint=str(checkpoint))
    assert "is of step 3, and `max_steps` is 2: nothing is trained" in caplog.text
