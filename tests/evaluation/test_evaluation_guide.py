"""Python blocks of the guides that can run on their own, and the specs they show."""

import re
from pathlib import Path

import pytest
import yaml

from vlm_sft_rl.evaluation.specs import parse_spec

GUIDE = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()


def test_python_example_gives_what_its_comment_says():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    *lines, call, comment = code.strip().splitlines()
    namespace: dict = {}
    exec("\n".join([*lines, f"result = {call}"]), namespace)
    assert repr(namespace["result"]) == comment.removeprefix("# ")


def test_spec_example_parses():
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    spec = parse_spec(yaml.safe_load(text), "docs/evaluation.md")
    assert spec.decoding.threshold_for("qwen2_5_vl") == pytest.approx(0.01)
