from pathlib import Path

import families
import pytest
from test_packed_processes import launch

SCRIPT = Path(__file__).with_name("method_processes.py")
SIGNAL = Path(__file__).with_name("signal_processes.py")


@pytest.mark.slow
def test_self_correction_and_dpo_with_adapters_train_on_two_processes_as_on_one(tmp_path):
    families.save(*families.llava(), tmp_path / "model")
    (alone,) = launch(tmp_path / "one", 1, 4, SCRIPT)
    for rank in launch(tmp_path / "two", 2, 2, SCRIPT):
        for method, figures in (
            ("sco", ("loss", "loss/attempt", "loss/correction")),
            ("dpo", ("loss", "rewards/margins_cot", "rewards/margins_refine")),
        ):
            for figure in figures:
                wanted = [entry[figure] for entry in alone[method]]
                assert len(wanted) == 3 and len(set(wanted)) > 1
                assert [entry[figure] for entry in rank[method]] == pytest.approx(wanted, abs=1e-5), figure


@pytest.mark.slow
def test_a_signal_on_one_process_is_one_for_all_and_none_on_any_moves_nothing(tmp_path):
    one, other = launch(tmp_path / "two", 2, 3, SIGNAL)
    assert one["skipped"] == [0, 1, 1]
    assert one["start"] != one["end"] == other["end"]
    assert one["sums"] == other["sums"] == [one["end"]] * 2
