"""Wrong alternatives of a phrase: by rule, from what goes together in a data set, from a prior, or from a teacher.

A negative must not betray itself by its company: were wrong nouns drawn at random, "unusual here" would predict `</UN>`
and nobody would have to look at the image. So a wrong noun is drawn from those that most often accompany the nouns of
this very image and yet are absent from it.
"""

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UserError
from ..conclusions import without_thinking
from ..tags import VERIFICATION_TOKENS
from .config import KINDS
from .phrases import (
    ARTICLES,
    ATTRIBUTES,
    COLOURS,
    COUNTED,
    NUMBERS,
    RELATIONS,
    YES_NO,
    Phrase,
    content_words,
    fix_article,
    plural,
    with_case_of,
    words,
)
from .verdicts import Scene

TEACHER = "teacher"  # the kind of a teacher's negatives
GENERAL = "general_answer"  # REVERSE's name for all that is free text
PRIORS = ("company", "theme", "uniform")
Choose = Callable[[Sequence[str]], str]

MOST_NOUNS = 2000  # the commonest of a data set; memory grows with the pairs of them
SHRINK = 5.0  # occurrences of a noun below which its company says little
HARDNESS = 2.0  # exponent on the conditional frequency: 0 is uniform, larger is nearer to "the likeliest"
LONGEST_RATIO = 3.0  # in characters, of the longer to the shorter phrase

_OPTION = re.compile(r"(?:^|[\s(])([A-H])[.):]\s", re.MULTILINE)
_NUMBER = re.compile(rf"(?<![\w.-])(\d{{1,4}}|{'|'.join(NUMBERS)})(?![\w-]|[.,]\d)", re.IGNORECASE)
_COLOUR = re.compile(rf"(?<!\w)({'|'.join(COLOURS)})(?!\w)", re.IGNORECASE)
_QUESTIONS = (
    ("count", re.compile(r"\bhow many\b|\bnumber of\b", re.IGNORECASE)),
    ("colour", re.compile(r"\b(what|which) colou?rs?\b", re.IGNORECASE)),
)


@dataclass(frozen=True)
class Negative:
    """A text that is wrong where `phrase` stands, and the kind of mistake; its noun or place, where that is new."""

    phrase: Phrase
    text: str
    kind: str
    head: str = ""
    place: str = ""


def answer_type(question: str, answer: str) -> str:
    """ "yes_no", "choice", "count", "colour" or "general_answer"."""
    if YES_NO.match(answer):
        return "yes_no"
    if re.fullmatch(r"\s*\(?[A-H]\)?[.:]?\s*", answer) and option_letters(question):
        return "choice"
    return next((kind for kind, pattern in _QUESTIONS if pattern.search(question)), GENERAL)


def option_letters(question: str) -> list[str]:
    """Letters of the options of a multiple-choice question; empty unless they run A, B, …"""
    letters = _OPTION.findall(question)
    expected = [chr(ord("A") + i) for i in range(len(letters))]
    return letters if len(letters) > 1 and letters == expected else []


# --- By rule ---


def by_rule(phrase: Phrase, question: str, kind_of_answer: str, choose: Choose) -> Iterator[Negative]:
    """Candidates of every kind but "object".

    Args:
        choose: picks one of several words, by chance; how often they occur in the data set should count.
    """
    text = phrase.text
    if kind_of_answer == "yes_no":
        if YES_NO.fullmatch(text):
            yield Negative(phrase, with_case_of(text[0], "no" if text.lower() == "yes" else "yes"), "yes_no")
        return
    if kind_of_answer == "choice":
        others = [letter for letter in option_letters(question) if letter not in text]
        if others and (letter := re.search(r"[A-H]", text)):
            swapped = text[: letter.start()] + choose(others) + text[letter.end() :]
            yield Negative(phrase, swapped, "choice")
        return
    for match in _NUMBER.finditer(text):
        if (other := _other_number(match.group(), phrase, choose)) is not None:
            yield _swap_word(phrase, match, other, "count")
    colours = {word for word in words(text) if word in COLOURS}
    for match in _COLOUR.finditer(text):
        if phrase.noun and text[match.start() :].lower() == phrase.noun.lower():
            continue  # "an orange" is a fruit
        others = [colour for colour in COLOURS[:10] if colour not in colours]
        yield _swap_word(phrase, match, choose(others), "colour")
    for group in ATTRIBUTES:
        for match in re.finditer(rf"(?<![\w-])({'|'.join(group)})(?![\w-])", text, re.IGNORECASE):
            others = [word for word in group if word not in words(text)]
            if others and len(phrase.place) <= match.start() and match.end() < len(text):
                yield _swap_word(phrase, match, choose(others), "attribute")
    if phrase.place:
        others = {place for pair in RELATIONS if phrase.place in pair for place in pair} - {phrase.place}
        before, behind = text[: len(phrase.place)], text[len(phrase.place) :]
        for other in sorted(others):
            yield Negative(phrase, with_case_of(before, other) + behind, "relation", place=other)


