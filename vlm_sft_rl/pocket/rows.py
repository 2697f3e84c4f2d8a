"""Training rows for REVERSE from the world's files: tagged rows with synthetic or on-policy negatives, and the control."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ..data.rows import read_rows
from ..data.tagging.build import on_policy_rows, synthetic_rows, yes_no_rows
from ..data.tagging.verdicts import Scene, object_grader
from ..data.tags import strip_tags
from ..io import read_json, read_jsonl, write_jsonl
from .world import NOUNS, absent_weights


def write_rows(world: str | Path, folder: str | Path, *, seed: int = 0) -> dict[str, int]:
    """Write `reverse.jsonl` (tagged) and `control.jsonl` (the same positives without tags); returns counts.

    Tagged: captions with synthetic negatives, and a quarter as many yes/no questions.
    """
    world, folder = Path(world), Path(folder)
    notes: Counter = Counter()
    tagged = list(_synthetic(world, notes, seed))
    control = [untagged(row) for row in tagged if not is_negative(row)]
    write_jsonl(folder / "control.jsonl", control)
    write_jsonl(folder / "reverse.jsonl", tagged)
    return {"rows": len(tagged), "negatives": len(tagged) - len(control), **notes}


def _synthetic(world: Path, notes: Counter, seed: int) -> Iterator[dict]:
    bias = read_json(world / "world.json")["bias"]
    objects = ground_truth(world)
    yield from synthetic_rows(
        read_rows(world / "train_captions.json"),
        lambda row: Scene(objects[row["images"][0]]),
        NOUNS,
        prior=lambda scene: absent_weights(scene.objects, bias),
        seed=seed,
        notes=notes,
    )
    questions = list(read_rows(world / "train_questions.json"))
    yield from yes_no_rows(questions[: len(questions) // 4], notes)


def write_on_policy_rows(
    world: str | Path, samples: list[dict], folder: str | Path, *, seed: int = 0
) -> dict[str, int]:
    """Write `on_policy.jsonl`: the base's own captions, graded by ground truth, and the tagged positives.

    Args:
        samples: the base's captions of training images, as in samples.jsonl with `objects` in the reference.
    """
    world, folder = Path(world), Path(folder)
    notes: Counter = Counter()
    own = list(on_policy_rows(samples, object_grader(NOUNS), NOUNS, supervise="verdicts", notes=notes))
    positives = [row for row in _synthetic(world, Counter(), seed) if not is_negative(row)]
    write_jsonl(folder / "on_policy.jsonl", own + positives)
    return {"own": len(own), "positives": len(positives), **notes}


def ground_truth(world: Path) -> dict[str, list[str]]:
    """Image path -> nouns in it."""
    return {
        row["image"]: [item["noun"] for item in row["objects"]]
        for _, row in read_jsonl(world / "objects.jsonl")
    }


def is_negative(row: dict) -> bool:
    return any("</UN>" in message["content"] for message in row["messages"] if message["role"] == "assistant")


def untagged(row: dict) -> dict:
    """The row as ordinary SFT data: no tags, no hints."""
    messages = [
        {"role": message["role"], "content": strip_tags(message["content"])} for message in row["messages"]
    ]
    return {"id": row["id"], "images": row["images"], "messages": messages}
