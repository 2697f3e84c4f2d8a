import numpy as np
import pytest
import regions as drawn
from PIL import Image

from vlm_sft_rl.evaluation.region_report import LOCATED, ORIGINAL, draw_boxes, pick_examples
from vlm_sft_rl.evaluation.regions import region_differences, region_metrics


def sample(key, located, *, image="a", **fields):
    base = {"id": key, "image": image, "box": [0, 0, 10, 10], "description": "a red star", "leak": False}
    return base | {"located": located} | fields


SAMPLES = [
    sample("1", [0, 0, 10, 10], expression="star", found=[0, 0, 10, 9], exact=True),
    sample("2", [0, 0, 10, 5], expression="moon", found=None, exact=False, image="b"),
    sample("3", None, leak=True, description="w1", image="b"),
]


def test_hand_worked_figures():
    metrics = {name: interval.value for name, interval in region_metrics(SAMPLES, 20).items()}
    assert metrics == pytest.approx(
        {
            "self_consistency_iou": 0.5,
            "self_consistency_acc50": 2 / 3,
            "parse_rate": 2 / 3,
            "leak_rate": 1 / 3,
            "words": 7 / 3,
            "rec_acc50": 0.5,
            "reg_exact": 0.5,
        }
    )
    assert "rec_acc50" not in region_metrics([SAMPLES[2]], 20)


def test_whole_images_are_resampled():
    """Twenty boxes of one image are one draw: their interval is that of the images, not of the boxes."""
    rng = np.random.default_rng(0)
    good = {image: rng.random() < 0.5 for image in range(10)}
    samples = [
        sample(f"{image}-{n}", [0, 0, 10, 10] if good[image] else None, image=str(image))
        for image in range(10)
        for n in range(20)
    ]
    one = region_metrics(samples, 500)["self_consistency_iou"]
    lone = region_metrics([s for s in samples if s["id"].endswith("-0")], 500)["self_consistency_iou"]
    assert (one.value, one.low, one.high) == pytest.approx((lone.value, lone.low, lone.high))
    assert one.high - one.low > 0.3


def test_differences_are_paired():
    better = [s | {"located": s["box"]} for s in SAMPLES]
    found = region_differences(better, SAMPLES, 200)["self_consistency_iou"]
    assert found.value == pytest.approx(0.5) and found.high == pytest.approx(0.75)
    same = region_differences(SAMPLES, SAMPLES, 50)["self_consistency_iou"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="same boxes"):
        region_differences(better[:2], SAMPLES)


def test_boxes_are_drawn_where_they_are():
    picture = draw_boxes(Image.new("RGB", (128, 128)), (32, 32, 64, 64), (64, 96, 128, 128))
    assert picture.size == (256, 256)
    assert picture.getpixel((64, 90)) == ORIGINAL and picture.getpixel((90, 90)) == (0, 0, 0)
    assert LOCATED in {picture.getpixel((x, 220)) for x in range(128, 140)}
    unparsed = draw_boxes(drawn.region_rows(1)[0]["image"], (1, 1, 9, 9), None)
    assert LOCATED not in set(unparsed.getdata())


def test_examples_show_failures_and_successes_of_different_images():
    samples = [sample(str(i), [0, 0, 10, i], image=str(i // 2)) for i in range(1, 20)]
    chosen = pick_examples(samples, 4)
    assert len({s["image"] for s in samples if s["id"] in chosen}) == 4
    assert "1" in chosen
