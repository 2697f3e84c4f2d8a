import json

import families
import pytest
from regions import region_rows
from typer.testing import CliRunner

from vlm_sft_rl.cli import app
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.files import read_jsonl, write_jsonl
from vlm_sft_rl.region_eval import RegionDecoding, evaluate_regions

DECODING = RegionDecoding(describe_max_new_tokens=5, locate_max_new_tokens=8)


@pytest.fixture
def world(tmp_path):
    families.save(*families.llava(), tmp_path / "model")
    rows = region_rows(5, expressions=True)
    for row in rows:
        row["image"].save(tmp_path / f"{row['id']}.png")
        row["image"] = f"{row['id']}.png"
    write_jsonl(tmp_path / "regions.jsonl", rows)
    return tmp_path


def run(world, **options):
    settings = {"image_root": world, "decoding": DECODING, "rounds": 20, "batch_size": 2} | options
    return evaluate_regions(world / "model", world / "regions.jsonl", world / "out", **settings)


def test_samples_summary_and_page_and_a_run_that_goes_on(world):
    summary = run(world, grade=lambda row, text: row["id"] == "r0")
    assert summary["n"] == 5 and summary["metrics"]["reg_exact"]["value"] == pytest.approx(0.2)
    assert {"self_consistency_iou", "rec_acc50", "parse_rate"} <= set(summary["metrics"])
    page = (world / "out" / "report.html").read_text()
    assert "data:image/png" in page and "REC acc@0.5" in page
    path = world / "out" / "samples.jsonl"
    lines = path.read_text().splitlines()
    # killed while the third answer was being written
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30])
    again = run(world, grade=lambda row, text: row["id"] == "r0")
    assert again["metrics"] == summary["metrics"]
    assert sorted(map(str, read_jsonl(path))) and len(path.read_text().splitlines()) == 5
    with pytest.raises(UserError, match="another configuration"):
        run(world, describe_prompt="What is at {box}?")


def test_the_commands(world):
    runner = CliRunner()
    source = [{"image": "r0.png", "sent": "one", "bbox": [1, 1, 20, 20], "width": 56, "height": 56}]
    (world / "ref.json").write_text(json.dumps(source))
    done = runner.invoke(
        app, ["regions", "convert", str(world / "ref.json"), str(world / "r.jsonl"), "--format", "refcoco"]
    )
    assert done.exit_code == 0, done.output
    options = [
        "--model",
        world / "model",
        "--regions",
        world / "r.jsonl",
        "--image-root",
        world,
        "--rounds",
        20,
    ]
    done = runner.invoke(app, ["regions", "eval", *map(str, options), "--output-dir", str(world / "cli")])
    assert done.exit_code == 0, done.output
    assert json.loads((world / "cli" / "summary.json").read_text())["n"] == 1


def test_reg_scores_against_known_values():
    pytest.importorskip("pycocoevalcap")
    from vlm_sft_rl.evaluation.reg import reg_scores

    references = {"1": ["the small red star"], "2": ["a blue cat"], "3": ["green umbrella on the left"]}
    same = reg_scores({k: v[0] for k, v in references.items()}, references, rounds=20)
    other = reg_scores({"1": "a dog", "2": "the sun", "3": "blue cat"}, references, rounds=20)
    # CIDEr-D of identical texts is 10 where they have all four n-gram lengths
    assert same["cider"].value > 5 > 0.5 > other["cider"].value
    with pytest.raises(UserError, match="no reference"):
        reg_scores({"1": "a"}, {"1": []})
