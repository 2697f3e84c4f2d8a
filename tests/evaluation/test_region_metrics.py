import shutil

import numpy as np
import pytest
import regions as drawn
from PIL import Image

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.cider import Reg, cider_scores
from vlm_sft_rl.evaluation.metrics.regions import Rec, SelfConsistency
from vlm_sft_rl.evaluation.pages import LOCATED, ORIGINAL, draw_boxes
from vlm_sft_rl.evaluation.scoring import count_matrix

SQUARE = [0, 0, 10, 10]


def sample(key, located, *, image="a", **fields):
    reference = {"box": SQUARE, "image": image, "captions": ["the star"]}
    base = {"id": key, "answer": "a red star", "leak": False, "located": located, "reference": reference}
    return base | fields


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
    verdicts = [Rec().verdict(row) for row in Rec().per_sample([s["located"] for s in SAMPLES], references())]
    assert verdicts == ["right", "right", "unreadable", "wrong"]


def references():
    return [sample["reference"] for sample in SAMPLES]


def test_the_ordinary_call_of_evaluate():
    boxes = [[0.0, 0.0, 10.0, 10.0], None]
    truth = [{"box": [0.0, 0.0, 10.0, 10.0], "image": name} for name in ("a", "b")]
    found = Rec().compute(predictions=boxes, references=truth)
    assert found == {"acc50": 0.5, "mean_iou": 0.5, "parse_rate": 0.5}


@pytest.mark.parametrize("box", [[0, 0, 1], [5, 5, 5, 9], None, "box"])
def test_boxes_that_are_none(box):
    with pytest.raises(UserError, match="expected a `box`"):
        Rec().check({"box": box, "image": "a"})


def test_whole_images_are_resampled():
    """Twenty boxes of one image are one draw: their interval is that of the images, not of the boxes."""
    rng = np.random.default_rng(0)
    good = {image: rng.random() < 0.5 for image in range(10)}
    samples = [
        sample(f"{image}-{n}", SQUARE if good[image] else None, image=str(image))
        for image in range(10)
        for n in range(20)
    ]
    metric = Rec()
    one = metric.intervals(count_matrix(samples, metric), 500)["acc50"]
    lone = metric.intervals(count_matrix([s for s in samples if s["id"].endswith("-0")], metric), 500)[
        "acc50"
    ]
    assert (one.value, one.low, one.high) == pytest.approx((lone.value, lone.low, lone.high))
    assert one.high - one.low > 0.3


def test_reg_is_cider_with_the_length_and_the_leaks():
    said = ["a dog runs with a ball", "two people sit near a table", "w1"]
    captions = [["a dog runs on the grass", "a small dog"], ["two people sit near a table"], ["a man"]]
    rows = [
        sample(str(i), None, answer=text, leak=text == "w1", reference={"captions": own, "image": str(i)})
        for i, (text, own) in enumerate(zip(said, captions, strict=True))
    ]
    found = values(Reg(), rows)
    cider = 100 * cider_scores(said, captions).mean()
    assert found == pytest.approx({"cider": cider, "leak_rate": 1 / 3, "words": 13 / 3})
    together = [row | {"reference": row["reference"] | {"image": "same"}} for row in rows]
    assert len(count_matrix(together, Reg())) == 1 and values(Reg(), together) == pytest.approx(found)
    with pytest.raises(UserError, match="list of captions"):
        Reg().check({"captions": [], "image": "a"})


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
        sample(
            "same",
            None,
            answer="the small red star",
            reference={"captions": ["the small red star"], "image": "a"},
        ),
        sample("stem", None, answer="a dogs", reference={"captions": ["one star", "a dog"], "image": "b"}),
        sample("none", None, answer="", reference={"captions": ["a cat"], "image": "c"}),
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
