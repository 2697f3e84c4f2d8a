"""Every shipped benchmark, from its owners' files to a report, with a tiny random model and a local judge."""

import pytest
from endpoint_server import EndpointServer
from owners_files import BENCHMARKS, FIXTURES, write_benchmark
from worlds import evaluate, write_checkpoint

from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.scoring import predictions, references
from vlm_sft_rl.evaluation.specs import JudgeSettings, load_spec
from vlm_sft_rl.runs import read_samples

REPLY = '{"score": 40, "reason": "?"}\nRating: 4\nCorrect: yes\nCorrectness: 0.4'


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tagged"))


@pytest.fixture(scope="module")
def judge():
    with EndpointServer(lambda body: REPLY) as server:
        yield JudgeSettings(server.url, "judge")


def test_every_shipped_benchmark_has_a_fixture():
    shipped = {path.stem for path in (FIXTURES.parents[2] / "eval").glob("*.yaml")}
    assert {name for name in shipped if not name.startswith("pocket")} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_from_the_owners_files_to_a_report(name, checkpoint, judge, tmp_path):
    spec = load_spec(name)
    data = write_benchmark(name, tmp_path / "data")
    options = {"max_new_tokens": 6, "judge": judge if spec.judge else None, "rounds": 10, "report": True}
    summary = evaluate(spec, checkpoint, tmp_path / "out", data, **options)
    samples = read_samples(tmp_path / "out")
    assert summary["n"] == len(samples) > 0 and summary["units"] <= summary["n"]
    metric = load_metric(spec.metric, spec.metric_options, data)
    assert set(summary["metrics"]) == set(metric.statistics)
    if spec.judge is None:
        # the same numbers through the plain interface of `evaluate`, for the rows as they were read
        own = metric.compute(predictions=predictions(samples, metric), references=references(samples, metric))
        assert own == pytest.approx({name: found["value"] for name, found in summary["metrics"].items()})
    page = (tmp_path / "out/report.html").read_text()
    for row in spec.published:
        assert row.system in page and row.source in page
        # what the metric does not measure would be left out of the tables in silence
        assert {n for v in (row.values, *row.by_category.values()) for n in v} <= set(metric.statistics)
    if any("category" in sample["reference"] for sample in samples):
        assert summary["by_category"] and "By category" in page
    if spec.judge:
        assert summary["judge"]["model"] == "judge" and summary["judge"]["usage"]["prompt_tokens"] > 0
        assert summary["metrics"]["unjudged"]["value"] == 0


@pytest.mark.parametrize("decoder", ["vcd", "dola"])
def test_training_free_baselines_are_a_switch(decoder, checkpoint, tmp_path):
    data = write_benchmark("pope", tmp_path / "data")
    options = {"decoder": decoder, "max_new_tokens": 6, "rounds": 10}
    evaluate("pope", checkpoint, tmp_path / "out", data, limit=2, **options)
    evaluate("pope", checkpoint, tmp_path / "out", data, **options)
    evaluate("pope", checkpoint, tmp_path / "whole", data, batch_size=1, **options)
    parts, whole = ([s["tagged_answer"] for s in read_samples(tmp_path / name)] for name in ("out", "whole"))
    assert parts == whole and len(whole) == 6


