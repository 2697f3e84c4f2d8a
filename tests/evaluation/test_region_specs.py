"""Questions about boxes: the shipped specs on the pocket world and on owners' files, and what refuses to work."""

import json
import math
import shutil
from pathlib import Path

import families
import pytest
import torch
from json_lines import read_lines, write_lines
from owners_files import write_benchmark
from PIL import ExifTags, Image
from regions import region_rows
from typer.testing import CliRunner
from worlds import evaluate

from vlm_sft_rl.cli.app import app
from vlm_sft_rl.data.chat import load_processor
from vlm_sft_rl.data.sources.source import Record, Source
from vlm_sft_rl.decoding.generate import encode_batch
from vlm_sft_rl.demos.sc_tune import BASE
from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.evaluation.compare import compare
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.readers.captions import _distractors
from vlm_sft_rl.evaluation.regions import RegionSystem, region_settings
from vlm_sft_rl.evaluation.results import read_samples
from vlm_sft_rl.evaluation.specs import Regions, load_spec, parse_spec, with_categories
from vlm_sft_rl.models.load import load_model
from vlm_sft_rl.models.sidecar import Sidecar, write_sidecar
from vlm_sft_rl.pocket.regions import build_regions

SPLITS = ["refcoco_val", "refcoco_val", "refcoco_testA", "refcoco+_testA", "refcoco+_testB"] + [
    "refcocog_test"
] * 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket")
    return build_regions(folder / "regions", sizes={"warmup": 1, "train": 1, "val": 1, "test": 4})


def rows_of(name, folder, *categories):
    spec = with_categories(load_spec(name), categories)
    return load_questions(spec, folder, load_metric(spec.metric, spec.metric_options, folder)).rows


def test_the_pocket_base_finds_things_and_the_run_goes_on_after_a_kill(world, tmp_path):
    """The base was taught where things are: all its answers are boxes, and many more than one in 16 (cells) are right."""
    summary = evaluate("pocket_rec", BASE, tmp_path, world, rounds=20, report=True)
    metrics = {name: interval["value"] for name, interval in summary["metrics"].items()}
    assert metrics["parse_rate"] == 1 and metrics["acc50"] > 0.25 and metrics["acc50"] == metrics["mean_iou"]
    assert summary["units"] == 4 < summary["n"]
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png" in page and "Green: the true box, red: the located one." in page
    path = tmp_path / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n" + lines[3][:40])
    again = evaluate("pocket_rec", BASE, tmp_path, world, batch_size=3, rounds=20)
    assert again["metrics"] == summary["metrics"] and again["answered_now"] == len(lines) - 3
    assert path.read_text().splitlines() == lines


def test_self_consistency_describes_and_then_locates_what_it_said(world, tmp_path):
    evaluate("pocket_self_consistency", BASE, tmp_path / "loop", world, rounds=20)
    evaluate("pocket_reg", BASE, tmp_path / "reg", world, rounds=20)
    loop, reg = read_samples(tmp_path / "loop"), read_samples(tmp_path / "reg")
    assert [s["answer"] for s in loop] == [s["answer"] for s in reg] and len(loop) >= 16
    assert all(sample["counts"]["image_encodes"] == 2 for sample in loop)
    # the same texts asked for as expressions lead to the same boxes
    rows = read_lines(world / "test.jsonl")
    described = [row | {"expressions": [s["answer"]]} for row, s in zip(rows, loop, strict=True)]
    write_lines(world / "described.jsonl", described)
    raw = load_spec("pocket_rec").to_json() | {"questions": "described.jsonl"}
    evaluate(parse_spec(raw, "described"), BASE, tmp_path / "rec", world, rounds=20)
    located = read_samples(tmp_path / "rec")
    assert [s["located"] for s in located] == [s["located"] for s in loop]
    assert [s["answer"] for s in located] == [s["trace"][-1]["text"] for s in loop]
    same = compare(tmp_path / "loop", tmp_path / "loop", rounds=10)
    assert same["metrics"]["mean_iou"]["difference"]["high"] == 0


@torch.no_grad()
def slow_greedy(model, processor, rendered, picture, opening, count, ends):
    """Greedy tokens behind prompt and opening, the whole of them run anew for every token."""
    inputs = encode_batch(model, processor, [rendered], [[picture]])
    tokens: list[int] = []
    while len(tokens) < count and (not tokens or tokens[-1] not in ends):
        longer = dict(inputs)
        more = torch.tensor([[*opening, *tokens]], dtype=torch.long)
        longer["input_ids"] = torch.cat([inputs["input_ids"], more], 1)
        for name in ("attention_mask", "mm_token_type_ids", "token_type_ids"):
            if name in inputs:
                fill = torch.ones_like(more) if name == "attention_mask" else torch.zeros_like(more)
                longer[name] = torch.cat([inputs[name], fill], 1)
        tokens.append(int(model(**longer).logits[0, -1].argmax()))
    return tokens


