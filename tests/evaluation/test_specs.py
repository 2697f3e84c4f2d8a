import json
from pathlib import Path

import pytest
import yaml
from PIL import Image

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.metrics import load_metric, metric_class
from vlm_sft_rl.evaluation.questions import load_questions
from vlm_sft_rl.evaluation.readers import file_options
from vlm_sft_rl.evaluation.specs import load_spec, parse_spec

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(path.stem for path in (ROOT / "eval").glob("*.yaml"))
MINIMAL = "{name: a, description: b, questions: c.jsonl, metric: yes_no}"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_parse_by_name_and_build_their_metric(name):
    spec = load_spec(name)
    assert spec.name == name
    metric = metric_class(spec.metric)
    named = [*spec.question_files().values()]
    named += [spec.reader_options[key] for key in file_options(spec.reader)]
    named += [path for key in metric.file_options if (path := spec.metric_options.get(key))]
    assert all(spec.source_of(path) for path in named)
    for row in spec.published:
        assert row.values or row.by_category
        for values in (row.values, *row.by_category.values()):
            assert set(values) <= set(metric.statistics), row.system
    assert (spec.judge is not None) == (metric.prediction_field == "judgement")
    header = (ROOT / f"eval/{name}.yaml").read_text().split("name:")[0]
    assert f"vlm-sft-rl eval run {name} --model" in header and "# Purpose" in header


def test_the_pocket_vocabulary_is_that_of_the_pocket_world():
    world = pytest.importorskip("vlm_sft_rl.pocket.world")
    assert set(load_spec("pocket_captions").metric_options["vocabulary"]) == set(world.NOUNS)


def test_defaults_and_families():
    spec = parse_spec(yaml.safe_load(MINIMAL), "x.yaml")
    assert spec.prompt == "{question}" and spec.decoding.threshold_for("llava") is None
    tau = parse_spec(
        yaml.safe_load(MINIMAL[:-1] + ", decoding: {threshold: {qwen2_5_vl: 0.01, default: 0.003}}}"), "x"
    ).decoding
    assert tau.threshold_for("qwen2_5_vl") == 0.01 and tau.threshold_for("llava") == 0.003
    only = parse_spec(yaml.safe_load(MINIMAL[:-1] + ", decoding: {threshold: {llava: 0.5}}}"), "x").decoding
    assert only.threshold_for("qwen2_vl") is None


@pytest.mark.parametrize(
    "text, message",
    [
        (MINIMAL[:-1] + ", metrics: x}", r"x\.yaml: there is no 'metrics'. EvalSpec has name, "),
        (MINIMAL[:-1] + ", decoding: {tau: 0.1}}", r"x\.yaml: decoding: there is no 'tau'"),
        (
            MINIMAL[:-1] + ", decoding: {threshold: 1}}",
            "decoding: threshold = 1, expected a number > 0 and < 1",
        ),
        (MINIMAL[:-1] + ", decoding: {threshold: {llava: 0}}}", "threshold = {'llava': 0}, expected"),
        (MINIMAL[:-1] + ", decoding: {threshold: '0.5'}}", "threshold = '0.5', expected a number"),
        (MINIMAL[:-1] + ", decoding: {retrospective: {beams: 2}}}", "decoding: --beams has no effect on"),
        (MINIMAL[:-1] + ", decoding: {max_new_tokens: 0}}", "max_new_tokens = 0, expected an integer >= 1"),
        (
            MINIMAL[:-1] + ", decoding: {sample_temperature: 0}}",
            "sample_temperature = 0, expected a number > 0",
        ),
        (MINIMAL[:-1] + ", prompt: hello}", "prompt = 'hello', expected text with {question}"),
        (MINIMAL[:-1] + ", files: [{path: a}]}", r"files\[0\]: 'source' is missing"),
        (
            MINIMAL[:-1] + ", published: [{system: a, source: b, values: {f1: high}}]}",
            "values = .*expected a map of a number",
        ),
        (MINIMAL[:-1] + ", metric_options: [a]}", r"metric_options = \['a'\], expected a map"),
        ("{name: a, description: b, questions: c}", r"x\.yaml: 'metric' is missing"),
        (
            "{name: 1, description: b, questions: c, metric: chair}",
            "name = 1, expected text that is not empty",
        ),
        (
            "{name: a, description: b, questions: c, metric: chiar}",
            "metric = 'chiar', expected amber_discriminative, .* or yes_no",
        ),
    ],
)
def test_bad_specs_are_explained(text, message):
    with pytest.raises(UserError, match=message):
        parse_spec(yaml.safe_load(text), "x.yaml")


