import pytest
from endpoint_server import EndpointServer
from json_lines import read_lines, write_lines
from PIL import Image
from typer.testing import CliRunner

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_training.distill import DistillConfig, distill
from vlm_sft_rl.teacher import EndpointClient


def write_questions(folder, count=6):
    rows = []
    for i in range(count):
        Image.new("RGB", (28, 28), (30 * i, 90, 10)).save(folder / f"{i}.png")
        rows.append({"id": f"q{i}", "images": [f"{i}.png"], "question": f"How many, {i}?", "answer": str(i)})
    path = folder / "questions.jsonl"
    write_lines(path, rows)
    return path


def teacher(body):
    """Right for even questions; answers as the prompt asks."""
    text = body["messages"][0]["content"][1]["text"]
    number = int(text.split(",")[1].split("?")[0])
    return f"I count them.\nAnswer: {number if number % 2 == 0 else number + 1}"


def test_only_right_rationales_are_kept_and_nothing_is_asked_twice(tmp_path):
    questions, target = write_questions(tmp_path), tmp_path / "warmup.jsonl"
    with EndpointServer(teacher) as server, EndpointClient(server.url, "teacher") as client:
        counts = distill(questions, target, client, DistillConfig("clevr_math"), image_root=tmp_path)
        assert counts == {"questions": 6, "rationales": 6, "kept": 3, "right": 3, "wrong": 3}
        calls = server.calls
        assert distill(questions, target, client, DistillConfig("clevr_math"), image_root=tmp_path) == counts
        assert server.calls == calls == 6
    assert [row["id"] for row in read_lines(target)] == ["q0", "q2", "q4"]
    assert read_lines(target)[1]["rationale"] == "I count them.\nAnswer: 2"


def test_the_first_right_one_of_several(tmp_path):
    questions, target = write_questions(tmp_path, 2), tmp_path / "warmup.jsonl"
    with (
        EndpointServer(lambda body: ["Answer: 9", "well. Answer: 1", "Answer: 1"]) as server,
        EndpointClient(server.url, "teacher") as client,
    ):
        distill(
            questions, target, client, DistillConfig("clevr_math", n=3, temperature=0.7), image_root=tmp_path
        )
    assert [(row["id"], row["rationale"]) for row in read_lines(target)] == [("q1", "well. Answer: 1")]


def test_a_teacher_that_is_never_right_is_an_error(tmp_path):
    questions = write_questions(tmp_path, 3)
    with (
        EndpointServer(lambda body: "I cannot see the image, sorry about that") as server,
        EndpointClient(server.url, "teacher") as client,
        pytest.raises(UserError, match=r"None of 3 rationales has the right answer.*3 have no readable one"),
    ):
        distill(questions, tmp_path / "w.jsonl", client, DistillConfig("clevr_math"), image_root=tmp_path)


@pytest.mark.parametrize("setting", [{"n": 0}, {"limit": 0}, {"max_new_tokens": 0}, {"temperature": -1.0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} = .*expected"):
        DistillConfig("clevr_math", **setting)


def test_the_command(tmp_path):
    questions = write_questions(tmp_path)
    with EndpointServer(teacher) as server:
        words = ["distill", str(questions), str(tmp_path / "out" / "w.jsonl"), "--endpoint", server.url]
        words += ["--model", "teacher", "--dataset", "clevr_math", "--limit", "4"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert server.calls == 4
    assert "questions: 4" in result.output
