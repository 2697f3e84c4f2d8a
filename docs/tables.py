"""The hook of mkdocs. README is the first page, files outside of docs/ that a page links to belong to the site, and tables
are made from the code where a page says `<!-- NAME -->`. `python docs/tables.py NAME` prints one of them."""

import dataclasses
import html
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import typer

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.evaluation.specs import load_spec
from vlm_sft_rl.recipes import METHODS, find, header, names
from vlm_sft_rl.train import config_classes

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'(\]\(|src="|href=")(?!\w+:|#)([^)\s"#]+)')
MARK = re.compile(r"^<!-- (\w+) -->$", re.MULTILINE)


# --- Pages and links ---


def on_files(files, config):
    """Add README, and what pages link to outside of docs/."""
    files.append(_page("README.md", config, "index.md"))
    waiting = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    while waiting:
        page = waiting.pop()
        for target in _targets(page):
            name = target.relative_to(ROOT).as_posix()
            if name.startswith("docs/") or name == "README.md" or files.get_file_from_path(name):
                continue
            files.append(_page(name, config))
            if target.suffix == ".md":
                waiting.append(target)
    return files


def _page(name: str, config, place: str | None = None):
    from mkdocs.structure.files import File

    return File.generated(config, place or name, abs_src_path=str(ROOT / name))


def _targets(page: Path) -> Iterable[Path]:
    """The files of this repository that a page links to. What does not exist is left to mkdocs, which reports it."""
    for _, link in LINK.findall(page.read_text(encoding="utf-8")):
        target = Path(os.path.normpath(page.parent / link))
        if target.is_file() and target.is_relative_to(ROOT):
            yield target


def on_page_markdown(markdown, page, config, files):
    """Links as the site has the files, and the tables."""
    source = Path(page.file.abs_src_path)
    folder = os.path.dirname(page.file.src_uri)

    def move(match: re.Match) -> str:
        target = Path(os.path.normpath(source.parent / match[2]))
        if not target.is_relative_to(ROOT):
            return match[0]
        name = target.relative_to(ROOT).as_posix().removeprefix("docs/")
        name = "index.md" if name == "README.md" else name
        moved = os.path.relpath(name, folder or ".")
        return match[1] + moved

    text = LINK.sub(move, markdown)
    return MARK.sub(lambda match: TABLES[match[1]]() if match[1] in TABLES else match[0], text)


# --- Tables ---


def cell(text: object) -> str:
    """One line of a table; outside of `code`, marks of HTML are text."""
    parts = re.split(r"(`[^`]*`)", " ".join(str(text).split()))
    parts = [part if part.startswith("`") else html.escape(part, quote=False) for part in parts]
    return "".join(parts).replace("|", "\\|")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [columns, ["---"] * len(columns), *(map(cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def recipes() -> str:
    rows = []
    for name in names("recipes"):
        parts = header(find("recipes", name))
        rows.append([f"`{name}`", parts["title"], parts.get("Hardware", ""), parts.get("Answers to", "")])
    return table(["recipe", "what it trains", "hardware", "answers to"], rows)


def benchmarks() -> str:
    rows = []
    for name in names("eval"):
        if "/" in name or name.startswith("speed"):
            continue
        spec = load_spec(name)
        files = ", ".join(f"`{file.path}`" for file in spec.files)
        rows.append([f"`{name}`", spec.description, files, f"`{spec.metric}`", "yes" if spec.judge else ""])
    return table(["spec", "what", "files", "metric", "judge"], rows)


def configuration() -> str:
    """The fields that are ours, each class once; below it the class of TRL whose fields are keys, too."""
    users: dict[type, list[str]] = {}
    for method in METHODS:
        for config in config_classes(method):
            users.setdefault(config, []).append(method)
    ours: dict[type, list[str]] = {}
    for config, methods in users.items():
        for base in config.__mro__:
            if base.__module__.startswith("vlm_sft_rl") and vars(base).get("__annotations__"):
                ours.setdefault(base, []).extend(methods)
    parts = []
    for config, methods in ours.items():
        own = [field for field in dataclasses.fields(config) if field.name in vars(config)["__annotations__"]]
        rows = [[f"`{field.name}`", _default(field), field.metadata.get("help", "")] for field in own]
        theirs = next(
            (base for base in config.__mro__ if base.__module__.startswith(("trl", "transformers"))), None
        )
        more = (
            f" Every field of {theirs.__module__.split('.')[0]}'s `{theirs.__name__}` is a key as well."
            if theirs
            else ""
        )
        known = (
            "every method"
            if set(methods) == set(METHODS)
            else ", ".join(f"`{m}`" for m in dict.fromkeys(methods))
        )
        parts.append(
            f"### {config.__name__}\n\nFor {known}.{more}\n\n{table(['key', 'default', 'meaning'], rows)}"
        )
    return "\n\n".join(parts)


def _default(field: dataclasses.Field) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "must be given"
        value = field.default_factory()
    return (
        f"`{getattr(value, 'value', value)}`".replace("`True`", "`true`")
        .replace("`False`", "`false`")
        .replace("`None`", "`null`")
    )


def commands() -> str:
    return "\n\n".join(_commands(typer.main.get_command(app), "vlm-sft-rl"))


def _commands(command, name: str) -> Iterable[str]:
    if hasattr(command, "commands"):
        for word, inner in command.commands.items():
            if not inner.hidden:
                yield from _commands(inner, f"{name} {word}")
        if not command.invoke_without_command or name == "vlm-sft-rl":
            return
    words = [param.name.upper() for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    usage = " ".join([name, *words, *(["[OPTIONS]"] if options else [])])
    rows = []
    for param in options:
        flags = ", ".join(f"`{flag}`" for flag in (*param.opts, *param.secondary_opts))
        rows.append([flags + (" (must be given)" if param.required else ""), param.help or ""])
    parts = [f"## {name.removeprefix('vlm-sft-rl ')}", f"`{usage}`", cell(command.help or "")]
    if rows:
        parts.append(table(["option", "meaning"], rows))
    yield "\n\n".join(parts)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (recipes, benchmarks, configuration, commands)
}

if __name__ == "__main__":
    print(TABLES[sys.argv[1]]())
