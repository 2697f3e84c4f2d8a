import json

import families
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.models.clip.image_processing_clip import CLIPImageProcessor

from vlm_sft_rl.models import regions as region_prompts
from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.models.regions import RegionPrompts, crops_ends


def test_each_size_of_picture_is_prepared_once_and_resized_as_the_tower_sees_it(monkeypatch):
    _, processor = families.qwen2_5_vl()
    prompts = RegionPrompts(processor, CONVENTIONS["qwen2.5-vl"])
    sizes = [(56, 84), (120, 64), (56, 84), (64, 120), (120, 64)]
    images = processor.image_processor
    expected = []
    for size in sizes:
        grid = images(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
        _, height, width = grid[0].tolist()
        expected.append((width * images.patch_size, height * images.patch_size))
    prepared, original = [], type(images).__call__
    monkeypatch.setattr(
        type(images), "__call__", lambda self, *a, **k: prepared.append(1) or original(self, *a, **k)
    )
    assert [prompts.resized(Image.new("RGB", size)) for size in sizes] == expected
    assert len(set(expected)) == len(set(sizes)) == len(prepared)


def cured(processor, folder):
    """The processor with the settings that the warning names, written to its file and read again."""
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    cure = {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "do_center_crop": False}
    settings["image_processor"] |= cure
    path.write_text(json.dumps(settings))
    return AutoProcessor.from_pretrained(folder).image_processor


def sees_both_ends(image_processor, size) -> bool:
    """Does a white line at either end of the long side change what the tower is given?"""
    (width, height), thick = size, max(size) // 10
    lines = [(0, 0, thick, height), (width - thick, 0, width, height)]
    if width < height:
        lines = [(0, 0, width, thick), (0, height - thick, width, height)]
    pictures = [Image.new("RGB", size) for _ in range(3)]
    for picture, line in zip(pictures[1:], lines, strict=True):
        picture.paste("white", line)
    pixels = [image_processor(images=[p], return_tensors="pt")["pixel_values"].float() for p in pictures]
    plain, first, last = pixels
    return not torch.equal(plain, first) and not torch.equal(plain, last)


@pytest.mark.parametrize("size", [(120, 40), (40, 120)])
def test_the_settings_tell_whether_the_tower_sees_the_ends_of_a_picture(tmp_path, size):
    names, square = ("llava", "llava_next", "qwen2_5_vl", "internvl"), {"height": 28, "width": 28}
    kinds = {name: getattr(families, name)()[1].image_processor for name in names}
    kinds["cured"] = cured(families.llava()[1], tmp_path)
    kinds["squeezed"] = CLIPImageProcessor(size=square, crop_size=square)
    assert kinds["cured"](images=[Image.new("RGB", size)])["pixel_values"][0].shape == (3, 28, 28)
    assert {name for name, kind in kinds.items() if not sees_both_ends(kind, size)} == {"llava"}
    assert {name for name, kind in kinds.items() if crops_ends(kind)} == {"llava"}


def test_a_picture_whose_ends_are_cut_off_is_warned_of_once(monkeypatch):
    warnings = []
    region_prompts.logger.warning_once.cache_clear()
    monkeypatch.setattr(region_prompts.logger, "warning", lambda text, *rest: warnings.append(text))
    prompts = RegionPrompts(families.llava()[1], CONVENTIONS["llava"])
    prompts.resized(Image.new("RGB", (40, 40)))
    assert not warnings  # square pictures, as the pocket world's, are whole
    for size in [(40, 60), (80, 40)]:
        prompts.resized(Image.new("RGB", size))
    assert len(warnings) == 1 and "do_center_crop" in warnings[0] and "llava-pad" in warnings[0]
