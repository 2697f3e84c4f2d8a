"""The files of the describer-locator demo: a modest set with text, and boxes without text on fresh scenes.

warmup.jsonl            messages: describe a box (annotators' captions), locate an expression (as in RefCOCO)
annotated.jsonl         the boxes of warmup.jsonl as region rows with the expressions that it locates
train.jsonl             region rows without any text
val.jsonl, test.jsonl   region rows with `expressions`: the one, least that picks the box out
scenes.jsonl            exact ground truth of every scene
"""

import random
from pathlib import Path

from ..io import read_jsonl, write_json, write_jsonl
from .dataset import draw_splits, is_complete
from .render import render
from .world import (
    IMAGE_PIXELS,
    Scene,
    SceneObject,
    caption_expression,
    cell_box,
    draw_twins,
    scene_from_json,
    shortest_expression,
)

DESCRIBE, LOCATE = "What is at {box}?", "Where is the {description}?"
SIZES = {"warmup": 200, "train": 1200, "val": 40, "test": 300}


def build_regions(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Render all splits into `folder`; a folder that is complete and has the same settings is left as it is.

    Raises UserError: `folder` holds regions with other settings.
    """
    folder, counts = Path(folder), SIZES | (sizes or {})
    manifest = {"format": 3, "seed": seed, "scenes": counts}
    if is_complete(folder / "regions.json", manifest):
        return folder
    truth = []
    for split, rng, places in draw_splits(folder, counts, f"{seed}-twins", "drawing scenes of twins"):
        rows, regions = [], []
        for _, path in places:
            scene = draw_twins(rng)
            render(scene, rng.getrandbits(32)).save(folder / path)
            truth.append({"image": path, "split": split, **scene.to_json()})
            for thing in scene.objects:
                if split == "warmup":
                    rows += _warmup_rows(path, thing, scene, rng)
                regions.append(_region_row(path, thing, scene, annotated=split != "train"))
        write_jsonl(folder / f"{'annotated' if split == 'warmup' else split}.jsonl", regions)
        if rows:
            write_jsonl(folder / f"{split}.jsonl", rows)
    write_jsonl(folder / "scenes.jsonl", truth)
    write_json(folder / "regions.json", manifest)
    return folder


def _warmup_rows(path: str, thing: SceneObject, scene: Scene, rng: random.Random) -> list[dict]:
    pairs = {
        "describe": (DESCRIBE.replace("{box}", thing.cell), caption_expression(thing, rng)),
        "locate": (LOCATE.replace("{description}", shortest_expression(thing, scene)), thing.cell),
    }
    name = _name(path, thing)
    return [messages(f"{name}-{kind}", path, *pair) for kind, pair in pairs.items()]


def _region_row(path: str, thing: SceneObject, scene: Scene, *, annotated: bool) -> dict:
    row = {
        "id": _name(path, thing),
        "image": path,
        "width": IMAGE_PIXELS,
        "height": IMAGE_PIXELS,
        "box": list(cell_box(thing.cell)),
    }
    return row | {"expressions": [shortest_expression(thing, scene)]} if annotated else row


def _name(path: str, thing: SceneObject) -> str:
    return f"{Path(path).stem}-{thing.cell}"


def messages(name: str, path: str, question: str, answer: str) -> dict:
    """An SFT row of one question."""
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "images": [path], "messages": talk}


def scenes_of(folder: str | Path) -> dict[str, Scene]:
    """Image path -> scene."""
    return {row["image"]: scene_from_json(row) for _, row in read_jsonl(Path(folder) / "scenes.jsonl")}


def thing_in(row: dict, scene: Scene) -> SceneObject:
    """The thing that a region row's box holds."""
    return next(
        thing for thing in scene.objects if list(cell_box(thing.cell)) == [int(v) for v in row["box"]]
    )
