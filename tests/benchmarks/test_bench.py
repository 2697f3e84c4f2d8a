"""The frame of the benchmarks: targets, and what a script prints and writes."""

import pytest
from bench import check

from vlm_sft_rl.errors import UserError


def test_targets_are_held_against_figures():
    figures = {"ratios": {"a": 4.0, "b": 1.2}}
    checked = check(figures, {"ratios.a": {"at_least": 5}, "ratios.b": {"at_most": 1.3}}, "x.yaml")
    assert [item["met"] for item in checked.values()] == [False, True]
    with pytest.raises(UserError, match="names no figure"):
        check(figures, {"ratios.c": {"at_least": 1}}, "x.yaml")
