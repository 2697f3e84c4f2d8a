"""What readers make of the owners' files, and what is wrong with a file, said with its place and its cure."""

import json
import re
from dataclasses import replace
from itertools import islice

import pytest
from mutations import mutants
from owners_files import BENCHMARKS, write_benchmark

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.readers import NAMES, file_options
from vlm_sft_rl.evaluation.specs import load_spec, with_metric_options


@pytest.fixture
def load(tmp_path):
    """`load(name, **changes of the spec)` -> its questions, its spec and its metric; the files lie in `tmp_path / name`."""

    def call(name, **change):
        spec, data = replace(load_spec(name), **change), tmp_path / name
        if not data.exists():
            write_benchmark(name, data)
        metric = load_metric(spec.metric, spec.metric_options, data)
        return load_questions(spec, data, metric), spec, metric

    return call


def edit(path, change):
    """`change` the value of a JSON file, the first object of a list or of a JSONL file."""
    lines = path.read_text().splitlines()
    try:
        value, rest = json.loads("\n".join(lines)), []
    except json.JSONDecodeError:
        value, rest = json.loads(lines[0]), lines[1:]
    change(value[0] if isinstance(value, list) else value)
    path.write_text("\n".join([json.dumps(value), *rest]) + "\n")


def put(field, value):
    return lambda row: row.__setitem__(field, value)


def drop(field):
    return lambda row: row.__delitem__(field)


@pytest.mark.parametrize(
    "name, file, change, message",
    [
        (
            "pope",
            "coco_pope_random.json",
            put("label", "maybe"),
            r"random\.json:1: field `\w+`: expected yes or no",
        ),
        ("pope", "coco_pope_popular.json", drop("image"), r"popular\.json:1: no field `image`"),
        ("amber_generative", "query/query_generative.json", put("id", 99), "id 99 has no entry"),
        ("amber_generative", "annotations.json", put("truth", ["unicorn"]), r"'unicorn' is not in relation"),
        ("chair_coco", "chair-500.jsonl", put("image", "dog.jpg"), "expected a name such as COCO_val2014"),
        ("chair_coco", "chair-500.jsonl", put("image", "COCO_val2014_000000000005.jpg"), "no caption"),
        (
            "object_halbench",
            "obj_halbench_300_with_image.jsonl",
            put("image", "COCO_val2014_000000000042.jpg"),
            r"image\.jsonl:1: `image` is no picture in base64",
        ),
        (
            "object_halbench",
            "obj_halbench_300_with_image.jsonl",
            put("image_id", "5"),
            "picture 5 has no caption",
        ),
        ("hallusion_bench", "HallusionBench.json", put("gt_answer", "2"), 'expected "0" or "1"'),
        (
            "mmhal_bench",
            "response_template.json",
            put("image_content", "x"),
            "`image_content`: expected list",
        ),
        ("mmhal_bench", "response_template.json", drop("gt_answer"), "no field `gt_answer`"),
        ("chartqa", "test/test_human.json", put("label", ""), "`label` is empty"),
        ("clevr_math", "clevr_test.json", put("answer", "many"), "expected a whole number"),
        ("geoqa", "test.jsonl", put("answer", "E"), "expected a letter from A to D"),
        (
            "okvqa",
            "mscoco_val2014_annotations.json",
            lambda value: value["annotations"][0].update(question_id=5),
            r"questions\.json:1: question 2971475 has no answers in .*another split",
        ),
        ("mmbench_dev", "MMBench_DEV_EN.tsv", None, "no column 'question'"),
        ("haloquest", "haloquest-eval.csv", None, "no column 'question'"),
        ("refcoco_rec", "refcoco/refs(unc).json", put("ann_id", 5), r"refs\(unc\)\.json:1: .*no 5"),
        ("refcoco_reg", "refcoco/refs(unc).json", put("sentences", []), "expected expressions"),
        (
            "refcoco_reg",
            "annotations/instances_train2014.json",
            lambda value: value["annotations"][0].update(bbox=[6.0, 6.0, 0.0, 14.0]),
            "1 refs have a box without area",
        ),
    ],
)
def test_a_bad_row_is_named(name, file, change, message, load, tmp_path):
    path = write_benchmark(name, tmp_path / name) / file
    if change is None:
        path.write_text(path.read_text().replace("answer", "reply").replace("question", "query"))
    else:
        edit(path, change)
    with pytest.raises(UserError, match=message):
        load(name)


