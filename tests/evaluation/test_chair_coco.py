import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.chair import (
    COCO_OBJECTS,
    ChairCoco,
    ReleasedParser,
    coco_vocabulary,
    merge_words,
    read_synonyms,
    released_table,
)
from vlm_sft_rl.evaluation.metrics.nouns import mentions

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


def split(text):
    return text.lower().replace(".", " .").split()


PARSER = ReleasedParser(released_table(TABLE), split)


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
        ("toilet with a seat", ["toilet"], 3),
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
    assert len(read_synonyms(COCO_OBJECTS)) == 80
    # blanks and line ends around a row belong to no name
    assert released_table("dog, puppy \r\n cat, kitten") == {
        "dog": "dog",
        "puppy": "dog",
        "cat": "cat",
        "kitten": "cat",
    }


def test_truth_is_what_annotations_and_captions_name():
    metric = ChairCoco()
    reference = {"instances": ["dog"], "captions": ["A puppy on a sofa.", "A pup near two books."]}
    assert metric.truth(reference) == {"dog", "couch", "book"}
    row = metric.sample_counts("A dog and a cat lie on a couch with a dog.", reference)
    assert dict(zip(metric.columns, row, strict=True)) == {
        "hallucinated": 1,
        "mentioned": 4,
        "any_hallucinated": 1,
        "covered": 2,
        "present": 3,
        "words": 12,
        "captions": 1,
    }
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
    assert [mention.noun for mention in mentions(caption, coco_vocabulary())] == expected


def test_every_category_of_coco_stands_for_itself():
    vocabulary = coco_vocabulary()
    assert all(vocabulary.canonical(name) == name for name in read_synonyms(COCO_OBJECTS))


def test_the_owners_table_is_read_when_given(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE)
    metric = ChairCoco(path)
    assert metric.truth({"instances": ["motorcycle"], "captions": ["a Metro"]}) == {"motorcycle", "bus"}
    assert metric.vocabulary.canonical("motor bike") == "motorcycle"
    assert metric.vocabulary.canonical("couch") is None
    with pytest.raises(UserError, match="needs the owners' table"):
        ChairCoco(rules="released")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="no line in it"):
        ChairCoco(tmp_path / "empty.txt")


def test_released_mode_with_nltk_or_a_message_that_says_what_to_install(tmp_path):
    path = tmp_path / "synonyms.txt"
    path.write_text(TABLE)
    try:
        metric = ChairCoco(path, rules="released")
    except UserError as error:
        assert "pip install nltk" in str(error)
        return
    reference = {"instances": ["dog"], "captions": ["a man with dogs"]}
    assert metric.sample_counts("Two dogs and women", reference)[:2] == (0, 2)