def _other_number(number: str, phrase: Phrase, choose: Choose) -> str | None:
    # a number near by, in words or digits as this one; it must not ask for another form of the noun
    word = number.lower()
    value = NUMBERS.index(word) if word in NUMBERS else int(number)
    if value == 1 and phrase.noun:
        return None
    low = 2 if phrase.noun else 0
    near = [n for n in range(value - 3, value + 4) if n >= low and n != value]
    if word in NUMBERS:
        return with_case_of(number, choose([NUMBERS[n] for n in near if n < len(NUMBERS)]))
    return choose([str(n) for n in near])


def _swap_word(phrase: Phrase, match: re.Match, other: str, kind: str) -> Negative:
    text = phrase.text
    swapped = text[: match.start()] + with_case_of(match.group(), other) + text[match.end() :]
    return Negative(phrase, fix_article(swapped), kind)


def swap_noun(phrase: Phrase, noun: str, head: str) -> Negative:
    """The phrase with another noun, written as `noun`, in the place of its own: article and capital letter stay right."""
    before = phrase.text[: len(phrase.text) - len(phrase.noun)]
    return Negative(phrase, fix_article(before + with_case_of(phrase.noun, noun)), "object", head)


# --- From what goes together in a data set ---


def _slot(phrase: Phrase) -> tuple[str, str, bool]:
    # the grammatical place that a noun fills: preposition, kind of determiner, number
    before = words(phrase.text[len(phrase.place) : len(phrase.text) - len(phrase.noun)])
    first = before[0] if before else ""
    if first in ("a", "an"):
        kind = "a"
    elif first in ARTICLES:
        kind = "the"
    elif first in NUMBERS or first.isdigit():
        kind = "number"
    else:
        kind = "other" if first else ""
    return phrase.place, kind, phrase.plural


class Corpus:
    """Counts over a data set, built a row at a time with `add`, then closed with `finish`."""

    def __init__(self) -> None:
        self.rows: Counter = Counter()  # noun -> rows that name it
        self.words: Counter = Counter()  # of all phrases
        self.placed: set[tuple[str, str]] = set()  # preposition, noun
        self.slots: dict[tuple, Counter] = defaultdict(Counter)
        self.forms: dict[tuple[str, bool], Counter] = defaultdict(Counter)
        self.together: dict[str, Counter] = defaultdict(Counter)
        self.images: Counter = Counter()  # noun -> images that it is said of
        self.named: dict[str, set[str]] = defaultdict(set)  # image -> nouns in anything said about it
        self._kept: frozenset = frozenset()

    def add(self, image: str, phrases: Iterable[Phrase]) -> None:
        """Count the phrases of one row; `image` is its key."""
        heads = set()
        for phrase in phrases:
            self.words.update(words(phrase.text))
            if phrase.head:
                self.placed.add((phrase.place, phrase.head))
                heads.add(phrase.head)
                if phrase.noun:
                    is_name = len(phrase.noun.split()) > 1 and phrase.noun.istitle()  # "Big Ben"
                    form = phrase.noun if phrase.noun.isupper() or is_name else phrase.noun.lower()
                    self.slots[_slot(phrase)][phrase.head] += 1
                    self.forms[phrase.head, phrase.plural][form] += 1
        self.named[image] |= heads
        self.rows.update(heads)

    def finish(self) -> "Corpus":
        """Count pairs of nouns of the same image."""
        self._kept = frozenset(noun for noun, _ in self.rows.most_common(MOST_NOUNS))
        for heads in self.named.values():
            kept = heads & self._kept
            self.images.update(kept)
            for noun in kept:
                self.together[noun].update(kept - {noun})
        return self

    def weights(
        self, phrase: Phrase, company: Collection[str], absent_from: Collection[str]
    ) -> dict[str, float]:
        """Nouns that could stand in the phrase's place, each with how much it is expected in this company.

        The weight is the largest `images with both / (images with the other + SHRINK)` over the company, to the power
        HARDNESS.

        Args:
            company: nouns named with the phrase.
            absent_from: nouns that must not be drawn, nor nouns that end in the same word.
        """
        last = {noun.rsplit(" ", 1)[-1] for noun in absent_from}
        others = [noun for noun in company if noun != phrase.head and noun in self._kept]
        weights = {}
        for noun in self.slots[_slot(phrase)]:
            if noun not in self._kept or noun.rsplit(" ", 1)[-1] in last:
                continue
            expected = max((self.together[o][noun] / (self.images[o] + SHRINK) for o in others), default=0.0)
            base = self.images[noun] / (len(self.named) + SHRINK)
            weights[noun] = max(expected, base) ** HARDNESS
        return weights

    def draw(
        self, phrase: Phrase, company: Collection[str], absent_from: Collection[str], rng: random.Random
    ) -> Negative | None:
        """The phrase with a noun drawn by `weights`; None where nothing fits."""
        weights = self.weights(phrase, company, absent_from) if phrase.noun else {}
        if not weights:
            return None
        heads = sorted(weights)
        head = rng.choices(heads, [weights[h] for h in heads])[0]
        return swap_noun(phrase, self.forms[head, phrase.plural].most_common(1)[0][0], head)

    def choose(self, options: Sequence[str], rng: random.Random) -> str:
        """One of several words, as often as the data set uses it; evenly where it uses none of them."""
        weights = [self.words[option.lower()] for option in options]
        return rng.choices(options, weights if any(weights) else None)[0]