def test_located_boxes_are_those_of_a_slow_reference_with_the_forced_opening(tmp_path):
    families.save(*families.qwen2_5_vl(), tmp_path)
    settings = {"max_new_tokens": 6, "regions": region_settings(Regions("locate"), tmp_path)}
    assert settings["regions"]["box_convention"] == "qwen2.5-vl"
    model, processor = load_model(tmp_path, dtype="float32").eval(), load_processor(tmp_path)
    system = RegionSystem((model, processor), settings, lambda *_: pytest.fail("described"), batch_size=2)
    assert system.prompts.opening
    rows = [
        {"images": ["x"], "question": text, **{k: row[k] for k in ("id", "width", "height", "box")}}
        for row, text in zip(region_rows(3), ("it", "the red one at the left", "a thing"), strict=True)
    ]
    pictures = [[row["image"]] for row in region_rows(3)]
    prompts, answers = system(rows, pictures)
    for row, (picture,), prompt, answer in zip(rows, pictures, prompts, answers, strict=True):
        assert row["question"] in prompt
        rendered = system.prompts.render(prompt)
        ids = slow_greedy(
            model, processor, rendered, picture, system.prompts.opening, 6, {processor.tokenizer.eos_token_id}
        )
        assert answer["text"] == system.prompts.located_text(ids)
        assert answer["counts"]["tokens_kept"] == len(ids)


def test_a_picture_of_another_size_is_refused(tagged, tmp_path):
    data = write_benchmark("refcoco_rec", tmp_path / "data")
    path = data / "annotations/instances_train2014.json"
    path.write_text(path.read_text().replace('"width": 28', '"width": 56'))
    with pytest.raises(UserError, match=r"given as 56 x 28, but image .* has 28 x 28"):
        evaluate("refcoco_rec", tagged, tmp_path / "out", data)


