"""The command line of `eval`: its commands, and options that come from the decoders' settings."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from endpoint_server import EndpointServer
from owners_files import write_benchmark
from typer.testing import CliRunner
from worlds import write_checkpoint

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import DECODERS
from vlm_sft_rl.io import read_json

SHIPPED = {path.stem for path in (Path(__file__).parents[2] / "eval").glob("*.yaml")}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "model")
    write_benchmark("pope", folder / "pope")
    write_benchmark("mm_vet", folder / "mm_vet")
    return folder


def call(*arguments, status=0):
    done = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code == status, (done.output, done.exception)
    return re.sub(r"[\s│]+", " ", done.output)


def run(world, spec, output, *options):
    folders = ("--model", world / "model", "--data-dir", world / spec, "--output-dir", world / output)
    return call("run", spec, *folders, "--max-new-tokens", 4, *options)


def test_run_compare_and_card(world):
    run(world, "pope", "a")
    run(world, "pope", "b", "--metric-option", "rules=ours", "--seed", 1)
    run(world, "pope", "c", "--metric-option", "rules=released")
    ours, released = (read_json(world / name / "summary.json")["metrics"] for name in "ac")
    assert ours["unreadable"]["value"] == 1 and released["unreadable"]["value"] == 0
    text = call("compare", world / "a", world / "b", "--rounds", 20, "--html", world / "compare.html")
    assert "paired bootstrap over 6 shared questions" in text
    assert "new against old" in (world / "compare.html").read_text()
    with pytest.raises(UserError, match="metric_options"):
        call("compare", world / "a", world / "c")
    call("card", world / "a", world / "c", "--readme", world / "model/README.md")
    assert "| pope | f1 |" in (world / "model/README.md").read_text()


def test_a_judge_from_the_command_line(world):
    with pytest.raises(UserError, match="--answers-only"):
        run(world, "mm_vet", "judged")
    with pytest.raises(UserError, match="go together"):
        run(world, "mm_vet", "judged", "--judge-model", "x")
    assert "2 answers, not judged yet" in run(world, "mm_vet", "judged", "--answers-only")
    with EndpointServer(lambda body: "Correctness: 0.5") as server:
        judge = ("--judge-url", server.url, "--judge-model", "j")
        text = run(world, "mm_vet", "judged", *judge, "--judge-input-price", 1, "--judge-output-price", 2)
    assert "verdicts of j" in text and read_json(world / "judged/summary.json")["judge"]["usage"]["cost"] > 0


@pytest.mark.parametrize(
    ("decoder", "options", "recorded"),
    [
        ("majority", ("--candidates", 2, "--temperature", 0.7), {"candidates": 2, "temperature": 0.7}),
        (
            "self-select",
            ("--prompts", "pocket/plain", "--fallback", "majority"),
            {"prompts": "pocket/plain", "fallback": "majority"},
        ),
        ("stage-beam", ("--beams", 3, "--rules", "released"), {"beams": 3, "rules": "released"}),
        ("opera", ("--beams", 2), {"beams": 2, "scale": 50.0}),
        ("dola", ("--layers", "0,1"), {"layers": [0, 1]}),
        (
            "retrospective",
            ("--no-rewrite-query", "--no-reject-repeats", "--total-attempts", 1),
            {"rewrite_query": False, "reject_repeats": False, "total_attempts": 1},
        ),
        ("correct", ("--stop", "same", "--correction-prompt", "Sure?"), {"stop": "same"}),
    ],
)
def test_options_of_decoders_are_recorded(world, decoder, options, recorded):
    run(world, "pope", decoder, "--limit", 2, "--decoder", decoder, *options)
    settings = read_json(world / decoder / "run.json")["decoding"]
    assert {name: settings[name] for name in recorded} == recorded


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        ("greedy", ("--beams", 3), "--beams has no effect on --decoder greedy; it belongs to opera, best-of-n, "),
        ("majority", ("--rules", "released"), "--rules has no effect on --decoder majority"),
        ("stage-beam", ("--rules", "odd"), "search: rules = 'odd', expected ours or released"),
        ("dola", ("--layers", "1,x"), "layers is '1,x'. Write whole numbers with commas"),
    ],
)  # fmt: skip
def test_wrong_options_of_decoders_name_the_right_ones(world, decoder, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(world, "pope", "wrong", "--decoder", decoder, *options)


def test_the_help_has_every_option_of_every_decoder_and_shows_tags_as_they_are():
    command = [sys.executable, "-m", "vlm_sft_rl.cli", "eval", "run", "--help"]
    output = subprocess.run(
        command, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True
    ).stdout
    text = re.sub(r"[\s│]+", " ", output)
    assert "P(</UN>)" in text
    for decoder in DECODERS.values():
        assert all(f"--{name.replace('_', '-')} " in text for name in decoder.options())
    (listed,) = re.findall(r"Benchmarks: (.*?)\.", text)
    assert set(listed.split(", ")) == SHIPPED


def test_benchmarks_and_decoders_are_listed():
    text = call("ls")
    assert all(f" {name} " in text for name in (*SHIPPED, *DECODERS))


def test_commands_that_are_not_there_are_answered_with_those_that_are():
    assert "run, compare, card, ls" in call("pope", status=2)