# --- From ground truth and a prior ---


Prior = Callable[[Scene], Mapping[str, float]] | Mapping[str | None, Mapping[str, float]]


def draw_absent(
    phrase: Phrase, scene: Scene, nouns: Collection[str], prior: Prior | None, rng: random.Random
) -> Negative | None:
    """The phrase with a noun that the image lacks, drawn from the prior; None where every weight is zero."""
    if prior is None:
        weights: Mapping[str, float] = dict.fromkeys(nouns, 1.0)
    else:
        weights = prior(scene) if callable(prior) else prior[scene.theme]
    present = set(scene.objects)
    absent = sorted(noun for noun, weight in weights.items() if weight > 0 and noun not in present)
    if not absent:
        return None
    noun = rng.choices(absent, [weights[noun] for noun in absent])[0]
    first = phrase.text.split()[0].lower()
    is_plural = phrase.plural or first in COUNTED or (first.isdigit() and first != "1")  # "two fish"
    return swap_noun(phrase, plural(noun) if is_plural else noun, noun)


def prior_of(
    name: str, scenes: Collection[Scene], nouns: Collection[str], where: str | Path = ""
) -> Prior | None:
    """How likely each noun is in a picture, for drawing absent ones.

    `company`: as often as it stands beside each of the nouns that are there, averaged over them, plus its share of all
    pictures, so that none of the vocabulary's nouns that occur is impossible. `theme`: its share of the pictures of that
    theme. `uniform`: all alike (then rare nouns are the wrong ones, and a model need not look).

    Raises UserError: an unknown name, or no themes in the ground truth.
    """
    if name not in PRIORS:
        raise UserError(f"prior: {name!r} is not one of {', '.join(PRIORS)}.")
    if name == "uniform":
        return None
    known = set(nouns)
    if name == "theme":
        if any(scene.theme is None for scene in scenes):
            raise UserError(
                f"{where}: some lines have no `theme`, which the prior `theme` needs. Use `company`."
            )
        themes: dict[str | None, Counter] = defaultdict(Counter)
        for scene in scenes:
            themes[scene.theme].update(known & set(scene.objects))
        return dict(themes)
    alone: Counter = Counter()
    beside: dict[str, Counter] = {noun: Counter() for noun in nouns}
    for scene in scenes:
        present = known & set(scene.objects)
        alone.update(present)
        for noun in present:
            beside[noun].update(present - {noun})

    def company(scene: Scene) -> dict[str, float]:
        present = sorted(noun for noun in set(scene.objects) & known if alone[noun])
        weights = {noun: count / len(scenes) for noun, count in alone.items()}
        for noun in present:
            for other, count in beside[noun].items():
                weights[other] += count / alone[noun] / len(present)
        return weights

    return company


# --- From a teacher ---
# After REVERSE (arXiv 2504.13169, appendix B): the teacher picks one tagged phrase and exchanges it for something of the
# same category that looks or means something else; it gives its reason first.

SYSTEM = """\
You make a training set harder to cheat on. You get a question about an image and a correct answer in which the phrases \
that can be checked against the image are numbered, like [2: a red kettle].

Choose ONE numbered phrase and write a replacement that makes the answer wrong for this image:
- same category and grammar as the phrase: a vessel for a vessel, a colour for a colour, singular for singular, with the \
same article or number where there is one;
- something that could well be in such an image, but clearly another thing: no synonym, no broader or narrower word;
- nothing that the question or the rest of the answer mentions;
- if the phrase begins with a word that the question uses already, keep that word.

Reply with JSON alone: {"reason": "one short sentence", "phrase": NUMBER, "replacement": "TEXT"}"""
EXAMPLES = (  # question and answer, then the reply: reason, phrase, replacement
    (
        "Question: What is the man holding?\nAnswer: The man is holding [1: a paper cup].",
        ("Another thing one drinks from.", 1, "a glass bottle"),
    ),
    (
        "Question: Describe the image.\nAnswer: [1: A grey cat] sleeps [2: on a wooden chair] next to [3: two books].",
        ("Another piece of furniture cats sleep on.", 2, "on a wooden shelf"),
    ),
    (
        "Question: What is this person's job?\nAnswer: [1: The woman] seems to be [2: a nurse].",
        ("A job with similar clothes.", 2, "a cook"),
    ),
    (
        "Question: From where is the bus seen?\nAnswer: It is [1: the back view] of the bus.",
        ("The opposite side.", 1, "the front view"),
    ),
)


