"""The plots of our reports, and the points of the one over thresholds.

Every plot is a matplotlib figure in light or dark ink.
"""

import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..roc import roc_auc, roc_curve
from .bootstrap import Interval
from .metrics.counting import CountMetric
from .results import read_results
from .revisions import derive
from .scoring import count_matrix

# Okabe and Ito's colours, which remain distinct for colour-blind readers; lighter ones on dark paper
_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#AA4499", "#B8860B", "#5d6875")
_DARK = ("#6DB6EE", "#F2915A", "#4CC9A4", "#DD99CC", "#E8C268", "#98a3b0")
_MARKERS = ("o", "s", "^", "D", "v", "P")
LABELS = {
    "chair_i": "CHAIR-i: hallucinated mentions",
    "chair_i_distinct": "CHAIR-i over distinct objects",
    "repeats": "Captions that name an object twice",
    "chair_s": "CHAIR-s: captions with a hallucination",
    "coverage": "Coverage: objects mentioned",
    "length": "Length (words)",
    "f1": "F1 of yes",
    "accuracy": "Accuracy",
    "yes_ratio": "Yes ratio",
    "self_consistency_iou": "Self-consistency: mean IoU",
    "rec_acc50": "REC: acc@0.5",
    "reg_exact": "Descriptions: pick out the one thing",
}
_PANEL = (2.7, 2.1)  # inches of a small plot among others


@contextmanager
def _style(dark: bool):
    ink, line = ("#e4e8ed", "#3a414a") if dark else ("#1b2027", "#dfe3e8")
    with matplotlib.rc_context(
        {
            "font.size": 10,
            "text.color": ink,
            "axes.labelcolor": ink,
            "axes.edgecolor": line,
            "xtick.color": ink,
            "ytick.color": ink,
            "axes.grid": True,
            "grid.color": line,
            "grid.linewidth": 0.6,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "lines.linewidth": 1.6,
            "lines.markersize": 5,
            "figure.dpi": 110,
        }
    ):
        yield _DARK if dark else _LIGHT


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no window
    return figure


def _error(interval: Interval) -> list[list[float]]:
    return [[max(0.0, interval.value - interval.low)], [max(0.0, interval.high - interval.value)]]


# --- What a threshold buys and costs: from one greedy run, or from one run per tau ---


@dataclass(frozen=True)
class SweepPoint:
    """All metrics of one system at one threshold (None: a system without one)."""

    threshold: float | None
    metrics: dict[str, Interval]


def sweep(
    samples: Sequence[dict],
    metric: CountMetric,
    mode: str,
    thresholds: Sequence[float],
    *,
    rounds: int = 100,
    seed: int = 0,
) -> list[SweepPoint]:
    """`drop` or `stop` at every threshold, derived from the samples of one greedy run; nothing is generated."""
    points = []
    for tau in thresholds:
        counts = count_matrix([derive(sample, mode, tau) for sample in samples], metric)
        points.append(SweepPoint(float(tau), metric.intervals(counts, rounds, seed)))
    return points


def run_point(folder: str | Path) -> SweepPoint:
    """The point of a finished run, from its summary.json."""
    summary = read_results(folder)
    return SweepPoint(
        summary["threshold"], {name: Interval(**value) for name, value in summary["metrics"].items()}
    )


def useful_thresholds(samples: Sequence[dict], count: int = 9) -> list[float]:
    """Thresholds spread evenly over the ranks of the P(</UN>) that occur, so that every step changes something."""
    scores = sorted({span["p_unconfident"] for sample in samples for span in sample["spans"]})
    scores = [score for score in scores if 0 < score < 1]
    if len(scores) <= count:
        return scores
    return [scores[int(index)] for index in np.linspace(0, len(scores) - 1, count)]


