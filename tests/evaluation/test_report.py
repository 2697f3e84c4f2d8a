import base64
import re
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_scoring import CHAIR, SAMPLES

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation import plots
from vlm_sft_rl.evaluation.bootstrap import Interval
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.metrics.amber import AmberGenerative
from vlm_sft_rl.evaluation.pages import answer_view, mark_plain, write_eval_page
from vlm_sft_rl.evaluation.report import (
    AnswerView,
    Cell,
    Example,
    Figure,
    Gallery,
    Panels,
    Piece,
    Table,
    Text,
    Tile,
    Tiles,
    interval_text,
    percent,
    render_report,
    thumbnail_uri,
)
from vlm_sft_rl.evaluation.scoring import score

HOSTILE = '<script>alert(1)</script> & "quotes" </UN>'


class Page(HTMLParser):
    """Checks nesting, and collects tags with their attributes and the text."""

    VOID = ("meta", "img", "source", "br", "link", "input")

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def metric():
    return load_metric("chair", CHAIR)


def curves(metric):
    return {
        mode: plots.sweep(SAMPLES, metric, mode, [0.15, 0.35, 0.8], rounds=20) for mode in ("drop", "stop")
    }


def figures(metric):
    lines, interval = curves(metric), Interval(0.2, 0.1, 0.3, 5)
    points = {
        "a": [(0, {"value": 0.5, "low": 0.4, "high": 0.6}), (1, {"value": 0.6, "low": 0.5, "high": 0.7})]
    }
    draws = {
        "Trade": partial(plots.tau_tradeoff, lines, {"base": lines["drop"][0]}),
        "Roc": partial(plots.verifier_roc, {"own": ([0.1, 0.9, 0.4], [False, True, False])}),
        "Lines": partial(plots.lines_with_intervals, points, x="Round", y="Accuracy (%)"),
    }
    return [
        *(Figure(title, draw, HOSTILE) for title, draw in draws.items()),
        Panels("Dots", plots.intervals_by_system({HOSTILE: {"f1": interval}}, ["f1"]), HOSTILE, wide=True),
        Panels("Train", plots.training_curves([{"step": 1, "loss": 2}], {"loss": HOSTILE, "no": "N"})),
        Panels("Rounds", plots.rounds_with_intervals(points)),
    ]


def all_sections(metric):
    pieces = [Piece(HOSTILE, False, 0.7, False), Piece(" and "), Piece("x", True, 0.1, True)]
    view = AnswerView(HOSTILE, pieces)
    return [
        Tiles("", [Tile(HOSTILE, HOSTILE, HOSTILE, "bad")]),
        Text(HOSTILE, "one\n\n" + HOSTILE),
        Table("Table", [HOSTILE, "b"], [[HOSTILE, Cell("2", "good")]], HOSTILE, folded=True),
        *figures(metric),
        Gallery("Gallery", [Example(Image.new("RGB", (900, 30)), HOSTILE, [view], HOSTILE)], HOSTILE),
        Gallery("No picture", [Example(None, "q", [AnswerView("s", [])])], legend=False),
    ]


def test_page_is_whole_self_contained_and_escaped(metric, tmp_path):
    path = render_report(HOSTILE, all_sections(metric), tmp_path / "r.html", command=HOSTILE)
    html = path.read_text()
    page = Page(html)
    assert not any(tag == "script" for tag, _ in page.tags)
    assert page.text.count(HOSTILE) >= 14
    assert "no answer" in page.text
    links = [a[key] for _, a in page.tags for key in ("src", "srcset", "href") if key in a]
    assert links and all(link.startswith("data:image/") for link in links)
    assert "http" not in re.sub(r'"data:[^"]*"', "", html)
    pictures = [a for tag, a in page.tags if tag == "source"]
    assert len(pictures) == 7 and all(a["media"] == "(prefers-color-scheme: dark)" for a in pictures)


def test_figures_differ_between_the_schemes_and_not_between_calls(metric, tmp_path):
    pages = [render_report("t", figures(metric)[:1], tmp_path / name).read_text() for name in "ab"]
    light, dark = uris = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", pages[0])
    assert light != dark and all(uri in pages[1] for uri in uris)
    assert b"<svg" in base64.b64decode(light)


def test_a_table_on_the_terminal_has_the_texts_of_the_page(tmp_path):
    table = Table("t [x]", ["", "[b]"], [["one", Cell("[1, 2]", "strong")], [], ["two", "3"]], "note [n]")
    console = Console(width=60, record=True, file=(tmp_path / "out").open("w"))
    console.print(table.terminal())
    lines = console.export_text().splitlines()
    assert "t [x]" in lines[0] and "[b]" in lines[2] and "note [n]" in lines[-1]
    assert "one" in lines[4] and "[1, 2]" in lines[4] and lines[5].startswith("├") and "3" in lines[6]


def test_intervals_as_text():
    interval = {"value": 0.5, "low": -0.25, "high": 0.625}
    assert interval_text(interval) == "0.500 [-0.250, 0.625]"
    assert interval_text(interval, 2, sign="+") == "+0.50 [-0.25, +0.62]"
    assert percent(interval) == "50.0 [-25.0, 62.5]"


def test_marks_tell_truth_from_verdict(metric, tmp_path):
    view = answer_view("greedy", SAMPLES[0], metric)
    assert [(p.text, p.truth, p.accepted) for p in view.pieces] == [
        ("There is ", None, None),
        ("a dog", True, True),
        (", ", None, None),
        ("a cat", False, False),
        (".", None, None),
    ]
    html = render_report("t", [Gallery("g", [Example(None, "q", [view])])], tmp_path / "r.html").read_text()
    assert re.search(r'<span class="piece right tagged">a dog<span class="p"[^>]*>0.1</span></span>, ', html)
    assert re.search(
        r'<span class="piece wrong rejected">a cat<span class="p"[^>]*>0.7</span></span>\.', html
    )


