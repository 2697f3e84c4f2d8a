import itertools
import string

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.chair import Chair
from vlm_sft_rl.evaluation.metrics.nouns import Vocabulary, mentions, plural, word_count

WORLD = Vocabulary.build(
    {
        "dog": ["puppy"],
        "hot dog": [],
        "teddy bear": ["teddy"],
        "bear": [],
        "person": ["man", "woman", "child"],
        "knife": [],
        "glass": [],
        "glasses": ["spectacles"],
        "fish": [],
        "umbrella": [],
        "plate": [],
        "bus": [],
        "cherry": [],
        "key": [],
    },
    ignore=["home plate"],
)
CHAIR = Chair(WORLD)


def nouns(caption):
    return [mention.noun for mention in mentions(caption, WORLD)]


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("A dog.", ["dog"]),
        ("Dogs, a PUPPY and two puppies!", ["dog", "dog", "dog"]),
        ("a hot dog and a dog", ["hot dog", "dog"]),
        ("hot dogs", ["hot dog"]),
        ("a hot, dog", ["hot dog"]),
        ("the teddy bear sat by the bear", ["teddy bear", "bear"]),
        ("a teddy", ["teddy bear"]),
        ("people, men and children", ["person", "person", "person"]),
        ("knives on plates near home plate", ["knife", "plate"]),
        ("a glass, two glasses", ["glass", "glasses"]),
        ("three fish and a starfish, no dogfish", ["fish"]),
        ("umbrellas under buses with cherries and keys", ["umbrella", "bus", "cherry", "key"]),
        ("the dog's plate", ["plate"]),
        ("dogged doggy", []),
        ("", []),
    ],
)
def test_mentions(caption, expected):
    assert nouns(caption) == expected


def test_mention_ranges_point_into_the_caption():
    caption = "Two Hot Dogs, and a knife."
    assert [caption[m.start : m.end] for m in mentions(caption, WORLD)] == ["Hot Dogs", "knife"]


@pytest.mark.parametrize(
    "noun, expected",
    [
        ("box", "boxes"),
        ("church", "churches"),
        ("boy", "boys"),
        ("potato", "potatoes"),
        ("photo", "photos"),
        ("fireman", "firemen"),
        ("human", "humans"),
        ("stuffed mouse", "stuffed mice"),
        ("crosswalk", "crosswalks"),
    ],
)
def test_plural(noun, expected):
    assert plural(noun) == expected


def test_counts_per_mention_but_coverage_per_object():
    counts = CHAIR.sample_counts("A dog, a dog, a bear and a bear by the bus.", ["dog", "bus", "key"])
    assert dict(zip(CHAIR.columns, counts, strict=True)) == {
        "hallucinated": 2,
        "mentioned": 5,
        "any_hallucinated": 1,
        "covered": 2,
        "present": 3,
        "words": 12,
        "captions": 1,
    }


def test_synonyms_in_the_ground_truth_count_as_their_noun():
    assert CHAIR.sample_counts("a dog", ["puppy", "dog"])[3:5] == (1, 1)


def test_unknown_object_in_the_ground_truth_is_an_error():
    with pytest.raises(UserError, match="'zebra' is not in the vocabulary"):
        CHAIR.sample_counts("a dog", ["dog", "zebra"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (({},), "no nouns"),
        (({"dog": ["pet"], "cat": ["pet"]},), "'pet' stands for both"),
        (({"dog": "puppy"},), "must be a list"),
        ((["!!"],), "no letters"),
        ((["plate"], ["plate"]), "'plate' stands for both"),
    ],
)
def test_bad_vocabularies(arguments, message):
    with pytest.raises(UserError, match=message):
        Vocabulary.build(*arguments)


def test_metric_matches_a_hand_computation_and_the_evaluate_interface():
    metric = Chair(WORLD)
    predictions = ["a dog and a bear", "a bus", "nothing here", "a key, a key"]
    references = [["dog"], ["bus", "fish"], ["umbrella"], ["plate"]]
    result = metric.compute(predictions=predictions, references=references)
    assert result == pytest.approx({"chair_i": 3 / 5, "chair_s": 2 / 4, "coverage": 2 / 5, "length": 13 / 4})
    intervals = metric.intervals(metric.counts(predictions, references), rounds=50)
    assert {name: interval.value for name, interval in intervals.items()} == pytest.approx(result)
    assert all(i.low <= i.value <= i.high and i.n == 4 for i in intervals.values())


def test_silence_does_not_hallucinate_and_does_not_cover():
    result = Chair(["dog"]).compute(predictions=["", ""], references=[["dog"], ["dog"]])
    assert result == {"chair_i": 0.0, "chair_s": 0.0, "coverage": 0.0, "length": 0.0}


def test_grading_a_phrase():
    metric = Chair(WORLD)
    assert metric.grade("a puppy", ["dog"]) is True
    assert metric.grade("two bears", ["dog"]) is False
    assert metric.grade("a dog on a bus", ["dog"]) is False
    assert metric.grade("the sky", ["dog"]) is None


def test_references_must_be_lists_of_nouns():
    with pytest.raises(UserError, match="list of nouns"):
        Chair(["dog"]).counts(["a dog"], ["dog"])


captions = st.lists(
    st.sampled_from(["a dog", "hot dogs", "the bear", "teddy bear", "and", "glasses", "sky", ","]), max_size=8
).map(" ".join)


@given(captions, st.sets(st.sampled_from(sorted(WORLD.nouns))))
def test_counts_are_consistent(caption, objects):
    row = dict(zip(CHAIR.columns, CHAIR.sample_counts(caption, objects), strict=True))
    assert 0 <= row["hallucinated"] <= row["mentioned"] <= row["words"]
    assert row["any_hallucinated"] == (row["hallucinated"] > 0)
    assert row["covered"] <= min(row["present"], row["mentioned"] - row["hallucinated"])
    everything = CHAIR.sample_counts(caption, WORLD.nouns)
    assert everything[0] == 0 and everything[3] == len(set(nouns(caption)))


@given(st.text(alphabet=string.ascii_letters + " .,-'’é3", max_size=60))
def test_any_text_is_read(text):
    found = mentions(text, WORLD)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    assert word_count(text) <= len(text)
    assert np.isfinite(CHAIR.sample_counts(text, ["dog"])).all()
