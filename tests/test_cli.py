import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vlm_sft_rl
from vlm_sft_rl.cli.app import app
from vlm_sft_rl.cli.common import decoder_settings

ROOT = Path(__file__).parents[1]

COMMANDS = [
    ["demo"],
    ["train"],
    ["generate"],
    ["eval", "run"],
    ["eval", "compare"],
    ["eval", "card"],
    ["merge"],
    ["data", "validate"],
    ["data", "preview"],
    ["data", "convert"],
    ["data", "synthetic"],
    ["data", "on-policy"],
    ["data", "pairs"],
    ["data", "tag"],
    ["demo", "tagging"],
    ["model", "prepare"],
    ["self-train"],
    ["distill"],
    ["demo", "r3v"],
    ["demo", "sc_tune"],
    ["pocket", "reproduce-sc-tune"],
    ["pocket", "build"],
    ["pocket", "world"],
]


def call(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "vlm_sft_rl.cli.app", *words],
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words):
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def test_help_imports_nothing_heavy():
    code = (
        "import sys, vlm_sft_rl.cli.app as c\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(c.app, ['--help']).exit_code == 0\n"
        "heavy = {'torch', 'transformers', 'trl', 'datasets', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train", "reverse/pockt"], ["reverse/pockt", "reverse/pocket"]),
        (["eval", "run", "pocket_captions"], ["--model"]),
        (["eval", "compare", "a"], ["{old}"]),
        (["eval", "card", "a"], ["--readme"]),
        (["eval", "compare", "a", "b", "--limit", "3"], ["--limit"]),
        (["demo", "r4v"], ["r4v", "reverse"]),
        (["data", "validate", "missing.json"], ["missing.json"]),
    ],
)
def test_errors_are_one_message_and_status_2(words, parts, tmp_path):
    result = call(*words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(_root())})
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


def _root():
    from pathlib import Path

    return Path(vlm_sft_rl.__file__).parent.parent


def test_validation_exits_with_1_when_something_is_wrong(tmp_path):
    rows = tmp_path / "rows.jsonl"
    row = {"id": "a", "images": [], "messages": [{"role": "user", "content": "Hi"}]}
    answer = {"role": "assistant", "content": "<SPAN> a cat </CN>"}
    rows.write_text(json.dumps({**row, "messages": [*row["messages"], answer]}) + "\n")
    assert CliRunner().invoke(app, ["data", "validate", str(rows)]).exit_code == 0
    broken = {"role": "assistant", "content": "<SPAN> a cat"}
    rows.write_text(json.dumps({**row, "messages": [*row["messages"], broken]}) + "\n")
    assert CliRunner().invoke(app, ["data", "validate", str(rows)]).exit_code == 1


@pytest.mark.parametrize("name", [name for name in vlm_sft_rl.__all__ if name != "__version__"])
def test_public_names_exist(name):
    assert getattr(vlm_sft_rl, name).__doc__


def test_switches_stand_in_the_guides_as_the_command_line_takes_them():
    """A switch is `--name` or `--no-name`; a value behind it is another word, which the command refuses."""
    switches = {setting.name.replace("_", "-") for setting in decoder_settings() if bool in setting.kinds}
    assert "without-replacement" in switches
    guides = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    values = [
        f"{path.name}: {match.group()}"
        for path in guides
        for match in re.finditer(r"--(?:no-)?([a-z-]+) (?:true|false)\b", path.read_text(encoding="utf-8"))
        if match.group(1) in switches
    ]
    assert values == []
