"""Who may import whom, read from the sources; and what must stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlm_sft_rl"
LONGEST_FILE = 600
LINES, FILES = 50_386, 244
BASE = ("endpoint", "errors", "io", "json_stream", "locks", "roc", "settings", "shapes")
# part of the package -> what it may import of ours (a prefix stands for everything below it); the longest key counts
ALLOWED = {
    "errors": (),
    "roc": (),
    "locks": ("errors",),
    "io": ("errors", "locks"),
    "json_stream": ("errors", "io"),
    "settings": ("errors",),
    "shapes": ("errors", "io"),
    "workers": BASE,
    "runs": ("__version__", "workers", *BASE),
    "recipes": BASE,
    "launch": ("recipes", *BASE),
    "endpoint": ("errors", "settings"),
    "ledger": BASE,
    "chat_request": ("data.images", *BASE),
    "teacher": ("chat_request", "ledger", *BASE),
    "data": ("data", *BASE),
    # plain answers to tagged rows: a teacher or a checker may be asked on the way
    # and answers are those of a run
    "data.tagging.pipeline": ("data", "runs", "teacher", *BASE),
    "data.tagging.pairs": ("data", "runs", *BASE),
    "data.tagging.verdicts": ("data", "teacher", "models", "decoding", *BASE),
    # what is graded is the conclusion of an answer; what the choices are is said by the question's row
    "graders": ("graders", "data.conclusions", "data.rows", *BASE),
    "graders.grade": ("graders", "data.conclusions", "data.stages", *BASE),
    "graders.prompts": ("graders", "data.rows", "data.messages", *BASE),
    "models": ("models", "data.chat", "data.model_files", "data.tags", *BASE),
    "packing": ("packing", "data", "models", *BASE),
    "rewards": ("rewards", *BASE),
    # whether an answer has its stages is a question of its text
    "rewards.answers": ("rewards", "data.stages", *BASE),
    "decoding": (
        "decoding",
        "models",
        "data.chat",
        "data.tags",
        "data.conclusions",
        "data.stages",
        "data.corrections",
        "data.marks",
        *BASE,
    ),
    "trainers": ("trainers", "data", "models", "packing", "rewards", *BASE),
    # the loop whose reward is decoded by the model it trains
    "trainers.sc_tune": ("trainers", "data", "models", "rewards", "decoding", *BASE),
    "evaluation": ("evaluation", "data", "graders", "recipes", "rewards", "runs", "workers", *BASE),
    "evaluation.judge": ("evaluation", "teacher", *BASE),
    # arithmetic of draws, no torch
    "evaluation.votes": ("evaluation", "decoding.tried", "graders", *BASE),
    # the two places where an evaluation meets a checkpoint
    "evaluation.decoders": ("evaluation", "data", "models", "decoding", "graders", *BASE),
    "evaluation.regions": ("evaluation", "models", "decoding", "rewards", *BASE),
    # the loop: it decodes, grades and evaluates; training runs in processes of its own
    "self_training": (
        "self_training",
        "graders",
        "data",
        "decoding",
        "evaluation",
        "models.load",
        "models.checkpoints",
        "models.vllm_names",
        "teacher",
        "launch",
        "runs",
        "workers",
        *BASE,
    ),
    # grading and building rows need no model
    **{
        f"self_training.{name}": ("self_training", "graders", "data", "runs", *BASE)
        for name in ("pool", "builders")
    },
    "self_training.config": (
        "self_training",
        "graders",
        "data.rows",
        "data.tagging.config",
        "decoding.config",
        *BASE,
    ),
    # rows are answered as `decode` answers them, and the verifier reads given answers as its training's probe does
    "self_training.rewinds": (
        "self_training",
        "data",
        "decode",
        "evaluation",
        "methods",
        "models.load",
        "runs",
        "workers",
        *BASE,
    ),
    "correction": (
        "correction",
        "data",
        "decoding",
        "teacher",
        "evaluation",
        "graders",
        "models",
        "runs",
        "self_training",
        "workers",
        *BASE,
    ),
    "methods": (
        "methods",
        "correction",
        "data",
        "decoding",
        "dry_run",
        "evaluation",
        "graders",
        "models",
        "rewards",
        "self_training.config",
        "self_training.pool",
        "trainers",
        *BASE,
    ),
    # all ways of running a model, side by side; `options` are the command line's
    "parity": (
        "parity",
        "data",
        "decoding",
        "evaluation.report",
        "models",
        "packing",
        "runs",
        "trainers",
        *BASE,
    ),
    "parity.rows": ("data.tags", "pocket"),
    # whether a phrase of a sampled answer is true may be asked of a model behind an endpoint
    "methods.phrase_judges": ("methods", "data", "rewards", "teacher", *BASE),
    "dry_run": ("data", "models", "trainers", *BASE),
    "machines": ("errors",),
    "train": ("data", "dry_run", "launch", "machines", "methods", "models", "recipes", *BASE),
    "decode": ("data", "evaluation", "runs", "workers", *BASE),
    "self_train": ("data", "launch", "recipes", "self_training", "train", "trainers", *BASE),
    "pocket": ("pocket", "data", "evaluation", "models", "train", *BASE),
    "demos": (
        "demos",
        "correction",
        "data",
        "decoding",
        "evaluation",
        "launch",
        "models",
        "pocket",
        "recipes",
        "rewards",
        "runs",
        "self_train",
        "self_training",
        "__version__",
        *BASE,
    ),
    "bridges": ("bridges", "evaluation", *BASE),
    # a checkpoint behind HTTP, or the pages of finished runs: nothing is evaluated
    "serving": (
        "serving",
        "data.chat",
        "data.images",
        "data.tags",
        "decoding",
        "evaluation.compare",
        "evaluation.decoders",
        "evaluation.report",
        "evaluation.results",
        "models.parts",
        "models.sidecar",
        "runs",
        *BASE,
    ),
    # commands call what they are named after; no trainer, no method
    "cli": (
        "__version__",
        "cli",
        "correction",
        "data",
        "decode",
        "decoding",
        "demos",
        "teacher",
        "evaluation",
        "launch",
        "models",
        "parity",
        "pocket",
        "recipes",
        "runs",
        "self_train",
        "self_training",
        "serving",
        "train",
        "workers",
        *BASE,
    ),
}
LIGHT = (
    "vlm_sft_rl",
    "vlm_sft_rl.errors",
    "vlm_sft_rl.io",
    "vlm_sft_rl.cli.app",
    "vlm_sft_rl.cli",
    "vlm_sft_rl.recipes",
    "vlm_sft_rl.data.rows",
    "vlm_sft_rl.data.tags",
    "vlm_sft_rl.evaluation.bootstrap",
    "vlm_sft_rl.evaluation.specs",
    "vlm_sft_rl.evaluation.revisions",
    "vlm_sft_rl.roc",
    "vlm_sft_rl.evaluation.report",
    "vlm_sft_rl.graders",
    "vlm_sft_rl.graders.prompts",
    "vlm_sft_rl.self_training.builders",
    "vlm_sft_rl.self_training.builders",
    "vlm_sft_rl.self_training.loop",
    "vlm_sft_rl.self_training.config",
)
HEAVY = ("torch", "transformers", "trl", "datasets", "evaluate", "matplotlib")
SOURCES = sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(path: Path, source: str | None = None):
    """Modules of ours that a file imports anywhere in it, without the package's name."""
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    here = path.relative_to(PACKAGE).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (name.removeprefix("vlm_sft_rl").lstrip(".") for name in names if is_ours(name))
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*here[: len(here) - node.level + 1], *(node.module or "").split(".")]
            elif is_ours(node.module):
                base = node.module.split(".")[1:]
            else:
                continue
            base = ".".join(part for part in base if part)
            for alias in node.names:
                yield f"{base}.{alias.name}".lstrip(".")


