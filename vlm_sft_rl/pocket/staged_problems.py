"""Questions with a choice of things by name, for staged answers: which one is there, is not, or has a colour."""

import random
from dataclasses import dataclass

from .world import Scene, draw_absent

KINDS = ("there", "nowhere", "colour")


@dataclass(frozen=True)
class Choice:
    """One question: which of the `nouns`; exactly one, `answer`, fits. `colour`: of the kind that asks for one."""

    kind: str
    nouns: tuple[str, ...]
    answer: str
    colour: str | None = None

    @property
    def text(self) -> str:
        asked = {"there": "there", "nowhere": "nowhere", "colour": self.colour}[self.kind]
        return f"Which is {asked}: {', '.join(self.nouns)}?"

    def found(self, scene: Scene) -> dict[str, str]:
        """Noun -> what the question wants to know of it: `there` or its colour, and `nowhere` where it is absent."""
        known = {item.noun: item.colour if self.kind == "colour" else "there" for item in scene.objects}
        return {noun: known.get(noun, "nowhere") for noun in self.nouns}


def ask(kind: str, scene: Scene, rng: random.Random) -> Choice:
    """A question with three to five choices; those that are not in the picture often belong to what is there."""
    number = rng.randint(3, 5)
    objects = rng.sample(scene.objects, len(scene.objects))
    if kind == "there":
        present, colour = objects[:1], None
    elif kind == "nowhere":
        present, colour = objects[: number - 1], None
    else:
        colour = objects[0].colour
        others = [item for item in objects[1:] if item.colour != colour]
        present = [objects[0], *others[: rng.randint(1, number - 1)]]
    absent = 1 if kind == "nowhere" else number - len(present)
    nouns = [item.noun for item in present]
    for _ in range(absent):
        nouns.append(draw_absent(rng, {*scene.nouns, *nouns}, 0.5))
    answer = nouns[-1] if kind == "nowhere" else nouns[0]
    rng.shuffle(nouns)
    return Choice(kind, tuple(nouns), answer, colour)
