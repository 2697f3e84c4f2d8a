"""Rows about a few pictures, several a picture, for the tests of packing."""

from functools import cache

from PIL import Image

NOUNS = ["cat", "dog", "kettle", "star", "boat", "tree"]


@cache
def picture(number: int) -> Image.Image:
    """A picture of its own content; odd ones are twice as wide as high."""
    size = (112, 56) if number % 2 else (56, 56)
    return Image.linear_gradient("L").rotate(40 * number).convert("RGB").resize(size)


def row(question: str, answer: str, *images: int, id: str = "row", **message) -> dict:
    return {
        "id": id,
        "messages": [
            {"role": "user", "content": "<image>\n" * len(images) + question},
            {"role": "assistant", "content": answer, **message},
        ],
        "images": [picture(i) for i in images],
    }


def tagged_rows(pictures: int = 3, each: int = 4) -> list[dict]:
    """`each` rows about every picture, of different lengths; every second one ends in a hallucinated phrase."""
    rows = []
    for p in range(pictures):
        for k in range(each):
            phrases = [f"<SPAN> a {NOUNS[(p + k + i) % 6]} </CN>" for i in range(k)]
            phrases.append(f"<SPAN> a {NOUNS[(p + 2 * k) % 6]} </{'UN' if k % 2 else 'CN'}>")
            question = ["What is there?", "Describe it briefly."][k // 2 % 2]
            rows.append(row(question, "There is " + " and ".join(phrases), p, id=f"{p}-{k}"))
    return rows


def mixed_rows() -> list[dict]:
    """Shared images, an image of its own, text alone, two images, several turns, an answer without loss."""
    turns = row("Is it a dog?", "Yes.", 0, id="turns", weight=0)
    turns["messages"] += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "It is a cat."},
    ]
    return [
        row("What is there?", "A cat.", 0, id="a"),
        row("What is there?", "A dog and another one.", 0, id="b"),
        row("What is there?", "A boat.", 1, id="alone"),
        row("No picture", "None at all.", id="text"),
        row("Which is wider?", "The second.", 0, 1, id="two"),
        turns,
        row("Which is higher?", "Neither is.", 0, 1, id="two-more"),
        row("Why?", "Because.", 0, id="c"),
    ]
