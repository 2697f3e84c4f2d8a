"""The table of decoders: settings from spec, checkpoint and user; what is refused; runs of those that draw candidates."""

import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from json_lines import read_lines
from worlds import SPEC, evaluate, write_checkpoint, write_questions, write_world

from vlm_sft_rl.decoding.answers import Answer, Counts
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import DECODERS, answer_batch, configure, recorded
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.evaluation.specs import load_spec
from vlm_sft_rl.models.sidecar import Sidecar, write_sidecar

YES_NO = SPEC.replace("metric: chair", "metric: yes_no").replace(
    "metric_options: {vocabulary: [circle, square]}", "metric_options: {}"
)
VERIFYING = ["retrospective", "drop", "stop"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tags=False)


@pytest.fixture
def run(tmp_path, checkpoint):
    spec = write_world(tmp_path)
    rows = read_lines(tmp_path / "data/questions.jsonl")
    write_questions(tmp_path, [row | {"answer": "yes"} for row in rows])

    def call(output="out", text=SPEC, **options):
        spec.write_text(text)
        return evaluate(spec, checkpoint, tmp_path / output, tmp_path / "data", **options)

    call.folder = tmp_path
    return call


def test_every_decoder_stands_in_the_guide_and_fixes_fields_that_it_has():
    guide = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    cells = [line.split("|")[1] for line in guide.splitlines() if line.startswith("| `")]
    assert set(DECODERS) <= {name for cell in cells for name in re.findall(r"`([a-z-]+)`", cell)}
    for decoder in DECODERS.values():
        fields = asdict(decoder.config(**decoder.fixed))
        assert {*decoder.fixed, *decoder.unused} <= set(fields)


def test_the_users_options_stand_over_the_checkpoint_over_the_spec(tagged, tmp_path):
    spec = {"threshold": 0.25, "local_attempts": 3, "total_attempts": 9}
    assert configure("drop", tagged, {}).threshold == 0.4
    config = configure("retrospective", tagged, {"total_attempts": 2}, spec=spec, seed=5)
    assert (config.threshold, config.local_attempts, config.total_attempts, config.seed) == (0.25, 3, 2, 5)
    write_sidecar(tmp_path, Sidecar(threshold=0.4, decoding={"local_attempts": 7}))
    for path in tagged.iterdir():
        if path.name != "vlm_sft_rl.json":
            (tmp_path / path.name).symlink_to(path)
    config = configure("retrospective", tmp_path, {"threshold": 0.6}, spec=spec)
    assert (config.threshold, config.local_attempts, config.total_attempts) == (0.6, 7, 9)


def test_a_checkpoint_is_corrected_as_it_was_trained_to(tmp_path):
    write_sidecar(tmp_path, Sidecar(recipe={"layout": "message", "correction_line": "Check.", "other": 1}))
    config = configure("correct", tmp_path, {"corrections": 2})
    assert (config.layout, config.correction_line, config.corrections) == ("message", "Check.", 2)


def test_published_defaults_and_what_is_recorded(tmp_path):
    search = recorded("stage-beam", configure("stage-beam", tmp_path, {"temperature": 1.0}), 0)
    expected = {"decoder": "stage-beam", "seed": 0, "search": "stage_beam", "beams": 2, "temperature": 1.0}
    assert search == search | expected | {"top_p": 0.9, "max_new_tokens": 2048}
    assert "captions" not in search
    sampled = configure("self-select", tmp_path, {})
    assert (sampled.candidates, sampled.temperature, sampled.top_p, sampled.top_k) == (3, 0.9, 0.95, 50)
    refined = recorded("self-refine", configure("self-refine", tmp_path, {}), 0)
    assert set(refined) == {"decoder", "seed", "kind", "max_new_tokens", "prompts"}


