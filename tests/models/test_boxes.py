"""Box conventions: golden strings, round trips, noise, and the processors' own resize."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from transformers import PreTrainedConfig
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.boxes import CONVENTIONS, convention_for, resized_sizes

NAMES = sorted(CONVENTIONS)


@st.composite
def boxes_in_images(draw):
    width, height = draw(st.tuples(st.integers(16, 3000), st.integers(16, 3000)))
    x1, y1 = draw(st.floats(0, width - 1)), draw(st.floats(0, height - 1))
    x2, y2 = draw(st.floats(x1 + 0.5, width)), draw(st.floats(y1 + 0.5, height))
    return (x1, y1, x2, y2), (width, height)


def steps_of(convention, size, resized):
    """Pixels of the original image per step of the convention, both axes; the largest error of one edge."""
    frame = (max(size), max(size)) if convention.padded else size
    full = resized if convention.needs_resized else (convention.full, convention.full)
    return [side / (edge * 10**convention.decimals) for side, edge in zip(frame, full, strict=True)]


GOLDEN = {
    "qwen-vl": "<ref>a cup</ref><box>(249,499),(499,999)</box>",
    "qwen2-vl": "<|object_ref_start|>a cup<|object_ref_end|><|box_start|>(250,500),(500,1000)<|box_end|>",
    "qwen2.5-vl": '{"bbox_2d": [112, 112, 224, 224], "label": "a cup"}',
    "qwen3-vl": '{"bbox_2d": [250, 500, 500, 1000], "label": "a cup"}',
    "internvl": "<ref>a cup</ref><box>[[250, 500, 500, 1000]]</box>",
    "llava": "a cup [0.25, 0.50, 0.50, 1.00]",
    "llava-pad": "a cup [0.25, 0.50, 0.50, 0.75]",  # padded to 400x400 the image lies between 100 and 300
    "pocket": "a cup x3-x4",
}


@pytest.mark.parametrize("name", NAMES)
def test_golden_strings(name):
    convention, sizes = CONVENTIONS[name], ((400, 200), (448, 224))
    text = convention.format((100, 100, 200, 200), *sizes, label="a cup")
    assert text == GOLDEN[name]
    (box,) = convention.parse(text, *sizes)
    assert box == pytest.approx((100, 100, 200, 200), abs=0.5 if name != "qwen-vl" else 1)
    bare = convention.format((100, 100, 200, 200), *sizes)
    assert bare.startswith(convention.opening) and "a cup" not in bare
    assert convention.parse(bare, *sizes) == [box]


def test_a_box_at_the_edge_of_a_padded_image_does_not_begin_in_the_padding():
    convention = CONVENTIONS["llava-pad"]
    for box, size in (((70, 0, 72, 1), (72, 603)), ((0, 70, 1, 72), (603, 72))):
        (back,) = convention.parse(convention.format(box, size), size)
        assert back == pytest.approx(box, abs=7)  # a hundredth of 603 pixels


@pytest.mark.parametrize("name", NAMES)
@given(case=boxes_in_images(), factor=st.floats(0.3, 2))
def test_round_trip(name, case, factor):
    convention = CONVENTIONS[name]
    box, size = case
    resized = tuple(max(28, round(side * factor / 28) * 28) for side in size)
    (back,) = convention.parse(convention.format(box, size, resized), size, resized)
    assert 0 <= back[0] < back[2] <= size[0] and 0 <= back[1] < back[3] <= size[1]
    for got, expected, step in zip(back, box, steps_of(convention, size, resized) * 2, strict=True):
        # an edge is off by less than a step; the far one by up to two where a tiny box was widened to one step
        assert abs(got - expected) <= 2 * step + 1e-6
    again = convention.format(back, size, resized)
    if convention.rounding != (int, int):
        assert convention.parse(again, size, resized)[0] == pytest.approx(back, abs=1e-6 * max(size))


@pytest.mark.parametrize("name", NAMES)
@given(text=st.text(alphabet='()[]<>box/,.-0123456789 ":{}_2dwxyz', max_size=80))
def test_noise_gives_boxes_inside_of_the_image_or_nothing(name, text):
    for x1, y1, x2, y2 in CONVENTIONS[name].parse(text, (640, 480), (644, 476)):
        assert 0 <= x1 < x2 <= 640 and 0 <= y1 < y2 <= 480


MALFORMED = [
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
]


@pytest.mark.parametrize("name, text", MALFORMED)
def test_malformed(name, text):
    assert CONVENTIONS[name].parse(text, (400, 200), (448, 224)) == []


def test_several_boxes_in_order_and_cut_off_lists():
    # as `skip_special_tokens` leaves it
    text = "a(0,0),(500,500) b(500,500),(1000,1000) c(1,"
    assert CONVENTIONS["qwen2-vl"].parse(text, (100, 100)) == [(0, 0, 50, 50), (50, 50, 100, 100)]
    text = '```json\n[\n\t{"bbox_2d": [0, 0, 56, 56], "label": "a"},\n\t{"bbox_2d": [1, 2'
    assert CONVENTIONS["qwen2.5-vl"].parse(text, (100, 100), (112, 112)) == [(0, 0, 50, 50)]
    cells = CONVENTIONS["pocket"].parse("The star is at w1, the moon at y3.", (128, 128))
    assert cells == [(0, 0, 32, 32), (64, 64, 96, 96)]


def test_boxes_outside_of_the_image():
    qwen = CONVENTIONS["qwen2-vl"]
    assert qwen.format((-10, 50, 500, 60), (100, 100)) == "<|box_start|>(0,500),(1000,600)<|box_end|>"
    with pytest.raises(UserError, match="is empty inside of an image of 100x100"):
        qwen.format((100, 0, 120, 10), (100, 100))
    with pytest.raises(UserError, match="pass `resized`"):
        CONVENTIONS["qwen2.5-vl"].parse("", (100, 100))


def qwen_processor(patch: int):
    area = (2 * patch) ** 2
    return Qwen2VLImageProcessor(min_pixels=area * 4, max_pixels=area * 60, patch_size=patch, merge_size=2)


# the whole picture, squashed, is the first tile of LLaVA-NeXT's and the only one of InternVL's without cutting
SIDE = 112
SQUARE = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
TILES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
PROCESSORS = {
    "qwen2-vl": qwen_processor(14),
    "qwen2.5-vl": qwen_processor(14),
    "qwen3-vl": qwen_processor(16),
    "internvl": GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=False),
    "llava": LlavaNextImageProcessor(**SQUARE, image_grid_pinpoints=TILES),
    "llava-pad": LlavaImageProcessor(**SQUARE, do_pad=True),
}


def seen(processor, features) -> np.ndarray:
    """What the vision tower is given of the picture, as (height, width)."""
    pixels = np.asarray(features["pixel_values"], dtype=np.float32)
    if "image_grid_thw" not in features:
        return pixels.reshape(-1, *pixels.shape[-3:])[0].mean(0)
    _, height, width = features["image_grid_thw"][0].tolist()
    patch, merge = processor.patch_size, processor.merge_size
    shape = (height // merge, width // merge, merge, merge, 3, 2, patch, patch)
    blocks = pixels.reshape(shape).mean(axis=(4, 5))
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(height * patch, width * patch)


@pytest.mark.parametrize("size", [(400, 200), (150, 330), (224, 224), (640, 480), (1999, 1001)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_text_says_where_the_tower_sees_a_painted_box(name, size):
    processor, convention = PROCESSORS[name], CONVENTIONS[name]
    width, height = size
    box = (width // 5, height * 2 // 5, width * 7 // 10, height * 9 // 10)
    picture = Image.new("RGB", size)
    ImageDraw.Draw(picture).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill="white")
    features = processor(images=[picture], return_tensors="pt")
    frame = seen(processor, features)
    bright = frame > (frame.min() + frame.max()) / 2
    ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    painted = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)

    resized = resized_sizes(features, processor)[0] if convention.needs_resized else None
    text = convention.format(box, size, resized)
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", text)[-4:]]
    sides = frame.shape[::-1]
    full = sides if convention.needs_resized else (convention.full, convention.full)
    named = [n * side / edge for n, side, edge in zip(numbers, sides * 2, full * 2, strict=True)]
    # a pixel for the blur of the resize, and half a step of the numbers
    steps = [side / (edge * 10**convention.decimals) for side, edge in zip(sides, full, strict=True)]
    errors = [abs(a - b) - step / 2 for a, b, step in zip(named, painted, steps * 2, strict=True)]
    assert max(errors) <= 1, (named, painted)


def test_choice_of_the_convention():
    config, unknown = PreTrainedConfig(), PreTrainedConfig()
    config.model_type, unknown.model_type = "qwen2_5_vl", "mllama"
    assert convention_for(config).name == convention_for(SimpleNamespace(config=config)).name == "qwen2.5-vl"
    assert convention_for(config, "pocket").name == "pocket"
    with pytest.raises(UserError, match="no way of their own to write boxes"):
        convention_for(unknown)
    with pytest.raises(UserError, match="'qwen' is unknown"):
        convention_for(config, "qwen")
    with pytest.raises(UserError, match="returns no `image_grid_thw`"):
        resized_sizes({"pixel_values": None}, object())
