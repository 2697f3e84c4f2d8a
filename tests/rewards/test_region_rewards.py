import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.rewards.regions import combine, iou_reward, length_reward, reward_named

COLUMNS = {
    "prompts": ["q"] * 3,
    "completions": ["a red star", [{"role": "assistant", "content": "star"}], ""],
    "completion_ids": [[1], [2], [3]],
    "box": [[0, 0, 2, 2]] * 3,
    "located": [(0, 0, 2, 2), (0, 0, 2, 1), None],
}


@pytest.mark.parametrize(
    "name, values",
    [
        ("iou", [1.0, 0.5, 0.0]),
        ("giou", [1.0, 0.5, -1.0]),
        ("hit", [1.0, 1.0, 0.0]),
        ("iou@0.6", [1.0, 0.0, 0.0]),
        ("parse", [1.0, 1.0, 0.0]),
        ("length", [-3.0, -1.0, 0.0]),
    ],
)
def test_values(name, values):
    assert reward_named(name)(**COLUMNS) == values


def test_weighted_sum_leaves_out_what_does_not_apply():
    def half(completions, **columns):
        return [None, 2.0, 2.0]

    total, parts = combine([iou_reward, half, length_reward], [1.0, 0.5, 0.1], 3, COLUMNS)
    assert total == pytest.approx([1.0 - 0.3, 0.5 + 1.0 - 0.1, 1.0])
    assert parts["half"] == [None, 2.0, 2.0] and set(parts) == {"iou_reward", "half", "length_reward"}


def test_misfits_are_named():
    with pytest.raises(UserError, match="'clip' is unknown"):
        reward_named("clip")
    with pytest.raises(UserError, match="must lie in"):
        reward_named("iou@1.5")
    with pytest.raises(UserError, match="2 weights for 1"):
        combine([iou_reward], [1.0, 2.0], 3, COLUMNS)
    with pytest.raises(UserError, match="short returned 1 values for 3"):

        def short(**columns):
            return [1.0]

        combine([short], None, 3, COLUMNS)