@pytest.mark.parametrize(
    ("decoder", "options", "message"),
    [
        ("greedy", {"local_attempts": 3}, "--local-attempts has no effect on --decoder greedy; it belongs to"),
        ("greedy", {"temperature": 0.5}, "--temperature has no effect on --decoder greedy; it belongs to sample"),
        ("opera", {"temperature": 0.5}, "--temperature has no effect on --decoder opera"),
        ("self-refine", {"temperature": 0.5}, "--temperature has no effect"),
        ("self-refine", {"candidates": 3}, "--candidates has no effect .* belongs to opera, majority, self-select"),
        ("sample", {"threshold": 0.5}, "--threshold has no effect on --decoder sample; it belongs to retrospective"),
        ("best-of-n", {"captions": 3}, "--captions has no effect on --decoder best-of-n; it belongs to swires"),
        ("stage-beam", {"kind": "majority"}, "There is no option 'kind'"),
        ("retrospective", {"local_atempts": 3}, "no option 'local_atempts' .* Those of retrospective: .*local_attempts"),
        ("beam", {}, "--decoder 'beam' does not exist. Decoders: greedy, sample, "),
        ("sample", {"temperature": 0}, "temperature = 0, expected a number > 0"),
        ("best-of-n", {"temperature": 0}, "search: temperature = 0, expected a number > 0"),
        ("best-of-n", {"beams": 0}, "search: beams = 0, expected an integer >= 1"),
        ("stage-beam", {"rules": "odd"}, "rules = 'odd', expected ours or released"),
        ("self-select", {"fallback": "first"}, "fallback = 'first', expected none or majority"),
        ("self-select", {"prompts": "moon"}, "no prompts for 'moon'"),
        ("self-select", {"prompts": "pocket/loud"}, "prompt_style"),
        *((name, {"threshold": tau}, f"threshold = {tau}, expected a number > 0 and < 1")
          for name in VERIFYING for tau in (0, 1, 1.5, -0.1, float("nan"), True)),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(tagged, decoder, options, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        configure(decoder, tagged, options)


@pytest.mark.parametrize("decoder", VERIFYING)
@pytest.mark.parametrize("sidecar", [None, Sidecar(recipe={"method": "sco"})])
def test_a_model_without_tags_cannot_verify(checkpoint, tmp_path, decoder, sidecar):
    """Without tags `drop` and `stop` would be greedy answers under another name."""
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    if sidecar is not None:
        write_sidecar(tmp_path, sidecar)
    with pytest.raises(UserError, match=f"lacks the verification tokens, which --decoder {decoder} needs"):
        configure(decoder, tmp_path, {})


def test_without_a_sidecar_somebody_must_give_the_threshold(tagged, tmp_path):
    for path in tagged.iterdir():
        if path.name != "vlm_sft_rl.json":
            (tmp_path / path.name).symlink_to(path)
    assert configure("drop", tmp_path, {}, spec={"threshold": 0.25}).threshold == 0.25
    with pytest.raises(UserError, match="Give --threshold"):
        configure("drop", tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{greedy: {candidates: 2}}", "decoding: --candidates has no effect on --decoder greedy"),
        ("{self-refine: {candidates: 2}}", "no effect"),
        ("{stage-beam: {beams: 0}}", "beams = 0"),
        ("[self-refine]", "candidates = .*expected a map"),
        ("{self-select: 3}", "candidates = .*expected a map of a map"),
    ],
)
def test_settings_of_specs_are_checked_when_they_are_read(tmp_path, settings, message):
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("decoding: {", f"decoding: {{candidates: {settings}, "))
    with pytest.raises(UserError, match=message):
        load_spec(path)


def test_settings_of_a_spec_stand_until_they_are_overridden(run):
    text = SPEC.replace(
        "decoding: {", "decoding: {candidates: {self-select: {candidates: 2, temperature: 0.5}}, "
    )
    config = run(text=text, decoder="self-select", limit=1, candidates=5)["config"]
    assert (config["candidates"], config["temperature"], config["fallback"]) == (5, 0.5, "none")


@pytest.mark.parametrize("decoder", ["self-select", "self-refine", "stage-beam", "swires", "opera"])
def test_going_on_gives_what_one_run_gives(run, decoder):
    few = {"swires": {"max_rounds": 1, "captions": 2, "limit": 3}, "self-select": {"candidates": 2}}
    options = {"max_new_tokens": 6} | few.get(decoder, {})
    whole = run("whole", decoder=decoder, batch_size=6, **options)
    run("parts", decoder=decoder, batch_size=1, **options | {"limit": 2})
    parts = run("parts", decoder=decoder, batch_size=3, **options)
    assert parts["answered_now"] == parts["n"] - 2
    assert read_samples(run.folder / "parts") == read_samples(run.folder / "whole")
    assert parts["metrics"] == whole["metrics"]
    assert whole["cost"]["image_encodes_per_answer"] == 1


def test_the_majority_is_chosen_from_the_texts_in_the_file_and_has_a_page(run):
    run(text=YES_NO, decoder="majority", candidates=4, report=True)
    for line in read_samples(run.folder / "out"):
        texts, vote = line["trace"][0]["texts"], line["trace"][-1]
        assert len(texts) == 4 and vote["kind"] == "vote"
        assert line["answer"] == texts[vote["chosen"]].strip()
    assert 'href="traces/1.html"' in (run.folder / "out/report.html").read_text()
    assert "answers read for the vote" in (run.folder / "out/traces/1.html").read_text()


def test_candidates_without_replacement_vote_with_weights_and_go_on(run):
    options = {"text": YES_NO, "decoder": "majority", "candidates": 3, "distinct": True}
    assert run(limit=1, **options)["candidates"][0]["k"] == 1
    summary = run(report=True, **options)
    assert [row["k"] for row in summary["candidates"]] == [1, 2, 3]
    assert summary["candidates"][-1]["texts"] == 3
    assert summary["candidates"][-1]["vote"]["accuracy"] == summary["metrics"]["accuracy"]
    for line in read_samples(run.folder / "out"):
        assert len(set(line["trace"][0]["texts"])) == len(line["trace"][0]["probabilities"]) == 3
    assert "Candidates" in (run.folder / "out/report.html").read_text()


def test_a_changed_setting_is_refused_and_named(run):
    run(decoder="self-select", limit=1)
    with pytest.raises(UserError, match=r"decoding\.candidates: 3 -> 4"):
        run(decoder="self-select", limit=1, candidates=4)
    with pytest.raises(UserError, match=r"decoding\.temperature: 0\.9 -> 0\.5"):
        run(decoder="self-select", limit=1, temperature=0.5)


def test_the_prompts_of_a_data_set_replace_the_specs(run):
    run(decoder="self-refine", limit=1, prompts="pocket")
    assert read_samples(run.folder / "out")[0]["prompt"] == "What is it? Think first."


@pytest.mark.parametrize(
    "options", [{"decoder": "majority"}, {"decoder": "self-select", "fallback": "majority"}]
)
def test_a_vote_needs_a_metric_that_reads_answers(run, options):
    with pytest.raises(UserError, match=r"shapes: a majority vote counts equal answers.*self-select"):
        run(**options)
    assert not (run.folder / "out").exists()


@pytest.mark.parametrize(
    "text, scored",
    [
        ("A cat.", "A cat."),
        ("<think>a dog?</think>\n\nA cat.", "A cat."),
        ("<CAPTION> a dog </CAPTION> <CONCLUSION> a cat </CONCLUSION>", "a cat"),
        ("<think>a dog", ""),
    ],
)
def test_an_answer_is_scored_by_its_conclusion(text, scored):
    """Captions too: what a model thinks aloud is no hallucination of its answer."""

    def generate(model, processor, images, prompts, config, *, ids, batch_size):
        return [Answer(text, text, True, text, text, [], [], Counts()) for _ in prompts]

    decoder = replace(DECODERS["greedy"], generate=generate)
    (answer,) = answer_batch((None, None), decoder, None, [None], ["What?"], ["1"], 1)
    assert (answer["text"], answer["tagged_text"]) == (scored, text)