def test_untagged_answers_are_marked_by_mention(metric):
    pieces = mark_plain("Two dogs and a cat sleep.", metric, ["dog"])
    assert [(p.text, p.truth) for p in pieces] == [
        ("Two ", None),
        ("dogs", True),
        (" and a ", None),
        ("cat", False),
        (" sleep.", None),
    ]
    assert "".join(p.text for p in pieces) == "Two dogs and a cat sleep."
    yes_no = load_metric("yes_no", {})
    assert mark_plain("Yes, sure", yes_no, "no") == [Piece("Yes, sure", False)]
    assert mark_plain("hm", yes_no, "no") == [Piece("hm")]


def test_what_an_answer_missed_stands_beside_it(metric, tmp_path):
    sample = SAMPLES[0] | {"answer": "There is a cat.", "tagged_answer": "There is a cat.", "spans": []}
    sample["reference"] = {"objects": ["dog", "cat", "fish"]}
    view = answer_view("s", sample, metric)
    assert view.missed == ["dog", "fish"]
    page = render_report("t", [Gallery("g", [Example(None, "q", [view])])], tmp_path / "page.html")
    assert "missed: dog, fish" in page.read_text()
    amber = AmberGenerative({"dog": ["puppy"], "cat": []})
    assert amber.missed("A puppy.", {"truth": ["dog", "cat"], "hallu": []}) == ["cat"]


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, "every phrase verified"),
        ({"ok": False}, "not fully verified"),
        ({"spans": [], "tagged_answer": "There is a dog."}, "nothing to verify"),
        ({"spans": [], "ok": False}, "not fully verified"),
    ],
)
def test_an_answer_says_whether_it_was_verified_where_its_decoder_verifies(metric, changes, note):
    sample = SAMPLES[0] | changes
    assert answer_view("s", sample, metric, verifies=True).note == note
    assert answer_view("s", sample, metric).note == ("" if sample["ok"] else "cut off")


def test_eval_report_shows_worst_before_best_once_each(metric, tmp_path):
    samples = [dict(s, images=[f"{s['id']}.png"]) for s in SAMPLES]
    for s in samples:
        Image.new("RGB", (20, 20), "red").save(tmp_path / s["images"][0])
    summary = {
        "spec": "s", "description": "d", "model": "m", "decoder": "greedy", "threshold": None,
        **score(samples, metric, rounds=10), "published": [], "seed": 0, "versions": {"torch": "1"},
        "config": {"level": 0.95, "rounds": 10, "retrospective": {"threshold": 0.5}},
    }  # fmt: skip
    path = write_eval_page(tmp_path / "r.html", summary, samples, metric, tmp_path, examples=2)
    text = Page(path.read_text()).text
    assert re.findall(r"id (\d)", text) == ["3", "2", "1"]
    assert "By category" in text and "retrospective.threshold" in text
    with pytest.raises(UserError, match=r"2\.png"):
        (tmp_path / "2.png").unlink()
        write_eval_page(tmp_path / "r.html", summary, samples, metric, tmp_path)


def test_thumbnails_shrink_large_pictures_and_keep_small_ones():
    noise = np.random.default_rng(0).integers(0, 255, (1200, 900, 3), dtype=np.uint8)
    large = thumbnail_uri(Image.fromarray(noise))
    assert large.startswith("data:image/jpeg") and len(large) < 120_000
    assert thumbnail_uri(Image.new("RGB", (64, 64))).startswith("data:image/png")


def test_plots_have_the_names_and_units_of_the_tables(metric):
    lines = curves(metric)
    axes = plots.tau_tradeoff(lines, {"base": lines["drop"][0]}).axes[0]
    assert axes.get_xlabel() == plots.LABELS["coverage"] and axes.get_ylabel() == plots.LABELS["chair_i"]
    drawn = axes.get_lines()[0].get_xdata()
    assert sorted(drawn) == pytest.approx([p.metrics["coverage"].value for p in lines["drop"]])
    (empty,) = plots.training_curves([], {"loss": "Loss (nats)"}).values()
    assert empty().axes[0].texts[0].get_text() == "not logged"


def test_small_plots_of_rounds_and_losses_have_one_scale():
    share = lambda value: {"value": value, "low": value - 0.05, "high": value + 0.05}  # noqa: E731
    rounds = {"low": [(0, share(0.1)), (1, share(0.2))], "high": [(0, share(0.7)), (1, share(0.9))]}
    logs = {
        "a": [{"step": 1, "loss": 3.0}, {"step": 2, "eval": 9}],
        "b": [{"step": 1, "loss": 0.5}],
        "none": [],
    }
    for panels in (plots.rounds_with_intervals(rounds), plots.loss_curves(logs)):
        (limits,) = {draw().axes[0].get_ylim() for draw in panels.values()}
        assert limits[0] <= 5 and limits[1] >= 3
    assert plots.rounds_with_intervals(rounds)["high"]().axes[0].get_ylim()[1] > 95
    assert len(plots.loss_curves(logs)["a"]().axes[0].get_lines()[0].get_xdata()) == 1
    flat = plots.rounds_with_intervals({"all": [(0, {"value": 1, "low": 1, "high": 1})]})
    assert flat["all"]().axes[0].get_ylim() == (99, 101)
