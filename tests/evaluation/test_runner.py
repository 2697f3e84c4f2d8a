"""One run from spec to report: going on after a kill, refusing another configuration, bad files."""

import json

import pytest
from json_lines import read_lines
from worlds import SPEC, evaluate, write_checkpoint, write_questions, write_world

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.evaluation.revisions import derive
from vlm_sft_rl.evaluation.scoring import count_matrix
from vlm_sft_rl.runs import answer_files


@pytest.fixture
def run(tmp_path, tagged):
    spec = write_world(tmp_path)

    def call(output="out", model=tagged, **options):
        return evaluate(spec, model, tmp_path / output, tmp_path / "data", **options)

    call.folder = tmp_path
    call.samples = lambda output="out": comparable(read_samples(tmp_path / output))
    return call


def comparable(samples):
    return [{key: sample[key] for key in ("id", "tagged_answer", "answer", "ok")} for sample in samples]


def test_a_run_writes_samples_summary_and_report(run):
    summary = run(report=True)
    out = run.folder / "out"
    samples = read_samples(out)
    assert [sample["id"] for sample in samples] == [f"q{i}" for i in range(6)]
    assert samples[0]["prompt"] == "What is it? Be brief."
    assert samples[1]["reference"] == {"objects": ["square"]}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert set(summary["metrics"]) == {
        "chair_i",
        "chair_s",
        "coverage",
        "length",
        "chair_i_distinct",
        "repeats",
    }
    assert summary["n"] == summary["answered_now"] == 6
    assert summary["cost"]["image_encodes_per_answer"] == 1
    assert summary["cost"]["tokens_per_answer"] == sum(s["counts"]["tokens_kept"] for s in samples) / 6
    assert summary["versions"]["torch"] and summary["config"]["max_new_tokens"] == 12
    page = (out / "report.html").read_text()
    assert "As published" in page and "Baseline-1B" in page and "a paper, Table 1" in page
    metric = load_metric("chair", {"vocabulary": ["circle", "square"]})
    counts = count_matrix(samples, metric)
    assert summary["metrics"]["length"]["value"] == counts[:, 5].mean()
    assert summary["metrics"] == {k: v.to_json() for k, v in metric.intervals(counts, 100, 0).items()}


def test_going_on_gives_what_one_run_gives(run):
    whole = run("whole", batch_size=6)
    assert run("parts", limit=2, batch_size=1)["answered_now"] == 2
    parts = run("parts", batch_size=4)
    assert parts["answered_now"] == 4
    assert run.samples("parts") == run.samples("whole")
    assert parts["metrics"] == whole["metrics"]
    assert run("parts")["answered_now"] == 0
    assert run("parts", limit=3)["n"] == 3 and len(run.samples("parts")) == 6


def test_a_half_written_line_is_answered_again(run):
    run()
    path = run.folder / "out/samples.jsonl"
    before, lines = run.samples(), path.read_text().splitlines(keepends=True)
    assert answer_files(path.parent) == answer_files(path) == [path]
    path.write_text("".join(lines[:3]) + lines[3][:40])
    path.with_name("summary.json").unlink()
    for source in (path, path.parent):
        with pytest.raises(UserError, match=r"answers are not finished.*eval run"):
            answer_files(source)
    assert run()["answered_now"] == 3
    assert run.samples() == before


def test_another_configuration_over_an_old_folder_is_refused(run):
    run(limit=2)
    before = (run.folder / "out/samples.jsonl").read_text()
    with pytest.raises(UserError, match=r"decoding\.max_new_tokens: 12 -> 9.*--output-dir.*--overwrite"):
        run(limit=2, max_new_tokens=9)
    spec = run.folder / "spec.yaml"
    spec.write_text(SPEC.replace("Be brief", "Be long"))
    with pytest.raises(UserError, match=r"spec\.prompt"):
        run(limit=2)
    spec.write_text(SPEC)
    rows = read_lines(run.folder / "data/questions.jsonl")
    write_questions(run.folder, [*rows[:5], rows[5] | {"question": "What else?"}])
    with pytest.raises(UserError, match="questions: "):
        run(limit=2)
    assert (run.folder / "out/samples.jsonl").read_text() == before
    assert run(limit=2, overwrite=True)["answered_now"] == 2
    (run.folder / "out/run.json").unlink()
    with pytest.raises(UserError, match=r"no run\.json"):
        run(limit=2)


