import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.marks import IGNORE, Example
from vlm_sft_rl.packing.layout import SEGMENTS, Row, lay_out, row_lengths, shared_length

PAD = 99


def row(ids, labelled, types=None):
    labels = [i if on else IGNORE for i, on in zip(ids, labelled, strict=True)]
    weights = [0.5 + n if on else 0.0 for n, on in enumerate(labelled)]
    return Row(Example(list(ids), labels, weights, ()), {"types": list(types or [0] * len(ids))})


@st.composite
def families_of_rows(draw):
    """Rows that begin alike: a few ids only, so that they often go on alike too."""
    prefix = draw(st.lists(st.integers(0, 2), max_size=5))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        ids = prefix + draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        first = draw(st.integers(0, len(ids) - 1))
        labelled = [n == first or (n > first and draw(st.booleans())) for n in range(len(ids))]
        rows.append(row(ids, labelled, [i % 2 for i in ids]))
    return rows


def slow_shared(rows):
    if len(rows) == 1:
        return 0
    n = 0
    while True:
        column = {tuple(r.example.input_ids[: n + 1]) for r in rows}
        predicts = any(all(x == IGNORE for x in r.example.labels[: n + 2]) is False for r in rows)
        if len(column) > 1 or predicts or any(n + 1 >= len(r) for r in rows):
            return n
        n += 1


@given(families_of_rows())
def test_what_rows_share_equals_a_slow_reference(rows):
    assert shared_length(rows) == slow_shared(rows)


def test_rows_that_differ_only_in_an_aligned_value_share_less():
    one, two = row([1, 2, 3, 4], [0, 0, 0, 1], [0, 1, 0, 0]), row([1, 2, 3, 4], [0, 0, 0, 1], [0, 0, 0, 0])
    assert shared_length([one, two]) == 1 and shared_length([one, one]) == 2


@given(st.lists(families_of_rows(), min_size=1, max_size=3), st.sampled_from([None, 4, 16]))
def test_every_row_can_be_read_back_from_the_segments(groups, multiple):
    pack = lay_out(groups, PAD, multiple)
    length = pack["input_ids"].shape[1]
    segments = pack[SEGMENTS].tolist()
    assert [s[0] for s in segments] == [0, *(s[1] for s in segments[:-1])] and segments[-1][1] == length
    assert not multiple or length % multiple == 0
    padding = int((pack["attention_mask"] == 0).sum())
    assert (pack["input_ids"][0, length - padding :] == PAD).all()
    prefixes = {(p, q) for _, _, p, q in segments if p != q}
    found = []
    for start, end, p, q in segments:
        if (start, end) in prefixes or start >= length - padding:
            assert (pack["labels"][0, start:end] == IGNORE).all()
            continue
        at = torch.tensor([*range(p, q), *range(start, end)])
        found.append({k: pack[k][0, at].tolist() for k in ("input_ids", "labels", "loss_weights", "types")})
    rows = [one for group in groups for one in group]
    assert len(found) == len(rows)
    for one, read in zip(rows, found, strict=True):
        assert read["input_ids"] == one.example.input_ids and read["types"] == one.aligned["types"]
        # the first token of a row is predicted by nothing
        assert read["labels"] == [IGNORE, *one.example.labels[1:]]
        assert read["loss_weights"] == [0.0, *one.example.weights[1:]]
    lengths = [len(one) for one in rows]
    assert row_lengths(pack[SEGMENTS]) == lengths + ([padding] if padding else [])


def test_a_shared_beginning_stands_once():
    rows = [row([7, 8, 9, 1, 5], [0, 0, 0, 0, 1]), row([7, 8, 9, 2, 3, 6], [0, 0, 0, 0, 1, 1])]
    pack = lay_out([rows, [row([4, 5], [0, 1])]], PAD)
    assert pack["input_ids"].tolist() == [[7, 8, 9, 1, 5, 2, 3, 6, 4, 5]]
    assert pack[SEGMENTS].tolist() == [[0, 3, 0, 0], [3, 5, 0, 3], [5, 8, 0, 3], [8, 10, 8, 8]]
