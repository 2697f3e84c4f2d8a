"""Questions that ask for the wrong phrase, from tagged rows as they are."""

from collections import Counter

import pytest
from json_lines import read_lines, write_lines

from vlm_sft_rl.data.tagging.injected import injected_questions, write_injected
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.graders import load_grader


def row(name, text, images=("0.png",)):
    talk = [{"role": "user", "content": "What is there?"}, {"role": "assistant", "content": text}]
    return {"id": name, "images": list(images), "messages": talk, "source": "file:1"}


POSITIVE = row("r-pos", "I see <SPAN> a cat </CN>, <SPAN> a pen </CN> and <SPAN> a dog </CN>.")


@pytest.mark.parametrize(
    ("negative", "text", "answer"),
    [
        ("I see <SPAN> a cow </UN>", "I see a cow, a pen and a dog.", "a cow"),
        ("I see <SPAN> a cat </CN>, <SPAN> a cow </UN>", "I see a cat, a cow and a dog.", "a cow"),
        (
            "I see <SPAN> a cat </CN>, <SPAN> a pen </CN> and <SPAN> two cows </UN>",
            "I see a cat, a pen and two cows.",
            "two cows",
        ),
    ],
)
def test_the_text_goes_on_behind_its_wrong_phrase(negative, text, answer):
    (question,) = injected_questions([POSITIVE, row("r-neg0", negative)], "Which in: {text}")
    assert question == {
        "id": "r-neg0",
        "images": ["0.png"],
        "question": f"Which in: {text}",
        "answer": answer,
    }
    assert load_grader("exact")(answer, question).correct
    assert not load_grader("exact")("a cat", question).correct


@pytest.mark.parametrize(
    ("positive", "negative", "complaint"),
    [
        (
            "I see <SPAN> a cat </CN>.",
            "I see <SPAN> a cat </CN>. <SPAN> A cow </UN>",
            "not the text of 'r-pos'",
        ),
        (POSITIVE["messages"][1]["content"], "There is <SPAN> a cow </UN>", "not the text of 'r-pos'"),
        (
            "I see <SPAN> a cat </CN>, <SPAN> a pen",
            "I see <SPAN> a cow </UN>",
            "1: <SPAN> .* is never closed",
        ),
        (POSITIVE["messages"][1]["content"], "I see a cow </UN>", "1: </UN> .* closes nothing"),
    ],
)
def test_rows_that_do_not_belong_together_are_named(positive, negative, complaint):
    with pytest.raises(RowError, match=f"^file:{complaint}" if "1:" in complaint else complaint):
        list(injected_questions([row("r-pos", positive), row("r-neg0", negative)]))


def test_what_gives_no_question_is_counted():
    notes = Counter()
    short = [row("s-pos", "<SPAN> Yes </CN>"), row("s-neg0", "<SPAN> No </UN>")]
    lost = row("t-neg0", "<SPAN> a cow </UN>")
    other = row("u", "<SPAN> a cow </CN>")
    assert list(injected_questions([POSITIVE, *short, lost, other], notes=notes)) == []
    assert sorted(notes.values()) == [1, 1, 1]


def test_a_file_of_tagged_rows_is_a_file_of_questions(tmp_path):
    rows = [POSITIVE, row("r-neg0", "I see <SPAN> a cow </UN>"), row("r-neg1", "I see <SPAN> an ox </UN>")]
    write_lines(tmp_path / "rows.jsonl", rows)
    counts = write_injected(tmp_path / "rows.jsonl", tmp_path / "questions.jsonl")
    assert counts == {"questions": 2}
    assert [line["answer"] for line in read_lines(tmp_path / "questions.jsonl")] == ["a cow", "an ox"]
    with pytest.raises(UserError, match=r"no \{text\} in it"):
        write_injected(tmp_path / "rows.jsonl", tmp_path / "questions.jsonl", "Which?")
    write_lines(tmp_path / "rows.jsonl", [POSITIVE])
    with pytest.raises(UserError, match="no question could be made"):
        write_injected(tmp_path / "rows.jsonl", tmp_path / "questions.jsonl")
