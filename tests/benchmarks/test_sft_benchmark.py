import json

import pytest

from vlm_sft_rl.benchmarks import run
from vlm_sft_rl.errors import UserError


def test_figures_and_their_file(tmp_path):
    figures = run("sft", tmp_path / "sft.json", steps=4, batch_size=2, warmup=1)
    assert json.loads((tmp_path / "sft.json").read_text()) == figures
    ratios = figures["ratios"]
    assert ratios["step_time_low"] <= ratios["step_time"] <= ratios["step_time_high"]
    assert 0.3 < ratios["step_cpu_time"] < 3  # a sane figure; its size is for a quiet machine to tell
    assert figures["max_loss_difference"] == 0
    assert figures["peak_bytes"]["trl"] > 1e6 and ratios["peak_memory"] <= 1.03


def test_unknown_name():
    with pytest.raises(UserError, match="decoding, reader, sft"):
        run("speed")
