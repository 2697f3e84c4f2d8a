import json

import pytest
import staged_world
import torch
import worlds
from safetensors.torch import save_file

from vlm_sft_rl.correction.config import StudyConfig
from vlm_sft_rl.correction.cost import parameter_count, parse_system, training_cost
from vlm_sft_rl.correction.error_types import GIVEN, TYPES, error_figures, error_type, false_sums, gold_prefix
from vlm_sft_rl.correction.study import (
    cost_of_points,
    error_types,
    stopping_table,
    turns_and_stops,
    where_it_declines,
)
from vlm_sft_rl.data.stages import STAGES, parse
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.turns import TurnGrades
from vlm_sft_rl.io import write_json

R, W, F = "right", "wrong", "unreadable"


def statuses(*values):
    return dict(zip(GIVEN, values, strict=True))


@pytest.mark.parametrize(
    ("given", "caption_text", "expected"),
    [
        ((R, R, R, R), "", "right"),
        ((F, R, R, R), "", "unreadable"),
        ((W, R, R, R), "", "plan"),
        ((W, W, R, R), "", "perception"),
        ((W, W, W, R), "2 plus 2 equals 5.", "arithmetic"),
        ((W, W, W, R), "2 plus 2 equals 4.", "reasoning"),
        ((W, W, W, W), "2 plus 2 equals 5.", "conclusion"),
    ],
)
def test_the_first_true_stage_that_helps_names_the_error(given, caption_text, expected):
    texts = dict.fromkeys(GIVEN, "") | {"CAPTION": caption_text}
    assert error_type(statuses(*given), texts) == expected


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("2 plus 3 equals 5. 4 minus 1 equals 2.", ["4 minus 1 equals 2"]),
        ("0.1 + 0.2 = 0.3", []),
        ("6 / 4 = 1.5, 6 ÷ 4 = 2", ["6 ÷ 4 = 2"]),
        ("1 / 0 = 0", ["1 / 0 = 0"]),
        ("room 3 is 4 metres", []),
    ],
)
def test_false_sums(text, wrong):
    assert false_sums(text) == wrong


def test_prefixes_are_the_true_answer_up_to_a_stage():
    whole = staged_world.staged(3)
    assert gold_prefix(whole, "nothing") == ""
    for given in GIVEN[1:]:
        prefix = gold_prefix(whole, given)
        assert whole.startswith(prefix) and prefix.endswith(f"</{given}>")
    assert parse(whole).conclusion == "3" and STAGES[-1] not in GIVEN


def test_shares_of_errors():
    found = [{"type": t, "statuses": statuses(R if t == "right" else W, W, R, R)} for t in TYPES]
    figures = error_figures(found, rounds=20)
    assert {t: figures["types"][t]["value"] for t in TYPES} == pytest.approx(
        dict.fromkeys(TYPES, 1 / len(TYPES))
    )
    assert figures["given"]["CAPTION"]["value"] == 1 and figures["given"]["nothing"][
        "value"
    ] == pytest.approx(1 / 7)


def test_stopping_rules():
    grades = [
        TurnGrades((W, R, W), ("1", "2", "3")),  # the oracle would stop at 1
        TurnGrades((R, R, W), ("2", "2", "9")),  # self-stopped after one repeat
        TurnGrades((F, W, W), (None, "4", "4")),
    ]
    table = {
        (r["turns"], r["rule"]): (round(3 * r["accuracy"]), round(3 * r["corrections"]))
        for r in stopping_table(grades, 2)
    }
    assert table[0, "always"] == (1, 0) and table[0, "oracle"] == (1, 0)
    assert table[1, "always"] == (2, 3)
    assert table[2, "always"] == (0, 6)
    assert table[2, "self-stopped"] == (1, 5)
    assert table[2, "oracle"] == (2, 3)


def test_sizes_and_costs_are_read_from_files(tmp_path):
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, str(tmp_path / "model.safetensors"))
    assert parameter_count(tmp_path) == 22
    history = [{"num_tokens": 100}, {"num_tokens": 250}, {"train_runtime": 4.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert training_cost(tmp_path) == {"tokens": 250, "flops": 6 * 22 * 250, "seconds": 4.0}
    for extra, tokens, flops in (
        ({"tokens_forwarded": 500, "tokens_trained": 250}, 750, 2 * 500 + 6 * 250),  # as our RL trainers log
        ({"completions/mean_length": 9.0}, 500, (2 + 6) * 250),  # as TRL's log, which count what was sampled
    ):
        history[1] = {"num_tokens": 250, **extra}
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        assert training_cost(tmp_path) == {"tokens": tokens, "flops": 22 * flops, "seconds": 4.0}
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history[2:]}))
    assert training_cost(tmp_path) == {"tokens": None, "flops": None, "seconds": 4.0}
    assert parse_system("a=b@c,d").trained == (tmp_path.__class__("c"), tmp_path.__class__("d"))
    for wrong in ("a", "=b", "a="):
        with pytest.raises(UserError):
            parse_system(wrong)
    with pytest.raises(UserError, match="trainer_state"):
        training_cost(tmp_path / "none")


