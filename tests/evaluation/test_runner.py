import json
import shutil

import pytest
from worlds import SPEC, read_rows, write_checkpoint, write_questions, write_world

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.baselines import derive
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.runner import evaluate_spec
from vlm_sft_rl.evaluation.scoring import count_matrix
from vlm_sft_rl.models.sidecar import Sidecar, write_sidecar
from vlm_sft_rl.runs import read_samples


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tagged"))


@pytest.fixture(scope="module")
def plain_checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("plain"), tags=False)


@pytest.fixture
def run(tmp_path, checkpoint):
    spec = write_world(tmp_path)

    def call(output="out", model=checkpoint, **options):
        return evaluate_spec(
            spec,
            model,
            output_dir=tmp_path / output,
            data_dir=tmp_path / "data",
            **({"report": False} | options),
        )

    call.folder = tmp_path
    return call


def comparable(samples):
    return [{key: sample[key] for key in ("id", "tagged_answer", "answer", "ok")} for sample in samples]


def test_a_run_writes_samples_summary_and_report(run, checkpoint):
    summary = run(report=True)
    out = run.folder / "out"
    samples = read_samples(out)
    assert [sample["id"] for sample in samples] == [f"q{i}" for i in range(6)]
    assert samples[0]["prompt"] == "What is it? Be brief."
    assert samples[1]["reference"] == {"objects": ["square"]}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary["metrics"]) == {"chair_i", "chair_s", "coverage", "length"}
    assert summary["n"] == summary["answered_now"] == 6
    assert summary["cost"]["image_encodes_per_answer"] == 1
    assert summary["cost"]["tokens_per_answer"] == sum(s["counts"]["tokens_kept"] for s in samples) / 6
    assert summary["versions"]["torch"] and summary["config"]["max_new_tokens"] == 12
    page = (out / "report.html").read_text()
    assert "As published" in page and "Baseline-1B" in page and "a paper, Table 1" in page


def test_going_on_gives_what_one_run_gives(run):
    whole = run("whole", batch_size=6)
    assert run("parts", limit=2, batch_size=1)["answered_now"] == 2
    parts = run("parts", batch_size=4)
    assert parts["answered_now"] == 4
    assert comparable(read_samples(run.folder / "parts")) == comparable(read_samples(run.folder / "whole"))
    assert parts["metrics"] == whole["metrics"]
    assert run("parts")["answered_now"] == 0
    fewer = run("parts", limit=3)
    assert fewer["n"] == 3 and len(read_samples(run.folder / "parts")) == 6


def test_a_half_written_line_is_answered_again(run):
    run()
    path = run.folder / "out/samples.jsonl"
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    path.write_text("".join(lines[:3]) + lines[3][:40])
    assert run()["answered_now"] == 3
    assert comparable(read_rows(path)) == comparable(map(json.loads, lines))


def test_another_configuration_over_an_old_folder_is_refused(run, checkpoint, tmp_path):
    run(limit=2)
    before = (run.folder / "out/samples.jsonl").read_text()
    with pytest.raises(UserError, match=r"decoding\.max_new_tokens: 12 -> 9.*--output-dir.*--overwrite"):
        run(limit=2, max_new_tokens=9)
    spec = run.folder / "spec.yaml"
    spec.write_text(SPEC.replace("Be brief", "Be long"))
    with pytest.raises(UserError, match=r"spec\.prompt"):
        run(limit=2)
    spec.write_text(SPEC)
    rows = read_rows(run.folder / "data/questions.jsonl")
    write_questions(run.folder, [*rows[:5], rows[5] | {"question": "What else?"}])
    with pytest.raises(UserError, match="questions: "):
        run(limit=2)
    assert (run.folder / "out/samples.jsonl").read_text() == before
    assert run(limit=2, overwrite=True)["answered_now"] == 2


def test_new_weights_in_the_same_folder_are_noticed(run, tmp_path):
    model = write_checkpoint(tmp_path / "model")
    run(model=model, limit=1)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="model_digest"):
        run(model=model, limit=1)


