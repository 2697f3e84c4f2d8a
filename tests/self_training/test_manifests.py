import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_training.stages import BEGUN, DONE, digest, is_done, run_stage


def test_a_stage_runs_once_for_each_manifest(tmp_path):
    calls = []
    for _ in range(2):
        run_stage(tmp_path / "s", {"seed": 0, "rows": "abc"}, lambda: calls.append(1))
    assert calls == [1] and is_done(tmp_path / "s")


def test_a_stage_that_failed_is_not_done_and_goes_on_under_the_same_manifest_only(tmp_path):
    def fail():
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        run_stage(tmp_path, {"lr": 1.0}, fail)
    assert (tmp_path / BEGUN).is_file() and not is_done(tmp_path)
    with pytest.raises(UserError, match=r"lr: 1.0 -> 2.0.*Choose another output_dir"):
        run_stage(tmp_path, {"lr": 2.0}, lambda: None)
    assert run_stage(tmp_path, {"lr": 1.0}, lambda: None) is True
    assert run_stage(tmp_path, {"lr": 1.0}, fail) is False


def test_a_changed_manifest_names_what_changed_and_leaves_everything(tmp_path):
    run_stage(tmp_path, {"sampling": {"top_k": 50, "stop": []}, "n": 3}, lambda: None)
    before = (tmp_path / DONE).read_text()
    with pytest.raises(UserError, match=r"sampling\.top_k: 50 -> 40"):
        run_stage(tmp_path, {"sampling": {"top_k": 40, "stop": []}, "n": 3}, lambda: None)
    assert (tmp_path / DONE).read_text() == before


def test_digests(tmp_path):
    (tmp_path / "a").write_text("x")
    first = digest(tmp_path / "a")
    (tmp_path / "a").write_text("y")
    assert digest(tmp_path / "a") != first
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    with pytest.raises(UserError, match="cannot be read"):
        digest(tmp_path / "nothing")
