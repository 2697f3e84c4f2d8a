"""Which versions of other packages may be installed, and that nothing deprecated in them is called."""

import logging
import os
import re
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
import staged_world
import transformers
from decoded import prompt_inputs
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image
from regions import by_length
from regions import trainer as region_trainer
from tagged_rows import prepared, write_rows
from training import recipe_of, written

from vlm_sft_rl import train
from vlm_sft_rl.decoding import (
    SamplingConfig,
    SearchConfig,
    generate_plain,
    generate_retrospective,
    generate_searched,
    retrospective_custom_generate,
    sample_many,
)
from vlm_sft_rl.models.checkpoints import merge
from vlm_sft_rl.models.load import load_for_inference

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]
PINNED = {
    canonicalize_name(name): number
    for name, number in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
}
# what a version number, or a name that changed between versions, is asked by
ASKS = r"past_key_values|activation_checkpointing|is_\w+_version|\bVersion\(|(transformers|trl|peft|torch)\.__version__"


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_the_pinned_version_is_allowed_and_the_next_major_one_is_not(requirement):
    pinned = Version(PINNED[canonicalize_name(requirement.name)])
    assert pinned in requirement.specifier
    assert f"{pinned.major + 1}" not in requirement.specifier


@pytest.mark.skipif(
    "NEWEST_VERSIONS" not in os.environ, reason="`make test-newest` installs the newest versions"
)
@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.name)
def test_the_upper_bound_is_behind_the_newest_minor_version(requirement):
    """Of what is installed here, and so tested."""
    installed = Version(version(requirement.name))
    assert f"{installed.major}.{installed.minor + 1}" not in requirement.specifier


@pytest.mark.parametrize(
    "pins", ["transformers==5.19.0 torch==2.13.0 numpy==2.3.5", "transformers==5.20.2 torch==2.14.0"]
)
def test_vllm_can_share_the_environment(pins):
    """What vLLM 0.32 and 0.33 pin."""
    allowed = {r.name: r.specifier for r in REQUIREMENTS}
    for name, number in (pin.split("==") for pin in pins.split()):
        assert number in allowed[name]


def test_differences_between_versions_stand_in_one_file():
    sources = {p.relative_to(ROOT).as_posix(): p.read_text() for p in (ROOT / "vlm_sft_rl").rglob("*.py")}
    asking = {path for path, text in sources.items() if re.search(ASKS, text)}
    assert asking == {"vlm_sft_rl/models/versions.py"}


# Calls of other packages: (package, a part of the message). TRL 1.16 and peft 0.21 ask for the old name, which
# transformers before 5.23 has alone.
OF_OTHERS = [("trl", "gradient_checkpointing"), ("peft", "gradient_checkpointing")]


@contextmanager
def nothing_deprecated() -> Iterator[None]:
    """Raises AssertionError at the end: a deprecated call, whose innermost caller outside of the warning package is not in
    OF_OTHERS. Seen are Python's warnings and what transformers only logs."""
    calls: list[tuple[str, str]] = []

    def note(message: str) -> None:
        calls.append((caller(traceback.extract_stack()), message))

    def show(message, category, *place, **options):
        if issubclass(category, FutureWarning | DeprecationWarning | PendingDeprecationWarning):
            note(str(message))

    class Logged(logging.Handler):
        def emit(self, record):
            if re.search(r"deprecat|will be removed|no longer supported", record.getMessage()):
                note(record.getMessage())

    handler, logger = Logged(), logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
    ours = [(who, text) for who, text in calls if not any(who == p and part in text for p, part in OF_OTHERS)]
    assert ours == []


def caller(stack: traceback.StackSummary) -> str:
    """The package that called the one that warns; `vlm_sft_rl` and its tests are ours."""
    packages = []
    for frame in reversed(stack[:-2]):
        parts = Path(frame.filename).parts
        if "site-packages" in parts:
            packages.append(parts[parts.index("site-packages") + 1])
        elif ROOT in Path(frame.filename).parents:
            packages.append("ours")
    warning = packages[0]
    return next((name for name in packages if name != warning), warning)


def preference_rows(folder: Path) -> list[dict]:
    ask, chosen, rejected = (
        [{"role": role, "content": text}]
        for role, text in (("user", "How many?"), ("assistant", "one"), ("assistant", "two or three"))
    )
    Image.new("RGB", (56, 56), (60, 10, 90)).save(folder / "picture.png")
    pair = {"prompt": ask, "chosen": chosen, "rejected": rejected, "pair_kind": "cot"}
    return [{"id": f"p{i}", "images": ["picture.png"], **pair} for i in range(4)]


@pytest.mark.parametrize("method", ["reverse", "reflection_dpo", "grpo"])
def test_training_by_recipe_calls_nothing_deprecated(tmp_path, method):
    settings = {"max_steps": 1, "use_peft": True, "lora_r": 4, "gradient_checkpointing": True}
    if method == "reverse":
        prepared(tmp_path / "start", "qwen2_5_vl").rename(tmp_path / "model")
        rows = write_rows(tmp_path, count=4)
        settings |= {"train_file": str(rows), "min_pixels": 28 * 28, "max_pixels": 28 * 28 * 8}
    else:
        staged_world.write_checkpoint(tmp_path / "model")
    if method == "grpo":
        rows = staged_world.write_questions(tmp_path / "data", 4)
        questions = {
            "train_file": str(tmp_path / "data/questions.jsonl"),
            "image_root": str(tmp_path / "data"),
        }
        lengths = {"num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 4}
        settings |= {"grader": "exact", "staged": False, **questions, **lengths}
    pairs = preference_rows(tmp_path) if method == "reflection_dpo" else []
    with nothing_deprecated():
        assert (
            train.main(["--config", written(recipe_of(tmp_path, method, pairs, **settings), tmp_path)]) == 0
        )
        if method == "reverse":
            merge(tmp_path / "out", tmp_path / "merged")


def test_tuning_with_rewards_calls_nothing_deprecated(tmp_path):
    with nothing_deprecated():
        region_trainer(tmp_path, reward_funcs=by_length, gradient_checkpointing=True).train()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_decoding_calls_nothing_deprecated(tmp_path, family):
    folder = prepared(tmp_path, family)
    picture, plain = Image.new("RGB", (60, 50), (200, 90, 10)), SamplingConfig(max_new_tokens=4)
    with nothing_deprecated():
        model, processor, _ = load_for_inference(folder)
        asked = model, processor, [picture, [picture]], ["What is it?", "How many?"]
        generate_plain(*asked, plain)
        generate_retrospective(*asked)
        sample_many(*asked, 2, plain)
        generate_searched(*asked, SearchConfig(search="swires", max_new_tokens=4))
        inputs = prompt_inputs(model, processor, "What?", picture)
        model.generate(
            **inputs, custom_generate=retrospective_custom_generate, rewind={"processor": processor}
        )
        model.generate(**inputs, max_new_tokens=2)
