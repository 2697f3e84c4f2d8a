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
    expected = []
    for size in sizes:
        (_, height, width), patch = (
            processor.image_processor(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"][
                0
            ].tolist(),
            processor.image_processor.patch_size,
        )
        expected.append((width * patch, height * patch))
    prepared = []
    kind = type(processor.image_processor)
    original = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **k: prepared.append(1) or original(self, *a, **k))
    assert [prompts.resized(Image.new("RGB", size)) for size in sizes] == expected
    assert len(set(expected)) == len(set(sizes)) == len(prepared)


def cured(processor, folder):
    """The processor with the settings that the warning names, written to its file and read again."""
    processor.save_pretrained(folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "do_center_crop": False,
    }
    path.write_text(json.dumps(settings))
    return AutoProcessor.from_pretrained(folder).image_processor


def sees_both_ends(image_processor, size) -> bool:
    """Does a white line at either end of the long side change what the tower is given?"""
    width, height = size
    pictures = [Image.new("RGB", size) for _ in range(3)]
    thick = max(size) // 10
    pictures[1].paste("white", (0, 0, thick, height) if width > height else (0, 0, width, thick))
    pictures[2].paste(
        "white", (width - thick, 0, width, height) if width > height else (0, height - thick, width, height)
    )
    plain, first, last = (
        image_processor(images=[p], return_tensors="pt")["pixel_values"].float() for p in pictures
    )
    return not torch.equal(plain, first) and not torch.equal(plain, last)


@pytest.mark.parametrize("size", [(120, 40), (40, 120)])
def test_the_settings_tell_whether_the_tower_sees_the_ends_of_a_picture(tmp_path, size):
    processor = families.llava()[1]
    kinds = {
        "llava": processor.image_processor,
        "cured": cured(processor, tmp_path),
        "squeezed": CLIPImageProcessor(
            size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28}
        ),
        "llava_next": families.llava_next()[1].image_processor,
        "qwen2_5_vl": families.qwen2_5_vl()[1].image_processor,
        "internvl": families.internvl()[1].image_processor,
    }
    assert cured(processor, tmp_path)(images=[Image.new("RGB", size)])["pixel_values"][0].shape == (3, 28, 28)
    assert {name for name, kind in kinds.items() if not sees_both_ends(kind, size)} == {"llava"}
    assert {name for name, kind in kinds.items() if crops_ends(kind)} == {"llava"}


def test_a_picture_whose_ends_are_cut_off_is_warned_of_once(monkeypatch):
    said = []
    region_prompts.logger.warning_once.cache_clear()
    monkeypatch.setattr(region_prompts.logger, "warning", lambda text, *rest: said.append(text))
    prompts = RegionPrompts(families.llava()[1], CONVENTIONS["llava"])
    prompts.resized(Image.new("RGB", (40, 40)))
    assert not said  # square pictures, as the pocket world's, are whole
    for size in [(40, 60), (80, 40)]:
        prompts.resized(Image.new("RGB", size))
    assert len(said) == 1 and "do_center_crop" in said[0] and "llava-pad" in said[0]