def test_samples_of_unknown_origin_are_refused(run):
    run(limit=1)
    (run.folder / "out/run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json"):
        run(limit=1)


@pytest.mark.parametrize("mode", ["drop", "stop"])
def test_baselines_from_a_greedy_run_equal_their_own_runs(run, mode):
    run("greedy", max_new_tokens=24)
    greedy = read_samples(run.folder / "greedy")
    verdicts = sorted(span["p_unconfident"] for sample in greedy for span in sample["spans"])
    options = {"decoder": mode, "max_new_tokens": 24, "threshold": verdicts[len(verdicts) // 2]}
    alone = run("alone", **options)
    derived = run("derived", **options, greedy_run=run.folder / "greedy")
    assert derived["metrics"] == alone["metrics"] and derived["threshold"] == options["threshold"]
    expected = [derive(sample, mode, options["threshold"]) for sample in greedy]
    assert comparable(read_samples(run.folder / "derived")) == comparable(expected) != comparable(greedy)
    assert comparable(read_samples(run.folder / "alone")) == comparable(expected)


def test_a_greedy_run_must_fit(run):
    run("greedy", limit=3)
    with pytest.raises(UserError, match=r"no answer to 3 questions, first 'q3'"):
        run("derived", decoder="drop", greedy_run=run.folder / "greedy")
    with pytest.raises(UserError, match="needed is greedy with 7"):
        run("other", decoder="drop", max_new_tokens=7, limit=2, greedy_run=run.folder / "greedy")
    with pytest.raises(UserError, match="drop and stop only"):
        run("plain", decoder="greedy", greedy_run=run.folder / "greedy")


def test_sampling_depends_on_the_seed_and_on_nothing_else(run):
    run("a", decoder="sample", batch_size=6)
    run("b", decoder="sample", batch_size=2)
    run("c", decoder="sample", seed=1)
    a, b, c = (comparable(read_samples(run.folder / name)) for name in "abc")
    assert a == b != c


def test_retrospective_takes_its_threshold_in_order(run, checkpoint, tmp_path):
    few = {"local_attempts": 1, "total_attempts": 2}
    of_spec = run("spec", decoder="retrospective", limit=1, retrospective=few)
    assert of_spec["threshold"] == 0.25
    assert of_spec["config"]["retrospective"]["threshold"] == 0.25
    assert of_spec["config"]["retrospective"]["total_attempts"] == 2
    assert (
        run("given", decoder="retrospective", limit=1, threshold=0.6, retrospective=few)["threshold"] == 0.6
    )
    (run.folder / "spec.yaml").write_text(
        SPEC.replace("threshold: {llava: 0.25, default: 0.5}", "threshold: null")
    )
    assert run("own", decoder="retrospective", limit=1, retrospective=few)["threshold"] == 0.4


def test_retrospective_starts_at_the_temperature_given(run):
    few = {"local_attempts": 1, "total_attempts": 2}
    for heat in (None, 0.4):
        summary = run(f"t{heat}", decoder="retrospective", limit=1, temperature=heat, retrospective=few)
        assert summary["config"]["retrospective"]["temperature"] == (heat or 0.0)


def test_settings_without_effect_are_refused(run):
    with pytest.raises(UserError, match="no effect on --decoder greedy"):
        run(retrospective={"local_attempts": 3})
    with pytest.raises(UserError, match="--temperature has no effect"):
        run(temperature=0.5)
    with pytest.raises(UserError, match="--threshold has no effect on --decoder sample"):
        run(decoder="sample", threshold=0.5)
    with pytest.raises(UserError, match="local_atempts"):
        run(decoder="retrospective", retrospective={"local_atempts": 3})
    with pytest.raises(UserError, match="does not exist"):
        run(decoder="beam")


@pytest.mark.parametrize("tau", [0, 1, 1.5, -0.1, float("nan"), True])
@pytest.mark.parametrize("decoder", ["retrospective", "drop", "greedy"])
def test_thresholds_outside_the_open_interval_are_refused(run, tau, decoder):
    with pytest.raises(UserError, match="strictly between 0 and 1"):
        run(decoder=decoder, threshold=tau)
    assert not (run.folder / "out").exists()


@pytest.mark.parametrize("decoder", ["retrospective", "drop", "stop"])
def test_a_model_without_tags_cannot_verify(run, plain_checkpoint, decoder):
    with pytest.raises(UserError, match=f"no verification tokens, which --decoder {decoder} needs"):
        run(model=plain_checkpoint, decoder=decoder)


@pytest.mark.parametrize("decoder", ["retrospective", "drop", "stop"])
def test_a_sidecar_of_another_method_does_not_make_a_verifier(run, plain_checkpoint, tmp_path, decoder):
    """Without tags `drop` and `stop` would be greedy answers under another name."""
    folder = tmp_path / "corrected"
    shutil.copytree(plain_checkpoint, folder)
    write_sidecar(folder, Sidecar(recipe={"method": "sco"}))
    with pytest.raises(UserError, match=f"no verification tokens, which --decoder {decoder} needs"):
        run(model=folder, decoder=decoder)


def test_a_model_without_tags_can_be_evaluated_as_it_is(run, plain_checkpoint):
    summary = run(model=plain_checkpoint, limit=2, report=True)
    assert summary["verifier"] is None and summary["threshold"] is None


def test_a_checkpoint_with_tags_but_without_sidecar(run, tmp_path):
    model = write_checkpoint(tmp_path / "model")
    (model / "vlm_sft_rl.json").unlink()
    assert run("a", model=model, decoder="drop", limit=1)["threshold"] == 0.25
    (run.folder / "spec.yaml").write_text(
        SPEC.replace("threshold: {llava: 0.25, default: 0.5}", "threshold: null")
    )
    with pytest.raises(UserError, match="Give --threshold"):
        run("b", model=model, decoder="drop", limit=1)


def test_missing_things_are_named_with_their_source(run, tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        run(model=tmp_path / "nowhere")
    with pytest.raises(UserError, match="no model folder"):
        run(model=run.folder / "data")
    (run.folder / "data/images/4.png").unlink()
    (run.folder / "data/images/5.png").unlink()
    with pytest.raises(UserError, match=r"2 of 6 images.*images/4\.png' \(line 5\).*draw_shapes\.py"):
        run()
    assert run(limit=3)["n"] == 3
    (run.folder / "data/questions.jsonl").unlink()
    with pytest.raises(UserError, match=r"questions\.jsonl: no such file.*'shapes'.*draw_shapes\.py"):
        run()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"id": "q1"}, r"line 1: .*|line 2: the id 'q1' is already that of line 1"),
        ({"id": ""}, "line 1: 'id' must be text"),
        ({"question": None}, "line 1: 'question' must be text"),
        ({"images": "images/0.png"}, "line 1: 'images' must be a list"),
        ({"images": ["../spec.yaml"]}, "line 1: .*outside"),
        ({"objects": "circle"}, "line 1, field 'objects': expected a list"),
        ({"objects": ["hexagon"]}, "line 1, field 'objects': object 'hexagon'"),
        ({"objects": 3}, "line 1, field 'objects'"),
    ],
)
def test_bad_question_rows_are_named(run, change, message):
    rows = read_rows(run.folder / "data/questions.jsonl")
    write_questions(run.folder, [rows[0] | change, *rows[1:]])
    with pytest.raises(UserError, match=message):
        run()


def test_a_missing_field_is_named(run):
    rows = read_rows(run.folder / "data/questions.jsonl")
    del rows[2]["objects"]
    write_questions(run.folder, rows)
    with pytest.raises(UserError, match="line 3: the field 'objects' is missing"):
        run()


def test_metrics_are_those_of_the_answers_on_disk(run):
    summary = run()
    metric = load_metric("chair", {"vocabulary": ["circle", "square"]})
    counts = count_matrix(read_samples(run.folder / "out"), metric)
    assert summary["metrics"]["length"]["value"] == counts[:, 5].mean()
    assert summary["metrics"] == {k: v.to_json() for k, v in metric.intervals(counts, 100, 0).items()}
