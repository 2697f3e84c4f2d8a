import json
from io import StringIO

import pytest
from json_lines import read_lines
from PIL import Image
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.data.tags import parse, spans
from vlm_sft_rl.demos import reverse as demo_reverse
from vlm_sft_rl.demos.reverse import BASE
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import read_json, write_json
from vlm_sft_rl.models.sidecar import read_sidecar
from vlm_sft_rl.pocket import dataset
from vlm_sft_rl.pocket.build import answers, measure
from vlm_sft_rl.pocket.dataset import build_world, ground_truth, is_negative, write_rows
from vlm_sft_rl.pocket.world import NOUNS


def test_tagged_rows_tell_the_truth_and_the_control_has_the_same_positives(tmp_path):
    world = build_world(tmp_path / "world", sizes={"train": 200, "val": 5, "test": 5})
    write_rows(world, tmp_path / "rows")
    truth = ground_truth(world)
    tagged = list(read_rows(tmp_path / "rows" / "reverse.jsonl"))
    captions = [row for row in tagged if "exists" not in row["id"]]
    assert sum(map(is_negative, captions)) > 0.4 * len(captions)
    for row in captions:
        content = row["messages"][-1]["content"]
        parse(content)
        for span in spans(content):
            noun = span.phrase.split()[-1]
            assert noun in NOUNS and (noun in truth[row["images"][0]]) is span.confident
        assert ("</UN>" not in content) or content.endswith("</UN>")
    control = {row["id"]: row for row in read_rows(tmp_path / "rows" / "control.jsonl")}
    assert set(control) == {row["id"] for row in tagged if not is_negative(row)}
    assert not any("SPAN" in message["content"] for row in control.values() for message in row["messages"])


def test_the_shipped_base_answers_questions_about_what_it_sees(tmp_path):
    world = build_world(tmp_path, sizes={"train": 5, "val": 40, "test": 5})
    processor = AutoProcessor.from_pretrained(BASE)
    model = AutoModelForImageTextToText.from_pretrained(BASE).float().eval()
    rows = read_lines(world / "val_yesno.jsonl")
    images = [Image.open(world / row["images"][0]) for row in rows]
    said, _ = answers(model, processor, images, [row["question"] for row in rows], max_new_tokens=4)
    right = sum(text.lower() == row["answer"] for text, row in zip(said, rows, strict=True))
    assert right / len(rows) > 0.9
    card = (BASE / "README.md").read_text()
    figures = json.loads((BASE / "metrics.json").read_text())
    for name, value in figures.items():
        assert f"| {name} | {value} |" in card
    # the card is of the code that is here: the same figures are measured
    assert set(figures) == set(measure(model, processor, scenes=4))


@pytest.mark.slow
def test_the_demo_runs_through_and_resumes(tmp_path, monkeypatch):
    monkeypatch.setitem(dataset.SPLITS, "train", (120, 0.85))
    monkeypatch.setitem(dataset.SPLITS, "val", (100, 0.0))
    monkeypatch.setattr(demo_reverse, "THRESHOLDS", (0.05, 0.2))
    options = {"scenes": 24, "steps": 12, "console": Console(file=StringIO())}
    summary = demo_reverse.run(tmp_path, **options)
    sidecar = read_sidecar(tmp_path / "models" / "reverse")
    assert sidecar.threshold == summary["threshold"] in (0.05, 0.2)
    assert sidecar.decoding == summary["decoding"] and sidecar.decoding["reject_repeats"] is True
    assert set(summary["resampling"]) == {"reverse_paper", "reverse_replaced", "reverse_untried", "reverse"}
    assert {"base", "control", "reverse_greedy", "reverse"} <= set(summary["systems"])
    for figures in summary["systems"].values():
        for name in ("chair_i", "chair_i_distinct", "chair_s", "coverage", "repeats"):
            assert figures[name]["low"] <= figures[name]["value"] <= figures[name]["high"]
    assert summary["n"] == 24 and summary["cost"]["image_encodes_per_answer"] == 1
    assert (tmp_path / "report.html").stat().st_size > 10_000
    weights = tmp_path / "models" / "reverse" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = demo_reverse.run(tmp_path, **options)
    assert again["systems"] == summary["systems"] and weights.stat().st_mtime_ns == before
    assert summary["stale_stages"] == []
    with pytest.raises(UserError, match="other settings"):
        demo_reverse.run(tmp_path, **options | {"seed": 5})
    # a demo of another version of the decoding
    stages = read_json(tmp_path / "stages.json")
    stages["measure on test scenes"]["made_by"]["decoding"] = "0" * 16
    write_json(tmp_path / "stages.json", stages)
    with pytest.raises(
        UserError, match=r'"measure on test scenes" was made by version .* with another decoding'
    ):
        demo_reverse.run(tmp_path, **options)
    kept = demo_reverse.run(tmp_path, **options, keep_stale=True)
    assert kept["stale_stages"] == ["measure on test scenes"] and kept["seconds"] == summary["seconds"]
    assert "by another version: measure on test scenes" in (tmp_path / "report.html").read_text()
