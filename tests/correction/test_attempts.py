import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.correction.attempts import (
    Attempt,
    choose_attempts,
    fault_of,
    refine_prompt,
    refine_rows,
    repair_prompt,
    repair_rows,
)
from vlm_sft_rl.data.stages import Staged, format_staged
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.turns import grade_turns
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.graders.grade import grade_staged

GRADER = load_grader("pocket")


def answer(number):
    return format_staged(Staged("plan", "three cats", "one, two", str(number)))


def question(name, gold="2"):
    return {"id": name, "images": [f"{name}.png"], "question": f"How many in {name}?", "answer": gold}


attempts = st.lists(
    st.builds(
        Attempt, st.sampled_from("abc"), st.integers(0, 9), st.sampled_from("stuv"), st.sampled_from(["right", "wrong"])
    ),
    unique_by=lambda a: (a.question, a.index),
    max_size=20,
)  # fmt: skip


@given(attempts, st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]), st.integers(1, 3), st.integers(0, 3))
def test_the_mix_is_the_one_asked_for_and_as_large_as_can_be(pool, share, per_question, seed):
    distinct = {}
    for a in sorted(pool, key=lambda a: (a.question, a.index)):
        distinct.setdefault((a.question, a.text), a)
    counts = {}
    for a in distinct.values():
        counts.setdefault((a.question, a.right), []).append(a)
    available = {
        r: sum(min(per_question, len(v)) for (_, right), v in counts.items() if right == r)
        for r in (True, False)
    }
    needed = [r for r, s in ((False, share), (True, 1 - share)) if s > 0]
    if any(available[r] == 0 for r in needed):
        with pytest.raises(UserError):
            choose_attempts(pool, wrong_share=share, per_question=per_question)
        return
    chosen = choose_attempts(pool, wrong_share=share, per_question=per_question, seed=seed)
    wrong, right = sum(not a.right for a in chosen), sum(a.right for a in chosen)
    assert len({(a.question, a.index) for a in chosen}) == len(chosen)
    # no larger mix of that share exists: one sort is used up but for the rounding
    assert any(available[r] - n < 1 + 1e-6 for r, n in ((False, wrong), (True, right)) if r in needed)
    if share in (0.0, 1.0):
        assert (wrong == 0) if share == 0 else (right == 0)
    else:
        assert abs(wrong * (1 - share) - right * share) <= 1
    assert chosen == choose_attempts(pool[::-1], wrong_share=share, per_question=per_question, seed=seed)


def test_a_limit_keeps_the_mix():
    pool = [Attempt(f"q{i}", 0, "x", "right" if i % 2 else "wrong") for i in range(40)]
    chosen = choose_attempts(pool, wrong_share=0.25, limit=12)
    assert [sum(not a.right for a in chosen), len(chosen)] == [3, 12]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (answer(2), None),
        (answer(3), "conclusion wrong"),
        (answer("two or three"), "conclusion unreadable"),
        (answer(2) + " Good luck!", "not staged"),
        ("2", "not staged"),
        ("  ", "empty"),
    ],
)
def test_faults_of_a_teachers_answer(text, expected):
    assert fault_of(text, GRADER, question("a")) == expected


def test_a_refined_answer_must_keep_the_conclusion():
    assert fault_of(answer("2."), None, question("a"), equals=" 2 ") is None
    assert fault_of(answer("3"), None, question("a"), equals="2") == "another conclusion"


def test_rows_repair_wrong_attempts_and_keep_right_ones():
    questions = {name: question(name) for name in "abc"}
    chosen = [
        Attempt("a", 1, answer(5), "wrong"),
        Attempt("b", 0, answer(2), "right"),
        Attempt("c", 0, "?", "unreadable"),
    ]
    rows = repair_rows(chosen, questions, {("a", 1): answer(2)}, "Check.", "Look: {question}")
    assert [row["id"] for row in rows] == ["a/1", "b/0"]  # c has no correction
    first, second = (row["messages"] for row in rows)
    assert first[0]["content"] == "Look: How many in a?" and first[2]["content"] == "Check."
    assert [m["content"] for m in first[1::2]] == [answer(5), answer(2)]
    assert [m["weight"] for m in first[1::2]] == [0, 1] and [m["weight"] for m in second[1::2]] == [1, 1]
    assert second[1]["content"] == second[3]["content"]


def test_refined_rows_teach_both_answers():
    rows = refine_rows([(question("a"), answer(2), answer("2"))])
    assert [m.get("weight") for m in rows[0]["messages"]] == [None, 1, None, 1]


def test_prompts_say_what_the_teacher_may_know():
    assert "right answer is: 2" in repair_prompt("q", "wrong one", "2")
    assert "wrong one" in repair_prompt("q", "wrong one", "2")
    for prompt in (refine_prompt("q", answer(2)), repair_prompt("q", "x", "2")):
        assert "<CAPTION> … </CAPTION>" in prompt


def test_only_the_conclusion_is_graded():
    assert grade_staged(GRADER, answer(2).replace("three cats", "So the answer is 7."), question("a")).correct
    assert grade_staged(GRADER, "So the answer is 2.", question("a")).status == "unreadable"
    assert grade_staged(GRADER, "So the answer is 2.", question("a"), staged=False).correct
    turns = [{"text": answer(1)}, {"text": "none"}, {"text": answer("2.")}]
    grades = grade_turns(GRADER, turns, question("a"))
    assert grades.statuses == ("wrong", "unreadable", "right") and grades.keys == ("1", None, "2")


def test_right_attempts_can_be_looked_at_again():
    chosen = [Attempt("a", 0, answer(2), "right"), Attempt("b", 0, answer(2), "right")]
    looked = answer(2).replace("three cats", "cat, cat, cat")
    questions = {name: question(name) for name in "ab"}
    rows = repair_rows(chosen, questions, {("a", 0): looked}, keep="teacher")
    assert [m["content"] for m in rows[0]["messages"][1::2]] == [answer(2), looked]
    assert len(rows) == 1  # b's has no valid correction


def test_a_question_with_choices_is_asked_with_them():
    asked = question("a", "B") | {"choices": ["one", "two"]}
    (row,) = repair_rows([Attempt("a", 0, "x", "wrong")], {"a": asked}, {("a", 0): answer("B")})
    assert row["messages"][0]["content"] == "How many in a? Options: (A) one (B) two"
