"""Box conventions: golden strings, round trips, noise, and the processors' own resize."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.boxes import CONVENTIONS, convention_for, resized_sizes

NAMES = sorted(CONVENTIONS)
sizes = st.tuples(st.integers(16, 3000), st.integers(16, 3000))


@st.composite
def boxes_in_images(draw):
    width, height = draw(sizes)
    x1 = draw(st.floats(0, width - 1))
    y1 = draw(st.floats(0, height - 1))
    x2 = draw(st.floats(x1 + 0.5, width))
    y2 = draw(st.floats(y1 + 0.5, height))
    return (x1, y1, x2, y2), (width, height)


def unit(convention, size, resized):
    """Pixels of the original image per step of the convention, both axes; the largest error of one edge."""
    frame = (max(size), max(size)) if convention.padded else size
    full = resized if convention.needs_resized else (convention.full, convention.full)
    return tuple(side / (edge * 10**convention.decimals) for side, edge in zip(frame, full, strict=True))


GOLDEN = [
    ("qwen-vl", "<ref>a cup</ref><box>(249,499),(499,999)</box>"),
    ("qwen2-vl", "<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(250,500),(500,1000)<|box_end|>"),
    ("qwen2.5-vl", '{"bbox_2d": [112, 112, 224, 224], "label": "a cup"}'),
    ("qwen3-vl", '{"bbox_2d": [250, 500, 500, 1000], "label": "a cup"}'),
    ("internvl", "<ref>a cup</ref><box>[[250, 500, 500, 1000]]</box>"),
    ("llava", "a cup [0.25, 0.50, 0.50, 1.00]"),
    # 400x200 padded to 400x400: the image lies between 100 and 300
    ("llava-pad", "a cup [0.25, 0.50, 0.50, 0.75]"),
    ("pocket", "a cup x3-x4"),
]


@pytest.mark.parametrize("name, expected", GOLDEN, ids=[name for name, _ in GOLDEN])
def test_golden_strings(name, expected):
    convention = CONVENTIONS[name]
    text = convention.format((100, 100, 200, 200), (400, 200), (448, 224), label="a cup")
    assert text == expected
    (box,) = convention.parse(text, (400, 200), (448, 224))
    assert box == pytest.approx((100, 100, 200, 200), abs=0.5 if name != "qwen-vl" else 1)
    bare = convention.format((100, 100, 200, 200), (400, 200), (448, 224))
    assert bare.startswith(convention.opening) and "a cup" not in bare
    assert convention.parse(bare, (400, 200), (448, 224)) == [box]


def test_a_box_at_the_edge_of_a_padded_image_does_not_begin_in_the_padding():
    convention = CONVENTIONS["llava-pad"]
    for box, size in (((70, 0, 72, 1), (72, 603)), ((0, 70, 1, 72), (603, 72))):
        (back,) = convention.parse(convention.format(box, size), size)
        assert back == pytest.approx(box, abs=7)  # a hundredth of 603 pixels


@pytest.mark.parametrize("name", NAMES)
@given(case=boxes_in_images(), scale=st.floats(0.3, 2))
def test_round_trip(name, case, scale):
    convention = CONVENTIONS[name]
    box, size = case
    resized = tuple(max(28, round(side * scale / 28) * 28) for side in size)
    (back,) = convention.parse(convention.format(box, size, resized), size, resized)
    steps = unit(convention, size, resized)
    assert 0 <= back[0] < back[2] <= size[0] and 0 <= back[1] < back[3] <= size[1]
    for got, wanted, step in zip(back, box, steps * 2, strict=True):
        # an edge is off by less than a step; the far one by up to two where a tiny box was widened to one step
        assert abs(got - wanted) <= 2 * step + 1e-6
    again = convention.format(back, size, resized)
    if convention.rounding != (int, int):
        assert convention.parse(again, size, resized)[0] == pytest.approx(back, abs=1e-6 * max(size))


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(alphabet='()[]<>box/,.-0123456789 ":{}_2dwxyz', max_size=80))
def test_noise_gives_boxes_inside_of_the_image_or_nothing(name, text):
    for x1, y1, x2, y2 in CONVENTIONS[name].parse(text, (640, 480), (644, 476)):
        assert 0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 480


@pytest.mark.parametrize(
    "name, text",
    [
        ("qwen-vl", "<box>(1,2),(3)</box>"),
        ("qwen-vl", "<box>(500,2),(3,900)</box>"),
        ("qwen2-vl", f"({'9' * 5000},2),(3,4)"),
        ("qwen2.5-vl", '{"bbox_2d": [5, 5, 5, 9]}'),
        ("qwen3-vl", '{"bbox": [1, 2, 3, 4]}'),
        ("internvl", "[[1, 2, 3]]"),
        ("llava", "[10, 20, 30, 40]"),
        ("llava-pad", "[0.1, 0.0, 0.2, 0.2]"),
        ("pocket", "w5 a1 wx1 w12"),
        ("pocket", "x2-w1"),
    ],
)
def test_malformed(name, text):
    assert CONVENTIONS[name].parse(text, (400, 200), (448, 224)) == []


def test_several_boxes_in_order_and_cut_off_lists():
    qwen = CONVENTIONS["qwen2-vl"]
    # as `skip_special_tokens` leaves it
    assert qwen.parse("a(0,0),(500,500) b(500,500),(1000,1000) c(1,", (100, 100)) == [
        (0, 0, 50, 50),
        (50, 50, 100, 100),
    ]
    text = '```json\n[\n\t{"bbox_2d": [0, 0, 56, 56], "label": "a"},\n\t{"bbox_2d": [1, 2'
    assert CONVENTIONS["qwen2.5-vl"].parse(text, (100, 100), (112, 112)) == [(0, 0, 50, 50)]
    assert CONVENTIONS["pocket"].parse("The star is at w1, the moon at y3.", (128, 128)) == [
        (0, 0, 32, 32),
        (64, 64, 96, 96),
    ]


def test_boxes_outside_of_the_image():
    qwen = CONVENTIONS["qwen2-vl"]
    assert qwen.format((-10, 50, 500, 60), (100, 100)) == "<|box_start|>(0,500),(1000,600)<|box_end|>"
    with pytest.raises(UserError, match="is empty inside of an image of 100x100"):
        qwen.format((100, 0, 120, 10), (100, 100))
    with pytest.raises(UserError, match="pass `resized`"):
        CONVENTIONS["qwen2.5-vl"].parse("", (100, 100))


@pytest.mark.parametrize("size", [(640, 480), (33, 500), (1999, 1001), (28, 28)])
@pytest.mark.parametrize("patch, merge", [(14, 2), (16, 2)], ids=["qwen2-vl", "qwen3-vl"])
def test_through_the_processors_resize(size, patch, merge):
    """The grid tells the very size that smart_resize chose, and a box drawn there comes back to its pixels."""
    factor = patch * merge
    processor = Qwen2VLImageProcessor(
        min_pixels=factor**2 * 4, max_pixels=factor**2 * 200, patch_size=patch, merge_size=merge
    )
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    (resized,) = resized_sizes(processor(images=[image], return_tensors="pt"), processor)
    height, width = smart_resize(size[1], size[0], factor, factor**2 * 4, factor**2 * 200)
    assert resized == (width, height)
    box = (size[0] * 0.25, size[1] * 0.5, size[0] * 0.75, size[1])
    for name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl"):
        convention = CONVENTIONS[name]
        text = convention.format(box, size, resized)
        (back,) = convention.parse(text, size, resized)
        steps = unit(convention, size, resized)
        assert np.abs(np.subtract(back, box)).max() <= max(steps) / 2 + 1e-6
    numbers = [int(n) for n in re.findall(r"\d+", CONVENTIONS["qwen2.5-vl"].format(box, size, resized))[1:]]
    assert numbers == [round(width * 0.25), round(height * 0.5), round(width * 0.75), height]


class Config:
    model_type = "qwen2_5_vl"


class Model:
    config = Config()


class Unknown:
    model_type = "mllama"


def test_choice_of_the_convention():
    assert convention_for(Config()).name == convention_for(Model()).name == "qwen2.5-vl"
    assert convention_for(Model(), "pocket").name == "pocket"
    with pytest.raises(UserError, match="no way of their own to write boxes"):
        convention_for(Unknown())
    with pytest.raises(UserError, match="'qwen' is unknown"):
        convention_for(Model(), "qwen")


def test_processors_without_a_grid():
    with pytest.raises(UserError, match="returns no `image_grid_thw`"):
        resized_sizes({"pixel_values": None}, Model())
