"""The conclusion of an answer: behind thinking, inside of the wrapper that opens last."""

import pytest
from cpu_time import cpu_seconds
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.conclusions import conclusion, without_thinking


@pytest.mark.parametrize(
    "answer, text",
    [
        ("B", "B"),
        ("<think>A or B?</think>B", "B"),
        ("A or B?</think>\n\nB", "B"),  # the chat template has written the opening tag
        ("<think>A or B? it must be", ""),  # cut off
        ("Yes. <think>or no?", "Yes."),
        ("<think>a</think>B<think>no, wait</think>C", "C"),
        ("<think>a</think>B<think>no, wait</think>", "B"),
        ("<think>a<think>b</think>c</think>D", "D"),
        ("<think>", ""),
        ("</think>", ""),
        ("<THINK >a< / Think>B", "B"),
        ("<thinking>a</thinking> B", "B"),
        ("◁think▷a◁/think▷B", "B"),
        ("I think a < b", "I think a < b"),
    ],
)
def test_thinking_is_left_out(answer, text):
    assert without_thinking(answer) == text
    assert conclusion(answer) == (text, False)


@pytest.mark.parametrize(
    "answer, text",
    [
        ("so <answer> B </answer>", "B"),
        ("<answer>A</answer> no: <Answer>B</Answer>.", "B"),
        ("<answer>B", "B"),  # cut off
        ("B</answer>", "B"),  # prefilled
        ("<think>it is <answer>A</answer></think> <answer>B</answer>", "B"),
        ("<|begin_of_box|>B<|end_of_box|>", "B"),
        (r"So \boxed{B}.", "B"),
        (r"\boxed{A} is wrong, \boxed{B} is right", "B"),
        (r"$\boxed{\frac{3}{4}}$", r"\frac{3}{4}"),
        (r"\boxed{\text{\textbf{(B)} blue}}", "(B) blue"),
        (r"\boxed {90^\circ}", "90°"),
        (r"\boxed{1{,}200\text{ cm}}", "1,200 cm"),
        (r"\boxed{12\%}", "12%"),
        (r"\boxed{\{1\}}", "{1}"),
        (r"\fbox{B}", "B"),
        (r"\boxed{\boxed{5}}", "5"),
        ("\\boxed{5 and\nmore", "5 and"),  # never closed
        ("<REASONING> 1 </REASONING> <CONCLUSION> 2 </CONCLUSION>", "2"),
        ("<CONCLUSION> 1 </CONCLUSION> <CONCLUSION> 2", "2"),
        (r"<CONCLUSION> it is \boxed{2} </CONCLUSION>", "2"),
        (r"<REASONING> \boxed{1} </REASONING> <CONCLUSION> 2 </CONCLUSION>", "2"),
        (r"<answer>\boxed{2}</answer>", "2"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        (r"<answer>1</answer> rather \boxed{2}", "2"),
        (r"I will write \boxed{}. <answer>2</answer>", "2"),
        ("<answer>2</answer> in \\boxed{}", "2"),
        ("<answer></answer>", ""),
        ("<CONCLUSION> </CONCLUSION>", ""),
        (r"<think>\boxed{1}</think> <CONCLUSION> 2 </CONCLUSION>", "2"),
    ],
)
def test_the_wrapper_that_opens_last_holds_the_conclusion(answer, text):
    assert conclusion(answer) == (text, True)


PIECES = [
    *("<think>", "</think>", "<answer>", "</answer>", "<CONCLUSION>", "</CONCLUSION>", "\\boxed{", "{", "}"),
    *("\\frac{1}{2}", "<", "< /", "think", " ", "\n", "B", "12", "\\", "◁think▷", "<|begin_of_box|>"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_wrappers_in_any_order_conclude_something(answer):
    text, marked = conclusion(answer)
    assert isinstance(text, str) and isinstance(marked, bool)
    assert without_thinking(without_thinking(answer)) == without_thinking(answer)


@given(st.text(alphabet="ab<>/ \n{}\\.", max_size=60))
def test_an_answer_without_wrappers_is_its_own_conclusion(answer):
    assert conclusion(answer) == (answer, False)


@pytest.mark.parametrize("piece", [*PIECES, "<" + " " * 50_000, "\\boxed" + " " * 50_000, "\\boxed{\\text{"])
def test_long_answers_take_no_time(piece):
    answer = piece * max(1, 100_000 // len(piece))
    assert cpu_seconds(lambda: conclusion(answer)) < 1.0
