import random

import torch

from vlm_sft_rl.pocket.build import (
    BuildConfig,
    Packer,
    PatchWords,
    build,
    packed_loss,
    patch_labels,
    training_turns,
)
from vlm_sft_rl.pocket.model import build_model, build_processor, initialise_attention
from vlm_sft_rl.pocket.world import CELLS, NOUNS, draw_scene


def test_packed_turns_equal_one_sequence_per_turn():
    processor = build_processor()
    model = build_model(processor, hidden=48, layers=2)
    initialise_attention(model)
    rng = random.Random(0)
    scenes = [draw_scene(rng, 0.5) for _ in range(3)]
    turns = [training_turns(scene, rng, 0.7) for scene in scenes]
    features = torch.randn(3, 16, 48)
    weights = {"caption": 3.0, "locate-drill": 2.0}
    packer = Packer(processor, weights)
    with torch.no_grad():
        together = packed_loss(model, packer.pack(turns), features, packer.image_start)
        alone, total = 0.0, 0.0
        for row, scene_turns in enumerate(turns):
            for turn in scene_turns:
                weight = weights.get(turn.kind, 1.0)
                batch = packer.pack([[turn]])
                alone += weight * packed_loss(model, batch, features[row : row + 1], packer.image_start)
                total += weight
    torch.testing.assert_close(together, alone / total, atol=2e-6, rtol=1e-5)


def test_the_packed_prefix_is_what_the_chat_template_and_processor_write():
    processor = build_processor()
    from PIL import Image

    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a star?"}]},
        {"role": "assistant", "content": "Yes"},
    ]
    text = processor.apply_chat_template(chat, tokenize=False)
    expected = processor(text=text, images=Image.new("RGB", (128, 128)), add_special_tokens=False)[
        "input_ids"
    ][0]
    from vlm_sft_rl.pocket.language import Turn

    packed = Packer(processor, {}).pack([[Turn("Is there a star?", "Yes", "existence")]]).ids[0].tolist()
    assert packed == list(expected)


def test_patch_labels_name_what_stands_where():
    rng = random.Random(1)
    scenes = [draw_scene(rng, 0.5) for _ in range(5)]
    labels = patch_labels(scenes)
    names = ["nothing", *NOUNS]
    for row, scene in enumerate(scenes):
        found = {CELLS[i]: names[label] for i, label in enumerate(labels[row, :, 0]) if label}
        assert found == {item.cell: item.noun for item in scene.objects}
    words = PatchWords.from_tokenizer(build_processor().tokenizer)
    assert len(set(words.nouns.tolist())) == len(NOUNS) + 1


def test_an_interrupted_build_ends_with_the_same_weights(tmp_path, monkeypatch):
    from vlm_sft_rl.pocket import build as module

    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 1)
    config = BuildConfig(scenes=40, vision_steps=4, vision_batch=8, language_steps=4, language_batch=2)
    whole = build(tmp_path / "whole", config)
    original, calls = module._Stage.update, []

    def interrupted(stage, loss):
        calls.append(1)
        original(stage, loss)
        if len(calls) == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(module._Stage, "update", interrupted)
    try:
        build(tmp_path / "cut", config)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("the build was not interrupted")
    cut = build(tmp_path / "cut", config)
    assert (whole / "model.safetensors").read_bytes() == (cut / "model.safetensors").read_bytes()
