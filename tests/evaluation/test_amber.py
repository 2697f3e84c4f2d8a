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
from vlm_sft_rl.evaluation.metrics.yes_no import AmberDiscriminative, parse_amber

RELATION = {
    "beach": ["sand", "shore"],
    "umbrella": ["parasol"],
    "chair": ["seat", "sand"],
    "dog": ["puppy"],
    "person": ["man", "woman"],
    "sky": [],
}
SAFE = frozenset({"sky"})


def never(one, other):
    return False


def close(*pairs):
    return lambda one, other: (one, other) in pairs or (other, one) in pairs


# nouns, truth, hallu, similar, -> hallucinated, nouns, any, covered, truths, cognitive, targets
GOLDEN = [
    (["beach", "sand"], ["beach"], [], never, (0, 2, 0, 1, 1, 0, 0)),
    (["parasol"], ["beach", "umbrella"], [], never, (0, 1, 0, 1, 2, 0, 0)),
    (["sky", "dog"], ["beach"], ["person"], never, (1, 2, 1, 0, 1, 0, 1)),
    (["man"], ["beach"], ["person"], never, (1, 1, 1, 0, 1, 1, 1)),
    (["man", "woman", "person"], ["beach"], ["person", "dog"], never, (3, 3, 1, 0, 1, 1, 2)),
    # a word that the truth lists does not mark an imagined object, though it is listed there, too
    (["sand"], ["beach"], ["chair"], never, (0, 1, 0, 1, 1, 0, 1)),
    # only the first root that lists the noun is marked
    (["sand"], ["chair", "beach"], [], never, (0, 1, 0, 1, 2, 0, 0)),
    # similar to a true word: saved, and covered
    (["puppy"], ["dog"], [], never, (0, 1, 0, 1, 1, 0, 0)),
    (["dog"], ["person"], [], close(("dog", "man")), (0, 1, 0, 1, 1, 0, 0)),
    # similar to an imagined and to a true word: both are marked, and it is no hallucination
    (["dog"], ["person"], ["chair"], close(("dog", "man"), ("dog", "seat")), (0, 1, 0, 1, 1, 1, 1)),
    # exactly one imagined object and similar to another: both are marked
    (["seat"], ["beach"], ["chair", "dog"], close(("seat", "puppy")), (1, 1, 1, 0, 1, 2, 2)),
    # safe words stay in the denominator
    (["sky"], ["beach"], ["chair"], never, (0, 1, 0, 0, 1, 0, 1)),
    # a repeated annotation counts twice, and only its first copy can be covered
    (["dog", "dog"], ["dog", "dog"], [], never, (0, 2, 0, 1, 2, 0, 0)),
    ([], ["beach"], ["chair"], never, (0, 0, 0, 0, 1, 0, 1)),
]


@pytest.mark.parametrize("nouns, truth, hallu, similar, expected", GOLDEN)
def test_released_rules(nouns, truth, hallu, similar, expected):
    assert released_counts(nouns, truth, hallu, RELATION, SAFE, similar) == (*expected, 1)


def test_strict_rules_know_no_similarity_and_cover_every_root():
    row = dict(
        zip(
            AmberGenerative.columns,
            our_counts(["sand"], ["chair", "beach"], ["dog"], RELATION, SAFE),
            strict=True,
        )
    )
    assert row["covered"] == 2 and row["hallucinated"] == 0
    row = dict(
        zip(
            AmberGenerative.columns,
            our_counts(["puppy", "sky"], ["beach"], ["dog"], RELATION, SAFE),
            strict=True,
        )
    )
    assert (row["hallucinated"], row["nouns"], row["cognitive"], row["any_hallucinated"]) == (1, 2, 1, 1)


@given(
    st.lists(st.sampled_from(["beach", "sand", "puppy", "man", "sky", "seat"]), max_size=5),
    st.lists(st.sampled_from(sorted(RELATION)), unique=True, max_size=3),
    st.lists(st.sampled_from(sorted(RELATION)), unique=True, max_size=3),
)
def test_without_similarity_both_rules_find_the_same_hallucinations(nouns, truth, hallu):
    strict = our_counts(nouns, truth, hallu, RELATION, SAFE)
    released = released_counts(nouns, truth, hallu, RELATION, SAFE, never)
    assert strict[:3] == released[:3] and strict[3] >= released[3] and strict[4:][:1] == released[4:][:1]


def test_the_metric_reads_text():
    metric = AmberGenerative(RELATION, ["sky"])
    predictions = ["Two PUPPIES on the beach under the sky.", "A man with a parasol."]
    references = [
        {"truth": ["dog", "beach"], "hallu": ["person"]},
        {"truth": ["umbrella"], "hallu": ["person"]},
    ]
    result = metric.compute(predictions=predictions, references=references)
    assert result == pytest.approx({"chair": 1 / 5, "cover": 3 / 3, "hal": 1 / 2, "cog": 1 / 2})
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


def test_upper_case_words_of_the_table_are_found():
    metric = AmberGenerative({"television": ["TV", "screen"], "dog": []})
    assert metric.sample_counts("Two TVs and a dog", {"truth": ["television"], "hallu": ["dog"]})[:4] == (
        1,
        2,
        1,
        1,
    )


def test_bad_annotations_and_missing_tools_are_explained():
    metric = AmberGenerative(RELATION)
    with pytest.raises(UserError, match=r"'truth': 'zebra' is not in relation\.json"):
        metric.check({"truth": ["zebra"], "hallu": []})
    with pytest.raises(UserError, match="'hallu': expected a list"):
        metric.check({"truth": ["dog"], "hallu": "dog"})
    with pytest.raises(UserError, match="rules is 'x'"):
        AmberGenerative(RELATION, rules="x")


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        ("There is nothing", "no"),
        ("I do not know", "no"),
        ("His eyes are shut", "yes"),
        ("No, yes", "yes"),
        ("Maybe", None),
        ("", None),
    ],
)
def test_released_reading_of_yes_and_no(answer, said):
    assert parse_amber(answer) == said


def test_no_is_the_positive_class():
    answers, truths = ["No", "No", "Yes", "Yes", "hm"], ["no", "yes", "no", "yes", "no"]
    result = AmberDiscriminative().compute(predictions=answers, references=truths)
    assert result == pytest.approx(
        {
            "f1": 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3),
            "accuracy": 2 / 5,
            "precision": 1 / 2,
            "recall": 1 / 3,
            "yes_ratio": 2 / 5,
            "unreadable": 1 / 5,
        }
    )
