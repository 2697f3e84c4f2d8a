"""Rewind pairs from end to end on the shipped pocket model: pictures, traces, pairs, DPO with the probe."""

import json

import pytest
from json_lines import read_lines, write_lines
from rich.console import Console
from safetensors.torch import load_file

from vlm_sft_rl.data.images import open_image
from vlm_sft_rl.data.tagging.config import PairConfig
from vlm_sft_rl.data.tagging.pairs import write_pairs
from vlm_sft_rl.decode import DecodeOptions, decode
from vlm_sft_rl.decoding import SamplingConfig, generate_plain
from vlm_sft_rl.methods import read_verdicts
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.pocket.dataset import build_world
from vlm_sft_rl.runs import PACKAGE
from vlm_sft_rl.train import main

MODEL = PACKAGE / "pocket" / "verifier"
PICTURES = 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"), sizes={"train": 2, "val": PICTURES, "test": 2})


def test_verdicts_are_read_as_they_were_given(world):
    rows = read_lines(world / "val_captions.jsonl")[:4]
    model, processor, _ = load_for_inference(MODEL, "cpu")
    images = [[open_image(row["images"][0], world)] for row in rows]
    prompts = [row["question"] for row in rows]
    answers = generate_plain(model, processor, images, prompts, SamplingConfig(max_new_tokens=64))
    texts = [answer.tagged_text.strip() for answer in answers]
    read = read_verdicts(model, processor, images, prompts, texts, batch_size=3)
    given = [[span.p_unconfident for span in answer.spans] for answer in answers]
    assert sum(map(len, given)) > 8
    for mine, theirs in zip(read, given, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    # one value a phrase, as decoding counts phrases, where tags do not pair up
    unpaired = " There is <SPAN> a cat </CN>, a cup </CN> and <SPAN> a <SPAN> moon </UN> or <SPAN> a"
    (values,) = read_verdicts(model, processor, images[:1], prompts[:1], [unpaired.strip()])
    assert len(values) == 2 and values[0] == pytest.approx(
        read_verdicts(model, processor, images[:1], prompts[:1], ["There is <SPAN> a cat </CN>"])[0][0],
        abs=1e-4,
    )


def test_from_pictures_without_labels_to_a_model_that_was_trained_on_its_rewinds(world, tmp_path):
    asked = [
        {"id": row["id"], "images": row["images"], "question": row["question"]}
        for row in read_lines(world / "val_captions.jsonl")
    ]
    rows = write_lines(tmp_path / "rows.jsonl", asked)
    options = DecodeOptions(traces=True, image_root=world, batch_size=PICTURES, device="cpu")
    decode(rows, tmp_path / "traces", MODEL, options=options, console=Console(quiet=True))
    counts = write_pairs(tmp_path / "traces", tmp_path / "pairs.jsonl", PairConfig())
    assert counts["answers"] == PICTURES and counts["pairs"] >= 2
    words = {
        "model_name_or_path": MODEL,
        "train_file": tmp_path / "pairs.jsonl",
        "image_root": world,
        "output_dir": tmp_path / "out",
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_steps": 2,
        "probe_spec": "pocket_captions",
        "probe_questions": "val_captions.jsonl",
        "probe_data_dir": world,
        "probe_every": 1,
        "probe_limit": 8,
        "probe_fall": 0.02,
    }
    assert not main(["--config", "rewind/pocket", *(str(w) for k, v in words.items() for w in (f"--{k}", v))])
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any("verdict_drift" in record for record in log)
    assert any("verifier_p_right" in record for record in log)
    assert len(read_lines(tmp_path / "out/probe_start.jsonl")) == 8
    before, after = load_file(MODEL / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    moved = {name for name, tensor in after.items() if not tensor.equal(before[name])}
    assert moved and not any("vision_tower" in name for name in moved)
