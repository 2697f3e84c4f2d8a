"""Metrics of regions: located boxes, and descriptions by CIDEr-D and METEOR."""

import math
import shutil

import numpy as np
import pytest
import regions as drawn
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.cider import Cider, Reg, cider_scores, tokenize
from vlm_sft_rl.evaluation.metrics.regions import Rec, SelfConsistency
from vlm_sft_rl.evaluation.pages import LOCATED, ORIGINAL, draw_boxes
from vlm_sft_rl.evaluation.scoring import count_matrix, sample_matrix

SQUARE = [0, 0, 10, 10]


def sample(key, located, *, image="a", answer="a red star", leak=False, captions=("the star",)):
    reference = {"box": SQUARE, "image": image, "captions": list(captions)}
    return {"id": key, "answer": answer, "leak": leak, "located": located, "reference": reference}


SAMPLES = [
    sample("1", [0, 0, 10, 10]),
    sample("2", [0, 0, 10, 5], image="b"),  # an IoU of exactly one half is a hit
    sample("3", None, leak=True, answer="w1", image="b"),
    sample("4", [0, 0, 5, 5], image="c"),
]


def values(metric, samples):
    counts = count_matrix(samples, metric)
    return {name: interval.value for name, interval in metric.intervals(counts, 20).items()}


def test_hand_worked_figures():
    rec = {"acc50": 0.5, "mean_iou": (1 + 0.5 + 0 + 0.25) / 4, "parse_rate": 0.75}
    assert values(Rec(), SAMPLES) == pytest.approx(rec)
    assert values(SelfConsistency(), SAMPLES) == pytest.approx(rec | {"leak_rate": 0.25, "words": 10 / 4})
    verdicts = [Rec().verdict(row) for row in sample_matrix(SAMPLES, Rec())]
    assert verdicts == ["right", "right", "unreadable", "wrong"]


def test_the_ordinary_call_of_evaluate():
    boxes = [[0.0, 0.0, 10.0, 10.0], None]
    truth = [{"box": [0.0, 0.0, 10.0, 10.0], "image": name} for name in ("a", "b")]
    result = Rec().compute(predictions=boxes, references=truth)
    assert result == {"acc50": 0.5, "mean_iou": 0.5, "parse_rate": 0.5}


@pytest.mark.parametrize("box", [[0, 0, 1], [5, 5, 5, 9], None, "box"])
def test_boxes_that_are_none(box):
    with pytest.raises(UserError, match="expected a `box`"):
        Rec().check({"box": box, "image": "a"})


def test_whole_images_are_resampled():
    """Twenty boxes of one image are one draw: their interval is that of the images, not of the boxes."""
    rng, metric = np.random.default_rng(0), Rec()
    located = [SQUARE if rng.random() < 0.5 else None for _ in range(10)]
    single, many = [], []
    for image, box in enumerate(located):
        single.append(sample("x", box, image=str(image)))
        many += 20 * [single[-1]]
    single, many = (metric.intervals(count_matrix(s, metric), 500)["acc50"] for s in (single, many))
    assert (many.value, many.low, many.high) == pytest.approx((single.value, single.low, single.high))
    assert many.high - many.low > 0.3


REFERENCES = [
    ["a dog runs on the grass", "a small dog with a red ball"],
    ["two people sit near a table"],
    ["a man near the red table", "the man sits"],
]
CANDIDATES = ["a dog runs with a ball", "two people sit near a table", "a cat"]
SCORES = [2.561410493418422, 10.0, 0.0]  # computed with pycocoevalcap 1.2 on the same tokens


def test_cider_is_that_of_pycocoevalcap():
    assert cider_scores(CANDIDATES, REFERENCES) == pytest.approx(SCORES, abs=1e-12)


def test_a_case_worked_by_hand():
    # "a" against "a b" of two pictures: idf ln 2 each; cosine of (1, 0) and (1, 1) for single words, nothing longer;
    # the lengths in bigrams differ by one
    expected = 10 / 4 * math.exp(-1 / 72) / math.sqrt(2)
    assert cider_scores(["a", "x"], [["a b"], ["c"]]) == pytest.approx([expected, 0.0], abs=1e-12)