REGIONS = {"name": "a", "description": "b", "questions": "c.jsonl", "metric": "rec"}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"regions": {"task": "point"}}, "task = 'point', expected locate, describe or describe_and_locate"),
        ({"regions": None}, "metric 'rec' does not fit: it needs `regions: {task: locate}`"),
        ({"metric": "reg"}, "metric 'reg' does not fit: the metric of task 'locate' is 'rec'"),
        ({"metric": "yes_no"}, "metric 'yes_no' does not fit"),
        ({"prompt": "Where? {question}"}, "'prompt' has no effect on questions about boxes"),
        ({"locate_prompt": {"llava": "Where?"}}, "regions: locate_prompt = .*expected text with {description}"),
        ({"locate_max_new_tokens": 0}, "locate_max_new_tokens = 0, expected an integer >= 1"),
        ({"describe": "x"}, "regions: there is no 'describe'"),
        ({"categories": "val"}, "categories = 'val', expected a list of text"),
        ({"published": [{"system": "s", "source": "t", "by_category": {"val": 0.5}}]}, "a map of a map of a number"),
    ],
)  # fmt: skip
def test_bad_specs_of_regions_are_explained(change, message):
    inner = {key: value for key, value in change.items() if key.startswith(("locate", "describe"))}
    raw = REGIONS | {"regions": {"task": "locate"} | inner}
    raw |= {key: value for key, value in change.items() if key not in inner}
    with pytest.raises(UserError, match=message):
        parse_spec(raw, "x.yaml")


def test_unknown_name():
    with pytest.raises(UserError, match="pocket_capitons"):
        load_spec("pocket_capitons")


def test_files_that_are_no_specs(tmp_path):
    for text, message in (
        ("- a", "key: value"),
        ("a: [", "not valid YAML"),
        (MINIMAL[:-1] + ", name: z}", "given twice"),
    ):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            load_spec(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choices": ["B. x", "A. y"], "answer": "A"}, "their own letters"),
        ({"options": ["x", "y"]}, "looks like the choices"),
        ({"question": "<video>\nWhat?"}, "no mark here"),
        ({"system": "Be brief."}, "no system turn"),
        ({"messages": [{"role": "user", "content": "q"}]}, "SFT row"),
        ({"image": ...}, "'images' is missing"),
        ({"id": ..., "answer": 5}, None),
        ({"choices": ["A. x", "B. y"], "answer": "y"}, None),
    ],
)
def test_rows_of_ones_own_are_read_as_training_reads_them(tmp_path, change, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    raw = {"id": "1", "question": "What?", "image": "a.png", "answer": "x", **change}
    raw = {name: value for name, value in raw.items() if value is not ...}
    (tmp_path / "c.jsonl").write_text(json.dumps(raw) + "\n")
    spec = parse_spec(
        {"name": "a", "description": "b", "questions": "c.jsonl", "metric": "answer_accuracy"}
        | {"metric_options": {"grader": "mathvista"}, "prompt": "{question}\n{choices}"},
        "x.yaml",
    )
    metric = load_metric(spec.metric, spec.metric_options, tmp_path)
    if words:
        with pytest.raises(UserError, match=words):
            load_questions(spec, tmp_path, metric)
        return
    questions = load_questions(spec, tmp_path, metric)
    assert questions.rows[0]["images"] == ["a.png"]
    assert questions.rows[0]["id"] == ("1" if "id" in raw else "c-1")
    assert questions.prompt(questions.rows[0]).endswith("A. x\nB. y" if "choices" in raw else "What?\n")
