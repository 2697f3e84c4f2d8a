import json

import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.train import last_complete_checkpoint, resume_from


def checkpoint(folder, step, *, weights=True, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if weights:
        (path / "model.safetensors").write_bytes(b"x")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_complete_one_by_number(tmp_path):
    assert last_complete_checkpoint(tmp_path / "absent") == (None, [])
    checkpoint(tmp_path, 9)
    wanted = checkpoint(tmp_path, 10)
    killed = [
        checkpoint(tmp_path, 40, state=None),
        checkpoint(tmp_path, 30, state='{"global_st'),
        checkpoint(tmp_path, 20, weights=False),
    ]
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == (wanted, killed)


def test_what_was_asked_for(tmp_path):
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert resume_from(tmp_path, None) == (second, [])
    assert resume_from(tmp_path, "true") == (second, [])
    assert resume_from(tmp_path, "no") == (None, [])
    assert resume_from(tmp_path, str(first)) == (first, [])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        resume_from(tmp_path, str(tmp_path))
    assert json.loads((first / "trainer_state.json").read_text()) == {"global_step": 1}