def test_a_picture_that_its_exif_turns_is_refused(world, tmp_path):
    """A box may mean its pixels before or after the turn."""
    data = Path(shutil.copytree(world, tmp_path / "data"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    path = data / rows_of("pocket_rec", data)[0]["images"][0]
    with Image.open(path) as picture:
        picture.load()
    picture.save(path, exif=exif)
    with pytest.raises(UserError, match="EXIF orientation 3"):
        rows_of("pocket_rec", data)


def test_words_are_the_checkpoints_own_then_those_for_its_family(tagged, tmp_path):
    spec = Regions(
        "describe_and_locate",
        describe_prompt={"llava": "Say {box}", "default": "What? {box}"},
        locate_prompt="At {description}",
    )
    settings = region_settings(spec, tagged)
    assert (settings["describe_prompt"], settings["locate_prompt"]) == ("Say {box}", "At {description}")
    assert settings["box_convention"] == "llava"
    assert "locate_prompt" not in region_settings(Regions("describe"), tagged)
    assert region_settings(Regions("locate"), tagged)["locate_prompt"].startswith(
        "Please provide the bounding box"
    )
    families.save(*families.llava(), tmp_path)
    write_sidecar(tmp_path, Sidecar(box_convention="pocket", recipe={"describe_prompt": "Mine: {box}"}))
    settings = region_settings(spec, tmp_path)
    assert (settings["describe_prompt"], settings["locate_prompt"]) == ("Mine: {box}", "At {description}")
    assert settings["box_convention"] == "pocket"
    named = region_settings(Regions("locate", box_convention="qwen-vl"), tmp_path)
    assert named["box_convention"] == "qwen-vl"


def test_owners_refs_become_questions_by_split(tmp_path):
    data = write_benchmark("refcoco_rec", tmp_path)
    rows = rows_of("refcoco_rec", data)
    assert [row["category"] for row in rows] == SPLITS  # the ref of the train split is left to training
    assert [row["id"] for row in rows[:3]] == ["refcoco-0#0", "refcoco-0#1", "refcoco-1#0"]
    assert [row["question"] for row in rows[:2]] == ["man in the middle", "the navy blue shirt"]
    assert rows[0]["box"] == [6.0, 6.0, 20.0, 20.0] and rows[2]["box"] == [0.5, 0.25, 10.5, 5.25]
    regions = rows_of("refcoco_reg", data)
    assert " ".join(row["id"] for row in regions) == "refcoco-0 refcoco-1 refcoco+-0 refcoco+-3 refcocog-7"
    assert regions[0]["captions"] == ["man in the middle", "the navy blue shirt"]


def test_ref_adv_is_reported_by_distractors(tmp_path):
    rows = rows_of("ref_adv_s", write_benchmark("ref_adv_s", tmp_path))
    assert [row["category"] for row in rows] == ["2-3", "4-6", "7 and more"]
    assert rows[0]["question"] == "the ring that touches no other" and rows[0]["box"] == [
        6.0,
        6.0,
        20.0,
        20.0,
    ]
    metric = load_metric("ref_adv", {})
    truth = [{"box": [0, 0, 100, 100], "image": str(i)} for i in range(4)]
    boxes = [[0, 0, 100, 95], [0, 0, 100, 80], [0, 0, 100, 60], None]
    figures = metric.compute(predictions=boxes, references=truth)
    assert [figures[name] for name in ("acc50", "acc75", "acc90", "parse_rate")] == [0.75, 0.5, 0.25, 0.75]


@pytest.mark.parametrize(
    ("value", "count"), [([1, 2], 2), (3, 3), ("[4, 5, 6]", 3), ("a 1, b 22", 2), ("", 0), (None, 0)]
)
def test_distractors_are_counted_as_their_owners_do(value, count):
    assert _distractors(Record(Source(Path("x.parquet")), 1, {"distractors": value})) == count


@pytest.mark.parametrize(
    "raw", [{}, {"distractors": {"a": 1}}, {"distractors": math.nan}, {"distractors": '{"a": 1}'}]
)
def test_distractors_that_cannot_be_counted_are_no_group(raw):
    with pytest.raises(
        RowError, match=r"x\.parquet.*(no column `distractors`|expected a number, a list or text, found )"
    ):
        _distractors(Record(Source(Path("x.parquet")), 1, raw))


def test_categories_leave_out_questions_and_the_files_that_have_none_of_them(tmp_path):
    data = write_benchmark("refcoco_rec", tmp_path)
    (data / "refcocog/refs(umd).json").unlink()
    with pytest.raises(UserError, match=r"refs\(umd\).json: no such file.*lichengunc/refer"):
        rows_of("refcoco_rec", data)
    splits = {row["category"] for row in rows_of("refcoco_rec", data, "refcoco")}
    assert splits == {"refcoco_val", "refcoco_testA"}
    rows = rows_of("refcoco_rec", data, "refcoco+_testA", "refcoco_testA")
    assert [row["id"] for row in rows] == ["refcoco-1#0", "refcoco+-0#0"]
    for categories, message in (
        (["refcoco_test"], r"no question of the category 'refcoco_test' in it.*refcoco_testA, refcoco_val\."),
        (["coco"], r"--category: no question file is of coco\. There are refcoco, "),
        # one that exists does not hide another that does not
        (["refcoco_val", "refcoco_tesA"], "no question of the category 'refcoco_tesA' in it"),
    ):
        with pytest.raises(UserError, match=message):
            rows_of("refcoco_rec", data, *categories)


def test_published_figures_stand_beside_ours_by_split(tagged, tmp_path):
    data = write_benchmark("refcoco_rec", tmp_path / "data")
    words = ["eval", "run", "refcoco_rec", "--model", tagged, "--data-dir", data]
    words += ["--output-dir", tmp_path / "out", "--max-new-tokens", 4, "--rounds", 10]
    words += ["--category", "refcoco_val", "--category", "refcoco+"]
    done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    lines = {line.split("│")[1].strip(): line for line in done.output.splitlines() if line.count("│") > 3}
    assert [cell.strip() for cell in lines["Qwen-VL-7B"].split("│")[2:-1]] == ["0.8825", "0.7721", "0.8936"]
    page = (tmp_path / "out/report.html").read_text()
    assert "by category, as published" in page and "0.8325" not in page and "0.8936" in page


@pytest.mark.parametrize(
    "name, decoder, known",
    [
        ("pocket_rec", "sample", "greedy\\."),
        ("pocket_reg", "drop", "Decoders for it: greedy, sample, retrosp"),
    ],
)
def test_decoders_that_do_not_fit(name, decoder, known, world, tmp_path):
    with pytest.raises(UserError, match=f"--decoder {decoder} does not work for the task .*{known}"):
        evaluate(name, BASE, tmp_path, world, decoder=decoder)


def test_verified_descriptions_can_be_found_again(tagged, tmp_path):
    """REVERSE composed with self-consistency: descriptions decoded retrospectively, then located."""
    data = write_benchmark("self_consistency", tmp_path / "data")
    options = {"decoder": "retrospective", "max_new_tokens": 6, "limit": 2, "rounds": 10}
    summary = evaluate("self_consistency", tagged, tmp_path / "out", data, **options)
    samples = read_samples(tmp_path / "out")
    assert summary["decoder"] == "retrospective" and len(samples) == 2
    assert all("<SPAN>" not in s["answer"] and s["trace"][-1]["kind"] == "locate" for s in samples)


def test_rows_without_expressions_cannot_be_located(world):
    row = json.loads((world / "test.jsonl").read_text().splitlines()[0])
    del row["expressions"]
    (world / "mute.jsonl").write_text(json.dumps(row) + "\n")
    for per, message in (
        ("expression", "mute.jsonl, line 1: .*nothing to locate"),
        ("box", "'per' must be one of region"),
    ):
        raw = load_spec("pocket_rec").to_json() | {"questions": "mute.jsonl", "reader_options": {"per": per}}
        with pytest.raises(UserError, match=message):
            load_questions(parse_spec(raw, "mute"), world, load_metric("rec", {}))
