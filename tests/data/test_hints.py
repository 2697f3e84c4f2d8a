from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.marks import add_hints


def make(identity="1", **answer):
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat.", **answer}]
    return {"id": identity, "messages": messages, "images": []}


GENERAL = {"hint": "A Red Blender", "answer_type": "general_answer"}


def test_wording():
    hinted = add_hints(make(**GENERAL), 1.0)
    assert hinted["messages"][0]["content"] == "What? (Hint: potential incorrect phrases -> a red blender)"


def test_only_general_answers_with_a_hint():
    for answer in (
        {},
        {"hint": "x"},
        {"answer_type": "general_answer"},
        {"hint": "x", "answer_type": "yes_no"},
    ):
        assert add_hints(make(**answer), 1.0) == make(**answer)


def test_hint_goes_before_a_closing_image():
    one = make(**GENERAL)
    one["messages"][0]["content"] = "What?\n<image>"
    assert add_hints(one, 1.0)["messages"][0]["content"].endswith("a red blender)\n<image>")


def test_frequency_and_independence_of_order():
    rows = [make(str(i), **GENERAL) for i in range(5000)]
    hinted = [r["id"] for r in rows if add_hints(r, 0.2) != r]
    assert 900 < len(hinted) < 1100
    assert sorted(hinted) == sorted(r["id"] for r in reversed(rows) if add_hints(r, 0.2) != r)
    assert hinted != [r["id"] for r in rows if add_hints(r, 0.2, seed=1) != r]


@given(st.text(), st.integers(), st.floats(0, 1))
def test_pure(identity, seed, probability):
    one = make(identity, **GENERAL)
    assert add_hints(one, probability, seed) == add_hints(one, probability, seed)
    assert one == make(identity, **GENERAL)
