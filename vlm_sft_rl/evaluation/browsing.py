"""Which samples of a run a report page shows, as rows of its table."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data.images import open_image
from .drawing import draw_boxes
from .marking import answer_view
from .metrics.counting import CountMetric
from .report import AnswerView, Browser, BrowserRow, Piece
from .scoring import references, sample_matrix

SHOWN = 300  # rows of a page; each carries a picture of some kilobytes


def choose(badness: Sequence[tuple[float, ...]], shown: int = SHOWN) -> list[int]:
    """Indices of the samples to show, in their order: all, or half of the room for the worst and the rest spread evenly.

    Args:
        badness: of every sample.
    """
    if len(badness) <= shown:
        return list(range(len(badness)))
    worst = sorted(range(len(badness)), key=lambda i: (badness[i], -i), reverse=True)[: shown // 2]
    others = sorted(set(range(len(badness))) - set(worst))
    spread = np.linspace(0, len(others) - 1, shown - len(worst)).round().astype(int)
    return sorted({*worst, *(others[i] for i in spread)})


def ranks(badness: Sequence[tuple[float, ...]]) -> list[int]:
    """0 for the best; equal ones share a rank."""
    place = {value: index for index, value in enumerate(sorted(set(badness)))}
    return [place[value] for value in badness]


def categories(sample: dict) -> list[str]:
    found = sample["reference"].get("category")
    return [] if found is None else [str(name) for name in (found if isinstance(found, list) else [found])]


def sample_views(sample: dict, metric: CountMetric, system: str) -> list[AnswerView]:
    """The answer as the metric marks it, and the judge's reply where there is one."""
    views = [answer_view(system, sample, metric)]
    if sample.get("judgement"):
        views.append(AnswerView("judge", [Piece(sample["judgement"])]))
    return views


def sample_picture(sample: dict, image_root: Path, *, located: bool = True) -> Image.Image | None:
    """The first picture of a sample, with its box and, if asked for, the one that was located; None without a picture."""
    if not sample["images"]:
        return None
    picture = open_image(sample["images"][0], image_root)
    box = sample["reference"].get("box")
    return picture if box is None else draw_boxes(picture, box, sample.get("located") if located else None)


def box_legend(samples: Sequence[dict]) -> str:
    """What the boxes on the pictures mean; empty where there are none."""
    if not any(sample["reference"].get("box") for sample in samples):
        return ""
    found = ", red: the located one" if any(sample.get("located") for sample in samples) else ""
    return f"Green: the true box{found}."


def browser(
    samples: Sequence[dict],
    metric: CountMetric,
    image_root: Path,
    system: str,
    link: Callable[[int, dict], str] = lambda index, sample: "",
    *,
    shown: int = SHOWN,
) -> Browser:
    """The table of a run's answers.

    Args:
        link: (index, sample) -> page about this answer, or an empty text; called for the rows that are shown.
        shown: how many rows at most.
    """
    counts, truths = sample_matrix(samples, metric), references(samples, metric)
    badness = [metric.badness(row) for row in counts]
    order, chosen = ranks(badness), choose(badness, shown)
    rows = [
        BrowserRow(
            id=samples[i]["id"],
            image=sample_picture(samples[i], image_root),
            question=samples[i]["prompt"],
            truth=metric.truth_text(truths[i]),
            answers=sample_views(samples[i], metric, system),
            verdict=metric.verdict(counts[i]),
            badness=order[i],
            categories=categories(samples[i]),
            link=link(i, samples[i]),
        )
        for i in chosen
    ]
    note = box_legend(samples)
    if len(chosen) < len(samples):
        note += " " * bool(note) + (
            f"{len(chosen)} of {len(samples)} answers: the {shown // 2} worst by the metric, and others spread evenly "
            "over the rest. All of them are in samples.jsonl."
        )
    return Browser("Answers", rows, note)
