"""A box painted into a picture is found, after the processor's own resize, where the convention's text says it is."""

import re

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.llava.image_processing_llava import LlavaImageProcessor
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from vlm_sft_rl.models.boxes import CONVENTIONS, resized_sizes

SIDE = 112


def qwen(patch: int):
    return Qwen2VLImageProcessor(
        min_pixels=(2 * patch) ** 2 * 4, max_pixels=(2 * patch) ** 2 * 60, patch_size=patch, merge_size=2
    )


# the whole picture, squashed, is the first tile of LLaVA-NeXT's and the only one of InternVL's without cutting
PROCESSORS = {
    "qwen2-vl": qwen(14),
    "qwen2.5-vl": qwen(14),
    "qwen3-vl": qwen(16),
    "internvl": GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=False),
    "llava": LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]],
    ),
    "llava-pad": LlavaImageProcessor(
        do_pad=True, size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ),
}


def seen(processor, features) -> np.ndarray:
    """What the vision tower is given of the picture, as (height, width)."""
    pixels = np.asarray(features["pixel_values"], dtype=np.float32)
    if "image_grid_thw" not in features:
        while pixels.ndim > 3:
            pixels = pixels[0]
        return pixels.mean(0)
    _, height, width = features["image_grid_thw"][0].tolist()
    patch, merge = processor.patch_size, processor.merge_size
    shape = (height // merge, width // merge, merge, merge, 3, 2, patch, patch)
    blocks = pixels.reshape(shape).mean(axis=(4, 5))
    return blocks.transpose(0, 2, 4, 1, 3, 5).reshape(height * patch, width * patch)


@pytest.mark.parametrize("size", [(400, 200), (150, 330), (224, 224)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_text_says_where_the_tower_sees_the_box(name, size):
    processor, convention = PROCESSORS[name], CONVENTIONS[name]
    width, height = size
    box = (width // 5, height * 2 // 5, width * 7 // 10, height * 9 // 10)
    picture = Image.new("RGB", size)
    ImageDraw.Draw(picture).rectangle([box[0], box[1], box[2] - 1, box[3] - 1], fill="white")
    features = processor(images=[picture], return_tensors="pt")
    frame = seen(processor, features)
    bright = frame > (frame.min() + frame.max()) / 2
    ys, xs = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
    found = (xs[0], ys[0], xs[-1] + 1, ys[-1] + 1)

    resized = resized_sizes(features, processor)[0] if convention.needs_resized else None
    numbers = [float(n) for n in re.findall(r"\d+(?:\.\d+)?", convention.format(box, size, resized))[-4:]]
    # what the whole frame is called in the convention's numbers
    whole = {"qwen2.5-vl": frame.shape[::-1], "llava": (1, 1), "llava-pad": (1, 1)}.get(name, (1000, 1000))
    named = [n * side / full for n, side, full in zip(numbers, frame.shape[::-1] * 2, whole * 2, strict=True)]
    # a pixel for the blur of the resize, and half a step of the numbers
    steps = [side / (100 if full == 1 else full) for side, full in zip(frame.shape[::-1], whole, strict=True)]
    assert all(abs(a - b) <= 1 + step / 2 for a, b, step in zip(named, found, steps * 2, strict=True)), (
        named,
        found,
    )
