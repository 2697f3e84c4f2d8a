import io
import json

import pytest
import templates
from PIL import Image
from rich.console import Console

from vlm_sft_rl.data import images
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError


def answer(text, **extra):
    return {"from": "gpt", "value": text, **extra}


def record(identity, text="Yes.", question="<image>\nWhat?", image="a.png", **extra):
    made = {
        "id": identity,
        "image": image,
        "conversations": [{"from": "human", "value": question}, answer(text, **extra)],
    }
    return {k: v for k, v in made.items() if v is not None}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(images, "LARGEST_IMAGE", 2000)
    Image.new("1", (50, 50)).save(tmp_path / "bomb.png")
    (tmp_path / "sub").mkdir()
    return tmp_path


def write(folder, rows, name="rows.json"):
    path = folder / name
    path.write_text(json.dumps(rows))
    return path


BAD = [
    ("placeholder mismatch", record("p", question="<image> <image>")),
    ("placeholder mismatch", record("q", image=None)),
    ("missing image", record("m", image="none.png")),
    ("unreadable image", record("u", image="text.png")),
    ("path leaves image_root", record("o", image="../x.png")),
    ("image bomb", record("b", image="bomb.png")),
    ("unbalanced tags", record("t", "a <SPAN> b")),
    ("empty answer", record("e", "  ")),
    ("no supervised token", {"id": "n", "messages": [{"role": "user", "content": "q"}]}),
    ("duplicate id", record("good")),
    ("format", {"id": "f"}),
]
TOKEN_PROBLEMS = [
    ("too long", record("l", "long " * 200)),
    ("tokenizer lacks verification tokens", record("v", "<SPAN> a </CN>")),
]


@pytest.mark.parametrize("processor", [None, "with"])
def test_every_kind_of_problem_is_found_with_its_row(folder, processor):
    path = write(folder, [record("good"), *(row for _, row in BAD)])
    processor = processor and templates.processor("vicuna", "bpe")
    report = validate(path, processor, progress=False)
    expected = {}
    for number, (kind, _) in enumerate(BAD, 2):
        expected.setdefault(kind, []).append(f"{path}:{number}")
    assert set(report.problems) == set(expected) and not report.ok
    for kind, places in expected.items():
        problem = report.problems[kind]
        assert problem.count == len(places)
        assert [e.split(": ")[0] for e in problem.examples] == places
    assert report.rows == len(BAD) + 1


def test_token_problems(folder):
    processor = templates.processor("vicuna", "bpe")
    path = write(folder, [record("good"), TOKEN_PROBLEMS[0][1]])
    report = validate(path, processor, max_length=100, progress=False)
    assert {k: p.count for k, p in report.problems.items()} == {"too long": 1}
    assert "limit is 100" in report.problems["too long"].examples[0]
    bare = templates.families.llava()[1]
    report = validate(write(folder, [TOKEN_PROBLEMS[1][1]]), bare, progress=False)
    assert list(report.problems) == ["tokenizer lacks verification tokens"]


def test_good_file_with_a_saved_processor(folder):
    templates.processor("chatml", "bpe").save_pretrained(folder / "model")
    rows = [
        record("1", "<SPAN> a </CN> <SPAN> b </UN>"),
        record("2", "Longer than the other one."),
        record("3", image=None, question="q"),
    ]
    report = validate(write(folder, rows), folder / "model", progress=False)
    assert report.ok, report.problems
    assert report.tags == {"answers": 3, "tagged answers": 1, "confident": 1, "unconfident": 1}
    assert len(report.lengths) == 3 and sum(n for *_, n in report.histogram()) == 3
    assert report.to_json()["ok"] and json.dumps(report.to_json())


def test_untagged_training_may_ignore_tags(folder):
    path = write(folder, [record("1", "a <SPAN> b")])
    assert validate(path, tags=False, progress=False).ok


def test_truncated_file_is_a_problem_and_the_rows_before_it_are_checked(folder):
    path = write(folder, [record("1"), record("2", image="none.png"), record("3")])
    path.write_text(path.read_text()[:-20])
    report = validate(path, progress=False)
    assert report.rows == 2 and set(report.problems) == {"broken file", "missing image"}
    assert "fetch it again" in report.problems["broken file"].examples[0]


def test_examples_are_few_and_counts_are_whole(folder):
    path = write(folder, [record(str(i), image="none.png") for i in range(10)])
    problem = validate(path, progress=False).problems["missing image"]
    assert problem.count == 10 and len(problem.examples) == 3


def test_empty_file_is_not_ok(folder):
    assert not validate(write(folder, []), progress=False).ok


def test_bad_arguments(folder):
    path = write(folder, [record("1")])
    for kwargs in ({"image_root": "/nowhere"}, {"max_length": 5}, {"processor_or_path": folder / "sub"}):
        with pytest.raises(UserError):
            validate(path, progress=False, **kwargs)
    with pytest.raises(UserError, match="no such file"):
        validate(folder / "none.json")


def test_view_shows_kinds_counts_lengths_and_balance(folder, capsys):
    rows = [
        record("1", "<SPAN> a </CN> <SPAN> b </UN>"),
        record("1", image="none.png"),
        record("3", "[red] y" * 9),
    ]
    report = validate(write(folder, rows), templates.processor("vicuna", "bpe"))
    console = Console(width=1000, record=True, file=io.StringIO())  # no path breaks a line
    console.print(report)
    text = console.export_text()
    for words in (
        "NOT READY",
        "missing image",
        "duplicate id",
        "rows.json:2",
        "Tokens per row",
        "50.0 % unconfident",
    ):
        assert words in text
