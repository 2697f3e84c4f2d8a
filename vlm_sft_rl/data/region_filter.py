"""Which region rows are worth describing."""

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..errors import UserError
from .problems import FORMAT, RowError


@dataclass
class _Own:
    """The regions of one category in one image: how many, crowds apart, and the largest within the limits of size."""

    count: int = 0
    crowds: int = 0
    largest: list[tuple[float, int]] = field(
        default_factory=list
    )  # (area, minus the number of the row), a heap

    @property
    def same(self) -> int:
        return self.count + self.crowds


@dataclass(frozen=True)
class RegionFilter:
    """Limits; every limit None or 0 is off.

    Attributes:
        min_side: shortest side in pixels: the IoU of tiny boxes is noise.
        min_area, max_area: share of the image's area.
        max_same_category: at most so many regions of one category in an image; 1 keeps categories that are unique in it.
            A crowd counts as one, though it is no row (field `crowds`).
        max_per_image: regions kept of one image, the largest first.

    Raises:
        UserError: a limit out of range.
    """

    min_side: float = 0
    min_area: float = 0.0
    max_area: float = 1.0
    max_same_category: int | None = None
    max_per_image: int | None = None

    def __post_init__(self):
        if not 0 <= self.min_area <= self.max_area <= 1:
            raise UserError(
                f"region filter: expected 0 <= min_area <= max_area <= 1, found {self.min_area} and {self.max_area}."
            )
        for name in ("max_same_category", "max_per_image"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"region filter: {name} = {getattr(self, name)}, expected at least 1.")

    def apply(self, read: Callable[[Counter], Iterator[dict]], notes: Counter) -> Iterator[dict]:
        """Yield the regions kept, in their order; `notes` counts the others by reason.

        Uniqueness is judged before the limits of size: a small twin makes a description ambiguous too. What is unique or
        largest in an image is known when all rows were seen, so then they are read twice, and what is held meanwhile is a
        count and a few areas for each image and category.

        Args:
            read: gives the rows anew at each call, and counts what it leaves out in the counter it is given.

        Raises:
            RowError: a row that is no region, or `max_same_category` and a region without `category`.
        """
        found = self._survey(read(Counter())) if self.max_same_category or self.max_per_image else {}
        largest = self._largest(found) if self.max_per_image else None
        for number, row in enumerate(read(notes)):
            reason = self._outside(row)
            if reason is None and self.max_same_category:
                own = found[row["image"]][row["category"]]
                reason = "category not unique" if own.same > self.max_same_category else None
            if reason is None and largest is not None and number not in largest:
                reason = "more regions than max_per_image"
            if reason is None:
                yield row
            else:
                notes[reason] += 1

    def _survey(self, rows: Iterator[dict]) -> dict[str, dict[str | None, _Own]]:
        found: dict[str, dict[str | None, _Own]] = {}
        for number, row in enumerate(rows):
            outside = self._outside(row)
            if self.max_same_category and row.get("category") is None:
                raise RowError(FORMAT, "max_same_category needs the field `category`.", str(row["id"]))
            category = row["category"] if self.max_same_category else None
            own = found.setdefault(row["image"], {}).setdefault(category, _Own())
            own.count += 1
            own.crowds = row.get("crowds", 0)
            if self.max_per_image and outside is None:
                heapq.heappush(own.largest, (_area(row), -number))
                if len(own.largest) > self.max_per_image:
                    heapq.heappop(own.largest)
        return found

    def _largest(self, found: dict[str, dict[str | None, _Own]]) -> set[int]:
        """The numbers of the rows that may stay."""
        chosen: set[int] = set()
        for image in found.values():
            allowed = [
                own
                for own in image.values()
                if not self.max_same_category or own.same <= self.max_same_category
            ]
            best = heapq.nlargest(self.max_per_image, (pair for own in allowed for pair in own.largest))
            chosen.update(-number for _, number in best)
        return chosen

    def _outside(self, row: dict) -> str | None:
        if row.get("box") is None:
            raise RowError(
                FORMAT,
                "the limits on regions are for region rows, and this row has no `box`.",
                str(row.get("id")),
            )
        x0, y0, x1, y1 = row["box"]
        share = _area(row) / (row["width"] * row["height"])
        if min(x1 - x0, y1 - y0) < self.min_side:
            return "side shorter than min_side"
        if share < self.min_area:
            return "smaller than min_area"
        return "larger than max_area" if share > self.max_area else None


def _area(row: dict) -> float:
    x0, y0, x1, y1 = row["box"]
    return (x1 - x0) * (y1 - y0)
