import math
from dataclasses import fields

import pytest

from vlm_sft_rl.decoding import config
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.settings import configured

NAN, INF = float("nan"), float("inf")
BAD = {
    "RetrospectiveConfig": {
        "threshold": [0, 1, -0.1, NAN],
        "local_attempts": [0, 1.5, True],
        "total_attempts": [-1],
        "temperature": [-1, INF, NAN, "hot"],
        "temperature_step": [-0.1],
        "temperature_span": [-0.1],
        "rewrite_query": ["no"],
        "max_new_tokens": [0],
        "top_k": [0],
        "top_p": [0, 1.5],
        "seed": [0.5],
        "rules": ["fast"],
        "parallel_attempts": [0],
        "on_exhausted": ["stop"],
        "released_branch": ["llava", "gemma"],
    },
    "VCDConfig": {"alpha": [-1.0], "beta": [0.0, 2.0], "noise_step": [1000, -1]},
    "DoLaConfig": {"beta": [0.0]},
    "OperaConfig": {"candidates": [1], "beams": [0], "scale": [0], "overlap": [2.5], "earliest": [-1]},
    "CorrectionConfig": {
        "layout": ["tree"],
        "corrections": [-1],
        "stop": ["soon"],
        "confidence": [2],
        "correction_prompt": [" "],
        "correction_line": [""],
    },
    "SearchConfig": {"beams": [0], "rules": ["random"], "search": ["tree"], "threshold": ["high"]},
}
CASES = [(name, key, value) for name, own in BAD.items() for key, values in own.items() for value in values]


@pytest.mark.parametrize(("name", "key", "value"), CASES)
def test_settings_outside_their_range_are_refused(name, key, value):
    cls = getattr(config, name)
    with pytest.raises(UserError, match=f"{cls.method}: {key} = .*, expected"):
        cls(**{key: value})


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rules": "released", "parallel_attempts": 2}, "parallel_attempts"),
        ({"rules": "released", "on_exhausted": "continue"}, "on_exhausted"),
        ({"false_premise": True, "on_exhausted": "continue"}, "on_exhausted"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(settings, key):
    with pytest.raises(UserError, match=f"{key} = "):
        RetrospectiveConfig(**settings)


def test_a_field_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(UserError, match=r"the spec: there is no 'tau'. RetrospectiveConfig has .*threshold"):
        configured(RetrospectiveConfig, {"tau": 1}, "the spec")


def test_every_setting_has_its_help():
    for name in BAD:
        for item in fields(getattr(config, name)):
            assert item.metadata["help"].endswith((".", ")"))
    # LLaVA-CoT's published cut, to three digits
    assert math.isclose(config.SearchConfig().threshold, -0.243, abs_tol=1e-3)