def is_ours(name: str) -> bool:
    return name == "vlm_sft_rl" or name.startswith("vlm_sft_rl.")


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def forbidden(path: Path, source: str | None = None) -> list[str]:
    module = dotted(path)
    rule = max((key for key in ALLOWED if below(module, key)), key=len, default=None)
    imports = list(own_imports(path, source))
    if rule is None:
        return imports if module else []  # the package itself imports by name, when it is asked
    return [name for name in imports if not any(below(name, prefix) for prefix in ALLOWED[rule])]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: dotted(path) or "package")
def test_imports_flow_one_way(path):
    assert forbidden(path) == []


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("data/rows.py", "from ..models import load", ["models.load"]),
        ("data/rows.py", "def f():\n    from vlm_sft_rl.trainers.sft import X", ["trainers.sft.X"]),
        ("data/rows.py", "import vlm_sft_rl.decoding", ["decoding"]),
        ("data/rows.py", "from . import tags\nfrom ..errors import UserError\nimport json", []),
        ("models/load.py", "from ..data.tags import OPEN\nfrom ..data import rows", ["data.rows"]),
        ("decoding/generate.py", "from ..trainers import losses", ["trainers.losses"]),
        ("evaluation/compare.py", "from ..decoding import Answer", ["decoding.Answer"]),
        ("evaluation/metrics/chair.py", "from ...errors import UserError\nfrom ..bootstrap import ratio", []),
        ("train.py", "from .pocket.world import NOUNS", ["pocket.world.NOUNS"]),
        ("cli/pocket.py", "from ..pocket.world import NOUNS", []),
        ("cli/pocket.py", "from ..trainers import base", ["trainers.base"]),
        ("unknown.py", "from .data import rows", ["data.rows"]),
    ],
)
def test_the_rule_itself(module, source, expected):
    assert forbidden(PACKAGE / module, source) == expected


def test_light_modules_import_nothing_heavy():
    present = [name for name in LIGHT if is_written(name)]
    code = (
        "import importlib, sys\n"
        f"for name in {present!r}:\n"
        "    importlib.import_module(name)\n"
        f"    print(name, *[heavy for heavy in {HEAVY!r} if heavy in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert loaded == {name: [] for name in present}


def test_the_command_line_waits_for_no_array_and_no_picture():
    code = "import sys, vlm_sft_rl.cli.app; print({'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def is_written(name: str) -> bool:
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def import_graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, anywhere in it."""
    modules = {dotted(path): path for path in SOURCES}
    graph = {}
    for module, path in modules.items():
        targets = set()
        for name in own_imports(path):
            # `a.b.name` is a module, or a name in the module `a.b`
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                targets.add(target)
        graph[module] = targets
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began, or an empty list."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(graph[module]):
            if back := walk(target, [*path, module]):
                return back
        done.add(module)
        return []

    for start in sorted(graph):
        if back := walk(start, []):
            return back
    return []


def test_no_imports_go_in_a_circle():
    assert circle(import_graph()) == []


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_package_does_not_grow():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES)
    assert lines <= LINES and len(SOURCES) <= FILES


def test_no_file_is_long():
    files = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}


def test_no_two_test_files_share_a_name():
    """pytest cannot collect two of one name in one run."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
