"""N answers to one prompt in one cache row: the prompt's keys are held once, and read once a step for all of them.

Token t of copy c of a prompt of P tokens lies in slot P + t * N + c. A step is one forward pass over `(prompts, width)`
tokens, in which each copy sees the prompt's slots and its own. Which slot holds which position is arithmetic, so masks
and sliding windows go by position although the slots of a copy are N apart.

What it costs: a pass is as wide as the question with the most live copies, the places of other questions are padding, and
the slots of an ended copy are held until its question's last copy ends. Answers of very unequal length gain less.
"""

from dataclasses import dataclass

import torch

from .cache import CachedModel, Prefill


def worth_sharing(prompt_tokens: int, max_new_tokens: int) -> bool:
    """Whether copies should share a row: only where the prompt is at least as long as an answer may become.

    What is saved are reads of the prompt's keys. What it costs are the places of ended copies in a pass and in the row,
    which grow with the answers and with how unevenly they end.
    """
    return prompt_tokens >= max_new_tokens


@dataclass(eq=False)
class _Question:
    """A row of the cache. `prompt`: its tokens; `forks`: copies so far, `live`: those still decoded; `longest`: tokens of
    the longest copy."""

    row: int
    prompt: int
    offset: int
    forks: int = 1
    live: int = 1
    longest: int = 0


@dataclass
class _Copy:
    """An answer: every `copies`-th slot of its question's row, from `column` on; `length` tokens so far."""

    question: _Question
    column: int = 0
    length: int = 0


class SharedPrefixBackend(CachedModel):
    """The operations that plain decoding of several copies needs; a copy cannot be rewound.

    Rows are answers, numbered 0..n, and a removed row is replaced by the last one; a prompt's row of the cache is freed
    with its last answer. `capabilities.sharing_obstacle` proves on the model at hand that its attention takes such masks.

    Args:
        copies: most answers to one prompt.
    """

    def __init__(self, model, copies: int, headroom: int = 96):
        super().__init__(model, headroom * copies)
        self.copies = copies
        self.questions: list[_Question] = []
        self.answers: list[_Copy] = []

    def add(self, start: Prefill) -> None:
        """Append the rows of a prefill, one answer each."""
        self._take(start, len(self.questions))
        for prompt, offset in zip(start.prompts, start.offsets, strict=True):
            self.questions.append(_Question(len(self.questions), len(prompt), offset))
            self.answers.append(_Copy(self.questions[-1]))

    def reserve(self, rows: int) -> None:
        """Nothing: a fork takes no room."""

    def fork(self, row: int) -> int:
        """Another answer to the prompt of `row` as a new last row; returns its number.

        Raises ValueError: `row` holds tokens of its own, or its prompt has all its copies.
        """
        source = self.answers[row]
        question = source.question
        if source.length or question.forks == self.copies:
            raise ValueError(
                f"row {row} holds {source.length} tokens and its prompt has {question.forks} of {self.copies} copies: "
                "answers that share a prompt fork before their first token (RewindBackend forks anywhere)."
            )
        self.answers.append(_Copy(question, question.forks))
        question.forks += 1
        question.live += 1
        return len(self.answers) - 1

    def remove(self, row: int) -> None:
        question = self.answers[row].question
        self.answers[row] = self.answers[-1]
        self.answers.pop()
        question.live -= 1
        if question.live:
            return
        last = self.questions.pop()
        if last is not question:
            self.cache.copy_row(last.row, question.row, 0, last.prompt + last.longest * self.copies)
            last.row = question.row
            self.questions[last.row] = last

    def decode(self, tokens: list[int | None]) -> torch.Tensor:
        """One token an answer (None: it waits); logits `(answers, vocabulary)`, arbitrary where it waits."""
        groups: list[list[int]] = [[] for _ in self.questions]
        for place, token in enumerate(tokens):
            if token is not None:
                groups[self.answers[place].question.row].append(place)
        # ended copies leave their column free: the pass is as wide as the question with the most live ones
        width = max(map(len, groups))
        ids, slots, columns, lengths, positions = [], [], [], [], []
        order = [0] * len(tokens)
        for question, group in zip(self.questions, groups, strict=True):
            copies = [self.answers[place] for place in group]
            padding, prompt = width - len(group), question.prompt
            ids.append([tokens[place] for place in group] + [0] * padding)
            slots.append([prompt + c.length * self.copies + c.column for c in copies] + [-1] * padding)
            columns.append([c.column for c in copies] + [0] * padding)
            # padding sees what the prompt's last token saw: nothing visible would make its softmax not a number
            lengths.append([c.length for c in copies] + [-1] * padding)
            positions.append([question.offset + prompt + length for length in lengths[-1]])
            for number, place in enumerate(group):
                order[place] = question.row * width + number
            for copy in copies:
                copy.length += 1
                question.longest = max(question.longest, copy.length)
        prompts = [question.prompt for question in self.questions]
        used = max(*prompts, *(max(row) + 1 for row in slots))
        self.cache.plan_forward(len(prompts), None, slots, used, self.device)
        places = [torch.tensor(values, device=self.device) for values in (prompts, columns, lengths)]

        def visible(window: int | None) -> torch.Tensor:
            return visible_to_copies(*places, self.copies, used, window)

        return self._run(ids, positions, visible, width).flatten(0, 1)[order]


def visible_to_copies(
    prompts: torch.Tensor,
    columns: torch.Tensor,
    lengths: torch.Tensor,
    copies: int,
    used: int,
    window: int | None,
) -> torch.Tensor:
    """The mask `(prompts, 1, width, used)` of a step: the prompt's slots and the copy's own, its new token included.

    Args:
        prompts: `(prompts,)` tokens of each prompt.
        columns: `(prompts, width)` which copy a query belongs to.
        lengths: `(prompts, width)` how many tokens of its answer come before it; -1: the prompt's last token.
        window: how many positions back a query sees, itself included; None = all.
    """
    # (prompts, used): slots behind the prompt's end, negative inside of it
    behind = torch.arange(used, device=prompts.device) - prompts.unsqueeze(1)
    # position behind the prompt's end, and the copy that wrote there; -1: all copies see it
    position = behind.div(copies, rounding_mode="floor").where(behind >= 0, behind)
    owner = behind.remainder(copies).where(behind >= 0, -1)
    position, owner, query = position[:, None, None], owner[:, None, None], lengths[:, None, :, None]
    mask = (position <= query) & ((owner == columns[:, None, :, None]) | (owner < 0))
    return mask if window is None else mask & (position > query - window)
