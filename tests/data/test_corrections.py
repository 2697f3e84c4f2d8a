from functools import partial

import pytest
import templates
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.corrections import (
    CHECK_LINE,
    CHECK_PROMPT,
    Draft,
    Layout,
    attempt_weight_mark,
    correction_marks,
    correction_row,
    draft_ids,
    is_correction_row,
    lay_out,
    stage_ids,
    stage_weight_mark,
    superseded_mark,
)
from vlm_sft_rl.data.marks import IGNORE
from vlm_sft_rl.data.rows import sft_row
from vlm_sft_rl.data.stages import STAGES, Staged, format_staged
from vlm_sft_rl.errors import RowError, UserError


def answer(number):
    return format_staged(Staged("I count.", f"{number} cats", f"{number} of them.", str(number)))


WRONG, RIGHT = Draft(answer(3), False), Draft(answer(2), True)
ROW = correction_row("r", [], "How many cats?", [WRONG, RIGHT])


def contents(row):
    return [m["content"] for m in row["messages"]]


def test_the_canonical_row_survives_the_row_reader():
    assert contents(ROW) == ["How many cats?", WRONG.text, CHECK_PROMPT, RIGHT.text]
    assert [m.get("weight") for m in ROW["messages"]] == [None, 0, None, 1]
    read = sft_row(ROW, "f:1")
    assert read["messages"] == ROW["messages"] and is_correction_row(read)


@given(st.lists(st.booleans(), min_size=2, max_size=4), st.integers(0, 5))
def test_any_number_of_corrections_ends_with_the_last_draft(rights, count):
    drafts = [Draft(f"draft {i}", right) for i, right in enumerate(rights)]
    row = lay_out(correction_row("r", [], "q", drafts), Layout(corrections=count, attempt_loss="none"))
    said = [m for m in row["messages"] if m["role"] == "assistant"]
    assert len(said) == count + 1
    assert said[-1]["content"] == drafts[-1].text
    # behind the attempt the true drafts in order, then the last one again and again
    texts = [m["content"] for m in said]
    padded = [*(d.text for d in drafts[:count]), *[drafts[-1].text] * 9]
    assert texts == [*padded[:count], drafts[-1].text]
    assert [m["weight"] for m in said] == [0] * count + [1]
    assert sft_row(row, "f:1")  # roles alternate


def test_rows_without_an_attempt_are_left_alone():
    plain = correction_row("r", [], "q", [RIGHT])
    assert lay_out(plain, Layout("message")) is plain
    assert not is_correction_row(plain)


def test_one_message_and_one_stage():
    joined = lay_out(ROW, Layout("message"))
    assert contents(joined) == ["How many cats?", f"{WRONG.text}\n\n{CHECK_LINE}\n\n{RIGHT.text}"]
    early = lay_out(ROW, Layout("stage", after="CAPTION"))
    assert contents(early)[1].split("\n\n") == [
        "<SUMMARY> I count. </SUMMARY>",
        "<CAPTION> 3 cats </CAPTION>",
        CHECK_LINE,
        "<CAPTION> 2 cats </CAPTION>",
        "<REASONING> 2 of them. </REASONING>",
        "<CONCLUSION> 2 </CONCLUSION>",
    ]
    with pytest.raises(RowError, match="not a staged answer"):
        lay_out(correction_row("r", [], "q", [Draft("two", False), RIGHT]), Layout("stage"))


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"kind": "tree"}, {"after": "SUMMARY"}, {"attempt_loss": "some"}, {"corrections": -1}):
        with pytest.raises(UserError):
            Layout(**wrong)
    with pytest.raises(UserError, match="corrects once"):
        Layout("stage", corrections=2)


def learned(row, chat, *marks):
    """The supervised stretches of a row as text."""
    example = VisionCollator(chat.processor, marks=[superseded_mark, *marks]).encode(row)
    runs, previous = [], None
    for i, label in enumerate(example.labels):
        if label != IGNORE:
            if previous != i - 1:
                runs.append([])
            runs[-1].append(label)
            previous = i
    return [chat.decode(run).strip() for run in runs]


def test_a_wrong_attempt_is_read_and_not_learned(chat):
    wrong, right = f"{WRONG.text}{chat.end}", f"{RIGHT.text}{chat.end}"
    assert learned(ROW, chat) == [right]
    assert learned(lay_out(ROW, Layout(attempt_loss="all")), chat) == [wrong, right]
    # in one message the wrong stages are masked, what leads to the correction is learned
    joined = learned(lay_out(ROW, Layout("message")), chat)
    assert joined[-1] == f"{CHECK_LINE}\n\n{right}"
    assert all(not piece for piece in joined[:-1])  # nothing but the blanks between stages
    early = " ".join(learned(lay_out(ROW, Layout("stage", after="CAPTION")), chat))
    assert "3 cats" not in early and early.startswith("<SUMMARY> I count. </SUMMARY>")
    assert early.endswith(f"<CONCLUSION> 2 </CONCLUSION>{chat.end}")


def test_a_right_attempt_in_one_message_is_learned_whole(chat):
    row = lay_out(correction_row("r", [], "q", [RIGHT, RIGHT]), Layout("message"))
    assert learned(row, chat) == [f"{contents(row)[1]}{chat.end}"]


@pytest.mark.parametrize("layout", [Layout(attempt_loss="all"), Layout("message", attempt_loss="all")])
def test_stages_and_drafts_of_every_token(layout, chat):
    """Tokens of stage s in draft d, put together, are that stage of that draft as it was written."""
    example = VisionCollator(chat.processor).encode(lay_out(ROW, layout))
    stages, drafts = stage_ids(example), draft_ids(example)
    for number, draft in ((1, WRONG), (2, RIGHT)):
        for k, stage in enumerate(STAGES, 1):
            pairs = zip(example.input_ids, stages, drafts, strict=True)
            text = chat.decode([i for i, *pair in pairs if pair == [k, number]]).strip()
            # a token that holds the end of one stage and the blanks behind it belongs to the stage
            tags = f"<{stage}>", f"</{stage}>"
            assert text == draft.text[draft.text.index(tags[0]) : draft.text.index(tags[1])] + tags[1]
    spoken = {i for turn in example.turns for i in range(turn.start, turn.end)}
    assert {i for i, d in enumerate(drafts) if d} == spoken


def test_weights_of_attempts_and_stages():
    processor = templates.processor("chatml", "bytes")
    row = lay_out(ROW, Layout(attempt_loss="all"))
    plain = VisionCollator(processor, marks=[superseded_mark]).encode(row)
    weigh = [partial(attempt_weight_mark, weight=0.5), partial(stage_weight_mark, weights=[1, 1, 1, 3, 1])]
    marked = VisionCollator(processor, marks=weigh).encode(row)
    assert marked.labels == plain.labels
    for i, weight in enumerate(plain.weights):
        factor = (0.5 if draft_ids(plain)[i] == 1 else 1) * (3 if stage_ids(plain)[i] == 3 else 1)
        assert marked.weights[i] == weight * factor


def test_marks_are_only_what_is_asked_for():
    assert correction_marks() == [superseded_mark]
    assert len(correction_marks(0.5, {"reasoning": 2, "other": 1})) == 3
    for wrong in ({"REASON": 2}, {"CAPTION": -1}, {"CAPTION": "much"}):
        with pytest.raises(UserError):
            correction_marks(1.0, wrong)
