"""Object HalBench: what the judge lists is what counts, by our table and by the owners' script."""

import io

import pytest
from endpoint_server import EndpointServer
from json_lines import read_lines
from owners_files import write_benchmark
from rich.console import Console

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.judge import judge_samples
from vlm_sft_rl.evaluation.metrics.object_halbench import ObjectHalBench, ObjectWords, listed_objects
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.scoring import count_matrix
from vlm_sft_rl.evaluation.specs import JudgeSettings, load_spec

# picture 42 holds a dog and a book, picture 73 a motorcycle and chairs ("seats"); answer -> what the judge lists
ANSWERS = [
    (
        0,
        "A puppy and a cat sleep next to books on a sofa.",
        '["puppy", "cat", "cats", "books", "sofa", "dog"]',
    ),
    (1, "A motorcycle stands outside.", 'The answer names one:\n```json\n["motorcycle"]\n```'),
    (1, "It is dark  outside here.", "[]"),
    (0, "Two people.", None),
    (0, "A man rides a horse.", "I cannot tell."),
]


def test_figures_worked_by_hand(tmp_path):
    spec, metric = load_spec("object_halbench"), ObjectHalBench()
    data = write_benchmark(spec.name, tmp_path / "data")
    rows = load_questions(spec, data, metric).rows
    samples = [
        {"id": str(i), "question": rows[k]["question"], "answer": answer, "reference": rows[k]}
        for i, (k, answer, _) in enumerate(ANSWERS)
    ]

    def reply(body):
        prompt = body["messages"][0]["content"]
        return next(listed for _, answer, listed in ANSWERS if answer in prompt)

    with EndpointServer(reply) as server:
        settings = JudgeSettings(server.url, "lister")
        judge_samples(samples, spec, metric, settings, tmp_path, Console(file=io.StringIO()))
        assert server.calls == 4  # two words name nothing, and nobody is asked
    counts = count_matrix(samples, metric)
    named = [dict(zip(metric.columns, row, strict=True)) for row in counts]
    # puppy, cat, books, sofa, dog: five words for four objects; the cat and the sofa are not there
    first = {
        "hallucinated": 2,
        "mentioned": 5,
        "any_hallucinated": 1,
        "covered": 2,
        "present": 2,
        "words": 12,
    }
    distinct = {"distinct_hallucinated": 2, "distinct": 4, "repeats": 1}
    assert named[0] == first | {"captions": 1, "naming": 1, "unjudged": 0} | distinct
    assert named[4] == dict.fromkeys(metric.columns, 0) | {"unjudged": 1}
    totals = counts.sum(axis=0)
    assert {name: statistic(totals) for name, statistic in metric.statistics.items()} == pytest.approx(
        {
            "chair_i": 2 / 6,
            "chair_s": 1 / 4,
            "chair_s_refine": 1 / 2,
            "coverage": 3 / 8,
            "length": (12 + 4 + 6 + 2) / 4,  # split at each blank, as the owners do
            "chair_i_distinct": 2 / 5,
            "unjudged": 1 / 5,
        }
    )
    verdicts = ["hallucinates", "no hallucination", "names nothing", "names nothing", "unjudged"]
    assert [metric.verdict(row) for row in counts] == verdicts
    # from best to worst: the motorcycle, the two that name nothing, the cat, and what nobody judged
    assert sorted(range(5), key=lambda i: metric.badness(counts[i])) == [1, 2, 3, 0, 4]
    assert [row["judgement"] for row in read_lines(tmp_path / "judgements.jsonl")][2:4] == ["[]", ""]


@pytest.mark.parametrize(
    "reply, names",
    [
        ('["dog", "dining table"]', ["dog", "dining table"]),
        ('Not ["cat"] but:\n```json\n["dog"]\n```', ["dog"]),
        ('<think>["cat"]</think>["dog"]', ["dog"]),
        ('["dog"] [1]', ["dog"]),
        ("[]", []),
        ("()", None),
        ('["dog"', None),
        ("dog, cat", None),
        ("", None),
    ],
)
def test_the_last_list_of_texts_counts(reply, names):
    assert listed_objects(reply) == names


def test_one_word_in_two_numbers_is_one_word():
    metric = ObjectHalBench()
    assert metric.objects(["dogs", "Dog", "sheep", "man", "woman", "boats", "sky"]) == [
        *("dog", "sheep", "person", "person", "boat")
    ]


OWNERS = "person, man, people\ndining table, table, coffee table\nchair, seat\ntoilet\ntie, bow\ndog\ntrain\nmotor cycle\n"
TAGS = {"a": "DT", "on": "IN", "of": "IN", "wooden": "JJ", "big": "JJ", "baby": "NN"}


def tokens(text):
    return [(word.removesuffix("s"), TAGS.get(word, "NN")) for word in text.split()]


WORDS = ObjectWords(OWNERS, lambda text: text.lower().split(), tokens)


@pytest.mark.parametrize(
    "names, words, nodes",
    [
        (["wooden table"], ["table"], ["dining table"]),
        (["coffee table", "tables"], ["coffee table", "table"], ["dining table"] * 2),
        (["kitchen table"], ["kitchen table"], []),  # two nouns are one word, which is not in the table
        (["dog on dining table"], ["dining table"], ["dining table"]),  # a pair silences the rest of its name
        (["group of people"], ["group", "people"], ["person"]),
        (["dog", "dogs"], ["dog"], ["dog"]),
        (["man", "people"], ["man", "people"], ["person"] * 2),
        (["baby dog", "bow tie"], ["dog", "tie"], ["dog", "tie"]),
        (["seat", "toilet"], ["seat", "toilet"], ["toilet"]),
        (["train tracks"], ["train track"], []),
        (["big"], [], []),
    ],
)
def test_names_by_the_released_rules(names, words, nodes):
    assert WORDS.words(names) == words and WORDS.nodes(words) == nodes


def test_captions_by_the_released_rules():
    assert WORDS.nouns("A man at a coffee table on a motor cycle")[0] == [
        *("person", "dining table", "motor cycle")
    ]


def test_released_rules_say_what_they_need(tmp_path):
    with pytest.raises(UserError, match="needs the owners' table"):
        ObjectHalBench(rules="released")
    (tmp_path / "synonyms_refine.txt").write_text(OWNERS)
    try:
        metric = ObjectHalBench(tmp_path / "synonyms_refine.txt", rules="released")
    except UserError as error:
        assert "pip install nltk" in str(error) or "en_core_web_trf" in str(error)
        return
    assert metric.objects(["two wooden tables"]) == ["dining table"]
