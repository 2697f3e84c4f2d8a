"""Boxes to locate and to describe: our own region rows, and RefCOCO, RefCOCO+ and RefCOCOg as their owners write them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ...data.rows import region_row
from ...data.sources import boxes as referring
from ...data.sources.boxes import EMPTY
from ...data.sources.source import Source
from ...errors import FORMAT, RowError, UserError
from ...io import read_jsonl

PER = ("region", "expression")
SPLITS = ("val", "testA", "testB", "test")


def regions(source: Source, per: str = "region") -> Iterator[tuple[str, dict]]:
    """JSONL of region rows (`data.regions`); rows with `split`, else with `category`, are reported by it.

    Args:
        per: a question for each `region`, or for each `expression` of one.
    """
    rows = ((f"{source.path}, line {number}", row) for number, row in read_jsonl(source.path))
    yield from _questions(((where, row, row.get("split") or row.get("category")) for where, row in rows), per)


def refcoco(
    source: Source, instances: Path, per: str = "region", splits: Iterable[str] = SPLITS
) -> Iterator[tuple[str, dict]]:
    """The refs of RefCOCO, RefCOCO+ or RefCOCOg as JSON; the category of a question is its split.

    Args:
        instances: the boxes: the `instances.json` beside the refs, or COCO's `instances_train2014.json`, whose ids they
            keep.
        per: a question for each `region`, or for each `expression` of one.
        splits: which parts.
    """
    source = replace(source, annotations=instances)
    wanted = set(splits)
    rows = (
        (source.at(row["id"]), row, row["split"])
        for row in referring.refcoco(source)
        if row.get("split") in wanted
    )
    yield from _questions(rows, per)
    if source.notes[EMPTY]:
        raise RowError(
            FORMAT,
            f"{source.notes[EMPTY]} refs have a box without area: their boxes are others.",
            str(instances),
        )


def _questions(rows: Iterable[tuple[str, dict, str | None]], per: str) -> Iterator[tuple[str, dict]]:
    if per not in PER:
        raise UserError(f"reader_options: 'per' must be one of {', '.join(PER)}, found {per!r}.")
    for where, raw, category in rows:
        row = region_row(raw, where)
        expressions = row.get("expressions")
        common = {
            "images": [row["image"]],
            **{name: row[name] for name in ("image", "box", "width", "height")},
        }
        common |= {"captions": expressions} if expressions else {}
        common |= {"category": category} if category else {}
        if per == "region":
            box = ", ".join(f"{value:.5g}" for value in row["box"])
            yield where, {"id": row["id"], "question": f"[{box}]", **common}
        elif not expressions:
            raise RowError(FORMAT, "no field `expressions`, so there is nothing to locate.", where)
        else:
            for number, text in enumerate(expressions):
                yield where, {"id": f"{row['id']}#{number}", "question": text, **common}
