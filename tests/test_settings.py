"""Settings that check themselves against the types and limits of their fields."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from vlm_sft_rl.data.corrections import correction_marks
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.settings import Checked, configured, setting
from vlm_sft_rl.trainers.mixture_sft import kind_marks


@dataclass(frozen=True, kw_only=True)
class Example(Checked):
    method: ClassVar[str] = "example"

    name: str = setting(help="needed")
    share: float = setting(0.5, above=0, below=1)
    count: int | None = setting(None, least=1)
    flag: bool = setting(False)
    order: str = setting("both", choices=("both", "first", "last"))
    prompt: str | dict[str, str] | None = setting(None, holds="{box}")
    taus: float | dict[str, float] | None = setting(None, above=0, below=1)
    layers: str | tuple[int, ...] = setting("high", least=0)
    nested: dict[str, dict[str, Any]] = setting({})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": 3}, "example: name = 3, expected text that is not empty"),
        ({"name": " "}, "text that is not empty"),
        ({"share": 1}, "share = 1, expected a number > 0 and < 1"),
        ({"share": float("nan")}, "share = nan, expected a number > 0 and < 1"),
        ({"share": True}, "share = True, expected a number"),
        ({"count": 0}, "count = 0, expected an integer >= 1, or null"),
        ({"count": 1.5}, "expected an integer >= 1, or null"),
        ({"flag": 1}, "flag = 1, expected true or false"),
        ({"order": "none"}, "order = 'none', expected both, first or last"),
        ({"prompt": "Where?"}, "expected text with {box}, a map of text with {box}, or null"),
        ({"prompt": {"llava": "Where?"}}, "expected text with {box}, a map of"),
        ({"taus": {"llava": 0}}, "expected a number > 0 and < 1, a map of a number > 0 and < 1, or null"),
        ({"layers": (1, -1)}, "expected text that is not empty, or a list of an integer >= 0"),
        ({"nested": {"a": 1}}, "nested = {'a': 1}, expected a map of a map"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_would(values, message):
    with pytest.raises(UserError) as caught:
        Example(**{"name": "x"} | values)
    assert message in str(caught.value)


def test_values_that_fit_are_kept():
    good = {"name": "x", "count": 2, "prompt": {"llava": "At {box}"}, "taus": {"a": 0.5}, "layers": (0, 1)}
    example = Example(**good, share=0.25, nested={"a": {"b": None}})
    assert all(getattr(example, name) == value for name, value in good.items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "x", "nmae": 1}, "x.yaml: there is no 'nmae'. Example has name, share, "),
        ({"share": 0.5}, "x.yaml: 'name' is missing"),
        (["name"], "x.yaml: expected a map of keys to values, found list"),
    ],
)
def test_keys_of_a_file_are_checked(values, message):
    with pytest.raises(UserError, match=message):
        configured(Example, values, "x.yaml")


@pytest.mark.parametrize("factor", [-1, True, float("nan"), float("inf"), "2", None, [1.0], 10**400])
def test_factors_on_losses_are_numbers(factor):
    for check in (kind_marks, lambda factors: correction_marks(stage_weights={"reasoning": factors["cot"]})):
        with pytest.raises(UserError, match=r"must be a number >= 0"):
            check({"cot": factor})
    with pytest.raises(UserError, match="`kind_weights`: 'coot' is not one of"):
        kind_marks({"coot": 1.0})
