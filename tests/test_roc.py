import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.roc import roc_auc, roc_curve

scored = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.1000001, 0.5, 0.9, 1.0]), st.booleans()), max_size=40
)


@given(scored)
def test_the_area_equals_the_count_of_pairs(pairs):
    right, wrong = ([p for p, is_wrong in pairs if is_wrong == side] for side in (False, True))
    area = roc_auc([p for p, _ in pairs], [w for _, w in pairs])
    if not right or not wrong:
        assert math.isnan(area)
        return
    wins = sum((w > r) + 0.5 * (w == r) for w in wrong for r in right)
    assert area == wins / (len(right) * len(wrong))


@pytest.mark.parametrize(
    "scores, wrong, area",
    [
        ([0.1, 0.2, 0.9], [False, False, True], 1.0),
        ([0.3] * 7, [True, False] * 3 + [True], 0.5),
        ([0.9, 0.1], [False, True], 0.0),
    ],
)
def test_perfect_ignorant_and_inverted(scores, wrong, area):
    assert roc_auc(scores, wrong) == area


@given(scored.filter(lambda pairs: len({wrong for _, wrong in pairs}) == 2))
def test_area_under_the_drawn_curve_is_the_area(pairs):
    scores, wrong = zip(*pairs, strict=True)
    curve = roc_curve(scores, wrong)
    assert (curve.false_rejects[0], curve.true_rejects[0]) == (0, 0)
    assert (curve.false_rejects[-1], curve.true_rejects[-1]) == (1, 1)
    assert np.trapezoid(curve.true_rejects, curve.false_rejects) == pytest.approx(roc_auc(scores, wrong))
    for x, y, threshold in zip(*curve, strict=True):
        rejected = np.asarray(scores) >= threshold
        assert y == pytest.approx(rejected[np.asarray(wrong)].mean())
        assert x == pytest.approx(rejected[~np.asarray(wrong)].mean())


@pytest.mark.parametrize(
    "function, scores, wrong, message",
    [
        (roc_auc, [0.1], [True, False], "one length"),
        (roc_auc, [math.nan], [True], "NaN"),
        (roc_curve, [0.1], [True], "right and wrong"),
    ],
)
def test_refuses_unequal_lengths_nan_and_one_class(function, scores, wrong, message):
    with pytest.raises(ValueError, match=message):
        function(scores, wrong)
