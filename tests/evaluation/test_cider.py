import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics.cider import Cider, cider_scores, tokenize

REFERENCES = [
    ["a dog runs on the grass", "a small dog with a red ball"],
    ["two people sit near a table"],
    ["a man near the red table", "the man sits"],
]
CANDIDATES = ["a dog runs with a ball", "two people sit near a table", "a cat"]


def test_scores_are_those_of_pycocoevalcap():
    # computed with pycocoevalcap 1.2 on the same tokens
    assert cider_scores(CANDIDATES, REFERENCES) == pytest.approx([2.561410493418422, 10.0, 0.0], abs=1e-12)


def test_a_case_worked_by_hand():
    # "a" against "a b" of two pictures: idf ln 2 each; cosine of (1, 0) and (1, 1) for single words, nothing longer;
    # the lengths in bigrams differ by one
    expected = 10 / 4 * math.exp(-1 / 72) / math.sqrt(2)
    assert cider_scores(["a", "x"], [["a b"], ["c"]]) == pytest.approx([expected, 0.0], abs=1e-12)


def test_words_are_split_as_ptb_does():
    text = "It’s a dog's toy, isn't it? Don't! A T-shirt costs 3.50."
    expected = "it 's a dog 's toy is n't it do n't a t-shirt costs 3.50"
    assert tokenize(text) == expected.split()


def test_the_metric_is_the_mean_times_100():
    result = Cider().compute(predictions=CANDIDATES, references=REFERENCES)
    assert result["cider"] == pytest.approx(100 * np.mean([2.561410493418422, 10.0, 0.0]))
    metric = Cider()
    metric.counts(CANDIDATES, REFERENCES)
    # what was computed last is kept, and is not handed out for other texts
    assert metric.counts(CANDIDATES[::-1], REFERENCES)[0, 0] == pytest.approx(0.0)
    assert metric.counts(CANDIDATES, REFERENCES)[1, 0] == pytest.approx(1000.0)
    for bad in ([], ["  "], "a dog", [3]):
        with pytest.raises(UserError, match="expected a list of captions"):
            Cider().check(bad)


words = st.lists(st.sampled_from(["a", "dog", "runs", "two", "near"]), min_size=1, max_size=6).map(" ".join)


@given(st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_scores_are_bounded_and_do_not_depend_on_the_order_of_references(rows):
    candidates, references = [row[0] for row in rows], [row[1] for row in rows]
    scores = cider_scores(candidates, references)
    assert ((scores >= 0) & (scores <= 10 + 1e-9)).all()
    assert cider_scores(candidates, [r[::-1] for r in references]) == pytest.approx(scores)
