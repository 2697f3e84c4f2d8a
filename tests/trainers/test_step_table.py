"""What a run shows of its steps: a table in plain text, whatever it logs."""

import re
from types import SimpleNamespace

import pytest
from launched import recipe
from tagged_rows import prepared
from training import loaded_trainer
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from vlm_sft_rl.errors import missing_package
from vlm_sft_rl.train import main
from vlm_sft_rl.trainers.table import HEADER_EVERY, ShortRuns, StepTable

ARGS = SimpleNamespace(disable_tqdm=False)


def log(table, step, capsys, most=10, first=True, **logs):
    state = TrainerState(global_step=step, max_steps=most, is_world_process_zero=first)
    table.on_log(ARGS, state, None, logs=logs)
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def table():
    table = StepTable({"verdict_accuracy": "verdicts right", "loss/": ""})
    table.on_train_begin(ARGS, TrainerState(global_step=0, max_steps=10, is_world_process_zero=True), None)
    return table


def test_a_column_for_loss_for_what_the_method_tells_and_for_the_learning_rate(table, capsys):
    logs = {"loss": 1.23456, "verdict_accuracy": 0.5, "learning_rate": 1e-5, "entropy": 3.0, "epoch": 0.1}
    header, line = log(table, 5, capsys, **logs)
    assert re.split(r"\s{2,}", header.strip()) == ["step", "loss", "verdicts right", "lr", "left"]
    assert line.split() == ["5/10", "1.235", "0.5", "1.00e-05", "0:00:00"] and len(line) == len(header)


def test_the_header_comes_again_when_the_columns_change_and_after_a_screen(table, capsys):
    assert len(log(table, 1, capsys, loss=1.0)) == 2 and len(log(table, 2, capsys, loss=1.0)) == 1
    header, _ = log(table, 3, capsys, loss=1.0, **{"loss/cot": 2.0})
    assert "cot" in header
    headers = [len(log(table, 4, capsys, loss=1.0)) == 2 for _ in range(2 * HEADER_EVERY)]
    assert [i for i, header in enumerate(headers) if header] == [0, HEADER_EVERY]


def test_time_left_is_of_the_steps_of_this_run(table, capsys, monkeypatch):
    state = TrainerState(global_step=4, max_steps=10, is_world_process_zero=True)
    table.on_train_begin(ARGS, state, None)  # resumed
    monkeypatch.setattr(
        "vlm_sft_rl.trainers.table.time", SimpleNamespace(monotonic=lambda: table._begun + 30)
    )
    assert log(table, 7, capsys, loss=1.0)[-1].split()[-1] == "0:00:30"


def test_evaluations_and_the_end_are_sentences(table, capsys):
    logs = {"eval_loss": 0.5, "eval_verdict_auc": 0.75, "eval_runtime": 3.0}
    assert log(table, 5, capsys, **logs) == ["step 5, evaluation: loss 0.5, verdict auc 0.75"]
    assert log(table, 10, capsys, train_runtime=65.0, train_loss=0.25) == [
        "10 steps, 0:01:05 of training, mean loss 0.25"
    ]


def test_one_process_speaks(table, capsys):
    assert log(table, 5, capsys, first=False, loss=1.0) == []


@pytest.mark.parametrize(
    "most, every, strategy, steps",
    [
        (3, 10, "steps", [1, 2, 3]),
        (25, 100, "steps", [*range(3, 25, 3), 25]),
        (10, 10, "steps", []),
        (3, 10, "no", []),
    ],
)
def test_a_run_of_fewer_steps_than_logging_steps_logs_too(most, every, strategy, steps):
    state, args, logged = TrainerState(max_steps=most, logging_steps=every), TrainingArguments(), []
    args.logging_strategy = strategy
    for state.global_step in range(1, most + 1):
        control = TrainerControl()
        ShortRuns().on_step_end(args, state, control)
        logged += [state.global_step] * control.should_log
    assert logged == steps


@pytest.mark.parametrize("disable_tqdm", [False, True])
def test_it_takes_the_place_of_transformers_own(disable_tqdm, tmp_path):
    trainer, _ = loaded_trainer(prepared(tmp_path), tmp_path, training={"disable_tqdm": disable_tqdm})
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(StepTable) == 1 and not {PrinterCallback, ProgressCallback} & set(kinds)


def test_a_healthy_run_writes_a_log_without_warnings(tmp_path, capsys, recwarn):
    """One line for each step, as there are fewer than `logging_steps`; with all that used to warn: checkpointing, LoRA,
    workers, quick checkpoints."""
    prepared(tmp_path)
    changes = {
        "gradient_checkpointing": True,
        "use_peft": True,
        "dataloader_num_workers": 64,
        "use_cpu": False,
        "logging_steps": 10,
    }
    path = recipe(tmp_path, **changes, save_steps=1, save_total_limit=2, disable_tqdm=False)
    capsys.readouterr()
    assert main(["--config", str(path)]) == 0
    out, err = capsys.readouterr()
    steps = [line for line in out.splitlines() if re.match(r"\s*\d+/4 ", line)]
    assert [line.split()[0] for line in steps] == ["1/4", "2/4", "3/4", "4/4"]
    assert "{" not in out + err and "\r" not in out + err
    assert "CPU cores" in err and "arning" not in out + err and "mtime" not in out + err
    known = ("pin_memory", "gradient_checkpointing", "worker processes", "mtime")
    assert not [str(w.message) for w in recwarn if any(word in str(w.message) for word in known)]


def test_an_optimizer_whose_package_is_not_installed_is_one_message(tmp_path, capsys):
    prepared(tmp_path)
    assert (
        main(["--config", str(recipe(tmp_path, optim="galore_adamw", optim_target_modules="all-linear"))])
        == 2
    )
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("Error: You need to install `galore_torch`") and "change the setting" in message
    with pytest.raises(ImportError, match="name 'x'"):
        missing_package(ImportError("cannot import name 'x'"))


def test_a_tracker_that_is_not_installed_is_one_message(tmp_path, capsys):
    path = recipe(tmp_path, report_to="swanlab")
    assert main(["--config", str(path)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.startswith("Error: `report_to: swanlab`") and "Install the package" in message
    assert main(["--config", str(path), "--report_to", "nothing_of_the_kind"]) == 2
    assert "nothing_of_the_kind is not supported" in capsys.readouterr().err