def teacher_messages(question: str, answer: str, phrases: Sequence[Phrase]) -> list[dict]:
    """The chat that asks for one negative; the last message is text alone, without the image."""
    chat = [{"role": "system", "content": SYSTEM}]
    for task, reply in EXAMPLES:
        solution = json.dumps(dict(zip(("reason", "phrase", "replacement"), reply, strict=True)))
        chat += [{"role": "user", "content": task}, {"role": "assistant", "content": solution}]
    numbered, cursor = "", 0  # `There is a cat.` -> `There is [1: a cat].`
    for number, phrase in enumerate(phrases, 1):
        numbered += f"{answer[cursor : phrase.start]}[{number}: {phrase.text}]"
        cursor = phrase.end
    task = f"Question: {question.strip()}\nAnswer: {numbered}{answer[cursor:]}"
    return [*chat, {"role": "user", "content": task}]


def read_teacher(text: str, question: str, phrases: Sequence[Phrase]) -> Negative | None:
    """The negative that a reply proposes; None where it is not of the form asked for.

    Takes JSON inside a code fence or after other words.
    """
    text = without_thinking(text)
    for brace in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, brace.start())
        except (ValueError, RecursionError):
            continue
        number, replacement = value.get("phrase"), value.get("replacement")
        if type(number) is not int or not 1 <= number <= len(phrases) or not isinstance(replacement, str):
            return None
        phrase = phrases[number - 1]
        replacement = re.sub(rf"^\[?{number}:\s*|\]$", "", replacement.strip())
        first = words(phrase.text)[:1]
        if first and first[0] in words(question) and words(replacement)[:1] != first:
            return None
        return Negative(phrase, replacement, TEACHER)
    return None


# --- Quality control ---


def fault(
    negative: Negative,
    nouns: Collection[str],
    other_phrases: Collection[str] = (),
    answer_words: Collection[str] = (),
) -> str | None:
    """Why nobody should learn from a negative, in a few words (they are counted), or None when all is well.

    Args:
        nouns: said, or annotated, to be in the image.
        other_phrases, answer_words: the answer's other phrases, and all its words.
    """
    phrase, text, by_teacher = negative.phrase, negative.text, negative.kind not in KINDS
    breaks = not text.isprintable() if by_teacher else any(mark in text for mark in "\n\r\t")
    if not text.strip() or text != text.strip() or breaks:
        return "empty or with breaks"
    if any(tag in text for tag in VERIFICATION_TOKENS) or "<" in text:
        return "tag inside"
    if text[-1] in ".,;:!?":
        return "ends in punctuation"
    meaning, meant = content_words(text), content_words(phrase.text)
    if words(text) == words(phrase.text) or (meaning == meant and negative.kind != "yes_no"):
        return "same as the positive"
    if by_teacher and set(meaning) and set(meaning) < set(meant):
        return "less said, not wrong"
    if any(words(text) == words(other) for other in other_phrases):
        return "said elsewhere in the answer"
    if negative.head and (negative.head in nouns or (meaning and meaning[-1] in answer_words)):
        return "in the image"
    if by_teacher:
        # the last noun of a free text; the phrase's own noun may stay: another attribute
        tails = {" ".join(meaning[i:]) for i in range(len(meaning))}
        if any(tail in nouns and tail != phrase.head for tail in tails):
            return "in the image"
    longer, shorter = max(len(text), len(phrase.text)), min(len(text), len(phrase.text))
    if longer > LONGEST_RATIO * shorter and longer > 12:
        return "length"
    if text != fix_article(text) and phrase.text == fix_article(phrase.text):
        return "wrong article"
    if text[0].isalpha() and phrase.text[0].isalpha() and text[0].isupper() != phrase.text[0].isupper():
        return "capital letter"
    if by_teacher and _article(text) != _article(phrase.text):
        return "another article or number"
    return None


def _article(text: str) -> str:
    return {"a": "a", "an": "a", "the": "the"}.get(next(iter(words(text)), ""), "")
