import json
import re

import pytest
import staged_world
from endpoint_server import EndpointServer
from json_lines import read_lines, write_lines
from rich.console import Console

from vlm_sft_rl.correction.builder import build_corrections
from vlm_sft_rl.correction.config import BuildConfig
from vlm_sft_rl.data.corrections import is_correction_row
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.errors import UserError

QUIET = Console(quiet=True)


def build(folder, questions, config):
    return build_corrections(questions, folder, config, image_root=questions.parent, console=QUIET)


def repair(model, **changes):
    settings = {
        "model": str(model),
        "grader": "pocket",
        "samples": 2,
        "max_new_tokens": 5,
        "wrong_share": 1.0,
    }
    return BuildConfig(**{**settings, **changes})


def test_own_attempts_are_repaired_by_the_truth_and_a_second_run_asks_nothing(tmp_path):
    questions, model = (
        staged_world.write_questions(tmp_path / "data"),
        staged_world.write_checkpoint(tmp_path / "m"),
    )
    summary = build(tmp_path / "out", questions, repair(model))
    # a random model states nothing that can be read
    assert summary["counts"]["attempts unreadable"] == 12 and summary["counts"]["rows"] == 6
    assert summary["cost"]["attempts"]["completion_tokens"] > 0
    rows = list(read_rows(tmp_path / "out/rows.jsonl"))
    assert all(is_correction_row(row) for row in rows)
    for row in rows:
        number = row["id"][1]
        assert (
            row["messages"][3]["content"] == staged_world.staged(number) and row["messages"][1]["weight"] == 0
        )
    before = (tmp_path / "out/rows.jsonl").read_bytes()
    # a run that was killed: the last attempts are missing, one line is cut in half
    store = tmp_path / "out/attempts/samples.jsonl"
    kept = store.read_text().splitlines(keepends=True)
    store.write_text("".join(kept[:7]) + kept[7][:20])
    (tmp_path / "out/rows.jsonl").unlink()
    assert build(tmp_path / "out", questions, repair(model))["counts"] == summary["counts"]
    assert (tmp_path / "out/rows.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="another configuration"):
        build(tmp_path / "out", questions, repair(model, temperature=0.3))


def test_a_model_that_is_never_right_cannot_be_mixed(tmp_path):
    questions, model = (
        staged_world.write_questions(tmp_path / "data", 2),
        staged_world.write_checkpoint(tmp_path / "m"),
    )
    with pytest.raises(UserError, match="no right attempt"):
        build(tmp_path / "out", questions, repair(model, wrong_share=0.5))


def number_in(body):
    text = body["messages"][0]["content"][-1]["text"]
    return int(re.search(r"How many cats, (\d)\?", text)[1]), text


def test_an_endpoint_refines_and_what_is_wrong_is_counted(tmp_path):
    questions = staged_world.write_questions(tmp_path / "data")

    def teacher(body):
        number, text = number_in(body)
        assert "whose conclusion is right" in text and staged_world.staged(number) in text
        return {
            0: staged_world.staged(0).replace("I count.", "I look, then count."),
            1: staged_world.staged(2),  # another conclusion
            2: "It is 2.",  # not staged
        }.get(number, staged_world.staged(number).replace("cats", "grey cats"))

    with EndpointServer(teacher) as server:
        config = BuildConfig(
            mode="refine", teacher=server.url, teacher_model="big", grader="pocket", tries=1, input_price=1.0
        )
        summary = build(tmp_path / "out", questions, config)
        calls = server.calls
        again = build(tmp_path / "out", questions, config)
        assert server.calls == calls and again["counts"] == summary["counts"]
        # what was paid before was paid for these rows
        assert again["cost"]["teacher"] == summary["cost"]["teacher"]
    assert summary["counts"]["rows"] == 4
    assert summary["rejected"] == {"another conclusion": 1, "not staged": 1}
    assert {r["id"] for r in read_lines(tmp_path / "out/rejects.jsonl")} == {"q1", "q2"}
    assert summary["cost"]["teacher"]["answered"] == 6
    rows = list(read_rows(tmp_path / "out/rows.jsonl"))
    assert "grey" not in rows[1]["messages"][1]["content"] and "grey" in rows[1]["messages"][3]["content"]
    assert [m["weight"] for m in rows[0]["messages"][1::2]] == [1, 1]


def test_an_endpoint_repairs_wrong_attempts_with_several_tries(tmp_path):
    questions, model = (
        staged_world.write_questions(tmp_path / "data", 3),
        staged_world.write_checkpoint(tmp_path / "m"),
    )

    def teacher(body):
        number, text = number_in(body)
        assert f"The right answer is: {number}" in text
        good, bad = staged_world.staged(number), staged_world.staged(number + 1)
        return [bad, good] if number < 2 else [bad, bad]

    with EndpointServer(teacher) as server:
        config = repair(model, teacher=server.url, teacher_model="big", tries=2)
        summary = build(tmp_path / "out", questions, config)
    assert summary["counts"]["rows"] == 2 and summary["rejected"] == {"conclusion wrong": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "polish"}, "repair, refine"),
        ({"mode": "repair"}, "--model"),
        ({"mode": "refine", "keep": "all"}, "--keep"),
        ({"mode": "refine", "teacher": "own"}, "own"),
        ({"mode": "refine", "teacher": "http://x/v1"}, "--teacher-model"),
        ({"mode": "refine", "ask": "What?"}, "question"),
        ({"mode": "refine", "tries": 0}, "tries = 0, expected an integer >= 1"),
        ({"mode": "refine", "wrong_share": 1.5}, "wrong_share = 1.5, expected a number >= 0 and <= 1"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(UserError, match=message):
        BuildConfig(**changes)


def test_refining_needs_staged_answers(tmp_path):
    questions = staged_world.write_questions(tmp_path / "data", 2)
    rows = [{k: v for k, v in row.items() if k != "staged"} for row in read_lines(questions)]
    write_lines(questions, rows)
    with pytest.raises(UserError, match="no staged answer in the field"):
        build(tmp_path / "out", questions, BuildConfig(mode="refine", grader="pocket"))


def test_conversations_are_refined_pair_by_pair(tmp_path):
    turns = [
        {"from": "human", "value": "<image>\nHow many cats, 1?"},
        {"from": "gpt", "value": staged_world.staged(1)},
        {"from": "human", "value": "And dogs?"},
        {"from": "gpt", "value": "None."},
        {"from": "human", "value": "How many cats, 3?"},
        {"from": "gpt", "value": staged_world.staged(3)},
    ]
    staged_world.write_questions(tmp_path / "data", 1)
    source = tmp_path / "data/cot.jsonl"
    source.write_text(json.dumps({"id": "sqa/1", "image": "0.png", "conversations": turns}) + "\n")
    summary = build(tmp_path / "out", source, BuildConfig(mode="refine"))
    assert summary["counts"] == {
        "pairs without a conclusion": 1,
        "questions": 2,
        "rows": 2,
        "rows repairing": 0,
    }
    rows = list(read_rows(tmp_path / "out/rows.jsonl"))
    assert [row["messages"][0]["content"] for row in rows] == ["How many cats, 1?", "How many cats, 3?"]
    source.write_text(json.dumps({"id": "x", "image": "0.png", "conversations": turns[2:4]}) + "\n")
    with pytest.raises(UserError, match="CONCLUSION"):
        build(tmp_path / "other", source, BuildConfig(mode="refine"))


def test_a_teacher_is_told_the_choices(tmp_path):
    questions = tmp_path / "questions.jsonl"
    row = {
        "id": "a",
        "question": "Which?",
        "choices": ["cat", "dog"],
        "answer": "A",
        "staged": staged_world.staged(1),
    }
    questions.write_text(json.dumps(row))
    prompts = []

    def teacher(body):
        prompts.append(json.dumps(body["messages"]))
        return staged_world.staged(1).replace("cats", "grey cats")

    with EndpointServer(teacher) as server:
        config = BuildConfig(mode="refine", teacher=server.url, teacher_model="big", grader="choice", tries=1)
        build(tmp_path / "out", questions, config)
    assert prompts and all("Which? Options: (A) cat (B) dog" in prompt for prompt in prompts)
    assert "Options: (A) cat (B) dog" in read_lines(tmp_path / "out/rows.jsonl")[0]["messages"][0]["content"]
