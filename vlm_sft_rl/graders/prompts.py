"""What the model is asked: one renderer a data set and style, the same object in training and at test time.

Two styles, as published: `guided` says how the answer is to be written, `plain` is the classic step-by-step line.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..data.rows import IMAGE
from ..errors import UserError
from .choice import LETTERS, options_of

STYLES = ("guided", "plain")
DATASETS = ("chartqa", "choice", "clevr_math", "geoqa", "pocket", "tabmwp")
PLAIN = "Let's think step by step."


@dataclass(frozen=True)
class Prompts:
    """The texts of one data set.

    Attributes:
        direct: asks for a bare answer; `direct_choice` the same with options.
        cot: asks for a rationale that ends in an answer.
        prediction: label before a candidate; `{}` is its number, empty for a single one.
        refine, select: what is asked behind the candidates.
        target: how the answer of a self-select row is written.
    """

    direct: str
    direct_choice: str
    cot: str
    prediction: str
    refine: str
    select: str
    target: str

    def ask_directly(self, question: dict) -> str:
        instruction = self.direct_choice if question.get("choices") else self.direct
        return f"{self._block(question)} {instruction}"

    def ask(self, question: dict) -> str:
        """The prompt for a rationale."""
        return f"{self._block(question)} {self.cot}"

    def ask_to_refine(self, question: dict, prediction: str) -> str:
        """The rationale prompt, one earlier prediction, and the request to judge and refine it."""
        return self.refining(self.ask(question), prediction)

    def ask_to_select(self, question: dict, predictions: Sequence[str]) -> str:
        """The rationale prompt, the numbered predictions in the order given, and the request to choose."""
        return self.selecting(self.ask(question), predictions)

    def refining(self, asked: str, prediction: str) -> str:
        """`ask_to_refine` behind any prompt."""
        return "\n".join([asked, self._label(None), _safe(prediction), self.refine])

    def selecting(self, asked: str, predictions: Sequence[str]) -> str:
        """`ask_to_select` behind any prompt."""
        parts = [asked]
        for number, prediction in enumerate(predictions, 1):
            parts += [self._label(number), _safe(prediction)]
        return "\n".join([*parts, self.select])

    def selected(self, answer: str) -> str:
        """The target of a self-select row."""
        return self.target.format(answer)

    def _label(self, number: int | None) -> str:
        return self.prediction.format("" if number is None else f" {number}")

    def _block(self, question: dict) -> str:
        """Question, unit and lettered options."""
        text = question["question"].strip()
        if unit := question.get("unit"):
            text += f" (Unit: {unit})"
        if question.get("choices"):
            options = options_of(question)
            lettered = (f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
            text += f" Options: {' '.join(lettered)}"
        return text


def _safe(text: str) -> str:
    """A candidate without image placeholders: they would be counted as pictures."""
    return text.strip().replace(IMAGE, "image")


def _guided(answer: str) -> str:
    return (
        f'Write a step-by-step solution first, then end with a line "Answer: " followed by {answer}. '
        "Solution:"
    )


def _prompts(
    direct: str, answer: str, style: str, *, choice: str = "Answer with the option's letter only."
) -> Prompts:
    asked = "check the reading of the picture, the reasoning and the calculation"
    return Prompts(
        direct=direct,
        direct_choice=choice,
        cot=_guided(answer) if style == "guided" else PLAIN,
        prediction="Model's prediction{}:",
        refine=f"Judge whether this prediction is correct ({asked}), and write a refined solution that ends with its "
        f'"Answer: " line.',
        select=f'Which prediction is correct? Compare them ({asked}) and reply with "Answer: " followed by {answer}.',
        target="Answer: {}",
    )


def plain_reflection() -> Prompts:
    """To be asked behind prompts that say by themselves how to answer: the form of the answer is left as it is."""
    asked = "check the reading of the picture and the reasoning"
    return Prompts(
        direct="",
        direct_choice="",
        cot="",
        prediction="Model's prediction{}:",
        refine=f"Judge whether this prediction is correct ({asked}), and answer the question again in the form that was "
        "asked for.",
        select=f"Which prediction is correct? Compare them ({asked}), and answer the question again in the form that was "
        "asked for.",
        target="{}",
    )


def load_prompts(dataset: str, style: str = "guided") -> Prompts:
    """The prompts of a data set.

    Raises:
        UserError: no such data set or style.
    """
    if style not in STYLES:
        raise UserError(f"`prompt_style` is {style!r}. Styles: {', '.join(STYLES)}.")
    match dataset:
        case "tabmwp":
            return _prompts(
                "Answer with a word or phrase.", "a word, a phrase, a number or an option's text", style
            )
        case "chartqa":
            answer = "a numerical value, Yes or No, a word or a phrase"
            return _prompts(f"Answer with {answer}.", answer, style)
        case "clevr_math":
            answer = "a single number from 0 to 10"
            return _prompts(f"Answer with {answer}.", answer, style)
        case "geoqa" | "choice":
            return _prompts("Answer briefly.", "the option's letter", style)
        case "pocket":
            # short, because the pocket tokenizer spells unknown words letter by letter
            return Prompts(
                direct="Answer at once.",
                direct_choice="Answer at once.",
                cot="Think first." if style == "guided" else PLAIN,
                prediction="Try{}:",
                refine="Check again.",
                select="Which is correct?",
                target="So the answer is {}.",
            )
    raise UserError(f"There are no prompts for {dataset!r}. Data sets: {', '.join(DATASETS)}.")
