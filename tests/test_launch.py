import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.launch import (
    launch_training,
    main,
    module_command,
    process_count,
    run_command,
    training_command,
)


def test_the_command_is_accelerates():
    command = training_command("reverse/pocket", ["--seed", "3"], "cpu")
    assert command[1:3] == ["-m", "vlm_sft_rl.launch"]
    assert command[-2:] == ["--seed", "3"]
    assert command[command.index("--num_processes") + 1] == "1"
    several = training_command("reverse/pocket", [], "ddp", 2)
    assert several[several.index("--num_processes") + 1] == "2"
    # accelerate starts one process on a CPU, whatever number it is given, unless it is told that there are several
    assert "--multi_gpu" in training_command("reverse/pocket", [], "cpu", 2) and "--multi_gpu" not in several
    with pytest.raises(UserError, match="zero9"):
        training_command("reverse/pocket", [], "zero9")


@pytest.mark.parametrize("count", ["two", 0, -1, True, [2], 2.0])
def test_a_number_of_processes_that_is_none_is_refused(tmp_path, count):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"num_processes": count}))
    with pytest.raises(UserError, match=r"`num_processes` is .*expected an integer >= 1"):
        process_count(str(path))


@pytest.mark.slow
def test_a_failed_run_is_one_message(capfd):
    assert launch_training("reverse/pocket", ["--train_file", "nowhere.jsonl"], "cpu") == 2
    error = capfd.readouterr().err
    assert "Error:" in error and "CalledProcessError" not in error


CHILD = (
    "import os, time; from vlm_sft_rl.launch import end_with_parent; "
    "end_with_parent(); print(os.getpid(), flush=True); time.sleep(60)"
)


@pytest.mark.parametrize("reaped", [True, False])
@pytest.mark.parametrize("start", ["run_command", "accelerate"])
def test_a_process_ends_with_a_launcher_that_was_killed(start, reaped):
    """Also with one whose status nobody has asked for yet: it still has its process id."""
    if start == "run_command":
        code = (
            f"from vlm_sft_rl.launch import run_command; run_command([{sys.executable!r}, '-c', {CHILD!r}])"
        )
    else:
        code = f"import subprocess; subprocess.run([{sys.executable!r}, '-c', {CHILD!r}])"
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"} if start == "accelerate" else None
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=env)
    child = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    if reaped:
        launcher.wait()
    psutil.wait_procs([child], timeout=20)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    launcher.wait()


def test_a_broken_accelerate_config_is_one_message(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("distributed_type: MANY_GPUS\ncompute_environment: LOCAL_MACHINE\nnum_processes: 1\n")
    assert main(["--config_file", str(path), "--num_processes", "1", "-m", "json.tool"]) == 2
    assert capsys.readouterr().err.startswith(f"Error: {path}: ")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_child_that_could_not_say_why_it_ended_is_spoken_for(tmp_path, monkeypatch, capfd, processes):
    (tmp_path / "killed.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.getcwd()}")
    assert run_command(module_command("killed", [], "cpu", processes)) == 1
    error = capfd.readouterr().err
    assert "ended by signal 9 (SIGKILL)" in error and "Traceback" not in error


@pytest.mark.slow
@pytest.mark.parametrize("deaf", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "])
def test_children_end_with_their_parent(deaf):
    code = (
        "import vlm_sft_rl.launch as launch\n"
        "launch.GRACE_SECONDS = 1\n"
        "launch.training_command = lambda *a: [__import__('sys').executable, '-c', "
        f"'{deaf}import os,time; print(os.getpid(), flush=True); time.sleep(60)']\n"
        "launch.launch_training('x')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) != 0
    for _ in range(50):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the child outlived its parent")
