import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.amber import (
    AmberGenerative,
    noun_mentions,
    our_counts,
    released_counts,
)
from vlm_sft_rl.evaluation.metrics.nouns import Vocabulary

RELATION = {
    "beach": ["sand", "shore"],
    "umbrella": ["parasol"],
    "chair": ["seat", "sand"],
    "dog": ["puppy"],
    "person": ["man", "woman"],
    "sky": [],
}
SAFE = frozenset({"sky"})


# nouns, truth, hallu, similar words, -> hallucinated, nouns, any, covered, truths, cognitive, targets
GOLDEN = [
    ("beach sand", "beach", "", [], (0, 2, 0, 1, 1, 0, 0)),
    ("parasol", "beach umbrella", "", [], (0, 1, 0, 1, 2, 0, 0)),
    ("sky dog", "beach", "person", [], (1, 2, 1, 0, 1, 0, 1)),
    ("man", "beach", "person", [], (1, 1, 1, 0, 1, 1, 1)),
    ("man woman person", "beach", "person dog", [], (3, 3, 1, 0, 1, 1, 2)),
    # a word that the truth lists does not mark an imagined object, though it is listed there, too
    ("sand", "beach", "chair", [], (0, 1, 0, 1, 1, 0, 1)),
    # only the first root that lists the noun is marked
    ("sand", "chair beach", "", [], (0, 1, 0, 1, 2, 0, 0)),
    # similar to a true word: saved, and covered
    ("puppy", "dog", "", [], (0, 1, 0, 1, 1, 0, 0)),
    ("dog", "person", "", [{"dog", "man"}], (0, 1, 0, 1, 1, 0, 0)),
    # similar to an imagined and to a true word: both are marked, and it is no hallucination
    ("dog", "person", "chair", [{"dog", "man"}, {"dog", "seat"}], (0, 1, 0, 1, 1, 1, 1)),
    # exactly one imagined object and similar to another: both are marked
    ("seat", "beach", "chair dog", [{"seat", "puppy"}], (1, 1, 1, 0, 1, 2, 2)),
    # safe words stay in the denominator
    ("sky", "beach", "chair", [], (0, 1, 0, 0, 1, 0, 1)),
    # a repeated annotation counts twice, and only its first copy can be covered
    ("dog dog", "dog dog", "", [], (0, 2, 0, 1, 2, 0, 0)),
    ("", "beach", "chair", [], (0, 0, 0, 0, 1, 0, 1)),
]


@pytest.mark.parametrize("nouns, truth, hallu, similar, expected", GOLDEN)
def test_released_rules(nouns, truth, hallu, similar, expected):
    words = [text.split() for text in (nouns, truth, hallu)]
    counts = released_counts(*words, RELATION, SAFE, lambda a, b: {a, b} in similar)
    assert counts[:8] == (*expected, 1)
    distinct = set(words[0])
    # here nobody hallucinates a noun twice
    assert counts[8:] == (expected[0], len(distinct), len(distinct) < len(words[0]))


def test_our_rules_know_no_similarity_and_cover_every_root():
    def counts(nouns, truth):
        return dict(
            zip(AmberGenerative.columns, our_counts(nouns, truth, ["dog"], RELATION, SAFE), strict=True)
        )

    both = counts(["sand"], ["chair", "beach"])
    assert both["covered"] == 2 and both["hallucinated"] == 0
    wrong = counts(["puppy", "sky"], ["beach"])
    assert [wrong[name] for name in ("hallucinated", "nouns", "cognitive", "any_hallucinated")] == [
        1,
        2,
        1,
        1,
    ]


roots = st.lists(st.sampled_from(sorted(RELATION)), unique=True, max_size=3)


nouns_of_texts = st.lists(st.sampled_from(["beach", "sand", "puppy", "man", "sky", "seat"]), max_size=5)


@given(nouns_of_texts, roots, roots)
def test_without_similarity_both_rules_find_the_same_hallucinations(nouns, truth, hallu):
    ours = our_counts(nouns, truth, hallu, RELATION, SAFE)
    released = released_counts(nouns, truth, hallu, RELATION, SAFE, lambda a, b: False)
    assert (
        ours[:3] == released[:3]
        and ours[8:] == released[8:]
        and ours[3] >= released[3]
        and ours[4] == released[4]
    )


def test_the_metric_reads_text():
    metric = AmberGenerative(RELATION, ["sky"])
    predictions = ["Two PUPPIES on the beach under the sky.", "A man with a parasol."]
    references = [
        {"truth": ["dog", "beach"], "hallu": ["person"]},
        {"truth": ["umbrella"], "hallu": ["person"]},
    ]
    result = metric.compute(predictions=predictions, references=references)
    published = {"chair": 1 / 5, "cover": 3 / 3, "hal": 1 / 2, "cog": 1 / 2}
    assert result == pytest.approx(published | {"chair_distinct": 1 / 5, "repeats": 0})
    marks = metric.marks(predictions[1], references[1])
    assert [(predictions[1][a:b], right) for a, b, right in marks] == [("man", False), ("parasol", True)]


WORDS = Vocabulary.build(
    ["can", "hot", "leave", "watch", "dog", "board", "drink", "person", "people", "tie", "tv"]
)


@pytest.mark.parametrize(
    "text, nouns",
    [
        ("A dog can be seen.", ["dog"]),
        ("There is a can and two cans; a trash can.", ["can", "can", "can"]),
        ("People watch a dog, and he wears a gold watch.", ["people", "watch", "dog"]),
        ("It is a hot day; people leave under the leaves.", ["people", "leave"]),
        ("They want to drink a drink.", ["drink"]),
        ("A board and people board the TV.", ["board", "people", "tv"]),
        ("", []),
    ],
)
def test_verbs_are_no_nouns(text, nouns):
    assert sorted(m.noun for m in noun_mentions(text, WORDS)) == sorted(nouns)


def test_upper_case_words_of_the_table_are_found_and_marked():
    metric = AmberGenerative({"television": ["TV", "screen"], "dog": []})
    text, reference = "Two TVs and a dog", {"truth": ["television"], "hallu": ["dog"]}
    assert metric.sample_counts(text, reference)[:4] == (1, 2, 1, 1)
    assert [right for _, _, right in metric.marks(text, reference)] == [True, False]


def test_bad_annotations_and_rules_are_explained():
    metric = AmberGenerative(RELATION)
    with pytest.raises(UserError, match=r"'truth': 'zebra' is not in relation\.json"):
        metric.check({"truth": ["zebra"], "hallu": []})
    with pytest.raises(UserError, match="'hallu': expected a list"):
        metric.check({"truth": ["dog"], "hallu": "dog"})
    with pytest.raises(UserError, match="rules is 'x'"):
        AmberGenerative(RELATION, rules="x")
