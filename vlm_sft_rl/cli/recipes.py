"""`vlm-sft-rl recipes …`: the shipped training recipes."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError, printable
from ..io import read_text, require_absent, write_text
from ..recipes import LOOPS, find, header, load_recipe, names
from .common import closing, group, show

app = group("List the training recipes, print one, or copy one to change it.")
Name = Annotated[
    str,
    typer.Argument(help="Name of a recipe, for example reverse/qwen2_5_vl_3b_lora, or path of a YAML file."),
]


@app.command()
def ls(
    word: Annotated[
        str, typer.Argument(help="List only recipes with this word in their name. Default: all.")
    ] = "",
) -> None:
    """List the recipes, with what each trains and the hardware that it is made for."""
    from rich.console import Console
    from rich.table import Table

    shipped = [name for name in names("recipes") if word in name]
    if not shipped:
        raise UserError(f"No recipe has {word!r} in its name. `vlm-sft-rl recipes ls` lists all.")
    table = Table("recipe", "what it trains", "hardware", title="Recipes", title_justify="left")
    table.columns[0].overflow = "fold"
    for name in shipped:
        parts = header(find("recipes", name))
        table.add_row(name, parts["title"], parts.get("Hardware", "").split(". ")[0].removesuffix("."))
    Console().print(table, markup=False)
    closing({"look at one": ("recipes", "show", shipped[0])})


@app.command("show")
def show_recipe(name: Name) -> None:
    """Print a recipe: purpose, hardware, data, the launch line, and every key."""
    path = find("recipes", name)
    print(printable(read_text(path).rstrip()))
    closing({"change it": ("recipes", "copy", name, "my_recipe.yaml"), "run it": _launch(path, name)})


@app.command()
def copy(
    name: Name,
    target: Annotated[Path, typer.Argument(help="YAML file to write.")],
) -> None:
    """Copy a recipe to a file of your own."""
    path = find("recipes", name)
    if target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target}: name a file that ends with .yaml.")
    require_absent(target)
    write_text(target, read_text(path))
    show(f"Written to {target}. Its keys can also be given on the command line, as --key value.")
    launch = _launch(path, target)
    check = {"check it": (*launch, "--dry-run")} if launch[0] == "train" else {}
    closing({**check, "run it": launch})


def _launch(path: Path, name: str | Path) -> tuple:
    return ("self-train" if load_recipe(path)["method"] in LOOPS else "train", name)
