"""What the model is asked: one renderer a data set and style, the same object in training and at test time.

Two styles, as published: `guided` says how the answer is to be written, `plain` is the classic step-by-step line. Parts,
line breaks and the form of answers are those of MM-Self-Improve's released prompts; the words are ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.messages import IMAGE
from ..data.rows import question_parts
from ..errors import UserError

STYLES = ("guided", "plain")
PLAIN = "Let's think step by step."
_VALUE, _DIGIT, _LETTER = (
    "a numerical value, Yes or No, a word or a phrase",
    "a single number from 0 to 10",
    "the option's letter",
)
# data set -> what an answer is; to a question with options always its letter
_ANSWERS = {
    "chartqa": _VALUE,
    "choice": _LETTER,
    "clevr_math": _DIGIT,
    "geoqa": _LETTER,
    "tabmwp": "a single word or phrase",
}
DATASETS = tuple(sorted({*_ANSWERS, "pocket"}))


@dataclass(frozen=True)
class Prompts:
    """The texts of one data set.

    Attributes:
        direct: asks for a bare answer.
        cot: asks for a rationale that ends in an answer.
        refine, select: what is asked behind the candidates.
        target: how the answer of a self-select row is written.
        direct_choice, cot_choice: the same for a question with options.
        prediction: label before a candidate; `{}` is its number, empty for a single one.
        joint: between question, options and what is asked.
        target_letter: a self-select row of a question with options has the letter, however a candidate wrote it.
    """

    direct: str
    cot: str
    refine: str
    select: str
    target: str
    direct_choice: str
    cot_choice: str
    prediction: str = "Model's prediction{}:"
    joint: str = "\n"
    target_letter: bool = False

    def ask_directly(self, question: dict) -> str:
        """The prompt for a bare answer."""
        return self._prompt(question, self.direct_choice if question.get("choices") else self.direct)

    def ask(self, question: dict) -> str:
        """The prompt for a rationale."""
        return self._prompt(question, self.cot_choice if question.get("choices") else self.cot)

    def _prompt(self, question: dict, request: str) -> str:
        return self.joint.join([*question_parts(question, self.joint), request])

    def ask_to_refine(self, question: dict, prediction: str) -> str:
        """The rationale prompt, one earlier prediction, and the request to judge and refine it."""
        return self.refining(self.ask(question), prediction)

    def ask_to_select(self, question: dict, predictions: Sequence[str]) -> str:
        """The rationale prompt, the numbered predictions in the order given, and the request to choose."""
        return self.selecting(self.ask(question), predictions)

    def refining(self, prompt: str, prediction: str) -> str:
        """`ask_to_refine` behind any prompt."""
        return "\n".join([prompt, self.prediction.format(""), _without_images(prediction), self.refine])

    def selecting(self, prompt: str, predictions: Sequence[str]) -> str:
        """`ask_to_select` behind any prompt."""
        lines = [prompt]
        for number, prediction in enumerate(predictions, 1):
            lines += [self.prediction.format(f" {number}"), _without_images(prediction)]
        return "\n".join([*lines, self.select])

    def selected(self, answer: str) -> str:
        """The target of a self-select row."""
        return self.target.format(answer)


def _without_images(text: str) -> str:
    """A candidate without image placeholders: they would be counted as pictures."""
    return text.strip().replace(IMAGE, "image")


def load_prompts(dataset: str, style: str = "guided") -> Prompts:
    """The prompts of a data set.

    Raises UserError: no such data set or style.
    """
    if style not in STYLES:
        raise UserError(f"`prompt_style` is {style!r}. Styles: {', '.join(STYLES)}.")
    if dataset not in DATASETS:
        raise UserError(f"There are no prompts for {dataset!r}. Data sets: {', '.join(DATASETS)}.")
    if dataset == "pocket":
        # short and in one line, because the pocket tokenizer spells unknown words letter by letter
        cot = "Think first." if style == "guided" else PLAIN
        return Prompts(
            direct="Answer at once.",
            cot=cot,
            refine="Check again.",
            select="Which is correct?",
            target="So the answer is {}.",
            direct_choice="Answer at once.",
            cot_choice=cot,
            prediction="Try{}:",
            joint=" ",
        )

    def guided(answer: str) -> str:
        return f'Write a step-by-step solution first, then end with a line "Answer: " followed by {answer}.'

    answer = _ANSWERS[dataset]
    if answer == _LETTER:
        target, select = (
            "Answer:\n{}",
            'Reply with a line "Answer:" and, in the next line, the option\'s letter.',
        )
    elif dataset == "tabmwp":
        target, select = "Answer: {}", 'Reply with "Answer: " followed by its final answer.'
    else:
        target, select = "{}", f"Reply with its final answer alone: {answer}."
    checks = " in reading the picture, reasoning and calculating" if dataset == "tabmwp" else ""
    return Prompts(
        direct="Answer briefly." if answer == _LETTER else f"Answer with {answer}.",
        cot=guided(answer) if style == "guided" else PLAIN,
        refine="Judge whether this prediction is correct, and write a refined solution that ends with its "
        '"Answer: " line.',
        select=f"Which prediction is correct{checks}? {select}",
        target=target,
        direct_choice="Answer with the option's letter only.",
        cot_choice=guided(_LETTER) if style == "guided" else PLAIN,
        target_letter=answer == _LETTER,
    )


def plain_reflection() -> Prompts:
    """To be asked behind prompts that say by themselves how to answer: the form of the answer is left as it is."""
    checks, form = (
        "check the reading of the picture and the reasoning",
        "answer the question again in the form that was asked for",
    )
    return Prompts(
        refine=f"Judge whether this prediction is correct ({checks}), and {form}.",
        select=f"Which prediction is correct? Compare them ({checks}), and {form}.",
        target="{}",
        **dict.fromkeys(("direct", "cot", "direct_choice", "cot_choice"), ""),
    )
