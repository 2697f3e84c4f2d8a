"""Rows of the command's own: a few drawn pictures with questions and answers that any vision-language model takes."""

import random

from PIL import Image

from ..data.tags import CONFIDENT, OPEN, UNCONFIDENT
from ..pocket.language import CAPTION_PROMPT, THEME_PHRASES, with_article
from ..pocket.render import render
from ..pocket.world import Scene, draw_absent, draw_scene


def sample_rows(tagged: bool) -> list[dict]:
    """SFT rows: short and long answers, pictures of two shapes, a picture in two rows, two pictures, two turns, none.

    Args:
        tagged: the phrases of the long answers carry verification tags, and one in each is wrong.
    """
    rng = random.Random(0)
    scenes = [draw_scene(rng, 0.5) for _ in range(3)]
    first, second, third = (render(scene, seed) for seed, scene in enumerate(scenes))
    wide = Image.new("RGB", (2 * second.width, second.height))
    for place, picture in enumerate((second, third)):
        wide.paste(picture, (place * second.width, 0))
    noun = scenes[0].nouns[0]
    return [
        _row("short", [first], (f"Is there {with_article(noun)}?", "Yes")),
        _row("long", [first], (CAPTION_PROMPT, _caption(scenes[0], rng, tagged))),
        _row("wide picture", [wide], (CAPTION_PROMPT, _caption(scenes[1], rng, tagged))),
        _row("two pictures", [first, second], (f"Where is the {noun}?", scenes[0].objects[0].cell)),
        _row(
            "two turns",
            [third],
            ("How many things are there?", str(len(scenes[2].objects))),
            (CAPTION_PROMPT, _caption(scenes[2], rng, tagged)),
        ),
        _row("no picture", [], (f"What colour is the {noun}?", scenes[0].objects[0].colour)),
    ]


def _row(name: str, images: list, *turns: tuple[str, str]) -> dict:
    messages = []
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "images": images}


def _caption(scene: Scene, rng: random.Random, tagged: bool) -> str:
    """Two things that are there and, last, one that is not."""
    nouns = list(dict.fromkeys(scene.nouns))
    phrases = [(with_article(noun), CONFIDENT) for noun in nouns[:2]]
    phrases.append((with_article(draw_absent(rng, set(nouns), 0.5)), UNCONFIDENT))
    words = [f"{OPEN} {text} {close}" if tagged else text for text, close in phrases]
    return f"{THEME_PHRASES[scene.theme]} there is {', '.join(words)}."
