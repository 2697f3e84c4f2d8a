"""Nouns in captions, and CHAIR on given objects and on COCO, by our rules and by the released ones."""

import itertools
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.chair import (
    COCO_OBJECTS,
    Chair,
    ChairCoco,
    ReleasedParser,
    coco_vocabulary,
    merge_words,
    read_synonyms,
    released_table,
)
from vlm_sft_rl.evaluation.metrics.nouns import Vocabulary, mentions, plural, word_count

WORLD = Vocabulary.build(
    {
        "person": ["man", "woman", "child"],
        "dog": ["puppy"],
        "teddy bear": ["teddy"],
        "glasses": ["spectacles"],
        **dict.fromkeys(
            ("hot dog", "bear", "knife", "glass", "fish", "umbrella", "plate", "bus", "cherry", "key")
        ),
    },
    ignore=["home plate"],
)
CHAIR = Chair(WORLD)


def nouns(caption, vocabulary=WORLD):
    return [mention.noun for mention in mentions(caption, vocabulary)]


def counts(metric, caption, reference):
    return dict(zip(metric.columns, metric.sample_counts(caption, reference), strict=True))


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
    row = counts(CHAIR, "A dog, a dog, a bear and a bear by the bus.", ["dog", "bus", "key"])
    expected = {"hallucinated": 2, "mentioned": 5, "any_hallucinated": 1, "covered": 2, "present": 3}
    distinct = {"distinct_hallucinated": 1, "distinct": 3, "repeats": 1}
    assert row == expected | {"words": 12, "captions": 1} | distinct


def test_objects_of_the_truth_are_read_with_the_vocabulary():
    assert CHAIR.sample_counts("a dog", ["puppy", "dog"])[3:5] == (1, 1)
    with pytest.raises(UserError, match="'zebra' is not in the vocabulary"):
        CHAIR.check(["dog", "zebra"])
    with pytest.raises(UserError, match="list of nouns"):
        CHAIR.counts(["a dog"], ["dog"])


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
    predictions = ["a dog and a bear", "a bus", "nothing here", "a key, a key"]
    references = [["dog"], ["bus", "fish"], ["umbrella"], ["plate"]]
    result = CHAIR.compute(predictions=predictions, references=references)
    published = {"chair_i": 3 / 5, "chair_s": 2 / 4, "coverage": 2 / 5, "length": 13 / 4}
    # of a dog, a bear, a bus and a key the bear and the key are not there; the key comes twice
    assert result == pytest.approx(published | {"chair_i_distinct": 2 / 4, "repeats": 1 / 4})
    intervals = CHAIR.intervals(CHAIR.counts(predictions, references), rounds=50)
    assert {name: interval.value for name, interval in intervals.items()} == pytest.approx(result)
    assert all(i.low <= i.value <= i.high and i.n == 4 for i in intervals.values())


def test_silence_does_not_hallucinate_and_does_not_cover():
    result = Chair(["dog"]).compute(predictions=["", ""], references=[["dog"], ["dog"]])
    assert result == dict.fromkeys(Chair.statistics, 0.0)


@pytest.mark.parametrize(
    "phrase, right",
    [("a puppy", True), ("two bears", False), ("a dog on a bus", False), ("the sky", None)],
)
def test_grading_a_phrase(phrase, right):
    assert CHAIR.grade(phrase, ["dog"]) is right


captions = st.lists(
    st.sampled_from(["a dog", "hot dogs", "the bear", "teddy bear", "and", "glasses", "sky", ","]), max_size=8
).map(" ".join)


@given(captions, st.sets(st.sampled_from(sorted(WORLD.nouns))))
def test_counts_are_consistent(caption, objects):
    row = counts(CHAIR, caption, sorted(objects))
    assert 0 <= row["hallucinated"] <= row["mentioned"] <= row["words"]
    assert row["any_hallucinated"] == (row["hallucinated"] > 0)
    assert row["covered"] <= min(row["present"], row["mentioned"] - row["hallucinated"])
    assert row["distinct_hallucinated"] <= row["hallucinated"]
    assert row["distinct"] == row["covered"] + row["distinct_hallucinated"] <= row["mentioned"]
    assert row["repeats"] == (row["distinct"] < row["mentioned"])
    everything = CHAIR.sample_counts(caption, sorted(WORLD.nouns))
    assert everything[0] == 0 and everything[3] == len(set(nouns(caption)))


@given(st.text(alphabet=string.ascii_letters + " .,-'’é3", max_size=60))
def test_any_text_is_read(text):
    found = mentions(text, WORLD)
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    assert len(found) <= word_count(text) <= len(text)


TABLE = """
person, man, woman
motorcycle,  motor bike, scooter
toilet, urinal
chair, seat, stool
tie, bow
dog, hot dog puppy
hot dog, hotdog
train, metro
cell phone, iPhone, phone
orange, tangerine
bus, metro"""
PARSER = ReleasedParser(released_table(TABLE), lambda text: text.lower().replace(".", " .").split())


