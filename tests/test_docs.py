"""The docs: every message they quote is one of ours, every page is in the navigation, and their Python runs."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MESSAGES = re.findall(r"^> (.+)$", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.MULTILINE)
HOLE = "\N{REPLACEMENT CHARACTER}"


def joined(node: ast.AST) -> str:
    """A text of the code, with a mark where a value is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(joined(part) for part in node.values)
    return HOLE


@pytest.fixture(scope="module")
def texts() -> str:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "vlm_sft_rl").rglob("*.py")]
    kinds = (ast.Constant, ast.JoinedStr)
    return "\n".join(joined(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds))


def is_ours(message: str, texts: str) -> bool:
    """Whether some text of the code has the message's words with values, not words, in between."""
    parts = [re.escape(part) for part in message.strip("…").split("…")]
    return re.search(f"{HOLE}".join(parts), texts) is not None


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_that_is_explained_is_in_the_code(message, texts):
    assert is_ours(message, texts)


def test_a_message_that_is_in_no_code_is_seen(texts):
    assert len(MESSAGES) >= 20
    assert not is_ours("…: this model lacks the verification coins, which --decoder … needs.", texts)


def test_every_page_is_in_the_navigation_and_exists():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        return [
            page for inner in (entry.values() if isinstance(entry, dict) else entry) for page in pages(inner)
        ]

    listed = pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    assert len(listed) == len(set(listed))
    assert {path.name for path in DOCS.glob("*.md")} <= set(listed)
    for page in listed:
        assert page == "index.md" or (DOCS / page).is_file() or (ROOT / page).is_file(), page


@pytest.mark.slow
@pytest.mark.parametrize("page", ["bring_your_own_reward.md", "bring_your_own_decoder.md"])
def test_the_examples_run(page, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_extra_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == set(project["optional-dependencies"])
