"""Comparing readings: what differs is seen, and where."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.parity.compare import LIMITS, Limits, Reading, around, compare

LIMIT = Limits(1e-3, 1e-4)


@st.composite
def readings(draw):
    """Rows of random tokens; positions with one number or three."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        ids = draw(st.lists(st.integers(0, 50), min_size=2, max_size=12))
        start = draw(st.integers(1, len(ids) - 1))
        size = len(ids) - start
        log_probs = draw(st.lists(st.floats(-20, 0), min_size=size, max_size=size))
        planes = draw(st.sampled_from([1, 3]))
        rows.append(Reading(ids, start, log_probs, [(place,) * planes for place in range(len(ids))]))
    return rows


def changed(rows: list[Reading], row: int, **values) -> list[Reading]:
    return [*rows[:row], Reading(**(vars(rows[row]) | values)), *rows[row + 1 :]]


@given(readings())
def test_a_way_equals_itself(rows):
    comparison = compare(rows, rows)
    assert comparison.verdict(LIMIT) == "equal" and comparison.largest == comparison.mean == 0
    assert comparison.tokens == sum(len(row.log_probs) for row in rows)
    assert comparison.shifts == (0,) * len(rows)


@given(readings(), st.data(), st.floats(0, 5))
def test_the_largest_difference_is_placed(rows, data, gap):
    row = data.draw(st.integers(0, len(rows) - 1))
    place = data.draw(st.integers(0, len(rows[row].log_probs) - 1))
    values = list(rows[row].log_probs)
    values[place] -= gap
    other = changed(rows, row, log_probs=values)
    comparison, back = compare(rows, other), compare(other, rows)
    assert comparison.largest == back.largest == pytest.approx(gap, abs=1e-9)
    assert comparison.mean * comparison.tokens == pytest.approx(gap, abs=1e-9)
    if comparison.largest > 0:
        assert (comparison.worst.row, comparison.worst.token) == (row, rows[row].start + place)
    close = comparison.largest <= LIMIT.largest and comparison.mean <= LIMIT.mean
    assert comparison.verdict(LIMIT) == ("equal" if close else "log-probabilities differ")


@given(readings(), st.data())
def test_the_first_other_token_is_placed(rows, data):
    row = data.draw(st.integers(0, len(rows) - 1))
    places = data.draw(st.sets(st.integers(0, len(rows[row].ids) - 1), min_size=1))
    ids = [token + 100 * (place in places) for place, token in enumerate(rows[row].ids)]
    comparison = compare(rows, changed(rows, row, ids=ids))
    assert comparison.verdict(LIMIT) == "token ids differ"
    assert (comparison.ids.row, comparison.ids.token) == (row, min(places))
    longer = compare(rows, changed(rows, row, ids=[*rows[row].ids, 7]))
    assert (longer.ids.token, longer.ids.reference, longer.ids.value) == (len(rows[row].ids), None, 7)


@given(readings(), st.data(), st.integers(-9, 9))
def test_a_shift_of_a_row_is_no_other_position_and_a_jump_is(rows, data, shift):
    row = data.draw(st.integers(0, len(rows) - 1))
    old = rows[row].positions
    moved = [tuple(number + shift for number in position) for position in old]
    comparison = compare(rows, changed(rows, row, positions=moved))
    assert comparison.positions is None and comparison.shifts[row] == shift
    jump = data.draw(st.integers(1, len(old) - 1))
    jumped = [*moved[:jump], *(tuple(n + 1 for n in position) for position in moved[jump:])]
    comparison = compare(rows, changed(rows, row, positions=jumped))
    assert comparison.verdict(LIMIT) == "positions differ"
    assert (comparison.positions.row, comparison.positions.token) == (row, jump)
    # the last token is not fed
    assert compare(rows, changed(rows, row, positions=moved[:-1])).positions is None


@given(readings())
def test_one_number_stands_for_three(rows):
    single = [Reading(r.ids, r.start, r.log_probs, [p[:1] for p in r.positions]) for r in rows]
    assert compare(rows, single).verdict(LIMIT) == "equal"


def test_what_is_no_number_or_not_there():
    row = Reading([1, 2, 3], 1, [-1.0, -2.0])
    broken = compare([row], [Reading([1, 2, 3], 1, [-1.0, math.nan])])
    assert broken.verdict(LIMIT) == "log-probabilities differ" and broken.worst.token == 2
    masked = Reading([1, 2, 3], 1, [None, -2.0])
    without_loss = compare([masked], [row])
    assert without_loss.verdict(LIMIT) == "equal" and without_loss.tokens == 1 and without_loss.shifts is None
    assert compare([Reading([1, 2, 3], 1, [None, None])], [row]).verdict(LIMIT) == "nothing to compare"
    # what a way did not read is not equal
    for reading, token in ((masked, 1), (Reading([1, 2, 3], 1, [-1.0]), 2)):
        missing = compare([row], [reading])
        assert missing.verdict(LIMIT) == "log-probabilities differ" and missing.place.token == token


def test_many_small_differences_are_seen_by_their_mean():
    row = Reading(range(11), 1, [-1.0] * 10)
    other = Reading(range(11), 1, [-1.0 - 0.9 * LIMIT.largest] * 10)
    assert compare([row], [other]).verdict(LIMIT) == "log-probabilities differ"


def test_less_precision_is_allowed_more():
    assert LIMITS["float32"].largest < LIMITS["float16"].largest < LIMITS["bfloat16"].largest


def test_text_around_a_token():
    assert around([0, 1, 2, 3, 4, 5, 6], 1, str) == ("0", "1", "2345")
    assert around([0], 1, str) == ("0", "", "")
