"""Write the pocket world to disk as the files real users have: LLaVA-style JSON, question JSONL, an image folder."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.progress import Progress

from ..data.rows import read_rows
from ..data.tagging.build import on_policy_rows, synthetic_rows, yes_no_rows
from ..data.tagging.verdicts import Scene as GroundTruth
from ..data.tagging.verdicts import object_grader
from ..data.tags import strip_tags
from ..errors import UserError
from ..io import read_json, read_jsonl, write_json, write_jsonl, writing
from . import language
from .render import render
from .world import NOUNS, Scene, absent_weights, draw_scene

# bias: probability that a companion stands beside its noun; noise: that an absent one is named in a caption
TRAIN_BIAS = 0.85
CAPTION_NOISE = 0.7
SPLITS = {"train": (2400, TRAIN_BIAS), "val": (300, 0.0), "test": (500, 0.0)}


def is_complete(manifest_file: Path, manifest: dict) -> bool:
    """Whether the set of files is there already. Its manifest is written last.

    Raises UserError: the folder holds a set with other settings.
    """
    if not manifest_file.exists():
        return False
    if read_json(manifest_file) != manifest:
        raise UserError(f"{manifest_file.parent}: holds other settings. Choose another folder or delete it.")
    return True


def draw_splits(
    folder: Path, counts: dict[str, int], stream: str, label: str
) -> Iterator[tuple[str, random.Random, Iterator[tuple[str, str]]]]:
    """For every split: its name, its random stream, and `(id, image path)` of each picture to draw, with progress."""
    with Progress(transient=True) as progress:
        task = progress.add_task(label, total=sum(counts.values()))
        for split, count in counts.items():
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
            names = [f"{split}-{number:05d}" for number in range(count)]
            places = ((name, f"images/{split}/{name}.png") for name in names)
            yield split, random.Random(f"{stream}-{split}"), _counted(places, progress, task)


def _counted(items: Iterable, progress: Progress, task) -> Iterator:
    for item in items:
        yield item
        progress.advance(task)


def build_world(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Render all splits into `folder`; a folder that is complete and has the same settings is left as it is.

    Training scenes are biased and their captions noisy; `val` and `test` scenes are unbiased.

    Raises UserError: `folder` holds a world with other settings; the disk is full.
    """
    folder = Path(folder)
    counts = {split: (sizes or {}).get(split, size) for split, (size, _) in SPLITS.items()}
    manifest = {"format": 1, "seed": seed, "counts": counts, "bias": TRAIN_BIAS, "noise": CAPTION_NOISE}
    if is_complete(folder / "world.json", manifest):
        return folder
    with writing(folder, "the pictures are drawn again, the same ones."):
        _draw(folder, seed, counts)
    write_json(folder / "world.json", manifest)
    return folder


def _draw(folder: Path, seed: int, counts: dict[str, int]) -> None:
    ground_truth = []
    for split, rng, places in draw_splits(folder, counts, str(seed), "drawing scenes"):
        scenes = []
        for name, path in places:
            scene = draw_scene(rng, SPLITS[split][1])
            render(scene, rng.getrandbits(32)).save(folder / path)
            scenes.append((name, path, scene))
            ground_truth.append({"id": name, "image": path, "split": split, **scene.to_json()})
        if split == "train":
            write_json(folder / "train_captions.json", _captions(scenes, rng))
            write_json(folder / "train_questions.json", _training_questions(scenes, rng))
        else:
            write_jsonl(folder / f"{split}_captions.jsonl", _caption_questions(scenes))
            write_jsonl(folder / f"{split}_yesno.jsonl", _yesno_questions(scenes, rng))
    write_jsonl(folder / "objects.jsonl", ground_truth)


def _conversation(name: str, path: str, turns: list[language.Turn]) -> dict:
    talk = []
    for number, turn in enumerate(turns):
        talk.append({"from": "human", "value": ("<image>\n" if number == 0 else "") + turn.question})
        talk.append({"from": "gpt", "value": turn.answer})
    return {"id": name, "image": path, "conversations": talk}


def _captions(scenes: list[tuple[str, str, Scene]], rng: random.Random) -> list[dict]:
    return [
        _conversation(name, path, [language.caption_turn(scene, rng, CAPTION_NOISE)])
        for name, path, scene in scenes
    ]


def _training_questions(scenes: list[tuple[str, str, Scene]], rng: random.Random) -> list[dict]:
    rows = []
    for name, path, scene in scenes:
        turn = language.existence_turn(scene, rng, positive=rng.random() < 0.5)
        rows.append(_conversation(f"{name}-exists", path, [turn]))
    return rows


def _caption_questions(scenes: list[tuple[str, str, Scene]]) -> list[dict]:
    return [
        {"id": name, "images": [path], "question": language.CAPTION_PROMPT, "objects": list(scene.nouns)}
        for name, path, scene in scenes
    ]


def _yesno_questions(scenes: list[tuple[str, str, Scene]], rng: random.Random) -> list[dict]:
    """Two questions a scene, one of each answer; half of the negatives ask for a missing companion."""
    rows = []
    for name, path, scene in scenes:
        for positive in (True, False):
            turn = language.existence_turn(scene, rng, positive=positive)
            answer = turn.answer.lower()
            rows.append(
                {"id": f"{name}-{answer}", "images": [path], "question": turn.question, "answer": answer}
            )
    return rows


# Training rows for REVERSE from the world's files: tagged rows with synthetic or on-policy negatives, and the control.
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
        lambda row: GroundTruth(objects[row["images"][0]]),
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
    on_policy = list(on_policy_rows(samples, object_grader(NOUNS), NOUNS, supervise="verdicts", notes=notes))
    positives = [row for row in _synthetic(world, Counter(), seed) if not is_negative(row)]
    write_jsonl(folder / "on_policy.jsonl", on_policy + positives)
    return {"own": len(on_policy), "positives": len(positives), **notes}


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
