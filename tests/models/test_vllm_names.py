"""A copy under the names that vLLM reads: what is in it, what is linked, when it is made anew, what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import UNFINISHED
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.models.vllm_names import for_vllm
from vlm_sft_rl.models.weights import INDEX, WHOLE, weight_files
from vlm_sft_rl.runs import model_digest


@pytest.fixture
def folder(tmp_path):
    """In several files, of which some have nothing of the tower."""
    model, processor = families.llava()
    processor.save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    return tmp_path / "model"


def copies(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.is_dir())


def test_the_tower_has_its_published_names_and_the_rest_is_linked(folder):
    digest = model_digest(folder)
    copy = for_vllm(folder)
    assert copy.parent == folder and model_digest(folder) == digest
    old = {name: tensor for path in weight_files(folder) for name, tensor in load_file(path).items()}
    new = {name: tensor for path in weight_files(copy) for name, tensor in load_file(path).items()}
    tower = {name for name in old if "vision_tower." in name}
    assert len(tower) > 20 and len(old) > len(tower)
    for name, tensor in old.items():
        renamed = name.replace("vision_tower.", "vision_tower.vision_model.")
        assert (renamed != name) == (name in tower)
        assert torch.equal(new.pop(renamed), tensor)
    assert new == {}
    index = json.loads((copy / INDEX).read_text())
    assert set(index["weight_map"]) == {n.replace("tower.", "tower.vision_model.") for n in old}
    linked = {path.name for path in copy.iterdir() if path.samefile(folder / path.name)}
    made = {path.name for path in copy.iterdir()} - linked
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} <= linked
    assert any(name.endswith(".safetensors") for name in linked) and INDEX in made
    load_for_inference(copy, "cpu")  # transformers reads both names


def test_what_vllm_reads_is_taken_as_it_is(tmp_path):
    model, processor = families.qwen2_5_vl()
    folder = families.save(model, processor, tmp_path / "qwen")
    assert for_vllm(folder) == folder and copies(folder) == []


def test_a_name_on_the_hub_is_the_folder_it_is_downloaded_to(folder, tmp_path, monkeypatch):
    cached = tmp_path / "hub/models--small--llava"
    shutil.copytree(folder, cached / "snapshots/0123")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert for_vllm("small/llava").parent == cached / "snapshots/0123"
    with pytest.raises(UserError, match=r"small/qwen: no folder, and the Hub does not give it"):
        for_vllm("small/qwen")


def test_a_copy_is_made_once_and_anew_when_the_checkpoint_changed(folder):
    (folder / "vllm-notes").mkdir()  # the user's
    first = for_vllm(folder)
    changed = first.stat().st_mtime_ns
    assert for_vllm(folder) == first and first.stat().st_mtime_ns == changed
    os.utime(folder / "config.json", ns=(1, 1))
    second = for_vllm(folder)
    assert second != first and copies(folder) == sorted(["vllm-notes", second.name])


def test_an_export_that_was_broken_off_leaves_nothing(folder, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    (folder / f".vllm-0123456789ab{UNFINISHED}").mkdir()  # of a process that was killed
    monkeypatch.setattr("vlm_sft_rl.models.vllm_names._link", full)
    with pytest.raises(UserError, match="the disk is full"):
        for_vllm(folder)
    assert copies(folder) == []
    monkeypatch.undo()
    assert (for_vllm(folder) / "config.json").is_file() and len(copies(folder)) == 1


def test_processes_that_start_together_make_one_copy(folder):
    code = f"from vlm_sft_rl.models.vllm_names import for_vllm; print(for_vllm({str(folder)!r}))"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    names = {process.communicate()[0].strip() for process in started}
    assert [process.returncode for process in started] == [0, 0, 0]
    assert names == {str(folder / name) for name in copies(folder)} and len(names) == 1


def test_an_adapter_and_a_damaged_file_are_refused(folder, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"this is an adapter\. Merge it first: `vlm-sft-rl merge"):
        for_vllm(tmp_path / "adapter")
    damaged = weight_files(folder)[0]
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match=damaged.name):
        for_vllm(folder)
    assert not (folder / WHOLE).exists()
