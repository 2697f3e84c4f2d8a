"""N answers to one prompt in one cache row: the prompt's keys are held once, and read once a step for all of them.

Token t of copy c of a prompt of P tokens lies in slot P + t * N + c. A step is one forward pass over `(prompts, width)`
tokens, in which each copy sees the prompt's slots and its own. Which slot holds which position is arithmetic, so masks
and sliding windows go by position although the slots of a copy are N apart.

What it costs: a pass is as wide as the question with the most live copies, the places of other questions are padding, and
the slots of an ended copy are held until its question's last copy ends. Answers of very unequal length gain less.
"""

from dataclasses import dataclass
from typing import Any

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
    """A row of the cache. `prompt`: its tokens; `begun`: copies forked so far, `live`: those still decoded; `longest`:
    tokens of the longest copy."""

    row: int
    prompt: int
    offset: int
    begun: int = 1
    live: int = 1
    longest: int = 0


@dataclass
class _Copy:
    """An answer: every `copies`-th slot of its question's row, from `column` on; `taken` tokens so far."""

    question: _Question
    column: int = 0
    taken: int = 0


class SharedPrefixBackend(CachedModel):
    """The operations that plain decoding of several copies needs; a copy cannot be rewound.

    Rows are answers, numbered 0..n, and a removed row is replaced by the last one; a prompt's row of the cache is freed
    with its last answer. `admission.sharing_obstacle` proves on the model at hand that
    its attention takes such masks.

    Args:
        copies: most answers to one prompt.
    """

    def __init__(self, model, layer_windows: list[int | None], copies: int, headroom: int = 96):
        super().__init__(model, layer_windows, headroom * copies)
        self.copies = copies
        self.questions: list[_Question] = []
        self.answers: list[_Copy] = []

    def add(self, start: Prefill, inputs: dict[str, Any] | None = None) -> None:
        """Append the rows of a prefill, one answer each."""
        first = len(self.questions)
        self._take(start, first)
        for i, (prompt, offset) in enumerate(zip(start.prompts, start.offsets, strict=True)):
            self.questions.append(_Question(first + i, len(prompt), offset))
            self.answers.append(_Copy(self.questions[-1]))

    def reserve(self, rows: int) -> None:
        """Nothing: a fork takes no room."""

    def fork(self, row: int) -> int:
        """Another answer to the prompt of `row` as a new last row; returns its number.

        Raises:
            ValueError: `row` holds tokens of its own, or its prompt has all its copies.
        """
        source = self.answers[row]
        question = source.question
        if source.taken or question.begun == self.copies:
            raise ValueError(
                f"row {row} holds {source.taken} tokens and its prompt has {question.begun} of {self.copies} copies: "
                "answers that share a prompt fork before their first token (RewindBackend forks anywhere)."
            )
        self.answers.append(_Copy(question, question.begun))
        question.begun += 1
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
        ids, slots, columns, taken = [], [], [], []
        order = [0] * len(tokens)
        for question, group in zip(self.questions, groups, strict=True):
            padding = width - len(group)
            own = [self.answers[place] for place in group]
            ids.append([tokens[place] for place in group] + [0] * padding)
            slots.append([question.prompt + c.taken * self.copies + c.column for c in own] + [-1] * padding)
            columns.append([c.column for c in own] + [0] * padding)
            # padding sees what the prompt's last token saw: nothing visible would make its softmax not a number
            taken.append([c.taken for c in own] + [-1] * padding)
            for number, place in enumerate(group):
                order[place] = question.row * width + number
            for copy in own:
                copy.taken += 1
                question.longest = max(question.longest, copy.taken)
        logits = self._forward(ids, slots, columns, taken)
        return logits.flatten(0, 1)[order]

    def _forward(self, ids, slots, columns, taken) -> torch.Tensor:
        prompts = [question.prompt for question in self.questions]
        used = max(*prompts, *(max(row) + 1 for row in slots))
        self.cache.plan_forward(len(prompts), None, slots, used, self.device)
        positions = [
            [question.offset + question.prompt + t for t in row]
            for question, row in zip(self.questions, taken, strict=True)
        ]
        lengths, column, token = (torch.tensor(x, device=self.device) for x in (prompts, columns, taken))
        return self._run(
            ids,
            positions,
            lambda window: visible_to_copies(lengths, column, token, self.copies, used, window),
            len(ids[0]),
        )

    def rewind(self, row: int, length: int) -> None:
        self._refuse("rewound")

    def adopt(self, source: int, row: int, start: int) -> None:
        self._refuse("made equal to a fork")

    def extend(self, chunks: list) -> torch.Tensor:
        self._refuse("extended by several tokens")

    def _refuse(self, what: str) -> None:
        raise NotImplementedError(f"answers that share a prompt's row cannot be {what}: use RewindBackend.")


def visible_to_copies(
    prompts: torch.Tensor,
    columns: torch.Tensor,
    taken: torch.Tensor,
    copies: int,
    used: int,
    window: int | None,
) -> torch.Tensor:
    """The mask `(prompts, 1, width, used)` of a step: the prompt's slots and the copy's own, its new token included.

    Args:
        prompts: `(prompts,)` tokens of each prompt.
        columns: `(prompts, width)` which copy a query belongs to.
        taken: `(prompts, width)` how many tokens of its answer come before it; -1: the prompt's last token.
        window: how many positions back a query sees, itself included; None = all.
    """
    key = torch.arange(used, device=prompts.device)
    behind = key - prompts.unsqueeze(1)  # (prompts, used): slots behind the prompt, negative inside of it
    token = behind.div(copies, rounding_mode="floor").where(
        behind >= 0, behind
    )  # position, the prompt's end being 0
    owner = behind.remainder(copies).where(behind >= 0, -1)
    token, owner, query = token[:, None, None], owner[:, None, None], taken[:, None, :, None]
    mask = (token <= query) & ((owner == columns[:, None, :, None]) | (owner < 0))
    return mask if window is None else mask & (token > query - window)
