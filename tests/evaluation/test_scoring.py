import math

import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.compare import compare, comparison_table
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.pages import published_tables, summary_table
from vlm_sft_rl.evaluation.plots import run_point, sweep, useful_thresholds
from vlm_sft_rl.evaluation.scoring import cost_summary, score, verifier_summary
from vlm_sft_rl.io import write_json, write_jsonl
from vlm_sft_rl.roc import roc_auc

CHAIR = {"vocabulary": ["dog", "cat", "fish"]}


def sample(name, phrases, objects, **more):
    """`phrases`: (noun, P(</UN>)) pairs."""
    tags = [f"<SPAN> a {noun} {'</UN>' if p > 0.5 else '</CN>'}" for noun, p in phrases]
    answer = f"There is {', '.join('a ' + noun for noun, _ in phrases)}."
    return {
        "id": name,
        "images": [],
        "prompt": "Describe.",
        "answer": answer,
        "tagged_answer": f"There is {', '.join(tags)}.",
        "accepted_answer": answer,
        "best_effort_answer": answer,
        "question": "Describe.",
        "ok": True,
        "spans": [{"text": f"a {noun}", "p_unconfident": p, "accepted": p <= 0.5} for noun, p in phrases],
        "counts": {
            "tokens_forwarded": 30,
            "tokens_kept": 10,
            "forwards": 12,
            "image_encodes": 1,
            "prompt_tokens": 20,
        },
        "trace": [],
        "reference": {"objects": objects} | more,
    }


SAMPLES = [
    sample("1", [("dog", 0.1), ("cat", 0.7)], ["dog"], category="easy"),
    sample("2", [("dog", 0.2), ("fish", 0.3)], ["dog", "fish"], category="easy"),
    sample("3", [("cat", 0.2), ("dog", 0.4)], ["fish", "cat"], category="hard"),
]


def test_score_by_hand():
    metric = load_metric("chair", CHAIR)
    result = score(SAMPLES, metric)
    assert result["n"] == 3 and result["n_not_ok"] == 0
    assert result["metrics"]["chair_i"]["value"] == pytest.approx(2 / 6)
    assert result["metrics"]["coverage"]["value"] == pytest.approx(4 / 5)
    assert result["by_category"]["hard"]["chair_i"] == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 1}
    assert result["cost"] == {
        "tokens_forwarded_per_kept_token": 3.0,
        "forwards_per_answer": 12.0,
        "image_encodes_per_answer": 1.0,
        "tokens_per_answer": 10.0,
    }
    verifier = result["verifier"]
    assert verifier["phrases"] == 6 and verifier["wrong_phrases"] == 2
    assert verifier["auc"]["value"] == roc_auc([0.1, 0.7, 0.2, 0.3, 0.2, 0.4], [0, 1, 0, 0, 0, 1]) == 1.0
    assert verifier["mean_p_unconfident_wrong"] == pytest.approx(0.55)


def test_the_mean_of_categories_stands_beside_the_figure_of_all_questions():
    """POPE's owners average their three categories; ten of 12 questions are of one here."""
    metric = load_metric("yes_no", {"rules": "released"})

    def answered(number, category, right):
        said = {"answer": "Yes." if right else "No.", "spans": []}
        return sample(str(number), [], [], category=category, answer="yes") | said

    samples = [answered(i, "random", i < 9) for i in range(10)]
    samples += [answered(10, "popular", True), answered(11, "adversarial", False)]
    result = score(samples, metric, rounds=50)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(10 / 12)
    mean = result["category_mean"]["accuracy"]
    assert mean["value"] == pytest.approx((0.9 + 1 + 0) / 3) and mean["n"] == 12
    assert 0.5 < mean["low"] <= mean["value"] <= mean["high"] <= 2 / 3
    columns = {"spec": "pope", "model": "m", "decoder": "greedy", "threshold": None, "seed": 0}
    table = summary_table({**columns, **result, "config": {"level": 0.95, "rounds": 50}})
    assert table.columns[1:] == ["value [interval]", "mean of 3 categories"]
    assert table.cells[1][2].text.startswith("0.633 [")
    assert "category_mean" not in score(SAMPLES, load_metric("chair", CHAIR))


def test_verifier_without_phrases_or_without_errors():
    metric = load_metric("chair", CHAIR)
    assert verifier_summary([dict(SAMPLES[0], spans=[])], metric) is None
    only_right = verifier_summary([SAMPLES[1]], metric)
    assert only_right["auc"] is None and only_right["mean_p_unconfident_wrong"] is None


def test_cost_of_answers_without_tokens():
    empty = dict(SAMPLES[0], counts=dict.fromkeys(SAMPLES[0]["counts"], 0))
    assert cost_summary([empty])["tokens_forwarded_per_kept_token"] == 0


def test_a_sample_without_truth_is_named():
    with pytest.raises(UserError, match="sample '1': its reference has no 'answer'"):
        score(SAMPLES, load_metric("yes_no", {}))


