"""The decoding benchmark: both sides decide alike, and the JSON has what it promises."""

import decoding
import pytest


@pytest.mark.slow
def test_a_small_run_has_every_ratio_and_count():
    result = decoding.run(rows=2, repeats=1, failures=1, length=24)
    assert {
        "released_over_ours_batch1",
        "released_over_ours_batch16",
        "released_over_ours_batch16_rewriting",
        "without_over_with_replacement_batch1",
        "without_over_with_replacement_batch16",
        "ours_over_generate",
    } <= set(result["ratios"])
    assert all(value > 0 for value in result["ratios"].values())
    assert result["counts"]["ours"]["image_encodes_per_answer"] == 1
    assert result["counts"]["ours_rewriting"]["image_encodes_per_answer"] == 1
    assert result["counts"]["released"]["image_encodes_per_answer"] >= 5


@pytest.mark.slow
@pytest.mark.parametrize("rewrite", [False, True])
def test_every_row_is_decided_alike(rewrite):
    bench = decoding._Bench(4, failures=2, length=24)
    bench.check(rewrite, [0, 1, 2, 3])


def test_scripts_are_well_formed():
    bench = decoding._Bench(1, failures=3, length=64)
    script = bench.make(0)
    grammar = bench.grammar
    assert len(script.tokens) == 64
    assert script.tokens.count(grammar.open) == len(script.close_of) >= 6
    assert all(script.tokens[place] == grammar.confident for place in script.close_of)