def test_missing_files_and_unknown_options_are_named(load, tmp_path):
    data = write_benchmark("amber_generative", tmp_path / "amber_generative")
    with pytest.raises(UserError, match="unknown reader_options 'annotation'"):
        load("amber_generative", reader_options={"annotation": "annotations.json"})
    with pytest.raises(UserError, match="must name the file 'annotations'"):
        load("amber_generative", reader_options={})
    (data / "annotations.json").unlink()
    with pytest.raises(UserError, match=r"annotations\.json: no such file.*junyangwang0410"):
        load("amber_generative")
    (data / "relation.json").unlink()
    with pytest.raises(UserError, match=r"relation\.json: no such file; metric_options"):
        load("amber_generative")


def test_every_reader_can_be_loaded_and_knows_its_files():
    assert {name: files for name in NAMES if (files := file_options(name))} == {
        "amber": ["annotations"],
        "coco_objects": ["instances", "captions"],
        "object_halbench": ["instances", "captions"],
        "refcoco": ["instances"],
        "vqa": ["annotations"],
    }


@pytest.mark.parametrize(
    "name, ids, fields",
    [
        ("flickr30k", ["0", "2"], {}),  # the third split is not asked for
        ("haloquest", ["haloquest-1", "haloquest-2"], {}),
        ("mmmu", None, {"category": ["Accounting", "Art_Theory"]}),
        # questions without a picture are left out
        ("scienceqa", ["4", "7"], {"answer": ["B", "C"], "category": ["natural science", "social science"]}),
        ("vqav2", None, {"category": ["other", "number"]}),
        ("okvqa", None, {"category": ["other"]}),
        ("vizwiz", None, {"category": ["unanswerable", "other"]}),
    ],
)
def test_rows_of_the_owners_files(name, ids, fields, load):
    rows = load(name)[0].rows
    assert ids is None or [row["id"] for row in rows] == ids
    assert {field: [row[field] for row in rows] for field in fields} == fields


def test_chosen_categories_and_splits(load):
    rows = load("mme_hall")[0].rows
    assert {row["category"] for row in rows} == {"existence", "count"} and len(rows) == 4
    assert rows[0]["id"] == "existence/existence/000000006040.jpg#1"
    assert len(load("mme")[0].rows) == 6
    with pytest.raises(UserError, match="splits dev, validation"):
        load("mmmu", reader_options={})


def test_files_of_one_benchmark_keep_their_questions_apart(load):
    rows = load("pope")[0].rows
    assert [row["id"] for row in rows[:3]] == ["random-1", "random-2", "popular-1"]
    assert [row["category"] for row in rows[::2]] == ["random", "popular", "adversarial"]


def test_prompts_hold_the_options_and_open_questions_do_not(load):
    questions, _, _ = load("mmmu")
    closed, open_ = (questions.prompt(row) for row in questions.rows)
    assert "Options:\nA. $63,020\nB. $58,410\nC. $71,320\n" in closed
    assert "Options" not in open_ and "Answer: your answer" in open_
    assert [len(row["images"]) for row in questions.rows] == [2, 1]


def test_options_inside_a_question_are_cut_out_and_its_braces_are_no_placeholders(load):
    questions, _, _ = load("mmstar")
    # options that hold commas and letters stay whole
    assert questions.rows[0]["choices"][1] == "The case is under the cat, not on it."
    assert questions.rows[1]["choices"] == ["1", "2"]
    row = questions.rows[0] | {"question": "What does {choices} mean?"}
    assert questions.prompt(row).startswith("What does {choices} mean?\nOptions:\nA. ")


def test_a_hint_stands_before_its_question(load):
    assert load("scienceqa")[0].rows[0]["question"].startswith("Figure: tide pool.\nWhich better")


def test_shared_pictures_of_a_tsv_are_written_once(load, tmp_path):
    first, rotated, other = load("mmbench_dev")[0].rows
    assert first["images"] == rotated["images"] != other["images"]
    assert (first["circle"], rotated["circle"], other["circle"]) == ("241", "241", "242")
    assert other["question"] == "The passage says so.\nWhat follows?" and len(other["choices"]) == 3
    assert len(list((tmp_path / "mmbench_dev/.pictures").iterdir())) == 2


