"""Write the pocket world to disk as the files real users have: LLaVA-style JSON, question JSONL, an image folder."""

import random
from pathlib import Path

from rich.progress import Progress

from ..errors import UserError
from ..io import read_json, write_json, write_jsonl, writing
from . import language
from .render import render
from .world import Scene, draw_scene

# bias: probability that a companion stands beside its noun; noise: that an absent one is named in a caption
TRAIN_BIAS = 0.85
CAPTION_NOISE = 0.7
SPLITS = {"train": (2400, TRAIN_BIAS), "val": (300, 0.0), "test": (500, 0.0)}


def build_world(folder: str | Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Render all splits into `folder`; a folder that is complete and has the same settings is left as it is.

    Training scenes are biased and their captions noisy; `val` and `test` scenes are unbiased.

    Raises:
        UserError: `folder` holds a world with other settings; the disk is full.
    """
    folder = Path(folder)
    counts = {split: (sizes or {}).get(split, size) for split, (size, _) in SPLITS.items()}
    manifest = {"format": 1, "seed": seed, "counts": counts, "bias": TRAIN_BIAS, "noise": CAPTION_NOISE}
    done = folder / "world.json"
    if done.exists():
        if read_json(done) == manifest:
            return folder
        raise UserError(
            f"{done}: this folder holds a world with other settings. Choose another folder or delete it."
        )
    with writing(folder, "the pictures are drawn again, the same ones."):
        _draw(folder, seed, counts)
    write_json(done, manifest)
    return folder


def _draw(folder: Path, seed: int, counts: dict[str, int]) -> None:
    ground_truth = []
    with Progress(transient=True) as progress:
        task = progress.add_task("drawing scenes", total=sum(counts.values()))
        for split, (_, bias) in SPLITS.items():
            rng = random.Random(f"{seed}-{split}")
            scenes = []
            (folder / "images" / split).mkdir(parents=True, exist_ok=True)
            for number in range(counts[split]):
                scene = draw_scene(rng, bias)
                name = f"{split}-{number:05d}"
                path = f"images/{split}/{name}.png"
                render(scene, rng.getrandbits(32)).save(folder / path)
                scenes.append((name, path, scene))
                ground_truth.append({"id": name, "image": path, "split": split, **scene.to_json()})
                progress.advance(task)
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
