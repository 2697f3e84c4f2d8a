"""Speed benchmarks: each module has `run(...) -> dict`; eval/speed/NAME.yaml says with what arguments and which targets."""

from importlib import import_module
from pathlib import Path

from ..errors import UserError
from ..io import write_json

MODULES = ("decoding", "reader", "sampling", "sctune", "sft")


def run(name: str, json_file: str | Path | None = None) -> dict:
    """Run the benchmark `name` and return its figures with `targets: {key: {"value", "wanted", "met"}}`.

    Raises:
        UserError: there is no such benchmark, or its file is not well formed.
    """
    from ..recipes import find, read_yaml

    path = find("eval", f"speed/{name}")
    spec = read_yaml(path)
    if spec.get("module") not in MODULES:
        raise UserError(
            f"{path}: `module` must be one of {', '.join(MODULES)}, found {spec.get('module')!r}."
        )
    figures = import_module(f"{__name__}.{spec['module']}").run(**spec.get("arguments", {}))
    result = {"benchmark": spec["name"], **figures, "targets": check(figures, spec.get("targets", {}), path)}
    if json_file is not None:
        write_json(json_file, result)
    return result


def check(figures: dict, targets: dict[str, dict[str, float]], path: str | Path) -> dict[str, dict]:
    """Hold the figures against targets `dotted.key -> {at_least | at_most: number}`.

    Raises:
        UserError: a target names a figure that the benchmark does not give.
    """
    checked = {}
    for key, wanted in targets.items():
        value = figures
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{path}: the target {key!r} names no figure of this benchmark.")
            value = value[part]
        met = value >= wanted.get("at_least", value) and value <= wanted.get("at_most", value)
        checked[key] = {"value": value, "wanted": wanted, "met": met}
    return checked