def test_another_file_is_another_benchmark(load, tmp_path):
    before = load("chair_coco")[0].digest
    edit(tmp_path / "chair_coco/annotations/captions_val2014.json", put("info", {"year": 2017}))
    assert load("chair_coco")[0].digest != before


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("amber_discriminative", ["Yes", "No", "No."], ["No", "Yes", "hm"]),
        ("pope", ["Yes", "No"] * 3, ["No", "Yes"] * 3),
        ("gqa", ["No.", "A woman"], ["Yes", "man"]),
        ("easy_vqa", ["Circle.", "no"], ["square", "Yes."]),
        ("scienceqa", ["B", "C. Cheyenne"], ["A", "A"]),
        ("tabmwp", ["Answer: 1,200 votes", "Answer: B"], ["Answer: 800", "Answer: A"]),
        ("chartqa", ["Answer: 14", "Answer: yes"], ["Answer: 15", "Answer: no"]),
        ("clevr_math", ["Answer: 3", "So the answer is five."], ["Answer: 4", "Answer: 4"]),
        ("geoqa", ["Answer: C"], ["Answer: 40°"]),
        ("m3cot", ["Answer: (B) a rope"], ["Answer: A"]),
        ("mmstar", ["A", "2"], ["B", "A"]),
        ("ai2d", ["B"], ["A"]),
        ("mmmu", ["Answer: $58,410", "Answer: Cubism."], ["Answer: A", "Answer: baroque"]),
        ("mathvista", ["Answer: 1.23", "Answer: 60°"], ["Answer: 1.3", "Answer: A"]),
        ("mmbench_dev", ["A", "B", "C"], ["A", "A", "B"]),
        ("hallusion_bench", ["Yes", "No", "No", "Yes"], ["No", "Yes", "Yes", "No"]),
        ("mme_hall", ["Yes", "No"] * 2, ["No", "Yes"] * 2),
    ],
)
def test_right_and_wrong_answers_are_told_apart(name, right, wrong, load):
    questions, _, metric = load(name)
    references = [metric.reference_of(row) for row in questions.rows]
    best, worst = (
        {k: i.value for k, i in metric.intervals(metric.counts(answers, references), 10).items()}
        for answers in (right, wrong)
    )
    assert best["accuracy"] == 1 and worst["accuracy"] == 0
    assert [metric.verdict(row) for row in metric.per_sample(right, references)] == ["right"] * len(right)
    if name == "mme_hall":
        # two categories of one picture each: 2 x 200 points
        assert best["hallucination"] == 400 and worst["hallucination"] == 0 and best["accuracy_plus"] == 1


@pytest.mark.parametrize(
    "name, answers, scores",
    [
        ("vqav2", ["at table", "2"], [0.9, 1]),
        ("okvqa", ["Riding."], [0.6]),
        ("vizwiz", ["Unanswerable.", "soda"], [1, 0.9]),
    ],
)
def test_answers_of_people_make_scores(name, answers, scores, load):
    questions, _, metric = load(name)
    counts = metric.per_sample(answers, [metric.reference_of(row) for row in questions.rows])
    assert counts[:, 0].tolist() == pytest.approx(scores)


def test_metric_options_on_the_command_line():
    spec = with_metric_options(load_spec("pope"), ["rules=released"])
    assert spec.metric_options == {"rules": "released"}
    assert load_spec("pope").metric_options["rules"] == "ours"
    for bad, message in (
        ("rules", "expected KEY=VALUE"),
        ("=x", "expected KEY=VALUE"),
        ("a=[", "not valid YAML"),
    ):
        with pytest.raises(UserError, match=message):
            with_metric_options(spec, [bad])
    with pytest.raises(UserError, match="unknown key 'ruless'"):
        load_metric(spec.metric, with_metric_options(spec, ["ruless=1"]).metric_options)


# what each file's mutants are held against: every benchmark's files, each in a few ways
@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_mutated_files_are_refused_with_their_place_or_read(tmp_path, benchmark):
    spec = load_spec(benchmark)
    write_benchmark(benchmark, tmp_path)
    for path in sorted((*tmp_path.rglob("*.json"), *tmp_path.rglob("*.jsonl"))):
        content = path.read_bytes()
        for name, mutant in islice(mutants(content, seed=len(benchmark)), 8):
            path.write_bytes(mutant)
            try:
                load_questions(spec, tmp_path, load_metric(spec.metric, spec.metric_options, tmp_path))
            except UserError as error:
                assert str(tmp_path) in str(error), str(error)
            except Exception as error:
                error.add_note(f"{path.name}: {name}")
                raise
        path.write_bytes(content)
    for path in sorted((*tmp_path.rglob("*.csv"), *tmp_path.rglob("*.tsv"))):
        content = path.read_bytes()
        for mutant in (b"", b"\xff\xfe", content[:30] + b"\x00" + content[30:], content + b"1"):
            path.write_bytes(mutant)
            with pytest.raises(UserError, match=re.escape(str(path))):
                load_questions(spec, tmp_path, load_metric(spec.metric, spec.metric_options, tmp_path))
        path.write_bytes(content)
