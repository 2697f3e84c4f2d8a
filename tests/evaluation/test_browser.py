"""The table of answers in a real browser: it renders, says nothing on the console, filters and sorts."""

import json
import re
import shutil
import subprocess

import pytest
from owners_files import write_benchmark
from PIL import Image
from worlds import evaluate, write_checkpoint

from vlm_sft_rl.evaluation.compare import pair_runs, write_comparison
from vlm_sft_rl.evaluation.pages import choose, ranks
from vlm_sft_rl.evaluation.report import AnswerView, Browser, BrowserRow, Piece, render_report

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome is installed")
# what a reader does, and what the page shows afterwards
ACTIONS = """
const visible = () => Array.from(document.querySelectorAll("tbody tr"))
  .filter((row) => !row.hidden && row.offsetHeight > 0).map((row) => row.querySelector(".order").textContent);
const set = (selector, value) => {
  const control = document.querySelector(selector);
  control.value = value;
  control.dispatchEvent(new Event("input", { bubbles: true }));
};
const seen = { start: visible(), pictures: Array.from(document.querySelectorAll(".samples img"))
  .filter((image) => image.src.startsWith("data:image/")).length };
set("select.verdict", "wrong");
seen.wrong = visible();
seen.shown = document.querySelector(".shown").textContent;
set(".query", "KITTEN two");
seen.both = visible();
set("select.verdict", "");
set(".query", "");
set("select.category", "b");
seen.category = visible();
set("select.category", "");
document.querySelector("button[data-key=badness]").click();
seen.worst = visible();
document.querySelector("button[data-key=badness]").click();
seen.best = visible();
document.querySelector("button[data-key=order]").click();
seen.order = visible();
document.title = JSON.stringify(seen);
"""


def open_page(path, script=""):
    """`(DOM after the scripts ran, console messages)`."""
    page = path.with_name("driven.html")
    page.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    flags = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 --virtual-time-budget=4000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={path.parent / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def rows():
    answers = (
        ("one dog", "right", 0),
        ("two kittens", "wrong", 2),
        ("a kitten, two", "wrong", 3),
        ("<b>&</b>", "unreadable", 1),
    )
    return [
        BrowserRow(
            id=f"q{i}",
            image=Image.new("RGB", (40, 40), "red" if i < 2 else "blue"),
            question="What is it? </script><script>alert(1)</script>",
            truth='a "cat" & more',
            answers=[AnswerView("greedy", [Piece(text, verdict == "right")])],
            verdict=verdict,
            badness=badness,
            categories=["a", "b"] if i == 3 else ["a"],
        )
        for i, (text, verdict, badness) in enumerate(answers)
    ]


@needs_browser
def test_the_table_filters_and_sorts_in_a_real_browser(tmp_path):
    path = render_report("t", [Browser("Answers", rows())], tmp_path / "r.html")
    dom, console = open_page(path, ACTIONS)
    assert console == []
    title = re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"')
    assert json.loads(title) == {
        "start": ["1", "2", "3", "4"],
        "pictures": 4,
        "wrong": ["2", "3"],
        "shown": "2 of 4",
        "both": ["2", "3"],
        "category": ["4"],
        "worst": ["3", "2", "4", "1"],
        "best": ["1", "4", "2", "3"],
        "order": ["1", "2", "3", "4"],
    }
    assert "alert(1)" in dom and "<script>alert(1)" not in dom


def test_equal_pictures_are_stored_once(tmp_path):
    browser = Browser("Answers", rows())
    uris, places = browser.pictures()
    assert len(uris) == 2 and places == [0, 0, 1, 1]
    page = render_report("t", [browser], tmp_path / "r.html").read_text()
    assert page.count("data:image/png") == 2


@needs_browser
def test_pages_of_runs_and_comparisons_open_without_an_error(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "model")
    data = write_benchmark("pope", tmp_path / "data")
    for name, length in (("a", 4), ("b", 8)):
        options = {"max_new_tokens": length, "rounds": 10, "report": True}
        evaluate("pope", checkpoint, tmp_path / name, data, **options)
    page = write_comparison(tmp_path / "compare.html", pair_runs(tmp_path / "a", tmp_path / "b", rounds=20))
    for path in (tmp_path / "a/report.html", page):
        dom, console = open_page(path)
        assert console == [] and dom.count("<tr data-order=") == 6 and "6 of 6" in dom
    assert "Paired bootstrap over 6 shared questions" in dom


def test_pages_of_long_runs_show_the_worst_and_a_spread_of_the_rest():
    badness = [(float(i % 10),) for i in range(1000)]
    chosen = choose(badness, 100)
    assert len(chosen) == 100 == len(set(chosen)) and chosen == sorted(chosen)
    assert sum(badness[i] == (9.0,) for i in chosen) >= 50
    assert min(chosen) < 20 and max(chosen) > 980
    assert choose(badness[:80], 100) == list(range(80))
    assert ranks([(2.0,), (1.0,), (2.0,)]) == [1, 0, 1]
