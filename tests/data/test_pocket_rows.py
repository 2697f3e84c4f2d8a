"""The files that the pocket world writes, through the whole data layer."""

from collections import Counter

import pytest
import templates

from vlm_sft_rl.data import tags
from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.index import load_train_rows
from vlm_sft_rl.data.marks import verification_marks
from vlm_sft_rl.data.tagging.build import on_policy_rows, synthetic_rows, yes_no_rows
from vlm_sft_rl.data.tagging.verdicts import Scene, object_grader
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.io import read_jsonl, write_jsonl
from vlm_sft_rl.pocket.dataset import build_world
from vlm_sft_rl.pocket.world import NOUNS, absent_weights


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"), sizes={"train": 40, "val": 4, "test": 4})


@pytest.fixture(scope="module")
def present(world):
    return {r["id"]: {o["noun"] for o in r["objects"]} for _, r in read_jsonl(world / "objects.jsonl")}


def test_files_are_valid_and_load(world):
    processor = templates.processor("vicuna", "bytes")
    for name, rows in (("train_captions.json", 40), ("train_questions.json", 40)):
        report = validate(world / name, processor, progress=False)
        assert report.ok and report.rows == rows == len(report.lengths), report.problems
        assert len(load_train_rows(world / name, world)) == rows


def test_builders_make_rows_that_train(world, present, tmp_path):
    notes = Counter()
    captions = list(load_train_rows(world / "train_captions.json"))
    made = list(
        synthetic_rows(
            captions,
            lambda row: Scene(present[row["id"]]),
            NOUNS,
            prior=lambda scene: absent_weights(scene.objects, 0.85),
            notes=notes,
        )
    )
    assert len(made) == 2 * (40 - notes["untrue caption"]) > 0
    assert "no phrase" not in notes and "no absent noun" not in notes
    samples = [
        {
            "id": row["id"],
            "images": row["images"],
            "prompt": row["messages"][0]["content"],
            "answer": row["messages"][1]["content"],
            "reference": {"objects": list(present[row["id"]])},
        }
        for row in captions
    ]
    graded = Counter()
    own = list(on_policy_rows(samples, object_grader(NOUNS), NOUNS, notes=graded))
    assert graded == {"wrong": notes["untrue caption"], "right": 40 - notes["untrue caption"]}
    answers = list(yes_no_rows(load_train_rows(world / "train_questions.json")))
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*made, *({**r, "id": f"own-{r['id']}"} for r in own), *answers]
    )
    processor = templates.processor("vicuna", "bytes")
    report = validate(path, processor, image_root=world, progress=False)
    assert report.ok, report.problems
    collator = VisionCollator(
        processor, world, marks=verification_marks(processor.tokenizer), hint_probability=0.2
    )
    batch = collator(list(load_train_rows(path, world))[:8])
    assert batch["pixel_values"].shape[0] == 8 and (batch["loss_weights"].sum(1) > 0).all()
    for row in made:
        verdicts = [s.confident for s in tags.spans(row["messages"][1]["content"])]
        assert verdicts == [True] * len(verdicts) if row["id"].endswith("-pos") else verdicts[-1] is False
