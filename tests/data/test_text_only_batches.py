"""A batch without images on one of several processes: it gets a picture without loss."""

import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data.collators import VisionCollator

TEXT = {
    "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
    "images": [],
}
SEEN = {**TEXT, "images": [Image.new("RGB", (56, 56))]}
FAMILIES = ["llava", "llava_more", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_used_and_nothing_is_learnt_from_it(family):
    model, processor = getattr(families, family)()
    plain = VisionCollator(processor)([TEXT, TEXT])
    batch = VisionCollator(processor, always_image=True)([TEXT, TEXT])
    assert "pixel_values" not in plain and "pixel_values" in batch
    assert batch["labels"].shape[0] == 3 and (batch["labels"][2] == -100).all()
    assert (batch["loss_weights"][2] == 0).all()
    assert torch.equal(batch["labels"][:2, : plain["labels"].shape[1]], plain["labels"])
    inputs = {key: value for key, value in batch.items() if key != "loss_weights"}
    loss = model(**inputs).loss
    bare = model(**{key: value for key, value in plain.items() if key != "loss_weights"}).loss
    assert loss.item() == pytest.approx(bare.item(), abs=1e-6)
    loss.backward()
    # part of the graph, with a gradient of zero
    projector = [
        p
        for name, p in model.named_parameters()
        if "projector" in name or "merger" in name or "connector" in name
    ]
    assert projector and all(p.grad is not None and p.grad.abs().sum() == 0 for p in projector)


def test_batches_with_images_and_single_rows_are_left_as_they_are():
    _, processor = families.llava()
    collator, plain = VisionCollator(processor, always_image=True), VisionCollator(processor)
    mixed, same = collator([TEXT, SEEN]), plain([TEXT, SEEN])
    assert mixed.keys() == same.keys() and all(torch.equal(mixed[key], same[key]) for key in same)
    assert collator.encode(TEXT) == plain.encode(TEXT)
