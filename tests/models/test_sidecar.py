import json

import pytest

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.sidecar import Sidecar, read_sidecar, write_sidecar


def test_round_trip(tmp_path):
    decoding = {"rewrite_query": False}
    sidecar = Sidecar(threshold=0.01, decoding=decoding, recipe={"method": "reverse", "learning_rate": 1e-4})
    write_sidecar(tmp_path, sidecar)
    assert read_sidecar(tmp_path) == sidecar
    assert json.loads((tmp_path / "vlm_sft_rl.json").read_text()) == {
        "format": 1,
        "verification_tokens": {"open": "<SPAN>", "confident": "</CN>", "unconfident": "</UN>"},
        "threshold": 0.01,
        "decoding": {"rewrite_query": False},
        "box_convention": None,
        "base": None,
        "recipe": {"method": "reverse", "learning_rate": 1e-4},
    }


def test_absent(tmp_path):
    assert read_sidecar(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"format": 1, "threshold": 1.5}', "threshold = 1.5, expected a number > 0 and < 1"),
        ('{"format": 1, "threshold": NaN}', "threshold = nan"),
        ('{"format": 1, "threshold": true}', "threshold = True"),
        ('{"format": true}', "`format` is True"),
        ('{"format": 1, "decoding": []}', "decoding"),
        ('{"format": 1, "recipe": "x"}', "recipe"),
        ('{"format": 1, "box_convention": 7}', "box_convention"),
        ('{"format": 1, "verification_tokens": ["a"]}', "verification_tokens"),
        ("[" * 3000, "nested"),
        ('{"format": 2}', "reads 1"),
        ("[]", "expected an object"),
        ('{"format": 1, "treshold": 0.1}', "treshold"),
        ('{"format": 1, "verification_tokens": {"open": "<SPAN>"}}', "confident"),
        ('{"format": 1,', "line 1"),
    ],
)
def test_bad_files_are_named(tmp_path, text, complaint):
    (tmp_path / "vlm_sft_rl.json").write_text(text)
    with pytest.raises(UserError, match=rf"vlm_sft_rl\.json.*{complaint}"):
        read_sidecar(tmp_path)
