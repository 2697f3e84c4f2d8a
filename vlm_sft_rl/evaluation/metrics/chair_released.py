"""How the released CHAIR evaluator (REVERSE's, after LisaAnne/Hallucination) finds objects in a caption.

The rules, on lemmas of the lower-cased caption: merge listed two-word objects from left to right; drop "seat" where
"toilet" stands, too; keep words of the synonym table; map each to the first word of its row. Quirks that are kept:

- an empty line of the table puts the empty word into the vocabulary;
- names inside a row keep a blank that stands before them beyond the separating one, and then never match
  (" motor bike"); blanks around a row are cut off;
- upper-case names ("iPhone") never match the lower-cased text;
- later rows overwrite earlier ones that list the same name;
- names of three words ("stove top oven") cannot match; "orange", "bow" or "turkey" match whatever they mean;
- "home plate" and "train track" are merged only so that "plate" and "train" are not counted.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from ...io import read_text

_DOUBLE = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal", "stop light",
    "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball", "baseball bat", "baseball glove",
    "tennis racket", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier",
    "potted plant", "bow tie", "laptop computer", "stove top oven", "home plate", "train track",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub",
)  # fmt: skip
DOUBLE_WORDS = {
    **{phrase: phrase for phrase in _DOUBLE},
    **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
    "passenger jet": "jet",
    "passenger train": "train",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
}


def merge_words(words: Sequence[str]) -> list[str]:
    """Listed pairs become one word, from left to right."""
    merged, index = [], 0
    while index < len(words):
        pair = " ".join(words[index : index + 2])
        if index + 1 < len(words) and pair in DOUBLE_WORDS:
            merged.append(DOUBLE_WORDS[pair])
            index += 2
        else:
            merged.append(words[index])
            index += 1
    return merged


def released_table(text: str) -> dict[str, str]:
    """Name -> first word of its row, from the content of `synonyms.txt`."""
    table = {}
    for line in text.split("\n"):
        names = line.strip().split(", ")
        for name in names:
            table[name] = names[0]
    return table


class ReleasedParser:
    """Caption -> node words, by the rules above.

    Args:
        table: name -> node word.
        lemmas: text -> lemmas of its lower-cased tokens; NLTK's in real use.
    """

    def __init__(self, table: dict[str, str], lemmas: Callable[[str], Sequence[str]]):
        self.table, self.lemmas = table, lemmas

    @classmethod
    def from_file(cls, path: str | Path, lemmas: Callable[[str], Sequence[str]]) -> "ReleasedParser":
        return cls(released_table(read_text(path)), lemmas)

    def canonical(self, name: str) -> str | None:
        return self.table.get(name)

    def nouns(self, caption: str) -> tuple[list[str], int]:
        """Node words in order, one a mention, and the number of words after merging."""
        words = merge_words(self.lemmas(caption))
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [self.table[word] for word in words if word in self.table], len(words)
