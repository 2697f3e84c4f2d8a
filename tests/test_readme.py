"""README: short, true of what is shipped, and its six commands lead from plain answers to a model that is served."""

import json
import re
import shlex
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from vlm_sft_rl import recipes
from vlm_sft_rl.pocket.dataset import build_world

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
(STEPS,) = [block.splitlines() for block in BLOCKS if "data tag" in block]


def test_it_is_read_within_minutes():
    assert len(README.split()) <= 800


def test_the_recipes_exist():
    listed = re.findall(r"`((?:reverse|r3v|sco|sc_tune)/\w+)`", README)
    assert len(listed) >= 10 and set(listed) <= set(recipes.names("recipes"))


def test_the_first_hour_has_the_same_commands():
    guide = (ROOT / "docs/first_hour.md").read_text(encoding="utf-8").replace("\\\n    ", "")
    for step in STEPS:
        assert step.replace("images/1.jpg", "photo.jpg") in guide


def test_there_are_six_commands_and_they_tag():
    assert [shlex.split(step)[1] for step in STEPS] == ["model", "data", "data", "train", "generate", "serve"]


@pytest.mark.slow
def test_the_six_commands_run(tmp_path):
    """As they stand, but on the pocket model and for three steps; each begins where the one before it ended."""
    build_world(tmp_path / "world", sizes={"train": 8, "val": 1, "test": 1})
    (tmp_path / "images").mkdir()
    with open(tmp_path / "answers.jsonl", "w") as file:
        for number, scene in enumerate(sorted((tmp_path / "world").rglob("*.png"))[:8], 1):
            (tmp_path / f"images/{number}.jpg").write_bytes(scene.read_bytes())
            row = {"id": str(number), "image": f"{number}.jpg", "question": "Describe the image."}
            file.write(json.dumps(row | {"answer": "There is a sun and a cup."}) + "\n")
    swaps = {
        "Qwen/Qwen2.5-VL-3B-Instruct": str(ROOT / "vlm_sft_rl/pocket/base"),
        "train reverse/qwen2_5_vl_3b_qlora": "train reverse/pocket --accelerate-config cpu --max_steps 3",
        "--trace": "--threshold 0.1 --trace",
    }
    port = socket.create_server(("127.0.0.1", 0)).getsockname()[1]
    *steps, serve = STEPS
    for step in steps:
        for old, new in swaps.items():
            step = step.replace(old, new)
        words = [sys.executable, "-m", "vlm_sft_rl.cli", *shlex.split(step)[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stdout}\n{done.stderr}"
    assert "P(" in (tmp_path / "answer.html").read_text()
    words = [sys.executable, "-m", "vlm_sft_rl.cli", *shlex.split(serve)[1:], "--port", str(port)]
    server = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    try:
        assert "answers at" in server.stdout.readline()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as reply:
            assert json.load(reply)["status"] == "ok"
    finally:
        server.terminate()
        server.wait(60)
