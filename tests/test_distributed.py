"""Two processes on the CPU: rows with and without images, any assignment to the ranks."""

import json
import subprocess

import pytest
from launched import command, recipe
from tagged_rows import prepared, write_mixed_rows

STRICT = ["--ddp_find_unused_parameters", "false"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}], ids=["full", "lora"]
)
def test_text_only_rows_on_one_rank_do_not_hang_and_change_nothing(tmp_path, settings):
    """DDP without its search for unused parameters waits for ever when one rank leaves the projector out."""
    prepared(tmp_path)
    # with Adam a gradient of 1e-9 moves a weight by a whole step, and processes add in another order
    sgd = {"optim": "sgd", "learning_rate": 0.1}
    path = recipe(tmp_path, max_steps=6, gradient_checkpointing=True, **sgd, **settings)
    write_mixed_rows(tmp_path / "data")
    losses = []
    for processes, rows in ((2, 1), (1, 2)):
        out = tmp_path / f"out-{processes}"
        words = ["--output_dir", str(out), "--per_device_train_batch_size", str(rows), *STRICT]
        done = subprocess.run(
            command(path, *words, processes=processes), capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        log = json.loads((out / "trainer_state.json").read_text())["log_history"]
        losses.append([entry["loss"] for entry in log if "loss" in entry])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)