def test_sweep_ends_at_the_greedy_answer_and_falls_with_tau():
    metric = load_metric("chair", CHAIR)
    assert useful_thresholds(SAMPLES) == [0.1, 0.2, 0.3, 0.4, 0.7]
    assert useful_thresholds(SAMPLES, 3) == [0.1, 0.3, 0.7]
    for mode in ("drop", "stop"):
        points = sweep(SAMPLES, metric, mode, [0.05, 0.25, 0.5, 0.9])
        assert [point.threshold for point in points] == [0.05, 0.25, 0.5, 0.9]
        coverage = [point.metrics["coverage"].value for point in points]
        assert coverage == sorted(coverage) and coverage[0] == 0
        assert points[-1].metrics["chair_i"].value == pytest.approx(2 / 6)
    dropped = sweep(SAMPLES, metric, "drop", [0.35])[0].metrics
    assert dropped["chair_i"].value == 0 and dropped["coverage"].value == pytest.approx(4 / 5)


def write_run(folder, samples, spec_change=None, questions="same"):
    spec = {"name": "s", "description": "d", "questions": "q", "metric": "chair", "metric_options": CHAIR}
    manifest = {"spec": spec | (spec_change or {}), "questions": questions, "model": "m", "model_digest": "d"}
    decoding = {"decoder": "greedy", "seed": 0, "max_new_tokens": 9}
    write_json(folder / "run.json", manifest | {"decoding": decoding})
    write_jsonl(folder / "samples.jsonl", samples)
    return folder


def test_compare_pairs_shared_questions(tmp_path):
    better = [sample(str(i), [("dog", 0.1)], ["dog"]) for i in range(1, 30)]
    worse = [sample(str(i), [("dog", 0.1), ("cat", 0.2)][: 1 + i % 2], ["dog"]) for i in range(2, 35)]
    result = compare(write_run(tmp_path / "a", better), write_run(tmp_path / "b", worse))
    assert result["n"] == 28
    chair = result["metrics"]["chair_i"]
    assert chair["new"] == 0 and chair["old"] == pytest.approx(14 / 42)
    assert chair["difference"]["value"] == pytest.approx(-14 / 42) and chair["excludes_zero"]
    assert not result["metrics"]["coverage"]["excludes_zero"]
    assert len(comparison_table(result).rows) == 6
    backwards = compare(tmp_path / "b", tmp_path / "a")["metrics"]["chair_i"]["difference"]
    assert backwards["low"] == pytest.approx(-chair["difference"]["high"])


@pytest.mark.parametrize(
    "change, questions, message",
    [
        ({"name": "t"}, "same", "only runs of one spec"),
        ({"metric_options": {"vocabulary": ["dog"]}}, "same", r"changed between them \(metric_options\)"),
        ({}, "other", "the question file of 's' changed"),
    ],
)
def test_compare_refuses_different_benchmarks(tmp_path, change, questions, message):
    write_run(tmp_path / "a", SAMPLES)
    write_run(tmp_path / "b", SAMPLES, change, questions)
    with pytest.raises(UserError, match=message):
        compare(tmp_path / "a", tmp_path / "b")


def test_compare_refuses_strangers(tmp_path):
    write_run(tmp_path / "a", SAMPLES[:1])
    write_run(tmp_path / "b", SAMPLES[1:])
    with pytest.raises(UserError, match="no question was answered by both"):
        compare(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match=r"no run\.json"):
        compare(tmp_path / "a", tmp_path)


def test_summary_table_prints_published_values_and_brackets(tmp_path):
    from rich.console import Console

    published = [{"system": "B [7B]", "source": "paper", "values": {"chair_i": 0.2, "f1": 1}}]
    result = score(SAMPLES, load_metric("chair", CHAIR))
    summary = {
        "spec": "s",
        "model": "m[x]",
        "decoder": "drop",
        "threshold": 0.3,
        "published": published,
        "seed": 0,
    }
    console = Console(width=120, record=True, file=open(tmp_path / "out", "w"))  # noqa: SIM115
    summary |= result | {"config": {"rounds": 100, "level": 0.95}}
    for table in (summary_table(summary, {"chair_i"}), *published_tables(summary)):
        console.print(table.terminal())
    assert published_tables(summary | {"published": []}) == []
    text = console.export_text()
    assert "value [interval]" in text and "B [7B]" in text and "m[x]" in text and "0.2" in text
    assert "chair_i (lower is better)" in text and not math.isnan(result["metrics"]["chair_i"]["value"])


def test_run_point_reads_a_summary(tmp_path):
    result = score(SAMPLES, load_metric("chair", CHAIR))
    facts = {"spec": "s", "description": "d", "decoder": "drop", "threshold": 0.3, "seed": 0}
    write_json(tmp_path / "summary.json", result | facts | {"config": {"level": 0.95, "rounds": 9}})
    point = run_point(tmp_path)
    assert point.threshold == 0.3 and point.metrics["chair_i"].value == result["metrics"]["chair_i"]["value"]