def tau_tradeoff(
    curves: Mapping[str, Sequence[SweepPoint]],
    points: Mapping[str, SweepPoint],
    *,
    x: str = "coverage",
    y: str = "chair_i",
    dark: bool = False,
) -> Figure:
    """What each way of using the verifier pays (x) for what it gets (y), as tau varies.

    Args:
        curves: label -> points by threshold; a line with the intervals of both axes, some taus written beside it.
        points: label -> a single system (base, control, greedy).
    """
    with _style(dark) as colours:
        figure = _figure(6.0, 4.4)
        axes = figure.subplots()
        looks = zip(itertools.cycle(colours), itertools.cycle(_MARKERS), strict=False)
        written: list[tuple[float, float]] = []  # where a tau stands, so that none falls on another
        for label, curve in curves.items():
            colour, marker = next(looks)
            curve = sorted(curve, key=lambda point: point.threshold)
            xs = [point.metrics[x].value for point in curve]
            ys = [point.metrics[y].value for point in curve]
            axes.plot(xs, ys, color=colour, marker=marker, label=label, zorder=3)
            for point, px, py in zip(curve, xs, ys, strict=True):
                errors = {
                    "xerr": _error(point.metrics[x]),
                    "yerr": _error(point.metrics[y]),
                }
                axes.errorbar(px, py, **errors, color=colour, alpha=0.35, linewidth=0.9, fmt="none", zorder=2)
            for point, px, py in zip(curve, xs, ys, strict=True):
                if all(abs(px - other_x) > 0.12 or abs(py - other_y) > 0.04 for other_x, other_y in written):
                    written.append((px, py))
                    tau = f"τ {point.threshold:.2g}"
                    place = {"textcoords": "offset points", "xytext": (4, 5), "fontsize": 8, "color": colour}
                    axes.annotate(tau, (px, py), **place)
        for label, point in points.items():
            colour, marker = next(looks)
            axes.errorbar(
                point.metrics[x].value,
                point.metrics[y].value,
                xerr=_error(point.metrics[x]),
                yerr=_error(point.metrics[y]),
                color=colour,
                marker=marker,
                markersize=8,
                linestyle="none",
                elinewidth=1.1,
                label=label,
                zorder=4,
            )
        axes.set_xlabel(LABELS.get(x, x))
        axes.set_ylabel(LABELS.get(y, y))
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])
        axes.margins(x=0.08)
        axes.text(
            0.02, 0.97, "better: further right and lower", transform=axes.transAxes, va="top", fontsize=9, alpha=0.7
        )  # fmt: skip
        figure.legend(loc="outside upper center", ncols=3)
    return figure


# --- The others ---


def verifier_roc(
    verdicts: Mapping[str, tuple[Sequence[float], Sequence[bool]]], *, dark: bool = False
) -> Figure:
    """ROC of P(</UN>) as a detector of wrong phrases; label -> (P(</UN>), is wrong)."""
    with _style(dark) as colours:
        figure = _figure(4.6, 4.4)
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=colours[-1], linestyle=":", linewidth=1.2, label="chance (0.5)")
        for (label, (scores, wrong)), colour in zip(verdicts.items(), itertools.cycle(colours), strict=False):
            curve = roc_curve(scores, wrong)
            name = f"{label} (area {roc_auc(scores, wrong):.3f})"
            axes.plot(curve.false_rejects, curve.true_rejects, color=colour, label=name)
        axes.set_xlabel("Right phrases rejected")
        axes.set_ylabel("Wrong phrases rejected")
        axes.set_aspect("equal")
        axes.legend(loc="lower right", fontsize=9)
    return figure


def intervals_by_system(
    systems: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str]
) -> dict[str, Callable[..., Figure]]:
    """A panel per metric, one dot with its interval per system, so that overlaps can be seen."""

    def draw(name: str, *, dark: bool = False) -> Figure:
        with _style(dark) as colours:
            figure = _figure(4.3, 0.34 * len(systems) + 0.6)
            axes = figure.subplots()
            places = range(len(systems) - 1, -1, -1)
            for place, row, colour in zip(places, systems.values(), itertools.cycle(colours), strict=False):
                axes.errorbar(
                    row[name].value, place, xerr=_error(row[name]), color=colour,
                    fmt="o", capsize=3,
                )  # fmt: skip
            axes.set_yticks(places, [textwrap.fill(label, 24) for label in systems])
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0)
            axes.margins(x=0.1)
            axes.set_ylim(-0.6, len(systems) - 0.4)
        return figure

    titles = {name: LABELS.get(name, name.replace("_", " ").capitalize()) for name in metrics}
    return {title: partial(draw, name) for name, title in titles.items()}


