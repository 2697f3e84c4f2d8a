"""`vlm-sft-rl generate`: what it takes, what it refuses, and what the settings do."""

import json

import pytest
from typer.testing import CliRunner
from worlds import write_checkpoint

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.cli.common import ALONE
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
        (["--decoder", "self-select", "--fallback", "majority"], "self-select works in"),
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
