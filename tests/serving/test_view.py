"""The list of runs: what stands on it, what it opens, and what it does not hand out."""

import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest
import uvicorn
from typer.testing import CliRunner

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.pocket.dataset import build_world
from vlm_sft_rl.serving.view import create_view, list_runs

INTERVAL = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two evaluations of one benchmark, one of another, a self-training run, one under way and one that is damaged."""
    folder = tmp_path_factory.mktemp("view")
    world, root = build_world(folder / "world", sizes={"train": 2, "val": 2, "test": 5}), folder / "runs"
    for name, benchmark, decoder in (
        ("first", "pocket_captions", "greedy"),
        ("deep/second", "pocket_captions", "retrospective"),
        ("third", "pocket_yesno", "greedy"),
    ):
        words = ["eval", "run", benchmark, "--model", VERIFIER, "--data-dir", world, "--decoder", decoder]
        result = CliRunner().invoke(app, [*map(str, words), "--output-dir", str(root / name)])
        assert result.exit_code == 0, result.output
    for name, summary in (
        (
            "loop",
            {"rounds": [{"greedy": INTERVAL}, {"greedy": INTERVAL | {"value": 0.625}, "samples": 8}], "n": 8},
        ),
        ("under-way", None),
        ("damaged", {"spec": "pope"}),
    ):
        (root / name).mkdir()
        (root / name / "run.json").write_text("{}")
        if name == "loop":
            (root / name / "run.json").unlink()
        if summary is not None:
            (root / name / "summary.json").write_text(json.dumps(summary))
    (root / "model.html").mkdir()
    (root / "secret.json").write_text("{}")
    (folder / "outside.html").write_text("outside")
    (root / "link.html").symlink_to(folder / "outside.html")
    return root


@pytest.fixture(scope="module")
def address(runs):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_view(runs.resolve()), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def get(address):
    try:
        with urllib.request.urlopen(address, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_each_run_stands_in_the_list_with_its_figures_or_what_it_lacks(runs):
    rows = {run["name"]: run for run in list_runs(runs)}
    assert rows.keys() == {"first", "deep/second", "third", "loop", "under-way", "damaged"}
    assert rows["first"]["decoder"] == "greedy" and rows["first"]["n"] == 5
    summary = json.loads((runs / "deep/second/summary.json").read_text())
    figure = rows["deep/second"]["figures"]["chair_i"]
    assert figure["value"] == summary["metrics"]["chair_i"]["value"]
    assert rows["deep/second"]["decoder"] == f"retrospective, τ = {summary['threshold']:g}"
    assert rows["loop"]["benchmark"] == "self-training, 2 rounds"
    assert rows["loop"]["figures"] == {"greedy": {"value": 0.625, "text": "0.625 [0.250, 0.750]"}}
    assert rows["under-way"]["state"] == "not finished" and rows["under-way"]["page"] is None
    assert "description" in rows["damaged"]["state"]


@pytest.mark.parametrize(
    "path", ["secret.json", "../outside.html", "..%2Foutside.html", "link.html", "model.html", "none.html"]
)
def test_nothing_but_pages_below_the_folder_is_handed_out(address, path):
    assert get(f"{address}/runs/{path}")[0] == 404


def test_pages_open_and_two_runs_are_compared_as_new_minus_old(address, runs):
    status, page = get(f"{address}/runs/deep/second/report.html")
    assert status == 200 and page == (runs / "deep/second/report.html").read_text()
    query = urllib.parse.urlencode({"new": "deep/second", "old": "first"})
    status, page = get(f"{address}/compare?{query}")
    assert status == 200 and page.index("New: ") < page.index("retrospective") < page.index("Old: ")
    status, message = get(f"{address}/compare?new=third&old=first")
    assert status == 400 and "only runs of one spec" in message
    assert get(f"{address}/compare?new=../world&old=first")[0] == 404


def test_a_run_that_ends_while_the_page_is_shown_is_there_when_it_is_loaded_again(address, runs):
    shutil.copytree(runs / "first", runs / "</script><b>")
    try:
        _, page = get(address)
        assert "\\u003c/script>" in page and "</script><b>" not in page
    finally:
        shutil.rmtree(runs / "</script><b>")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_sorts_filters_and_compares(address, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    failures = []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.set_default_timeout(120_000)  # the comparison draws its figures
    page.goto(address)
    names = lambda: page.locator("tbody td.name").all_inner_texts()  # noqa: E731
    assert len(names()) == 6
    page.locator("th button[data-key=name]").click()
    assert names() == sorted(names())
    page.locator(".metric").select_option("chair_i")
    page.locator("th button[data-key=figure]").click()
    assert set(names()[:2]) == {"first", "deep/second"}  # what has no such figure comes last
    page.locator(".query").fill("captions")
    assert sorted(names()) == ["deep/second", "first"]
    for box in page.locator("tbody input").all():
        box.check()
    page.locator(".compare").click()
    page.wait_for_url("**/compare?*")
    assert "new against old" in page.locator("h1").inner_text()
    page.go_back()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert not failures
    page.close()
