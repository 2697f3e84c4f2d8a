"""Pictures and pages of describe-then-locate samples: the region, what was said, where it led."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..data.images import open_image
from ..rewards.boxes import iou
from .bootstrap import Interval
from .report import AnswerView, Example, Footer, Gallery, Piece, Table, Text, render_report

ORIGINAL, LOCATED = (20, 150, 70), (215, 60, 30)
SHORTEST = 256  # small pictures are enlarged to this before boxes are drawn
LABELS = {
    "self_consistency_iou": "Self-consistency, mean IoU",
    "self_consistency_acc50": "Self-consistency, acc@0.5",
    "rec_acc50": "REC acc@0.5",
    "reg_exact": "Descriptions that pick out the one thing",
    "parse_rate": "Located boxes that parse",
    "leak_rate": "Descriptions that spell coordinates",
    "words": "Words per description",
    "cider": "REG CIDEr",
    "meteor": "REG METEOR",
    "caption_chair_i": "Captions, CHAIR-i (lower is better)",
}


def draw_boxes(
    image: str | Path | Image.Image, box, located, image_root: str | Path | None = None
) -> Image.Image:
    """The picture with the region (green, solid) and the re-located box (red, inside of it where they agree)."""
    picture = open_image(image, image_root).copy()
    scale = max(1, -(-SHORTEST // min(picture.size)))
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS)
    pen, width = ImageDraw.Draw(picture), max(2, min(picture.size) // 100)
    for corners, colour, inset in ((box, ORIGINAL, 0), (located, LOCATED, 2 * width)):
        if corners is not None:
            x1, y1, x2, y2 = (value * scale for value in corners)
            inner = (x1 + inset, y1 + inset, max(x1 + inset, x2 - inset - 1), max(y1 + inset, y2 - inset - 1))
            pen.rectangle(inner, outline=colour, width=width)
    return picture


def metrics_table(systems: Mapping[str, Mapping[str, Interval]], title: str = "Figures") -> Table:
    names = [name for name in LABELS if any(name in row for row in systems.values())]
    rows = [
        [LABELS[name], *(row[name].format() if name in row else "" for row in systems.values())]
        for name in names
    ]
    return Table(title, ["", *systems], rows)


def gallery(
    title: str,
    samples: Mapping[str, Sequence[dict]],
    ids: Sequence[str],
    image_root: str | Path | None,
    note: str = "",
) -> Gallery:
    """The same boxes by several systems; the drawn picture is of the last system."""
    indexed = {system: {sample["id"]: sample for sample in own} for system, own in samples.items()}
    examples = []
    for key in ids:
        views = []
        for system, own in indexed.items():
            sample = own[key]
            overlap = iou(sample["located"], sample["box"])
            views.append(
                AnswerView(system, [Piece(sample["description"], truth=overlap >= 0.5)], f"IoU {overlap:.2f}")
            )
        last = list(indexed.values())[-1][key]
        picture = draw_boxes(last["image"], last["box"], last["located"], image_root)
        examples.append(Example(picture, last.get("expression") or "", views))
    return Gallery(title, examples, note, legend=False)


def pick_examples(samples: Sequence[dict], count: int = 6) -> list[str]:
    """Boxes to show, worst first, then best, then those between; one of an image."""
    seen, unique = set(), []
    for sample in samples:
        if sample["image"] not in seen:
            seen.add(sample["image"])
            unique.append(sample)
    ranked = sorted(unique, key=lambda s: iou(s["located"], s["box"]))
    if len(ranked) <= count:
        return [s["id"] for s in ranked]
    half = count // 2
    return [s["id"] for s in (*ranked[:half], *ranked[-(count - half) :])]


def write_region_report(
    path: str | Path,
    metrics: Mapping[str, Interval],
    samples: Sequence[dict],
    *,
    title: str,
    image_root: str | Path | None,
    command: str = "",
) -> Path:
    """The page of one evaluation."""
    sections = [
        metrics_table({"value [95 % interval]": metrics}, "Figures"),
        gallery(
            "Boxes",
            {"description": samples},
            pick_examples(samples),
            image_root,
            "Green: the region that was described. Red: where the description led. The heading of each picture is the "
            "reference expression, if there is one; first the failures, then the successes.",
        ),
        Text(
            "How to read it",
            "Each region was described, and the description was located on the same image by the same model, both "
            "greedy. Self-consistency is the overlap of the two boxes. REC locates what people said instead.",
        ),
    ]
    return render_report(title, sections, path, footer=Footer(command))
