"""What held-out regions tell of a model: self-consistency, and REC where they have expressions."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..rewards.boxes import iou
from .rollouts import Rollout

FIGURES = ("iou", "acc50", "parse_rate", "leak_rate", "length", "rec_acc50")


def measured_on(rows: Iterable[dict]) -> list[str]:
    """The names of `FIGURES` that these rows give: `rec_acc50` needs `expressions`."""
    described = any(row.get("expressions") for row in rows)
    return [name for name in FIGURES if described or name != "rec_acc50"]


def figures_of(rollouts: Sequence[Rollout], leaks: Callable[[str], bool]) -> Iterator[tuple[str, float]]:
    """`(name of FIGURES, value)` of every region's greedy description, and of every expression for `rec_acc50`.

    A figure is the mean of its values. `rollouts` are those of `Rollouts.captions(locate=True, expressions=True)`.
    """
    for rollout in rollouts:
        one, box = rollout.samples[0], rollout.row["box"]
        overlap = iou(one.located, box)
        yield "iou", overlap
        yield "acc50", float(overlap >= 0.5)
        yield "parse_rate", float(one.located is not None)
        yield "leak_rate", float(leaks(one.text))
        yield "length", float(len(one.ids))
        for text in rollout.row.get("expressions") or ():
            yield "rec_acc50", float(iou(rollout.found[text], box) >= 0.5)
