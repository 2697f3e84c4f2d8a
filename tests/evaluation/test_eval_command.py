"""The command line of `eval`: its three forms, and options that belong to another."""

import re
from pathlib import Path

import pytest
from endpoint_server import EndpointServer
from owners_files import write_benchmark
from typer.testing import CliRunner
from worlds import write_checkpoint

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.cli.common import Decoder
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import DECODERS
from vlm_sft_rl.io import read_json


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_checkpoint(folder / "model")
    write_benchmark("pope", folder / "pope")
    write_benchmark("mm_vet", folder / "mm_vet")
    return folder


def call(*arguments):
    done = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=True)
    if isinstance(done.exception, UserError):
        raise done.exception
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_run_compare_and_card(world):
    common = ("--model", world / "model", "--data-dir", world / "pope", "--max-new-tokens", 4)
    call("pope", *common, "--output-dir", world / "a")
    call("pope", *common, "--output-dir", world / "b", "--metric-option", "rules=ours", "--seed", 1)
    call("pope", *common, "--output-dir", world / "c", "--metric-option", "rules=released")
    strict, released = (read_json(world / name / "summary.json")["metrics"] for name in "ac")
    assert strict["unreadable"]["value"] == 1 and released["unreadable"]["value"] == 0
    text = call("compare", world / "a", world / "b", "--rounds", 20, "--html", world / "compare.html")
    assert "paired bootstrap over 6 shared questions" in " ".join(text.split())
    assert "A against B" in (world / "compare.html").read_text()
    with pytest.raises(UserError, match="metric_options"):
        call("compare", world / "a", world / "c")
    call("card", world / "a", world / "c", "--readme", world / "model/README.md")
    assert "| pope | f1 |" in (world / "model/README.md").read_text()


def test_a_judge_from_the_command_line(world):
    common = ("--model", world / "model", "--data-dir", world / "mm_vet", "--max-new-tokens", 4)
    output = ("--output-dir", world / "judged")
    with pytest.raises(UserError, match="--answers-only"):
        call("mm_vet", *common, *output)
    assert "2 answers, not judged yet" in call("mm_vet", *common, *output, "--answers-only")
    with EndpointServer(lambda body: "Correctness: 0.5") as server:
        judge = ("--judge-url", server.url, "--judge-model", "j", "--judge-prices", 1, 2)
        text = call("mm_vet", *common, *output, *judge)
    assert "verdicts of j" in text and read_json(world / "judged/summary.json")["judge"]["usage"]["cost"] > 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("compare", "a"), "needs two run folders"),
        (("compare", "a", "b", "--limit", "3"), "takes --rounds, --seed and --html only, not --limit"),
        (("card", "a"), "needs runs and a card"),
        (("card", "a", "--seed", "1"), "takes --readme only, not --seed"),
        (("pope", "--html", "x.html", "--model", "m"), "--html belongs to eval compare"),
        (("pope", "--readme", "x.md", "--model", "m"), "--readme belongs to eval card"),
        (("pope", "mme", "--model", "m"), "takes one spec"),
        (("mm_vet", "--model", "m", "--judge-model", "x"), "go together"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        call(*arguments)


@pytest.mark.parametrize(
    ("decoder", "options", "recorded"),
    [
        ("majority", ("--candidates", 2, "--temperature", 0.7), {"candidates": 2, "temperature": 0.7}),
        (
            "self-select",
            ("--prompts", "pocket/plain", "--fallback", "majority"),
            {"prompts": "pocket/plain", "fallback": "majority"},
        ),
        ("stage-beam", ("--candidates", 3, "--decoder-option", "rules=released"), {"candidates": 3}),
        ("opera", ("--decoder-option", "beams=2"), {"beams": 2, "scale": 50.0}),
    ],
)
def test_options_of_decoders_are_recorded(world, decoder, options, recorded):
    output = world / decoder
    common = ("--model", world / "model", "--data-dir", world / "pope", "--max-new-tokens", 3, "--limit", 2)
    call("pope", *common, "--decoder", decoder, *options, "--output-dir", output)
    settings = read_json(output / "run.json")["decoding"]
    found = settings["opera" if decoder == "opera" else "candidates"]
    assert {name: found[name] for name in recorded} == recorded
    if decoder == "stage-beam":
        assert found["search"]["rules"] == "released" and found["search"]["beams"] == 3


def test_the_help_names_every_benchmark_and_shows_tags_as_they_are():
    done = CliRunner().invoke(app, ["eval", "--help"])
    text = re.sub(r"[\s│]+", "", done.output)
    assert "P(</UN>)" in text
    shipped = {path.stem for path in (Path(__file__).parents[2] / "eval").glob("*.yaml")}
    (listed,) = re.findall(r"Benchmarks:(.*?)\.", text)
    assert set(listed.split(",")) == shipped


@pytest.mark.parametrize(
    ("decoder", "option", "message"),
    [
        (
            "greedy",
            "beams=3",
            "--decoder-option has no effect on --decoder greedy; it belongs to best-of-n, ",
        ),
        ("majority", "rules=released", "--decoder-option has no effect on --decoder majority"),
        ("stage-beam", "ordr=released", "search: there is no 'ordr'. SearchConfig has max_new_tokens, "),
        ("swires", "threshold=high", "search: threshold = 'high', expected a number"),
        ("opera", "bems=3", "OPERA: there is no 'bems'. OperaConfig has max_new_tokens, beams, "),
    ],
)
def test_wrong_options_of_decoders_name_the_right_ones(world, decoder, option, message):
    common = ("--model", world / "model", "--data-dir", world / "pope", "--output-dir", world / "wrong")
    with pytest.raises(UserError, match=re.escape(message)):
        call("pope", *common, "--decoder", decoder, "--decoder-option", option)


def test_every_decoder_is_a_switch_and_stands_in_the_guide():
    guide = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    cells = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`([a-z-]+)`", cell)}
    assert {decoder.value for decoder in Decoder} == set(DECODERS) <= named
