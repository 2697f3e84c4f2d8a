import pytest
import sampling


@pytest.mark.slow
def test_a_small_run_counts_what_it_says():
    result = sampling.run(questions=2, samples=3, length=4, side_by_side=2, repeats=1)
    assert result["answers"] == 6 and result["tokens_per_answer"] == 4
    assert result["image_encodes_per_answer"] == {"ours": pytest.approx(1 / 3, abs=0.01), "separate": 1.0}
    assert all(value > 0 for value in result["ratios"].values())
