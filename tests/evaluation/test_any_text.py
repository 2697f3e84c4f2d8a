"""Whatever a model or a judge writes: no metric raises on it, none takes long, and a runaway is not right."""

from functools import cache

import pytest
from cpu_time import cpu_seconds
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.rewards.answers import format_reward
from vlm_sft_rl.rewards.regions import spells_coordinates

# name -> options, a reference, whether the metric reads answers
METRICS = {
    "amber_discriminative": ({"rules": "released"}, "yes"),
    "answer_accuracy": ({"grader": "chartqa"}, {"answer": "3"}),
    "chair": ({"vocabulary": {"dog": ["hot dog"], "cat": []}}, ["dog"]),
    "cider": ({}, ["a dog", "two dogs"]),
    "clair": ({}, ["a dog"]),
    "hallusion_bench": ({}, {"answer": "yes", "set": "1", "figure": "1", "question_key": "1"}),
    "haloquest": ({}, "a dog"),
    "mm_vet": ({}, "a dog"),
    "mme": ({"rules": "released"}, {"answer": "no", "category": "count", "pair": "1"}),
    "mmhal": ({}, {"answer": "a dog", "image_content": ["dog"]}),
    "object_halbench": ({}, {"instances": ["dog"], "captions": ["a cat"]}),
    "vqa_accuracy": ({}, ["3"] * 10),
    "yes_no": ({}, "yes"),
}
PIECES = [
    *(
        "<think>",
        "</think>",
        "<answer>",
        "\\boxed{",
        "}",
        "{",
        "[",
        '{"score": ',
        "Rating: ",
        "Correct: ",
        "score ",
        "yes",
    ),
    *(
        "No",
        "1" * 50,
        ",",
        ".",
        " ",
        "\n",
        "a",
        "<CONCLUSION>",
        "answer is ",
        "Answer:",
        "\ud800",
        "\x00",
        "'",
        "<",
    ),
]
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12).map(
    "".join
)


@cache
def loaded(name):
    return load_metric(name, METRICS[name][0])


def read(name, text):
    metric, reference = loaded(name), METRICS[name][1]
    counts = metric.per_sample([metric.prediction_of({"answer": text, "judgement": text})], [reference])
    metric.verdict(counts[0])
    metric.marks(text, reference)
    metric.grade(text, reference)
    if metric.reads_answers:
        metric.read(text, reference)
    return counts


@pytest.mark.parametrize("name", METRICS)
def test_any_text_is_read(name):
    @given(TEXTS)
    def check(text):
        assert (read(name, text) >= 0).all()

    check()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    "piece", [*PIECES, "1", "score: ", "rating" + " " * 9, '{"score": 1' + "0" * 5000 + "}", "[{"]
)
def test_long_texts_take_no_time(name, piece):
    text = piece * (20_000 // len(piece) + 1)
    assert (read(name, text) >= 0).all()
    assert cpu_seconds(lambda: read(name, text)) < 1.0


@pytest.mark.parametrize(
    "piece", [*PIECES, "1", "(1,", "[1, ", '"bbox_2d": [1, ', "1 1 ", "x=", "7 %", "one ", "1:1"]
)
def test_boxes_stages_and_the_leak_guard_read_long_texts(piece):
    text = piece * (20_000 // len(piece) + 1)

    def reading():
        for convention in CONVENTIONS.values():
            convention.parse(text, (640, 480), (640, 480))
        spells_coordinates(text)
        format_reward([text])

    assert cpu_seconds(reading) < 1.0
