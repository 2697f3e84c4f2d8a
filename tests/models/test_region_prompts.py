import families
from PIL import Image

from vlm_sft_rl.models.boxes import CONVENTIONS
from vlm_sft_rl.models.region_prompts import RegionPrompts


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
