"""Two processes under each engine train as one process does, or refuse to before a weight is read.

An engine is launched once (`train_on_engine.py`). The table in docs/distributed.md is what is found here: `WRITE_TABLE=yes
make test-engines` writes it.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="`make test-engines` makes an environment with DeepSpeed")

from engine_cases import ENGINES, FAMILIES, HALFWAY, METHODS, REFUSED, RESUMED, RUNS
from engine_inputs import write_config, write_models, write_rows
from PIL import Image
from safetensors.torch import load_file

from vlm_sft_rl.decoding import SamplingConfig, generate_plain
from vlm_sft_rl.models.checkpoints import merge
from vlm_sft_rl.models.load import load_for_inference

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs" / "distributed.md"
BEGIN, END = "<!-- the engines' table -->\n\n", "\n<!-- its end -->"
LOSS, WEIGHT = 1e-5, 1e-4  # relative; absolute
SECONDS = 1200  # of one launch
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2 * SECONDS)]


def start(engine: str, folder: Path, runs: list, log: Path) -> subprocess.Popen:
    command = [sys.executable]
    if engine != "one":
        command += ["-m", "vlm_sft_rl.launch", "--config_file", str(write_config(engine, folder))]
    command += [str(Path(__file__).with_name("train_on_engine.py")), engine, str(folder)]
    paths = [ROOT, ROOT / "tests" / "support"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
    }
    with log.open("w") as file:
        return subprocess.Popen(
            [*command, *("/".join(run) for run in runs)], env=env, stdout=file, stderr=file
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("engines")
    write_rows(folder / "rows")
    write_models(folder, FAMILIES)
    return folder


@pytest.fixture(scope="module")
def trained(folder):
    """`engine -> folder of its runs`; each engine is launched once, and `one` is the single process."""

    @cache
    def launch(engine: str) -> Path:
        # a single process leaves a core free
        shares = [RUNS[::2], RUNS[1::2]] if engine == "one" else [RUNS]
        logs = [folder / f"{engine}-{number}.log" for number in range(len(shares))]
        launches = [start(engine, folder, runs, log) for runs, log in zip(shares, logs, strict=True)]
        for process, log in zip(launches, logs, strict=True):
            assert process.wait(SECONDS) == 0, log.read_text()[-6000:]
        return folder / engine

    return launch


def figures_of(run: Path) -> dict:
    return json.loads(run.with_name(f"{run.name}.json").read_text())


def weights_of(run: Path) -> dict:
    (file,) = [name for name in ("model", "adapter_model") if (run / f"{name}.safetensors").is_file()]
    return load_file(run / f"{file}.safetensors")


def losses(log: list[dict]) -> list[float]:
    return [entry["loss"] for entry in log]


def differences(run: Path, alone: Path) -> list[str]:
    """How a run of an engine differs from that of one process, and its resumed run from itself."""
    ours, theirs = figures_of(run), figures_of(alone)
    if text := ours.get("failed") or ours.get("refused"):
        return [text]
    differ = []
    if ours["processes"] != 2:
        differ.append(f"{ours['processes']} processes")
    if losses(ours["log"]) != pytest.approx(losses(theirs["log"]), rel=LOSS, abs=1e-6):
        differ.append(f"losses {losses(ours['log'])}, not {losses(theirs['log'])}")
    for folder in ("", f"checkpoint-{HALFWAY}"):
        differ += unequal(weights_of(run / folder), weights_of(alone / folder), WEIGHT)
    if "resumed" in ours:
        if ours["resumed"] != pytest.approx(losses(ours["log"]), rel=LOSS, abs=1e-6):
            differ.append(f"resumed with losses {ours['resumed']}, not {losses(ours['log'])}")
        differ += unequal(weights_of(run.with_name(f"{run.name}-resumed")), weights_of(run), WEIGHT / 10)
    return differ


def unequal(ours: dict, theirs: dict, allowed: float) -> list[str]:
    """What two sets of weights differ in: names, or values by more than `allowed`."""
    if names := sorted(ours.keys() ^ theirs.keys()):
        return [f"{len(names)} names, the first is {names[0]}"]
    gaps = {name: float((ours[name] - theirs[name]).abs().max()) for name in ours}
    return [f"{name} by {gap}" for name, gap in gaps.items() if not gap <= allowed][:1]


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_what_one_process_trains_has_a_signal(trained, family, name):
    """Where nothing moves, all engines are equal."""
    run = trained("one") / family / name
    assert len(set(losses(figures_of(run)["log"]))) > 1
    assert unequal(weights_of(run), weights_of(run / f"checkpoint-{HALFWAY}"), 1e-6)


@pytest.mark.parametrize(("family", "name"), RUNS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_as_one_or_refuse(trained, engine, family, name):
    run, alone = (trained(launched) / family / name for launched in (engine, "one"))
    figures = figures_of(run)
    if (engine, name) in REFUSED:  # of checkpoints without weights
        assert REFUSED[engine, name] in figures.get("refused", ""), figures
        return
    assert differences(run, alone) == []
    assert ("resumed" in figures) == ((family, name) in RESUMED)


@pytest.mark.parametrize(("family", "name"), RESUMED)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_saves_is_merged_reloaded_and_answers(trained, tmp_path, engine, family, name):
    if (engine, name) in REFUSED:
        pytest.skip("refused")
    answers = []
    for launched in (engine, "one"):
        path = trained(launched) / family / name
        if METHODS[name].settings.get("use_peft"):
            assert merge(path, tmp_path / launched).error < 1e-5
            path = tmp_path / launched
        picture = Image.linear_gradient("L").convert("RGB").resize((56, 56))
        model, processor, _ = load_for_inference(path, device="cpu")
        answers += generate_plain(model, processor, [picture], ["What?"], SamplingConfig(max_new_tokens=8))
    assert answers[0].text == answers[1].text


def table(trained) -> str:
    """Method x engine, and the families that each line holds for."""

    def cell(engine: str, name: str, families) -> str:
        if (engine, name) in REFUSED:
            return "refused"
        runs = [[trained(launched) / family / name for launched in (engine, "one")] for family in families]
        return "differs" if any(differences(*pair) for pair in runs) else "equal"

    lines = [f"| method | families | {' | '.join(ENGINES)} |", "|---" * (2 + len(ENGINES)) + "|"]
    for name, method in METHODS.items():
        families = [family for family, methods in FAMILIES.items() if name in methods]
        cells = [cell(engine, name, families) for engine in ENGINES]
        lines.append(f"| {method.name} | {', '.join(families)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_guide_has_the_table_of_what_was_found(trained):
    before, _, rest = GUIDE.read_text().partition(BEGIN)
    written, _, after = rest.partition(END)
    found = table(trained)
    if os.environ.get("WRITE_TABLE") == "yes":
        GUIDE.write_text(before + BEGIN + found + END + after)
    else:
        assert written == found, "WRITE_TABLE=yes make test-engines"