def test_new_weights_in_the_same_folder_are_noticed(run, tmp_path):
    model = write_checkpoint(tmp_path / "model")
    run(model=model, limit=1)
    weights = model / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="model_digest"):
        run(model=model, limit=1)


@pytest.mark.parametrize("mode", ["drop", "stop"])
def test_baselines_from_a_greedy_run_equal_their_own_runs(run, mode):
    run("greedy", max_new_tokens=24)
    greedy = read_samples(run.folder / "greedy")
    verdicts = sorted(span["p_unconfident"] for sample in greedy for span in sample["spans"])
    options = {"decoder": mode, "max_new_tokens": 24, "threshold": verdicts[len(verdicts) // 2]}
    alone = run("alone", **options)
    derived = run("derived", **options, greedy_run=run.folder / "greedy")
    assert derived["metrics"] == alone["metrics"] and derived["threshold"] == options["threshold"]
    expected = comparable(derive(sample, mode, options["threshold"]) for sample in greedy)
    assert run.samples("derived") == run.samples("alone") == expected != comparable(greedy)


def test_a_greedy_run_must_fit(run):
    run("greedy", limit=3)
    for options, message in (
        ({"decoder": "drop"}, r"no answer to 3 questions, first 'q3'"),
        ({"decoder": "drop", "max_new_tokens": 7, "limit": 2}, "needed is greedy with 7"),
        ({"decoder": "greedy"}, "drop and stop only"),
    ):
        with pytest.raises(UserError, match=message):
            run("other", greedy_run=run.folder / "greedy", overwrite=True, **options)


def test_sampling_depends_on_the_seed_and_on_nothing_else(run):
    run("a", decoder="sample", batch_size=6)
    run("b", decoder="sample", batch_size=2)
    run("c", decoder="sample", seed=1)
    assert run.samples("a") == run.samples("b") != run.samples("c")


def test_a_verifier_is_run_at_the_threshold_and_temperature_that_are_recorded(run):
    few = {"decoder": "retrospective", "limit": 1, "local_attempts": 1, "total_attempts": 2}
    summary = run("spec", **few)
    config = summary["config"]
    assert summary["threshold"] == config["threshold"] == 0.25 and config["total_attempts"] == 2
    assert config["temperature"] == 0
    hot = run("hot", threshold=0.6, temperature=0.4, **few)
    assert hot["threshold"] == 0.6 and hot["config"]["temperature"] == 0.4


def test_a_model_without_tags_can_be_evaluated_as_it_is(run, tmp_path):
    plain = write_checkpoint(tmp_path / "plain", tags=False)
    summary = run(model=plain, limit=2, report=True)
    assert summary["verifier"] is None and summary["threshold"] is None


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
        ({"id": ""}, "jsonl:1: field `id`: expected text"),
        ({"question": None}, "jsonl:1: no field `question`"),
        ({"images": 3}, "jsonl:1: field `images`: expected a path"),
        ({"image": "x.png"}, "jsonl:1: fields `image` and `images` disagree"),
        ({"images": [], "imgs": ["images/0.png"]}, "jsonl:1: field `imgs` looks like a picture"),
        ({"images": ["../spec.yaml"]}, "line 1: .*outside"),
        ({"objects": "circle"}, "line 1, field 'objects': expected a list"),
        ({"objects": ["hexagon"]}, "line 1, field 'objects': object 'hexagon'"),
        ({"objects": 3}, "line 1, field 'objects'"),
        ("objects", "jsonl:1: a question without `answer` or any other truth"),
    ],
)
def test_bad_question_rows_are_named(run, change, message):
    first, *others = read_lines(run.folder / "data/questions.jsonl")
    if isinstance(change, str):
        del first[change]
    else:
        first |= change
    write_questions(run.folder, [first, *others])
    with pytest.raises(UserError, match=message):
        run()
