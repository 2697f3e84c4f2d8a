"""Hard negatives are drawn from the company that nouns keep."""

import random
from collections import Counter

import pytest
from vlm_sft_rl.data.tagging.corpus import Corpus, slot
from vlm_sft_rl.data.tagging.taggers import VocabularyTagger

NOUNS = ["moon", "star", "car", "dog", "owl", "beach"]


def corpus_of(captions):
    tagger = VocabularyTagger(NOUNS)
    corpus = Corpus()
    for i, (caption, chunks) in enumerate(zip(captions, tagger.tag(captions), strict=True)):
        assert caption
        corpus.add(f"{i}.png", chunks)
    return corpus.finish()


def chunk(text):
    return next(iter(VocabularyTagger(NOUNS).tag([text])))[-1]


@pytest.fixture(scope="module")
def corpus():
    captions = ["At the beach there is a moon and a star."] * 40 + ["A moon and a car."] * 4
    captions += ["A dog and a car."] * 20 + ["An owl."] * 20 + ["Two dogs."] * 20
    return corpus_of(captions)


def test_companions_are_likeliest(corpus):
    weights = corpus.weights(chunk("a dog"), {"moon"}, {"moon"})
    assert max(weights, key=weights.get) == "star"
    # 40 images with both of 44 with a moon, shrunk by 5, squared
    assert weights["star"] == pytest.approx((40 / 49) ** 2)
    draws = Counter(corpus.draw(chunk("a dog"), {"moon"}, {"moon"}, random.Random(i))[1] for i in range(300))
    assert draws["star"] > 200 and "moon" not in draws and "beach" not in draws


def test_only_what_fits_the_place(corpus):
    assert set(corpus.weights(chunk("At the beach"), {"moon"}, set())) == {"beach"}
    assert set(corpus.weights(chunk("two dogs"), set(), set())) == {"dog"}
    assert corpus.draw(chunk("At the beach"), set(), {"beach"}, random.Random(0)) is None
    assert slot(chunk("Two dogs")) == ("", "number", True) and slot(chunk("on the car")) == (
        "on",
        "the",
        False,
    )


def test_forms_and_words(corpus):
    assert corpus.draw(chunk("a car"), {"moon"}, {"star", "car", "moon", "dog"}, random.Random(0)) == (
        "owl",
        "owl",
    )
    assert ("at", "beach") in corpus.placed and ("on", "beach") not in corpus.placed
    picks = Counter(corpus.choose(["moon", "owl", "red"], random.Random(i)) for i in range(300))
    assert picks["red"] == 0 and picks["moon"] > picks["owl"] > 0
    assert {corpus.choose(["red", "blue"], random.Random(i)) for i in range(30)} == {"red", "blue"}
