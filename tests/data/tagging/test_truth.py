"""Rows from files with ground truth, by function and by command."""

import json

import pytest
from typer.testing import CliRunner

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.data.tagging.pipeline import write_on_policy, write_synthetic
from vlm_sft_rl.data.tagging.verdicts import read_objects, read_vocabulary
from vlm_sft_rl.data.tags import spans
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import write_json, write_jsonl
from vlm_sft_rl.pocket.dataset import build_world

OBJECTS = [
    {"image": "a.png", "objects": ["Star", {"noun": "fish"}], "theme": "beach"},
    {"image": "b.png", "objects": ["star", "boat"], "theme": "beach"},
    {"image": "c.png", "objects": ["kettle", "traffic light"], "theme": "town"},
    {"image": "d.png", "objects": ["star", "fish", "boat"], "theme": "town"},
]


def captions(folder, *pairs):
    talk = [
        {
            "id": image[0],
            "image": image,
            "conversations": [{"from": "human", "value": "Describe."}, {"from": "gpt", "value": text}],
        }
        for image, text in pairs
    ]
    write_json(folder / "captions.json", talk)
    write_jsonl(folder / "objects.jsonl", OBJECTS)
    return folder / "captions.json", folder / "objects.jsonl", folder / "rows.jsonl"


def test_synthetic_rows_of_files(tmp_path):
    paths = captions(
        tmp_path,
        ("a.png", "There is a star and a fish."),
        ("./c.png", "There is a kettle under two traffic lights."),
        ("b.png", "There is a star and a fish."),
        ("d.png", "Nothing to speak of."),
    )
    counts = write_synthetic(*paths, negatives=2, seed=3)
    rows = list(read_rows(paths[2]))
    assert counts["rows"] == len(rows) and counts["untrue caption"] == counts["no phrase"] == 1
    assert counts["negatives"] == len(rows) - 2 == 4 - counts.get("duplicate negative", 0)
    truth = {image: scene.objects for image, scene in read_objects(paths[1]).items()}
    for row in rows:
        for span in spans(row["messages"][1]["content"]):
            present = any(noun in span.phrase.lower() for noun in truth[row["images"][0].removeprefix("./")])
            assert present is span.confident
    assert any("<SPAN> two traffic lights </CN>" in row["messages"][1]["content"] for row in rows)
    before = paths[2].read_bytes()
    write_synthetic(*paths, negatives=2, seed=3)
    assert paths[2].read_bytes() == before
    write_synthetic(*paths, negatives=2, seed=4)
    assert paths[2].read_bytes() != before


def test_a_negative_that_is_drawn_twice_is_kept_once(tmp_path):
    """One phrase and one absent noun with weight: every draw is the same."""
    paths = captions(tmp_path, ("c.png", "There is a kettle."))
    (tmp_path / "nouns.txt").write_text("kettle\ntraffic light\nboat\n")
    write_jsonl(paths[1], [OBJECTS[2], {"image": "e.png", "objects": ["boat"]}])
    counts = write_synthetic(*paths, negatives=5, vocabulary=tmp_path / "nouns.txt")
    assert counts == {"rows": 2, "negatives": 1, "duplicate negative": 4}
    assert len({r["messages"][1]["content"] for r in read_rows(paths[2])}) == 2


def test_on_policy_rows_of_files(tmp_path):
    def sample(i, answer, image="a.png", objects=("star", "fish")):
        line = {"id": i, "images": [image], "prompt": "Describe.", "answer": answer}
        return {**line, "reference": {"objects": list(objects)}}

    captioned = ["A star and a fish.", "A fish and a boat.", "A star and a fish.", "Nothing."]
    write_jsonl(tmp_path / "samples.jsonl", [sample(f"{i}", text) for i, text in enumerate(captioned)])
    write_jsonl(tmp_path / "objects.jsonl", OBJECTS)
    target = tmp_path / "rows.jsonl"
    (tmp_path / "nouns.txt").write_text("star\nfish\nboat\n")
    counts = write_on_policy(
        tmp_path / "samples.jsonl", target, vocabulary=tmp_path / "nouns.txt", supervise="verdicts"
    )
    assert counts == {"rows": 2, "negatives": 1, "right": 1, "wrong": 1, "duplicate": 1, "no phrase": 1}
    rows = list(read_rows(target))
    assert [row["messages"][1]["content"] for row in rows] == [
        "<SPAN> A star </CN> and <SPAN> a fish </CN>.",
        "<SPAN> A fish </CN> and <SPAN> a boat </UN>",
    ]
    assert rows[1]["messages"][1]["supervise"] == "verdicts" and rows[1]["messages"][1]["hint"] == "a boat"
    # with a file of ground truth its nouns are the vocabulary
    assert (
        write_on_policy(tmp_path / "samples.jsonl", target, objects=tmp_path / "objects.jsonl")["wrong"] == 1
    )
    write_jsonl(tmp_path / "samples.jsonl", [{**sample("1", "A star."), "reference": {}}])
    with pytest.raises(UserError, match=r"samples\.jsonl:1: no `reference\.objects`.*--objects"):
        write_on_policy(tmp_path / "samples.jsonl", target)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ({"objects": ["star"]}, "objects.jsonl:1: field `image`"),
        ({"image": "a.png"}, "objects.jsonl:1: field `objects`"),
        ({"image": "a.png", "objects": [{"name": "star"}]}, "`objects`: expected a list of nouns"),
        ({"image": "z.png", "objects": ["star"]}, "captions.json:1: the image 'a.png' is not in"),
        ({"image": "a.png", "objects": []}, "no nouns"),
    ],
)
def test_ground_truth_that_cannot_be_used(tmp_path, line, complaint):
    paths = captions(tmp_path, ("a.png", "There is a star."))
    write_jsonl(paths[1], [line])
    with pytest.raises(UserError) as caught:
        write_synthetic(*paths)
    assert complaint in str(caught.value) and not paths[2].exists()
    write_jsonl(paths[1], [OBJECTS[0], OBJECTS[0]])
    with pytest.raises(UserError, match=r"objects\.jsonl:2: the image 'a\.png' was described before"):
        read_objects(paths[1])
    with pytest.raises(UserError, match="no nouns"):
        read_vocabulary(None, [])


def test_the_commands_on_the_pocket_world(tmp_path):
    world = build_world(tmp_path / "world", sizes={"train": 60, "val": 2, "test": 2})
    rows = world / "rows.jsonl"
    words = ["data", "synthetic", world / "train_captions.json", world / "objects.jsonl", rows]
    words += ["--questions", world / "train_questions.json", "--negatives", 2, "--prior", "company"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0 and "negatives: " in done.output, done.output
    report = validate(rows, progress=False)
    assert report.ok and report.rows > 120 and report.tags["unconfident"] > 50
    samples = [
        {"id": r["id"], "images": r["images"], "prompt": "Describe.", "answer": r["messages"][1]["content"]}
        for r in read_rows(world / "train_captions.json")
    ]
    write_jsonl(tmp_path / "samples.jsonl", samples)
    words = ["data", "on-policy", tmp_path / "samples.jsonl", rows, "--objects", world / "objects.jsonl"]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--supervise", "verdicts"]])
    assert done.exit_code == 0 and "wrong: " in done.output, done.output
    assert validate(rows, progress=False).ok
    assert json.loads(rows.read_text().splitlines()[0])["messages"][1]["supervise"] == "verdicts"
