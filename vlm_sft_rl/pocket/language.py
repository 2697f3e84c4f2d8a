"""What people say about a scene: captions (as noisy as web captions, or exact) and questions with exact answers."""

import random
from dataclasses import dataclass

from .world import CELLS, COLOURS, COMPANIONS, NOUNS, SIZES, Scene, draw_absent

CAPTION_PROMPT = "Describe the image."
THEME_PHRASES = {
    "beach": "At the beach",
    "desert": "In the desert",
    "meadow": "In the meadow",
    "room": "In the room",
    "snow": "In the snow",
}


@dataclass(frozen=True)
class Turn:
    """One question and its answer about a scene; `kind` names the skill it needs."""

    question: str
    answer: str
    kind: str

    @property
    def pieces(self) -> tuple[tuple[str, bool], ...]:
        """(text, supervised) parts of the turn as the chat template writes it, without the end-of-turn token."""
        return ((f"{self.question} ASSISTANT:", False), (f" {self.answer}", True))


@dataclass(frozen=True)
class Drill:
    """A list in which a fact about each item follows it at once; only the facts are supervised.

    Pre-training only: ten look-ups in one turn teach matching far faster than ten questions.
    """

    title: str
    items: tuple[tuple[str, str], ...]
    kind: str

    @property
    def pieces(self) -> tuple[tuple[str, bool], ...]:
        parts = [(self.title, False)]
        for number, (key, fact) in enumerate(self.items):
            parts += [(f"{', ' if number else ': '}{key}", False), (f" {fact}", True)]
        return (*parts, (".", False))


def with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def named_nouns(scene: Scene, rng: random.Random, noise: float) -> list[str]:
    """Nouns in the order people name them: reading order, each companion right after the noun it goes with.

    An absent companion is named all the same with probability `noise`, as captions on the web name what is typical.
    """
    present, named = set(scene.nouns), []
    for noun in scene.nouns:
        if noun in named:
            continue
        partner = COMPANIONS.get(noun)
        if any(COMPANIONS.get(other) == noun for other in present if other not in named):
            continue  # its companion-giver comes later and brings it along
        named.append(noun)
        while partner and partner not in named and (partner in present or rng.random() < noise):
            named.append(partner)
            partner = COMPANIONS.get(partner)
    return named


def caption(scene: Scene, named: list[str]) -> str:
    return f"{THEME_PHRASES[scene.theme]} there is {', '.join(with_article(noun) for noun in named)}."


def caption_turn(scene: Scene, rng: random.Random, noise: float) -> Turn:
    return Turn(CAPTION_PROMPT, caption(scene, named_nouns(scene, rng, noise)), "caption")


def existence_turn(scene: Scene, rng: random.Random, *, positive: bool, hard: float = 0.5) -> Turn:
    """`hard`: share of negative questions about the missing companion of something present."""
    noun = rng.choice(scene.nouns) if positive else draw_absent(rng, set(scene.nouns), hard)
    return Turn(f"Is there {with_article(noun)}?", "Yes" if positive else "No", "existence")


def location_turn(scene: Scene, rng: random.Random, *, positive: bool = True) -> Turn:
    if positive:
        item = rng.choice(scene.objects)
        return Turn(f"Where is the {item.noun}?", item.cell, "location")
    return Turn(f"Where is the {draw_absent(rng, set(scene.nouns), 0.5)}?", "nowhere", "location")


def content_turn(scene: Scene, rng: random.Random) -> Turn:
    cells = {item.cell: item for item in scene.objects}
    cell = rng.choice(list(cells)) if rng.random() < 0.7 else rng.choice(CELLS)
    item = cells.get(cell)
    return Turn(f"What is at {cell}?", f"{item.colour} {item.noun}" if item else "nothing", "content")


def colour_turn(scene: Scene, rng: random.Random) -> Turn:
    item = rng.choice(scene.objects)
    return Turn(f"What colour is the {item.noun}?", item.colour, "colour")


def counting_turn(scene: Scene, rng: random.Random) -> Turn:
    """Counting by colour, or all objects."""
    if rng.random() < 0.3:
        return Turn("How many things are there?", str(len(scene.objects)), "counting")
    colour = rng.choice(tuple(COLOURS)) if rng.random() < 0.3 else rng.choice(scene.objects).colour
    return Turn(
        f"How many {colour} things are there?",
        str(sum(o.colour == colour for o in scene.objects)),
        "counting",
    )


def location_drill(scene: Scene, rng: random.Random, absent: int = 5, hard: float = 0.4) -> Drill:
    items = [(item.noun, item.cell) for item in scene.objects]
    items += [(draw_absent(rng, set(scene.nouns), hard), "nowhere") for _ in range(absent)]
    rng.shuffle(items)
    return Drill("Locate", tuple(items), "locate-drill")


def content_drill(scene: Scene, rng: random.Random, empty: int = 3) -> Drill:
    items = [(item.cell, f"{item.colour} {item.noun}") for item in scene.objects]
    taken = {item.cell for item in scene.objects}
    items += [(cell, "nothing") for cell in rng.sample([cell for cell in CELLS if cell not in taken], empty)]
    rng.shuffle(items)
    return Drill("Read", tuple(items), "read-drill")


def corpus() -> list[str]:
    """Every word the world knows, with the space it carries inside a sentence, for training the tokenizer."""
    words = [*NOUNS, *COLOURS, *SIZES, *(f"{noun}s" for noun in NOUNS)]
    lines = [
        f"{phrase} there is {with_article(noun)}." for phrase in THEME_PHRASES.values() for noun in NOUNS
    ]
    lines += [f"USER: {word} ASSISTANT: {word}" for word in words]
    lines += [f"Where is the {noun}? nowhere" for noun in NOUNS] + [
        f"What is at {cell}? nothing" for cell in CELLS
    ]
    lines += [
        f"What colour is the {noun}? How many {colour} things are there?"
        for noun in NOUNS
        for colour in COLOURS
    ]
    lines += [
        "Is there a star? Yes",
        "Is there a moon? No",
        CAPTION_PROMPT,
        "So the answer is 1. plus minus equals",
    ]
    lines += ["Locate: Read:"] * 4
    lines += ["(Hint: potential incorrect phrases -> a star, a moon)"] * 2
    lines += [
        "SUMMARY CAPTION REASONING CONCLUSION box region check again correct wrong more fewer than left right"
    ] * 2
    return lines * 3
