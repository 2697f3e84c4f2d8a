import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.stages import (
    STAGES,
    Staged,
    StageError,
    final_block,
    format_stage,
    format_staged,
    parse,
    problems,
    read_blocks,
    superseded,
)

TEXT = format_staged(Staged("plan", "a cat", "1 + 1 = 2", "2"))
# what a stage may hold: anything that is not blank at the ends, angle brackets and formulas included
words = (
    st.text(alphabet="ab <>/=\n\\{}é1", min_size=1)
    .map(str.strip)
    .filter(lambda t: t and not any(s in t.upper() for s in STAGES))
)
staged = st.builds(Staged, words, words, words, words)


@given(staged)
def test_parse_inverts_format(answer):
    text = format_staged(answer)
    assert parse(text) == answer
    assert problems(text) == []
    assert final_block(text, "CONCLUSION")[1] == answer.conclusion
    for block in read_blocks(text):
        assert text[block.start : block.end] == format_stage(block.stage, block.text)


# pieces of staged text in any order: the reader must cope, and agree with a slow reading
TAGS = [f"<{slash}{s}>" for s in STAGES for slash in ("", "/")]
pieces = st.lists(st.sampled_from([*TAGS, "<caption>", "< /REASONING >", "x", " y\n"]), max_size=14).map(
    "".join
)


def slow_blocks(text):
    """Character by character: which stage is open, and what it has collected."""
    found, open_stage, content, cursor = [], None, "", 0
    while cursor < len(text):
        tag = re.compile(r"<\s*(/?)\s*(\w+)\s*>").match(text, cursor)
        if tag and tag[2].upper() in STAGES:
            name = tag[2].upper()
            if not tag[1]:
                if open_stage:
                    found.append((open_stage, content.strip(), False))
                open_stage, content = name, ""
            elif name == open_stage:
                found.append((open_stage, content.strip(), True))
                open_stage, content = None, ""
            else:
                content += tag[0]
            cursor = tag.end()
        else:
            content += text[cursor]
            cursor += 1
    if open_stage:
        found.append((open_stage, content.strip(), False))
    return found


@given(pieces)
def test_the_tolerant_reader_equals_a_slow_reading(text):
    assert [(b.stage, b.text, b.closed) for b in read_blocks(text)] == slow_blocks(text)


@given(pieces)
def test_strict_and_tolerant_reader_agree_on_what_is_well_formed(text):
    if problems(text):
        with pytest.raises(StageError):
            parse(text)
    else:
        assert [(b.stage, b.text) for b in read_blocks(text)] == [(s, parse(text).get(s)) for s in STAGES]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("2", "SUMMARY is missing"),
        (TEXT.replace("</CONCLUSION>", ""), "CONCLUSION is not closed"),
        (TEXT.replace("a cat", " "), "CAPTION is empty"),
        (TEXT + " Done.", "text outside of the stages ('Done.')"),
        (TEXT + "\n\n" + format_stage("CONCLUSION", "3"), "CONCLUSION comes 2 times"),
        (format_stage("CAPTION", "c") + format_stage("SUMMARY", "s"), "the order is CAPTION, SUMMARY"),
    ],
)
def test_problems_are_named(text, problem):
    assert problem in problems(text)


def test_the_last_conclusion_counts_also_when_it_is_cut_off():
    revised = TEXT + "\n\nLet me check.\n\n" + TEXT.replace("2 </CONCLUSION>", "3")
    assert final_block(revised, "CONCLUSION") == (revised.rindex("<CONCLUSION>"), "3")
    assert final_block("no stages at all", "CONCLUSION") is None
    assert final_block("<CONCLUSION> </CONCLUSION>", "CONCLUSION") == (0, "")


def test_superseded_blocks_are_those_that_are_written_again():
    blocks = read_blocks(TEXT + format_stage("CAPTION", "a dog") + format_stage("CONCLUSION", "3"))
    assert [(b.stage, b.text) for b in superseded(blocks)] == [("CAPTION", "a cat"), ("CONCLUSION", "2")]


@pytest.mark.parametrize("stage, text", [("CAPTION", " "), ("CAPTION", "<summary> x"), ("TITLE", "x")])
def test_the_writer_is_strict(stage, text):
    with pytest.raises(StageError):
        format_stage(stage, text)
