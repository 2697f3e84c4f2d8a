"""What the model is asked: one renderer a data set and style, the same object in training and at test time.

Two styles, as published: `guided` says how the answer is to be written, `plain` is the classic step-by-step line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.messages import IMAGE
from ..data.rows import question_text
from ..errors import UserError

STYLES = ("guided", "plain")
PLAIN = "Let's think step by step."
# data set -> what asks for a bare answer, and what an answer is
_VALUE = "a numerical value, Yes or No, a word or a phrase"
_DIGIT = "a single number from 0 to 10"
_ANSWERS = {
    "chartqa": (f"Answer with {_VALUE}.", _VALUE),
    "choice": ("Answer briefly.", "the option's letter"),
    "clevr_math": (f"Answer with {_DIGIT}.", _DIGIT),
    "geoqa": ("Answer briefly.", "the option's letter"),
    "tabmwp": ("Answer with a word or phrase.", "a word, a phrase, a number or an option's text"),
}
DATASETS = tuple(sorted({*_ANSWERS, "pocket"}))


@dataclass(frozen=True)
class Prompts:
    """The texts of one data set.

    Attributes:
        direct: asks for a bare answer; `direct_choice` the same with options.
        cot: asks for a rationale that ends in an answer.
        refine, select: what is asked behind the candidates.
        target: how the answer of a self-select row is written.
        prediction: label before a candidate; `{}` is its number, empty for a single one.
    """

    direct: str
    direct_choice: str
    cot: str
    refine: str
    select: str
    target: str
    prediction: str = "Model's prediction{}:"

    def ask_directly(self, question: dict) -> str:
        """The prompt for a bare answer."""
        instruction = self.direct_choice if question.get("choices") else self.direct
        return f"{question_text(question).strip()} {instruction}"

    def ask(self, question: dict) -> str:
        """The prompt for a rationale."""
        return f"{question_text(question).strip()} {self.cot}"

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

    Raises:
        UserError: no such data set or style.
    """
    if style not in STYLES:
        raise UserError(f"`prompt_style` is {style!r}. Styles: {', '.join(STYLES)}.")
    if dataset not in DATASETS:
        raise UserError(f"There are no prompts for {dataset!r}. Data sets: {', '.join(DATASETS)}.")
    if dataset == "pocket":
        # short, because the pocket tokenizer spells unknown words letter by letter
        return Prompts(
            direct="Answer at once.",
            direct_choice="Answer at once.",
            cot="Think first." if style == "guided" else PLAIN,
            refine="Check again.",
            select="Which is correct?",
            target="So the answer is {}.",
            prediction="Try{}:",
        )
    direct, answer = _ANSWERS[dataset]
    guided = (
        f'Write a step-by-step solution first, then end with a line "Answer: " followed by {answer}. '
        "Solution:"
    )
    checks = "check the reading of the picture, the reasoning and the calculation"
    return Prompts(
        direct=direct,
        direct_choice="Answer with the option's letter only.",
        cot=guided if style == "guided" else PLAIN,
        refine=f"Judge whether this prediction is correct ({checks}), and write a refined solution that ends with its "
        f'"Answer: " line.',
        select=f'Which prediction is correct? Compare them ({checks}) and reply with "Answer: " followed by {answer}.',
        target="Answer: {}",
    )


def plain_reflection() -> Prompts:
    """To be asked behind prompts that say by themselves how to answer: the form of the answer is left as it is."""
    checks, form = (
        "check the reading of the picture and the reasoning",
        "answer the question again in the form that was asked for",
    )
    return Prompts(
        direct="",
        direct_choice="",
        cot="",
        refine=f"Judge whether this prediction is correct ({checks}), and {form}.",
        select=f"Which prediction is correct? Compare them ({checks}), and {form}.",
        target="{}",
    )
