"""The stage grammar of LLaVA-CoT and LLaVA-SCo: `<SUMMARY> <CAPTION> <REASONING> <CONCLUSION>`, each closed by its own tag.

Pure text, no tokenizer: the tags are plain text to the model, not added tokens (arXiv 2411.10440, section 3.1). The
writer is strict; the reader takes what models really produce and says what is wrong with it.

A stage that is written again later in the same text revises the earlier one: the last block of a stage counts.
"""

import re
from dataclasses import dataclass

from ..errors import UserError

STAGES = ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION")
SEPARATOR = "\n\n"  # between stages, as the published data have it

# one run of blanks before the slash and one behind it: two that touch would make a long one slow
_TAG = re.compile(rf"<\s*(/\s*)?({'|'.join(STAGES)})\s*>", re.IGNORECASE)


class StageError(UserError):
    """Text that is not a staged answer; `problems` lists what is wrong."""

    def __init__(self, problems: list[str]):
        super().__init__(f"not a staged answer: {'; '.join(problems)}.")
        self.problems = problems

    def __reduce__(self):
        return StageError, (self.problems,)


@dataclass(frozen=True)
class Staged:
    """A staged answer: plan, image description, steps, and the bare final answer."""

    summary: str
    caption: str
    reasoning: str
    conclusion: str

    def get(self, stage: str) -> str:
        return getattr(self, stage.lower())


@dataclass(frozen=True)
class Block:
    """One stage as found in a text. `start` and `end` are character offsets, tags included; `text` is without tags."""

    stage: str
    text: str
    start: int
    end: int
    closed: bool


def format_stage(stage: str, text: str) -> str:
    """`<CAPTION> text </CAPTION>`. Raises StageError: no such stage, an empty text, or a stage tag inside of it."""
    inner = text.strip()
    if stage not in STAGES:
        raise StageError([f"there is no stage {stage!r}; stages are {', '.join(STAGES)}"])
    if not inner:
        raise StageError([f"{stage} is empty"])
    if match := _TAG.search(inner):
        raise StageError([f"{stage} contains the tag {match.group()}: stages do not nest"])
    return f"<{stage}> {inner} </{stage}>"


def format_staged(staged: Staged, separator: str = SEPARATOR) -> str:
    """The four stages in order. Raises StageError as `format_stage` does."""
    return separator.join(format_stage(stage, staged.get(stage)) for stage in STAGES)


def read_blocks(text: str) -> list[Block]:
    """Every stage found, in the order of the text.

    Tags may be in any case and have blanks inside. A stage ends at its closing tag, or unclosed before the next opening
    tag or at the end of the text. Closing tags that close nothing are passed over (`problems` names them).
    """
    blocks: list[Block] = []
    opened: re.Match | None = None

    def close(end: int, after: int, closed: bool) -> None:
        stage = opened.group(2).upper()
        blocks.append(Block(stage, text[opened.end() : end].strip(), opened.start(), after, closed))

    for tag in _TAG.finditer(text):
        if not tag.group(1):
            if opened is not None:
                close(tag.start(), tag.start(), False)
            opened = tag
        elif opened is not None and tag.group(2).upper() == opened.group(2).upper():
            close(tag.start(), tag.end(), True)
            opened = None
    if opened is not None:
        close(len(text), len(text), False)
    return blocks


def problems(text: str) -> list[str]:
    """What keeps `text` from being one staged answer, each once; an empty list when nothing does."""
    blocks = read_blocks(text)
    wrong = [f"{b.stage} is not closed" for b in blocks if not b.closed]
    wrong += [f"{b.stage} is empty" for b in blocks if not b.text]
    names = [b.stage for b in blocks]
    wrong += [f"{stage} is missing" for stage in STAGES if stage not in names]
    wrong += [f"{stage} comes {names.count(stage)} times" for stage in STAGES if names.count(stage) > 1]
    once = list(dict.fromkeys(names))
    if once != sorted(once, key=STAGES.index):
        wrong.append(f"the order is {', '.join(once)}")
    outside, cursor = [], 0
    for block in blocks:
        outside.append(text[cursor : block.start])
        cursor = block.end
    outside.append(text[cursor:])
    if loose := next((piece.strip() for piece in outside if piece.strip()), None):
        wrong.append(f"text outside of the stages ({loose[:40]!r})")
    return list(dict.fromkeys(wrong))


def parse(text: str) -> Staged:
    """The inverse of `format_staged`. Raises StageError: anything that `problems` lists."""
    if wrong := problems(text):
        raise StageError(wrong)
    return Staged(*(block.text for block in read_blocks(text)))


def final_block(text: str, stage: str) -> tuple[int, str] | None:
    """Start and text of the last block of a stage, also of one cut off by a length limit; None when there is none."""
    last = [block for block in read_blocks(text) if block.stage == stage][-1:]
    return (last[0].start, last[0].text) if last else None


def superseded(blocks: list[Block]) -> list[Block]:
    """The blocks that a later block of the same stage revises."""
    last = {block.stage: block for block in blocks}
    return [block for block in blocks if last[block.stage] is not block]