def lines_with_intervals(
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]], *, x: str, y: str, dark: bool = False
) -> Figure:
    """Shares over whole numbers (rounds, samples), in per cent with their intervals.

    Args:
        curves: label -> points (x, {value, low, high} as shares).
        x, y: axis labels.
    """
    with _style(dark) as colours:
        figure = _figure(5.4, 3.6)
        axes = figure.subplots()
        looks = zip(itertools.cycle(colours), itertools.cycle(_MARKERS), strict=False)
        shift = 0.035 * (len(curves) - 1) / 2
        for number, ((label, points), (colour, marker)) in enumerate(
            zip(curves.items(), looks, strict=False)
        ):
            xs = [place + 0.035 * number - shift for place, _ in points]
            values = np.array([[100 * p[key] for key in ("value", "low", "high")] for _, p in points])
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            axes.errorbar(xs, values[:, 0], yerr=errors, color=colour, marker=marker, label=label, capsize=2)
        axes.set_xticks(sorted({place for points in curves.values() for place, _ in points}))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        figure.legend(loc="outside upper center", ncols=3)
    return figure


def rounds_with_intervals(
    curves: Mapping[str, Sequence[tuple[float, Mapping[str, float]]]],
) -> dict[str, Callable[..., Figure]]:
    """A panel per label, all on one scale: shares over whole numbers, in per cent with their intervals.

    Args:
        curves: as for `lines_with_intervals`.
    """
    ends = [100 * point[key] for points in curves.values() for _, point in points for key in ("low", "high")]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0

    def draw(label: str, *, dark: bool = False) -> Figure:
        with _style(dark) as colours:
            figure = _figure(*_PANEL)
            axes = figure.subplots()
            places, points = zip(*curves[label], strict=True)
            values = np.array([[100 * point[key] for key in ("value", "low", "high")] for point in points])
            errors = np.abs(values[:, 1:] - values[:, :1]).T
            axes.errorbar(places, values[:, 0], yerr=errors, color=colours[0], marker="o", capsize=3)
            axes.set_xticks(places)
            axes.margins(x=0.15)
            axes.set_ylim(min(ends) - margin, max(ends) + margin)
        return figure

    return {label: partial(draw, label) for label in curves}


def training_curves(
    log_history: Sequence[Mapping], panels: Mapping[str, str]
) -> dict[str, Callable[..., Figure]]:
    """A panel per logged quantity, over optimiser steps.

    Args:
        log_history: the trainer's (`runs.training_log`).
        panels: logged name -> title with its unit; a panel without any logged value says so.
    """
    series = {title: logged(log_history, name) for name, title in panels.items()}
    return {title: partial(_steps, points) for title, points in series.items()}


def loss_curves(log_histories: Mapping[str, Sequence[Mapping]]) -> dict[str, Callable[..., Figure]]:
    """A panel per training, its loss over optimiser steps, all on one scale."""
    series = {title: logged(history, "loss") for title, history in log_histories.items()}
    highest = max((loss for points in series.values() for _, loss in points), default=1.0)
    return {title: partial(_steps, points, 1.05 * highest) for title, points in series.items()}


def logged(log_history: Sequence[Mapping], name: str) -> list[tuple[int, float]]:
    """(step, value) of every time that a trainer logged a quantity."""
    return [(entry["step"], entry[name]) for entry in log_history if name in entry]


def _steps(points: Sequence[tuple[int, float]], top: float | None = None, *, dark: bool = False) -> Figure:
    with _style(dark) as colours:
        figure = _figure(*_PANEL)
        axes = figure.subplots()
        if points:
            axes.plot(*zip(*points, strict=True), color=colours[0], marker="o", markersize=2.5)
        else:
            axes.text(0.5, 0.5, "not logged", ha="center", va="center", transform=axes.transAxes)
        if top is not None:
            axes.set_ylim(0, top)
    return figure