def rows_of(name, folder, **change):
    spec = load_spec(name)
    data = write_benchmark(name, folder)
    metric = load_metric(spec.metric, spec.metric_options | change, data)
    return load_questions(spec, data, metric), spec, metric


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("amber_discriminative", ["Yes", "No", "No."], ["No", "Yes", "hm"]),
        ("pope", ["Yes", "No"] * 3, ["No", "Yes"] * 3),
        ("gqa", ["No.", "A woman"], ["Yes", "man"]),
        ("scienceqa", ["B", "C. Cheyenne"], ["A", "A"]),
        ("tabmwp", ["Answer: 1,200 votes", "Answer: B"], ["Answer: 800", "Answer: A"]),
        ("chartqa", ["Answer: 14", "Answer: yes"], ["Answer: 15", "Answer: no"]),
        ("clevr_math", ["Answer: 3", "So the answer is five."], ["Answer: 4", "Answer: 4"]),
        ("geoqa", ["Answer: C"], ["Answer: 40°"]),
        ("m3cot", ["Answer: (B) a rope"], ["Answer: A"]),
        ("mmstar", ["A", "2"], ["B", "A"]),
        ("ai2d", ["B"], ["A"]),
        ("mmmu", ["Answer: $58,410", "Answer: Cubism."], ["Answer: A", "Answer: baroque"]),
        ("mathvista", ["Answer: 1.23", "Answer: 60°"], ["Answer: 1.3", "Answer: A"]),
        ("mmbench_dev", ["A", "B", "C"], ["A", "A", "B"]),
        ("hallusion_bench", ["Yes", "No", "No", "Yes"], ["No", "Yes", "Yes", "No"]),
        ("mme_hall", ["Yes", "No"] * 2, ["No", "Yes"] * 2),
    ],
)
def test_right_and_wrong_answers_are_told_apart(name, right, wrong, tmp_path):
    questions, _, metric = rows_of(name, tmp_path)
    references = [metric.reference_of(row) for row in questions.rows]
    best = {k: i.value for k, i in metric.intervals(metric.counts(right, references), 10).items()}
    worst = {k: i.value for k, i in metric.intervals(metric.counts(wrong, references), 10).items()}
    assert best["accuracy"] == 1 and worst["accuracy"] == 0
    assert [metric.verdict(row) for row in metric.per_sample(right, references)] == ["right"] * len(right)
    if name == "mme_hall":
        # two categories of one picture each: 2 x 200 points
        assert best["hallucination"] == 400 and worst["hallucination"] == 0 and best["accuracy_plus"] == 1


def test_prompts_hold_the_options_and_open_questions_do_not(tmp_path):
    questions, _, _ = rows_of("mmmu", tmp_path)
    closed, open_ = (questions.prompt(row) for row in questions.rows)
    assert "Options:\nA. $63,020\nB. $58,410\nC. $71,320\n" in closed
    assert "Options" not in open_ and "Answer: your answer" in open_
    assert [len(row["images"]) for row in questions.rows] == [2, 1]
    assert [row["category"] for row in questions.rows] == ["Accounting", "Art_Theory"]


def test_braces_in_a_question_are_no_placeholders(tmp_path):
    questions, _, _ = rows_of("mmstar", tmp_path)
    row = questions.rows[0] | {"question": "What does {choices} mean?"}
    assert questions.prompt(row).startswith("What does {choices} mean?\nOptions:\nA. ")


def test_options_that_hold_commas_and_letters_stay_whole(tmp_path):
    questions, _, _ = rows_of("mmstar", tmp_path)
    assert questions.rows[0]["choices"][1] == "The case is under the cat, not on it."
    assert questions.rows[1]["choices"] == ["1", "2"]


def test_shared_pictures_of_a_tsv_are_written_once(tmp_path):
    questions, _, _ = rows_of("mmbench_dev", tmp_path)
    first, rotated, other = questions.rows
    assert first["images"] == rotated["images"] != other["images"]
    assert (first["circle"], rotated["circle"], other["circle"]) == ("241", "241", "242")
    assert other["question"] == "The passage says so.\nWhat follows?" and len(other["choices"]) == 3
    assert len(list((tmp_path / ".pictures").iterdir())) == 2


def test_files_of_one_benchmark_keep_their_questions_apart(tmp_path):
    questions, _, _ = rows_of("pope", tmp_path)
    assert [row["id"] for row in questions.rows[:3]] == ["random-1", "random-2", "popular-1"]
    assert [row["category"] for row in questions.rows[::2]] == ["random", "popular", "adversarial"]


def test_a_missing_second_file_is_named_with_its_source(tmp_path):
    from vlm_sft_rl.errors import UserError

    spec = load_spec("amber_generative")
    data = write_benchmark("amber_generative", tmp_path)
    metric = load_metric(spec.metric, spec.metric_options, data)
    (data / "annotations.json").unlink()
    with pytest.raises(UserError, match=r"annotations\.json: no such file.*junyangwang0410"):
        load_questions(spec, data, metric)
