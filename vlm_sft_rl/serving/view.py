"""The runs below a folder as a page: sorted, filtered, two of them compared, each one's own page a click away."""

import json
import tempfile
from collections import Counter
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..errors import UserError
from ..evaluation.compare import pair_runs, write_comparison
from ..evaluation.report import TEMPLATES, interval_text
from ..evaluation.results import read_results
from ..runs import RUN_FILE, SUMMARY
from ..shapes import COUNT, NUMBER, fault, read_object, require

PAGE = "report.html"
HERE = Path(__file__).parent
# of a self-training run, what the list shows of its last round
ROUNDS = {"rounds": [dict], "n": COUNT}
INTERVAL = {"value": NUMBER, "low": NUMBER, "high": NUMBER}
CURE = "Give the command that made this folder again."


def list_runs(root: Path) -> list[dict]:
    """What the page shows of each run below `root`, the newest first.

    A folder with `run.json` or `summary.json` is a run. Of one that has not ended, or whose summary cannot be read, `state`
    says so.
    """
    folders = {path.parent for name in (RUN_FILE, SUMMARY) for path in root.rglob(name)}
    runs = [_run(root, folder) for folder in folders]
    return sorted(runs, key=lambda run: (-run["time"], run["name"]))


def _run(root: Path, folder: Path) -> dict:
    name = folder.relative_to(root).as_posix()
    row = {"name": name, "benchmark": "", "model": "", "decoder": "", "n": None, "figures": {}, "state": ""}
    row["page"] = name if (folder / PAGE).is_file() else None
    path = folder / SUMMARY
    ended = path.is_file()
    row["time"] = (path if ended else folder / RUN_FILE).stat().st_mtime
    if not ended:
        return row | {"state": "not finished"}
    try:
        summary = read_object(path, dict, CURE)
        if "rounds" in summary:
            return row | _self_training(require(summary, ROUNDS, str(path), CURE))
        if "spec" in summary:
            return row | _evaluation(read_results(folder, model=str))
        return row | {"benchmark": "page only"}
    except UserError as error:
        return row | {"state": str(error)}


def _evaluation(summary: dict) -> dict:
    tau = "" if summary["threshold"] is None else f", τ = {summary['threshold']:g}"
    return {
        "benchmark": summary["spec"],
        "model": Path(summary["model"]).name,
        "decoder": summary["decoder"] + tau,
        "n": summary["n"],
        "figures": _figures(summary["metrics"]),
    }


def _self_training(summary: dict) -> dict:
    rounds = summary["rounds"]
    intervals = {name: row for name, row in (rounds or [{}])[-1].items() if fault(row, INTERVAL) is None}
    name = f"self-training, {len(rounds)} rounds"
    return {"benchmark": name, "n": summary["n"], "figures": _figures(intervals)}


def _figures(intervals: dict[str, dict]) -> dict[str, dict]:
    """Metric -> its value, and how it is written."""
    return {name: {"value": row["value"], "text": interval_text(row)} for name, row in intervals.items()}


def create_view(root: Path) -> FastAPI:
    """The application; it reads `root` anew for each request, and hands out nothing but pages below it."""
    app = FastAPI(title="vlm_sft_rl", docs_url=None, redoc_url=None, openapi_url=None)
    loader = FileSystemLoader([HERE, TEMPLATES])
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)

    def within(name: str) -> Path | None:
        path = (root / name).resolve()
        return path if path.is_relative_to(root) else None

    @app.get("/", response_class=HTMLResponse)
    def index() -> str:
        runs = list_runs(root)
        # the first is shown when the page opens: what most runs have
        metrics = [name for name, _ in Counter(name for run in runs for name in run["figures"]).most_common()]
        style = (TEMPLATES / "style.css").read_text(encoding="utf-8")
        # no text of a run may end the script that holds it
        data = json.dumps(runs).replace("<", "\\u003c")
        return environment.get_template("runs.html.j2").render(
            root=root, runs=data, metrics=metrics, style=style, count=len(runs)
        )

    @app.get("/compare", response_class=HTMLResponse)
    def compare(new: str, old: str) -> HTMLResponse:
        folders = within(new), within(old)
        if None in folders:
            return HTMLResponse("There is no such run here.", 404)
        try:
            with tempfile.TemporaryDirectory() as place:
                page = write_comparison(Path(place, PAGE), pair_runs(*folders))
                return HTMLResponse(page.read_text(encoding="utf-8"))
        except UserError as error:
            message = environment.from_string("<p>{{ message }}</p>").render(message=str(error))
            return HTMLResponse(message, 400)

    @app.get("/runs/{name:path}")
    def page(name: str):
        path = within(name)
        if path is None or path.suffix != ".html" or not path.is_file():
            return HTMLResponse("There is no such page here.", 404)
        return FileResponse(path)

    return app


def view(root: Path, host: str, port: int) -> None:
    """Show the runs below `root` until the process is told to stop. Raises UserError: no such folder."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder.")
    from .run import AnnouncingServer

    server = AnnouncingServer(
        uvicorn.Config(create_view(root.resolve()), host=host, port=port, log_level="warning")
    )
    server.announce = lambda address: print(
        f"The runs below {root}: {address}/. Stop it with Ctrl-C.", flush=True
    )
    server.run()
