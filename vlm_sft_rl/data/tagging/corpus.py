"""What goes with what in a data set: hard negatives come from its own words.

A negative must not betray itself by its company: were wrong nouns drawn at random, "unusual here" would predict
`</UN>` and nobody would have to look at the image. So a wrong noun is drawn from those that most often accompany the
nouns of this very image and yet are absent from all that is said about it.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence

from .lexicon import ARTICLES, NUMBERS, words
from .taggers import Chunk

MOST_NOUNS = 2000  # the commonest; memory grows with the pairs of them
SHRINK = 5.0  # occurrences of a noun below which its company says little
HARDNESS = 2.0  # exponent on the conditional frequency: 0 is uniform, larger is nearer to "the likeliest"


def slot(chunk: Chunk) -> tuple[str, str, bool]:
    """The grammatical place that a noun fills: preposition, kind of determiner, number."""
    before = words(chunk.text[len(chunk.place) : len(chunk.text) - len(chunk.noun)])
    first = before[0] if before else ""
    if first in ("a", "an"):
        kind = "a"
    elif first in ARTICLES:
        kind = "the"
    elif first in NUMBERS or first.isdigit():
        kind = "number"
    else:
        kind = "other" if first else ""
    return chunk.place, kind, chunk.plural


class Corpus:
    """Counts over a data set, built a row at a time with `add`, then closed with `finish`."""

    def __init__(self) -> None:
        self.rows: Counter = Counter()  # noun -> rows that name it
        self.words: Counter = Counter()  # of all phrases
        self.placed: set[tuple[str, str]] = set()  # preposition, noun
        self.slots: dict[tuple, Counter] = defaultdict(Counter)
        self.forms: dict[tuple[str, bool], Counter] = defaultdict(Counter)
        self.together: dict[str, Counter] = defaultdict(Counter)
        self.named: dict[str, set[str]] = defaultdict(set)  # image -> nouns in anything said about it
        self._kept: frozenset = frozenset()

    def add(self, image: str, chunks: Iterable[Chunk]) -> None:
        """Count the phrases of one row; `image` is its key."""
        heads = set()
        for chunk in chunks:
            self.words.update(words(chunk.text))
            if chunk.head:
                self.placed.add((chunk.place, chunk.head))
                heads.add(chunk.head)
                if chunk.noun:
                    self.slots[slot(chunk)][chunk.head] += 1
                    self.forms[chunk.head, chunk.plural][lowered(chunk.noun)] += 1
        self.named[image] |= heads
        self.rows.update(heads)

    def finish(self) -> "Corpus":
        """Count pairs of nouns of the same image."""
        self._kept = frozenset(noun for noun, _ in self.rows.most_common(MOST_NOUNS))
        self.images: Counter = Counter()
        for heads in self.named.values():
            kept = heads & self._kept
            self.images.update(kept)
            for noun in kept:
                self.together[noun].update(kept - {noun})
        return self

    def weights(
        self, chunk: Chunk, company: Collection[str], absent_from: Collection[str]
    ) -> dict[str, float]:
        """Nouns that could stand in the chunk's place, each with how much it is expected in this company.

        The weight is the largest `images with both / (images with the other + SHRINK)` over the company, to the power
        HARDNESS.

        Args:
            company: nouns named with the chunk.
            absent_from: nouns that must not be drawn, nor nouns that end in the same word.
        """
        last = {noun.rsplit(" ", 1)[-1] for noun in absent_from}
        others = [noun for noun in company if noun != chunk.head and noun in self._kept]
        found = {}
        for noun in self.slots[slot(chunk)]:
            if noun not in self._kept or noun.rsplit(" ", 1)[-1] in last:
                continue
            expected = max((self.together[o][noun] / (self.images[o] + SHRINK) for o in others), default=0.0)
            base = self.images[noun] / (len(self.named) + SHRINK)
            found[noun] = max(expected, base) ** HARDNESS
        return found

    def draw(
        self, chunk: Chunk, company: Collection[str], absent_from: Collection[str], rng: random.Random
    ) -> tuple[str, str] | None:
        """`(noun as written, head)` drawn by `weights`; None where nothing fits."""
        if not chunk.noun:
            return None
        weights = self.weights(chunk, company, absent_from)
        if not weights:
            return None
        heads = sorted(weights)
        head = rng.choices(heads, [weights[h] for h in heads])[0]
        return self.forms[head, chunk.plural].most_common(1)[0][0], head

    def choose(self, options: Sequence[str], rng: random.Random) -> str:
        """One of several words, as often as the data set uses it; evenly where it uses none of them."""
        weights = [self.words[option.lower()] for option in options]
        return rng.choices(options, weights if any(weights) else None)[0]


def lowered(noun: str) -> str:
    """Lower case, unless it is a name or an abbreviation ("TV", "Big Ben")."""
    return noun if noun.isupper() or (len(noun.split()) > 1 and noun.istitle()) else noun.lower()
