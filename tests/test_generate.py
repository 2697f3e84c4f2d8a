"""`vlm-sft-rl generate`: what it takes, what it refuses, and what the settings do."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner
from worlds import write_checkpoint

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.cli.common import ALONE
from vlm_sft_rl.data.tags import verification
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.sidecar import read_sidecar, write_sidecar


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def generate(checkpoint, *words):
    command = ["generate", "--model", str(checkpoint), "--prompt", "What is it?", "--max-new-tokens", "12"]
    done = CliRunner().invoke(app, [*command, "--json", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return json.loads(done.output[done.output.index("{") :])


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--decoder", "greedy", "--threshold", "0.1"], "--threshold has no effect on --decoder greedy"),
        (["--decoder", "sample", "--threshold", "0.1"], "--threshold has no effect on --decoder sample"),
        (["--decoder", "greedy", "--temperature", "0.5"], "--temperature has no effect on --decoder greedy"),
        (["--decoder", "sample", "--temperature", "0"], "temperature = 0.0, expected a number > 0"),
        (["--decoder", "drop"], "--decoder drop works in `vlm-sft-rl eval run` only.* Use greedy, sample, "),
    ],
)
def test_settings_without_effect_are_refused(checkpoint, words, complaint):
    with pytest.raises(UserError, match=complaint):
        generate(checkpoint, *words)


def test_greedy_and_sampled_answers(checkpoint):
    greedy = generate(checkpoint, "--decoder", "greedy", "--temperature", "0")
    assert greedy == generate(checkpoint, "--decoder", "greedy")
    assert generate(checkpoint, "--decoder", "sample", "--temperature", "1e-7") == greedy
    hot = {generate(checkpoint, "--decoder", "sample", "--seed", str(i))["tagged_text"] for i in range(4)}
    assert len(hot) > 1


@pytest.mark.parametrize("decoder", [name for name in ALONE if name not in ("greedy", "sample")])
def test_every_decoder_that_needs_no_benchmark_answers_a_question(checkpoint, decoder):
    few = {"swires": ["--max-rounds", "1", "--captions", "1"], "retrospective": ["--total-attempts", "2"]}
    answer = generate(checkpoint, "--decoder", decoder, *few.get(decoder, []))
    assert answer["counts"]["tokens_forwarded"] and isinstance(answer["text"], str)


def test_the_checkpoint_s_own_temperature_counts_unless_one_is_given(checkpoint, monkeypatch):
    import vlm_sft_rl.decoding as decoding

    used, original = [], decoding.generate_retrospective
    monkeypatch.setattr(
        decoding,
        "generate_retrospective",
        lambda model, processor, images, prompts, config: (
            used.append(config) or original(model, processor, images, prompts, config)
        ),
    )
    own = read_sidecar(checkpoint)
    own.decoding.update(temperature=0.3, total_attempts=2)
    write_sidecar(checkpoint, own)
    generate(checkpoint)
    generate(checkpoint, "--temperature", "0", "--threshold", "0.2")
    assert [(c.temperature, c.threshold) for c in used] == [(0.3, 0.4), (0.0, 0.2)]


@pytest.mark.parametrize(
    "words", [["--threshold", "0.999"], ["--threshold", "0.001"], ["--max-new-tokens", "1"]]
)
def test_the_verdict_is_one_of_three_and_stands_on_the_terminal(checkpoint, words):
    limits = ["--total-attempts", "2", *words]
    answer = generate(checkpoint, *limits)
    assert answer["verdict"] == verification(answer["ok"], len(answer["spans"]))
    command = ["generate", "--model", str(checkpoint), "--prompt", "What is it?", "--max-new-tokens", "12"]
    assert answer["verdict"] in CliRunner().invoke(app, [*command, *limits]).output
    assert generate(checkpoint, "--decoder", "greedy")["verdict"] is None


def test_an_empty_prompt_is_refused(checkpoint):
    with pytest.raises(UserError, match="is empty"):
        generate(checkpoint, "--prompt", " ")


def test_errors_and_answers_cannot_steer_a_terminal(tmp_path):
    hostile = tmp_path / "a\x1b[2J\x9b"
    done = subprocess.run(
        [sys.executable, "-m", "vlm_sft_rl.cli", "generate", "--model", str(hostile), "--prompt", "x"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "a\\u001b[2J\\u009b" in done.stderr
    assert "\x1b[2J" not in done.stderr and "\x9b" not in done.stderr