@pytest.fixture
def table_file(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE)
    return path


@pytest.mark.parametrize(
    "words, merged",
    [
        ("a hot dog", "a|hot dog"),
        ("the home plate and a plate", "the|home plate|and|a|plate"),
        ("baby elephant and adult cat", "elephant|and|cat"),
        ("passenger train jet", "train|jet"),
        ("a bow tie", "a|tie"),
        ("toilet seat", "toilet"),
        ("wine glas", "wine glass"),
        ("stove top oven", "stove|top|oven"),
        ("dog", "dog"),
        ("", ""),
        ("traffic light light", "traffic light|light"),
    ],
)
def test_pairs_are_merged_from_left_to_right(words, merged):
    assert "|".join(merge_words(words.split())) == merged


@pytest.mark.parametrize(
    "caption, nodes, words",
    [
        ("A man and a woman", ["person", "person"], 5),
        ("a hot dog", ["hot dog"], 2),
        ("toilet with a seat", ["toilet"], 4),  # the seat is no chair, and it is a word of the caption
        ("a seat", ["chair"], 2),
        ("an orange shirt", ["orange"], 3),
        ("motor bike", [], 1),  # " motor bike" in the table: the blank stays and never matches
        ("my iPhone and phone", ["cell phone"], 4),
        ("a metro", ["bus"], 2),  # the later row takes the word
        ("train track", [], 1),
        ("a bow tie and a bow", ["tie", "tie"], 5),
    ],
)
def test_released_reading_of_a_caption(caption, nodes, words):
    assert PARSER.nouns(caption) == (nodes, words)


def test_quirks_of_the_released_table():
    assert "" in PARSER.table and " motor bike" in PARSER.table and "motor bike" not in PARSER.table
    # blanks and line ends around a row belong to no name
    rows = {"dog": "dog", "puppy": "dog", "cat": "cat", "kitten": "cat"}
    assert released_table("dog, puppy \r\n cat, kitten") == rows


def test_truth_on_coco_is_what_annotations_and_captions_name():
    metric = ChairCoco()
    reference = {"instances": ["dog"], "captions": ["A puppy on a sofa.", "A pup near two books."]}
    assert metric.truth(reference) == {"dog", "couch", "book"}
    row = counts(metric, "A dog and a cat lie on a couch with a dog.", reference)
    expected = {"hallucinated": 1, "mentioned": 4, "any_hallucinated": 1, "covered": 2, "present": 3}
    distinct = {"distinct_hallucinated": 1, "distinct": 3, "repeats": 1}
    assert row == expected | {"words": 12, "captions": 1} | distinct
    assert metric.grade("a kitten", reference) is False and metric.grade("the sky", reference) is None
    with pytest.raises(UserError, match="'unicorn' is not in the table"):
        metric.check({"instances": ["unicorn"], "captions": []})


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("Two men ride motorbikes past a fire truck.", ["person", "motorcycle", "truck"]),
        ("He slides into home plate.", []),
        ("a plate of hot dogs with a teddy bear", ["hot dog", "teddy bear"]),
        ("a cup of orange juice on the dining table", ["cup", "dining table"]),
        ("the train tracks near the train", ["train"]),
        ("A tennis player swings a racquet.", ["person", "tennis racket"]),
        ("polar bears and people on skis", ["bear", "person", "skis"]),
    ],
)
def test_our_own_table(caption, expected):
    assert nouns(caption, coco_vocabulary()) == expected


def test_every_category_of_coco_stands_for_itself():
    categories, vocabulary = read_synonyms(COCO_OBJECTS), coco_vocabulary()
    assert len(categories) == 80 and all(vocabulary.canonical(name) == name for name in categories)


def test_the_owners_table_is_read_when_given(table_file):
    metric = ChairCoco(table_file)
    assert metric.truth({"instances": ["motorcycle"], "captions": ["a Metro"]}) == {"motorcycle", "bus"}
    assert metric.vocabulary.canonical("motor bike") == "motorcycle"
    assert metric.vocabulary.canonical("couch") is None
    with pytest.raises(UserError, match="needs the owners' table"):
        ChairCoco(rules="released")
    table_file.write_text("\n")
    with pytest.raises(UserError, match="no line in it"):
        ChairCoco(table_file)


def test_released_rules_with_nltk_or_a_message_that_says_what_to_install(table_file):
    try:
        metric = ChairCoco(table_file, rules="released")
    except UserError as error:
        assert "pip install nltk" in str(error)
        return
    reference = {"instances": ["dog"], "captions": ["a man with dogs"]}
    assert metric.sample_counts("Two dogs and women", reference)[:2] == (0, 2)