def test_building_rows_costs_what_was_sampled(tmp_path):
    for name, size in (("policy", 10), ("teacher", 30)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.zeros(size)}, str(tmp_path / name / "model.safetensors"))
    built = tmp_path / "built"
    built.mkdir()
    (built / "rows.jsonl").write_text("")
    asked = {"answers": 2, "prompt_tokens": 5, "completion_tokens": 7}
    summary = {
        "config": {"model": str(tmp_path / "policy"), "teacher": "gold"},
        "cost": {"attempts": asked, "teacher": {}},
        "seconds": 3.0,
    }
    for teacher, counts, expected in (
        ("gold", {}, {"tokens": 12, "flops": 2 * 10 * 12, "seconds": 3.0}),
        (str(tmp_path / "teacher"), asked, {"tokens": 24, "flops": 2 * (10 + 30) * 12, "seconds": 3.0}),
    ):
        summary["config"]["teacher"], summary["cost"]["teacher"] = teacher, counts
        (built / "summary.json").write_text(json.dumps(summary))
        assert training_cost(built) == expected
    summary["config"]["teacher"] = "http://host/v1"
    (built / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match="FLOPs are unknown"):
        training_cost(built)


SPEC = """
name: cats
description: cats in drawn pictures
questions: questions.jsonl
metric: answer_accuracy
metric_options: {grader: pocket}
decoding: {max_new_tokens: 5}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cats")
    staged_world.write_questions(folder / "data")
    staged_world.write_checkpoint(folder / "model")
    (folder / "spec.yaml").write_text(SPEC)
    return folder


def run(world, decoder, name, **options):
    return worlds.evaluate(
        world / "spec.yaml",
        world / "model",
        world / name,
        world / "data",
        decoder=decoder,
        report=True,
        **options,
    )


def test_any_benchmark_with_corrections(world):
    summary = run(world, "correct", "correct", corrections=2, correction_prompt="Check.")
    assert summary["config"]["corrections"] == 2
    assert [t["turn"] for t in summary["corrections"]["turns"]] == [1, 2, 3]
    assert sum(g["n"] for g in summary["corrections"]["by_category"].values()) == 6
    plain = run(world, "greedy", "greedy")
    first = summary["corrections"]["turns"][0]["metrics"]
    assert first == plain["metrics"]  # the first turn is the greedy answer
    assert (world / "correct/report.html").is_file()
    with pytest.raises(UserError, match="no effect"):
        run(world, "greedy", "other", corrections=2)
    with pytest.raises(UserError, match="no option 'turns'"):
        run(world, "correct", "other", turns=2)


def test_captions_can_be_corrected_too(tmp_path):
    spec = worlds.write_world(tmp_path)
    model = worlds.write_checkpoint(tmp_path / "model", tags=False)
    summary = worlds.evaluate(spec, model, tmp_path / "out", tmp_path / "data", decoder="correct", limit=3)
    assert "flips" not in summary["corrections"] and len(summary["corrections"]["turns"]) == 2
    found = where_it_declines([tmp_path / "out"], tmp_path / "report")
    assert list(found["tasks"]) == ["shapes"]


def test_a_folder_of_another_kind_is_refused(tmp_path):
    write_json(tmp_path / "run.json", {"decoding": {}})
    with pytest.raises(UserError, match=r"run\.json: the field `spec` is missing"):
        where_it_declines([tmp_path], tmp_path / "out")


def test_the_reports(world):
    run(world, "correct", "correct", corrections=2, correction_prompt="Check.")
    run(world, "greedy", "greedy")
    found = where_it_declines([world / "correct"], world / "declines")
    assert found["tasks"]["cats"]["flips"][0]["n"] == 6
    with pytest.raises(UserError, match="greedy"):
        where_it_declines([world / "greedy"], world / "declines")
    config = StudyConfig(max_new_tokens=5)
    errors = error_types(world / "model", world / "data/questions.jsonl", world / "errors", config)
    assert errors["n"] == 6 and errors["types"]["unreadable"]["value"] == 1
    settings = {"correction_prompt": "Check."}
    turns = turns_and_stops(
        world / "model", world / "data/questions.jsonl", world / "turns", config, most=1, settings=settings
    )
    assert len(turns["stops"]) == 6 and turns["n"] == 6
    systems = [parse_system(f"base={world / 'greedy'}"), parse_system(f"corrected={world / 'correct'}")]
    rows = cost_of_points(systems, world / "cost")["rows"]
    assert rows[0]["gain"]["value"] == 0 and rows[0]["training_per_point"] is None
    assert rows[1]["tokens_per_answer"] > rows[0]["tokens_per_answer"]
    assert rows[1]["flops_per_answer"] == 2 * parameter_count(world / "model") * rows[1]["tokens_per_answer"]
    for name in ("declines", "errors", "turns", "cost"):
        assert "</html>" in (world / name / "report.html").read_text()
