import json

import pytest

from vlm_sft_rl.cli.common import whole_numbers
from vlm_sft_rl.demos import r3v as demo_r3v
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.pocket import problems as problem_set


@pytest.mark.slow
def test_a_small_demo_has_a_summary_of_the_agreed_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(problem_set, "SIZES", {"warmup": 48, "train": 24, "test": 12})
    options = {"seeds": [0], "variants": ["full", "star"], "questions": 12, "steps": 40}
    result = demo_r3v.reproduce(tmp_path, **options)
    full, star = (
        json.loads((tmp_path / "seed-0" / v / "summary.json").read_text()) for v in ("full", "star")
    )
    assert (full["method"], full["n"], full["seed"]) == ("r3v", 12, 0) and full["seconds"] > 0
    assert [r["round"] for r in full["rounds"]] == [0, 1, 2]
    for record in full["rounds"]:
        for name in ("greedy", "majority", "self_select", "self_refine", "pass_at_k"):
            assert set(record[name]) == {"value", "low", "high"}
            assert 0 <= record[name]["low"] <= record[name]["value"] <= record[name]["high"] <= 1
    assert star["rounds"][0] == full["rounds"][0]  # round 0 is shared
    assert (
        not {"refine", "select"} & star["rows"]["1"].keys()
        and {"refine", "select"} & full["rows"]["1"].keys()
    )
    assert result["variants"]["full"]["minus_full"]["value"] == 0
    assert (tmp_path / "seed-0" / "full" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "report.html").is_file()


def test_unknown_variant(tmp_path):
    with pytest.raises(UserError, match=r"no variant 'stars'"):
        demo_r3v.run(tmp_path, variant="stars")


def test_unknown_variants_and_seeds_of_a_reproduction(tmp_path):
    with pytest.raises(UserError, match=r"no variant 'stars'.*deduplicate"):
        demo_r3v.reproduce(tmp_path, variants=["full", "stars"])
    with pytest.raises(UserError, match="--seeds is '0;1'"):
        whole_numbers("--seeds", "0;1")
    assert whole_numbers("--seeds", "0, 2") == [0, 2]