def test_words_are_split_as_ptb_does():
    text = "It’s a dog's toy, isn't it? Don't! A T-shirt costs 3.50."
    expected = "it 's a dog 's toy is n't it do n't a t-shirt costs 3.50"
    assert tokenize(text) == expected.split()


def test_the_metric_is_the_mean_times_100():
    metric = Cider()
    result = metric.compute(predictions=CANDIDATES, references=REFERENCES)
    assert result["cider"] == pytest.approx(100 * np.mean(SCORES))
    # what was computed last is kept, and is not handed out for other texts
    assert metric.counts(CANDIDATES[::-1], REFERENCES)[0, 0] == pytest.approx(0.0)
    assert metric.counts(CANDIDATES, REFERENCES)[1, 0] == pytest.approx(1000.0)
    for bad in ([], ["  "], "a dog", [3]):
        with pytest.raises(UserError, match="expected a list of captions"):
            metric.check(bad)
    with pytest.raises(UserError, match="list of captions"):
        Reg().check({"captions": [], "image": "a"})


words = st.lists(st.sampled_from(["a", "dog", "runs", "two", "near"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_scores_are_bounded_and_do_not_depend_on_the_order_of_references(rows):
    candidates, references = [row[0] for row in rows], [row[1] for row in rows]
    scores = cider_scores(candidates, references)
    assert ((scores >= 0) & (scores <= 10 + 1e-9)).all()
    assert cider_scores(candidates, [r[::-1] for r in references]) == pytest.approx(scores)


def descriptions(image=None):
    pairs = zip([*CANDIDATES[:2], "w1"], REFERENCES, strict=True)
    return [
        sample(str(i), None, answer=text, leak=text == "w1", image=image or str(i), captions=captions)
        for i, (text, captions) in enumerate(pairs)
    ]


def test_reg_is_cider_with_the_length_and_the_leaks():
    result = values(Reg(), descriptions())
    assert result == pytest.approx(
        {"cider": 100 * np.mean(SCORES), "leak_rate": 1 / 3, "words": 13 / 3}, rel=1e-12
    )
    assert len(count_matrix(descriptions("same"), Reg())) == 1
    assert values(Reg(), descriptions("same")) == pytest.approx(result)


def test_meteor_is_asked_for_and_needs_its_program():
    try:
        import pycocoevalcap  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"vlm-sft-rl\[reg\]"):
            Reg(meteor=True)
        return
    if shutil.which("java") is None:
        with pytest.raises(UserError, match="`java` is not on this machine"):
            Reg(meteor=True)
        return
    rows = [
        sample("same", None, answer="the small red star", captions=["the small red star"], image="a"),
        sample("stem", None, answer="a dogs", captions=["one star", "a dog"], image="b"),
        sample("none", None, answer="", captions=["a cat"], image="c"),
    ]
    metric = Reg(meteor=True)
    counts = count_matrix(rows, metric)
    meteor = counts[:, metric.columns.index("meteor")]
    assert meteor == pytest.approx([100, 70, 0])  # the second matches by its stem
    assert metric.intervals(counts, 10)["meteor"].value == pytest.approx(meteor.mean())
    assert metric.differences(counts, counts, 10)["meteor"].value == 0


def test_boxes_are_drawn_where_they_are():
    picture = draw_boxes(Image.new("RGB", (128, 128)), (32, 32, 64, 64), (64, 96, 128, 128))
    assert picture.size == (256, 256)
    assert picture.getpixel((64, 90)) == ORIGINAL and picture.getpixel((90, 90)) == (0, 0, 0)
    assert LOCATED in {picture.getpixel((x, 220)) for x in range(128, 140)}
    unparsed = draw_boxes(drawn.region_rows(1)[0]["image"], (1, 1, 9, 9), None)
    assert LOCATED not in set(unparsed.getdata())
