"""Every shipped benchmark, from its owners' files to a report, with a tiny random model and a local judge."""

import pytest
from endpoint_server import EndpointServer
from owners_files import BENCHMARKS, FIXTURES, write_benchmark
from worlds import evaluate

from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.evaluation.scoring import predictions, references
from vlm_sft_rl.evaluation.specs import JudgeSettings, load_spec

REPLY = '{"score": 40, "reason": "?"}\nRating: 4\nCorrect: yes\nCorrectness: 0.4\n["dog"]'


@pytest.fixture(scope="module")
def judge():
    with EndpointServer(lambda body: REPLY) as server:
        yield JudgeSettings(server.url, "judge")


def test_every_shipped_benchmark_has_a_fixture():
    shipped = {path.stem for path in (FIXTURES.parents[2] / "eval").glob("*.yaml")}
    assert {name for name in shipped if not name.startswith("pocket")} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_from_the_owners_files_to_a_report(name, tagged, judge, tmp_path):
    spec = load_spec(name)
    data = write_benchmark(name, tmp_path / "data")
    options = {"max_new_tokens": 6, "judge": judge if spec.judge else None, "rounds": 10, "report": True}
    summary = evaluate(spec, tagged, tmp_path / "out", data, **options)
    samples = read_samples(tmp_path / "out")
    assert summary["n"] == len(samples) > 0 and summary["units"] <= summary["n"]
    metric = load_metric(spec.metric, spec.metric_options, data)
    assert set(summary["metrics"]) == set(metric.statistics)
    if spec.judge is None:
        # the same numbers through the plain interface of `evaluate`, for the rows as they were read
        plain = metric.compute(
            predictions=predictions(samples, metric), references=references(samples, metric)
        )
        assert plain == pytest.approx({name: i["value"] for name, i in summary["metrics"].items()})
    page = (tmp_path / "out/report.html").read_text()
    for row in spec.published:
        assert row.system in page and row.source in page
        # what the metric does not measure would be left out of the tables in silence
        assert {n for v in (row.values, *row.by_category.values()) for n in v} <= set(metric.statistics)
    if any("category" in sample["reference"] for sample in samples):
        assert summary["by_category"] and "By category" in page
    if spec.judge:
        asked = any(metric.asks_judge(sample["answer"]) for sample in samples)
        assert summary["judge"]["model"] == "judge"
        assert (summary["judge"]["usage"]["prompt_tokens"] > 0) == asked
        assert summary["metrics"]["unjudged"]["value"] == 0


@pytest.mark.parametrize("decoder", ["vcd", "dola"])
def test_training_free_baselines_are_a_switch(decoder, tagged, tmp_path):
    data = write_benchmark("pope", tmp_path / "data")
    options = {"decoder": decoder, "max_new_tokens": 6, "rounds": 10}
    evaluate("pope", tagged, tmp_path / "out", data, limit=2, **options)
    evaluate("pope", tagged, tmp_path / "out", data, **options)
    evaluate("pope", tagged, tmp_path / "whole", data, batch_size=1, **options)
    parts, whole = ([s["tagged_answer"] for s in read_samples(tmp_path / name)] for name in ("out", "whole"))
    assert parts == whole and len(whole) == 6
