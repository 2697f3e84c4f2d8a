"""What is wrong with an owner's file is said with its place and its cure."""

import json
from dataclasses import replace

import pytest
from owners_files import write_benchmark

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.readers import NAMES, file_options
from vlm_sft_rl.evaluation.specs import load_spec, with_metric_options


def load(name, data, **change):
    spec = replace(load_spec(name), **change)
    return load_questions(spec, data, load_metric(spec.metric, spec.metric_options, data)).rows


def edit(path, change):
    """Apply `change` to the value of a JSON file or to the first line of a JSONL file."""
    lines = path.read_text().splitlines()
    try:
        value = json.loads("\n".join(lines))
        path.write_text(json.dumps(change(value)))
    except json.JSONDecodeError:
        path.write_text("\n".join([json.dumps(change(json.loads(lines[0]))), *lines[1:]]) + "\n")


def with_first(field, value):
    def change(found):
        first = found[0] if isinstance(found, list) else found
        first[field] = value
        return found

    return change


def without_area(instances):
    instances["annotations"][0]["bbox"] = [6.0, 6.0, 0.0, 14.0]
    return instances


def without_first(field):
    def change(found):
        del (found[0] if isinstance(found, list) else found)[field]
        return found

    return change


@pytest.mark.parametrize(
    "name, file, change, message",
    [
        (
            "pope",
            "coco_pope_random.json",
            with_first("label", "maybe"),
            r"random\.json:1: expected yes or no",
        ),
        ("pope", "coco_pope_popular.json", without_first("image"), r"popular\.json:1: no field `image`"),
        ("amber_generative", "query/query_generative.json", with_first("id", 99), "id 99 has no entry"),
        (
            "amber_generative",
            "annotations.json",
            with_first("truth", ["unicorn"]),
            r"'unicorn' is not in relation\.json",
        ),
        (
            "chair_coco",
            "chair-500.jsonl",
            with_first("image", "dog.jpg"),
            "expected a name such as COCO_val2014",
        ),
        ("chair_coco", "chair-500.jsonl", with_first("image", "COCO_val2014_000000000005.jpg"), "no caption"),
        ("hallusion_bench", "HallusionBench.json", with_first("gt_answer", "2"), 'expected "0" or "1"'),
        (
            "mmhal_bench",
            "response_template.json",
            with_first("image_content", "dog"),
            "`image_content`: expected list",
        ),
        ("mmhal_bench", "response_template.json", without_first("gt_answer"), "no field `gt_answer`"),
        ("chartqa", "test/test_human.json", with_first("label", ""), "`label` is empty"),
        ("clevr_math", "clevr_test.json", with_first("answer", "many"), "expected a whole number"),
        ("geoqa", "test.jsonl", with_first("answer", "E"), "expected a letter from A to D"),
        ("mmbench_dev", "MMBench_DEV_EN.tsv", None, "no column 'question'"),
        ("haloquest", "haloquest-eval.csv", None, "no column 'question'"),
        ("refcoco_rec", "refcoco/refs(unc).json", with_first("ann_id", 5), r"refs\(unc\)\.json:1: .*no 5"),
        ("refcoco_reg", "refcoco/refs(unc).json", with_first("sentences", []), "expected expressions"),
        (
            "refcoco_reg",
            "annotations/instances_train2014.json",
            without_area,
            "1 refs have a box without area",
        ),
    ],
)
def test_a_bad_row_is_named(name, file, change, message, tmp_path):
    data = write_benchmark(name, tmp_path)
    path = data / file
    if change is None:
        path.write_text(path.read_text().replace("answer", "reply").replace("question", "query"))
    else:
        edit(path, change)
    with pytest.raises(UserError, match=message):
        load(name, data)


def test_readers_refuse_what_they_do_not_know(tmp_path):
    data = write_benchmark("amber_generative", tmp_path)
    with pytest.raises(UserError, match="unknown reader_options 'annotation'"):
        load("amber_generative", data, reader_options={"annotation": "annotations.json"})
    with pytest.raises(UserError, match="must name the file 'annotations'"):
        load("amber_generative", data, reader_options={})
    (data / "relation.json").unlink()
    with pytest.raises(UserError, match=r"relation\.json: no such file; metric_options"):
        load("amber_generative", data)


def test_every_reader_can_be_loaded_and_knows_its_files():
    assert {name: files for name in NAMES if (files := file_options(name))} == {
        "amber": ["annotations"],
        "coco_objects": ["instances", "captions"],
        "refcoco": ["instances"],
        "vqa": ["annotations"],
    }


def test_chosen_categories_and_splits(tmp_path):
    rows = load("mme_hall", write_benchmark("mme_hall", tmp_path / "a"))
    assert {row["category"] for row in rows} == {"existence", "count"} and len(rows) == 4
    assert rows[0]["id"] == "existence/existence/000000006040.jpg#1"
    assert len(load("mme", write_benchmark("mme", tmp_path / "b"))) == 6
    folder = write_benchmark("mmmu", tmp_path / "c")
    with pytest.raises(UserError, match="splits dev, validation"):
        load("mmmu", folder, reader_options={})
    flickr = write_benchmark("flickr30k", tmp_path / "d")
    assert [row["id"] for row in load("flickr30k", flickr)] == ["0", "2"]
    assert load("haloquest", write_benchmark("haloquest", tmp_path / "e"))[-1]["id"] == "haloquest-2"


def test_another_file_is_another_benchmark(tmp_path):
    spec = load_spec("chair_coco")
    data = write_benchmark("chair_coco", tmp_path)
    metric = load_metric(spec.metric, spec.metric_options, data)
    before = load_questions(spec, data, metric).digest
    edit(data / "annotations/captions_val2014.json", lambda value: value | {"info": {"year": 2017}})
    assert load_questions(spec, data, metric).digest != before


def test_metric_options_on_the_command_line():
    spec = with_metric_options(load_spec("pope"), ["rules=released"])
    assert (
        spec.metric_options == {"rules": "released"} and load_spec("pope").metric_options["rules"] == "ours"
    )
    for bad, message in (
        ("rules", "expected KEY=VALUE"),
        ("=x", "expected KEY=VALUE"),
        ("a=[", "not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            with_metric_options(spec, [bad])
    with pytest.raises(UserError, match="unknown key 'ruless'"):
        load_metric(spec.metric, with_metric_options(spec, ["ruless=1"]).metric_options)
