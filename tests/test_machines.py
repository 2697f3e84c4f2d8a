"""Several machines, as two launchers on the loopback: each starts its share of the processes, as on a machine of its own."""

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from launched import recipe
from tagged_rows import prepared

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import read_json
from vlm_sft_rl.launch import Machines, module_command, process_count
from vlm_sft_rl.self_training.processes import Trainer
from vlm_sft_rl.train import last_complete_checkpoint

# with Adam a gradient of 1e-9 moves a weight by a whole step, and processes add in another order
SGD = {"optim": "sgd", "learning_rate": 0.1}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(path: Path, rank: int, port: int, *words: str, processes: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "vlm_sft_rl.cli", "train", str(path), "--accelerate-config", "cpu"]
    command += ["--num-processes", str(processes), "--num-machines", "2", "--machine-rank", str(rank)]
    command += ["--main-process-ip", "127.0.0.1", "--main-process-port", str(port), *words]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ends(*machines: subprocess.Popen) -> list[tuple[int, str]]:
    """Their status and what they said."""
    said = [machine.communicate(timeout=300)[1] for machine in machines]
    return [(machine.returncode, text) for machine, text in zip(machines, said, strict=True)]


def losses(output: Path) -> list[float]:
    log = read_json(output / "trainer_state.json")["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.slow
def test_two_machines_train_as_one_process_also_when_killed_and_resumed(tmp_path):
    prepared(tmp_path)
    path = recipe(tmp_path, **SGD)
    command = [sys.executable, "-m", "vlm_sft_rl.train", "--config", str(path), "--output_dir"]
    alone = [*command, str(tmp_path / "alone"), "--per_device_train_batch_size", "4"]
    subprocess.run(alone, check=True, capture_output=True)
    port, output = free_port(), tmp_path / "out"
    machines = [start(path, rank, port) for rank in (1, 0)]
    while last_complete_checkpoint(output)[0] is None:
        assert all(machine.poll() is None for machine in machines), ends(*machines)
        time.sleep(0.01)
    for machine in machines:
        os.killpg(machine.pid, signal.SIGKILL)
        machine.wait()
    assert not (output / "trainer_state.json").exists()
    (status, second), (first_status, first) = ends(*(start(path, rank, port) for rank in (1, 0)))
    assert status == first_status == 0, first + second
    assert f"Machine 1 of 0 to 1 joins 127.0.0.1:{port}" in second and "Going on from" in first
    assert losses(output) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5) and len(losses(output)) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--seed", "4"], "`seed` differs between the machines of this run: '3' on "),
        (["--output_dir", "{}/elsewhere"], "what .* writes there cannot be seen on .*a folder of a file system that"),
    ],
    ids=["another setting", "another folder"],
)  # fmt: skip
def test_machines_that_differ_are_refused_on_each_of_them(tmp_path, words, complaint):
    prepared(tmp_path)
    path, port = recipe(tmp_path), free_port()
    other = start(path, 1, port, *(word.format(tmp_path) for word in words))
    for status, said in ends(start(path, 0, port), other):
        assert status == 2 and "Traceback" not in said
        assert len(re.findall(f"Error: .*{complaint}", said)) == 1, said


TWO = {"num_machines": 2, "machine_rank": 0, "main_process_ip": "127.0.0.1"}


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"machine_rank": 2}, "--machine-rank: `machine_rank` is 2, and 2 machines have the numbers 0 to 1"),
        ({"machine_rank": None}, "which of them this one is has to be said: give --machine-rank"),
        ({"main_process_ip": None}, "--main-process-ip is missing: 2 machines meet"),
        ({"main_process_port": 0}, "`main_process_port` is 0; 2 machines meet at a port from 1 to 65535"),
        ({"num_machines": 3}, "--num-processes: 4 processes cannot be shared by 3 machines"),
        ({"num_machines": None, "machine_rank": 1}, "--machine-rank is for several machines, and there is one"),
        ({"num_machines": None}, "--main-process-ip is for several machines, and there is one"),
    ],
)  # fmt: skip
def test_machines_that_do_not_fit_together_are_refused(given, complaint):
    with pytest.raises(UserError, match=complaint):
        process_count("cpu", 4, Machines(**{**TWO, **given}))


def test_a_config_may_say_it_all_and_the_command_line_says_it_instead(tmp_path):
    path = tmp_path / "config.yaml"
    settings = {"num_processes": 4, "num_machines": 2, "machine_rank": 1, "main_process_ip": "127.0.0.1"}
    path.write_text(yaml.safe_dump(settings))
    command = module_command("json.tool", [], str(path))
    words = dict(itertools.pairwise(command))
    assert (words["--machine_rank"], words["--main_process_port"]) == ("1", "29500")
    command = module_command("json.tool", [], str(path), 6, Machines(num_machines=3, machine_rank=2))
    words = dict(itertools.pairwise(command))
    assert (words["--num_machines"], words["--machine_rank"], words["--num_processes"]) == ("3", "2", "6")
    path.write_text(yaml.safe_dump({**settings, "num_processes": 3}))
    with pytest.raises(UserError, match=f"{path}: 3 processes cannot be shared by 2 machines"):
        module_command("json.tool", [], str(path))
    path.write_text(yaml.safe_dump({**settings, "machine_rank": "one"}))
    with pytest.raises(UserError, match="`machine_rank` is 'one', expected an integer >= 0"):
        module_command("json.tool", [], str(path))


def test_a_port_that_is_taken_is_refused_where_it_is_needed():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        taken = {**TWO, "main_process_port": holder.getsockname()[1]}
        with pytest.raises(
            UserError, match=r"cannot be used here .*give another --main-process-port on all machines"
        ):
            module_command("json.tool", [], "cpu", 2, Machines(**taken))
        module_command("json.tool", [], "cpu", 2, Machines(**{**taken, "machine_rank": 1}))


def test_an_unknown_name_of_machine_0_is_refused():
    machines = Machines(**{**TWO, "machine_rank": 1, "main_process_ip": "no-such-machine.invalid"})
    with pytest.raises(
        UserError, match=r"main_process_ip 'no-such-machine.invalid': this machine knows no such"
    ):
        module_command("json.tool", [], "cpu", 2, machines)


def test_self_training_on_several_machines_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        UserError, match=r"self-training runs on one machine, not on 2.*round-1/train.yaml --num-machines"
    ):
        Trainer({}, "cpu", 2, Machines(**TWO))
