"""docs/families.md says what the tests do, and its example runs."""

import re
from pathlib import Path

from training import OTHERS, QUICK

GUIDE = (Path(__file__).parents[1] / "docs/families.md").read_text()
NAMES = {
    "llava": "LLaVA-1.5",
    "llava_mistral": "LLaVA with Mistral",
    "llava_more": "LLaVA-MORE",
    "llava_next": "LLaVA-NeXT",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "internvl": "InternVL",
    "mllama": "Llama-3.2-Vision",
}


def test_the_table_has_the_families_of_the_tests():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in GUIDE.splitlines()
        if "| tested |" in line
    ]
    assert {row[0].split(" (")[0] for row in rows} == {NAMES[name] for name in [*QUICK, *OTHERS]}
    assert all(row[2] == row[3] == row[5] == "tested" for row in rows)
    # tests/trainers/test_every_family_more.py has the refusal
    refused = {row[0] for row in rows if row[6] != "tested"}
    assert refused == {NAMES["mllama"]}


def test_the_example_gives_what_its_comment_says():
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    *lines, call, comment = code.strip().splitlines()
    namespace: dict = {}
    exec("\n".join([*lines, f"result = {call}"]), namespace)
    assert repr(namespace["result"]) == comment.removeprefix("# ")


def test_the_guides_name_recipes_and_options_that_exist():
    from vlm_sft_rl.recipes import names

    text = "".join(path.read_text() for path in (Path(__file__).parents[1] / "docs").glob("*.md"))
    shipped = {*names("recipes"), *names("eval")}
    for name in set(re.findall(r"\breverse/[a-z0-9_]+", text)):
        assert name in shipped, name
