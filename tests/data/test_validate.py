import io
import json

import pytest
import templates
from PIL import Image
from rich.console import Console

from vlm_sft_rl.data import images
from vlm_sft_rl.data.validate import TWICE, validate
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import read_json


def record(identity, text="Yes.", question="<image>\nWhat?", image="a.png"):
    talk = [{"from": "human", "value": question}, {"from": "gpt", "value": text}]
    return {"id": identity, **({"image": image} if image else {}), "conversations": talk}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    Image.new("RGB", (20, 16)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("no picture")
    monkeypatch.setattr(images, "LARGEST_IMAGE", 2000)
    Image.new("1", (50, 50)).save(tmp_path / "bomb.png")
    (tmp_path / "sub").mkdir()
    return tmp_path


@pytest.fixture
def check(folder):
    """`validate` of some rows."""

    def run(rows, processor=None, **options):
        (folder / "rows.json").write_text(json.dumps(rows))
        return validate(folder / "rows.json", processor, progress=False, **options)

    return run


TAGGED = "<SPAN> a </CN> <SPAN> b </UN>"
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


@pytest.mark.parametrize("processor", [None, "with"])
def test_every_kind_of_problem_is_found_with_its_row(check, processor):
    processor = processor and templates.processor("vicuna", "bpe")
    report = check([record("good"), *(row for _, row in BAD)], processor)
    places = {}
    for number, (kind, _) in enumerate(BAD, 2):
        places.setdefault(kind, []).append(f"{report.path}:{number}")
    assert not report.ok and report.rows == len(BAD) + 1
    assert {k: [e.split(": ")[0] for e in p.examples] for k, p in report.problems.items()} == places
    assert {k: p.count for k, p in report.problems.items()} == {k: len(p) for k, p in places.items()}


def test_token_problems(check):
    report = check(
        [record("good"), record("l", "long " * 200)], templates.processor("vicuna", "bpe"), max_length=100
    )
    assert {k: p.count for k, p in report.problems.items()} == {"too long": 1}
    assert "limit is 100" in report.problems["too long"].examples[0]
    bare = templates.families.llava()[1]
    assert list(check([record("v", "<SPAN> a </CN>")], bare).problems) == [
        "tokenizer lacks verification tokens"
    ]


def test_good_file_with_a_saved_processor(check, folder):
    templates.processor("chatml", "bpe").save_pretrained(folder / "model")
    longer, blind = record("2", "Longer than the other one."), record("3", image=None, question="q")
    report = check([record("1", TAGGED), longer, blind], folder / "model")
    assert report.ok, report.problems
    assert report.tags == {"answers": 3, "tagged answers": 1, "confident": 1, "unconfident": 1}
    assert len(report.lengths) == 3 and sum(n for *_, n in report.histogram()) == 3
    assert report.to_json()["ok"] and json.dumps(report.to_json())


def test_untagged_training_may_ignore_tags(check):
    assert check([record("1", "a <SPAN> b")], tags=False).ok


def test_truncated_file_is_a_problem_and_the_rows_before_it_are_checked(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps([record("1"), record("2", image="none.png"), record("3")])[:-20])
    report = validate(path, progress=False)
    assert report.rows == 2 and set(report.problems) == {"broken file", "missing image"}
    assert "fetch it again" in report.problems["broken file"].examples[0]


def test_examples_are_few_and_counts_are_whole(check):
    problem = check([record(str(i), image="none.png") for i in range(10)]).problems["missing image"]
    assert problem.count == 10 and len(problem.examples) == 3


def test_empty_file_is_not_ok(check):
    assert not check([]).ok


def test_bad_arguments(check, folder):
    for kwargs in ({"image_root": "/nowhere"}, {"max_length": 5}, {"processor": folder / "sub"}):
        with pytest.raises(UserError):
            check([record("1")], **kwargs)
    with pytest.raises(UserError, match="no such file"):
        validate(folder / "none.json")


def test_view_shows_kinds_counts_lengths_and_balance(check):
    rows = [record("1", TAGGED), record("1", image="none.png"), record("3", "[red] y" * 9)]
    console = Console(width=1000, record=True, file=io.StringIO())  # no path breaks a line
    console.print(check(rows, templates.processor("vicuna", "bpe")))
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


# --- Question and region rows ---

BOX = {"box": [1, 2, 20, 16], "expressions": ["it"]}
REGION = {"id": "r", "image": "a.png", "width": 20, "height": 16, **BOX}
QUESTION = {"id": "q", "images": ["a.png"], "question": "What?", "choices": ["x", "y"], "answer": "B"}
CAPTION = {"id": "c", "images": ["a.png"], "question": "Describe it.", "objects": ["cat"]}


def test_good_rows(check):
    for rows in ([REGION], [QUESTION, CAPTION, {**QUESTION, "id": "t", "answer": "y"}]):
        assert check(rows).problems == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**REGION, "box": [1, 2, 21, 16]}, "inside an image of 20 x 16"),
        ({**REGION, "box": [5, 2, 5, 16]}, "--box-format xywh"),
        ({**REGION, "box": [1, 2, "3", 4]}, "expected four numbers"),
        ({**REGION, "width": 40, "height": 32}, "the image has 20 x 16 pixels"),
        ({**REGION, "width": None}, "width missing"),
        ({**REGION, "expressions": []}, "field `expressions`"),
        ({**REGION, "image": "b.png"}, "does not exist"),
        ({**QUESTION, "answer": "C"}, "neither a letter from A to B nor one of the choices"),
        ({**QUESTION, "choices": ["x"]}, "field `choices`"),
        ({**QUESTION, "question": " "}, "field `question`"),
        ({**CAPTION, "images": ["b.png"]}, "does not exist"),
    ],
)
def test_bad_rows(check, row, message):
    problems = check([row]).problems
    assert [message in example for problem in problems.values() for example in problem.examples] == [True]


PAIR = {"id": "p", "image": "a.png", "prompt": "What?", "chosen": "A cat.", "rejected": "A dog."}


def test_pairs_are_checked_with_their_tokens(check):
    report = check([PAIR, {**PAIR, "id": "q", "images": "a.png"}], templates.processor("vicuna", "bpe"))
    assert report.ok and report.kinds == {"preference": 2} and len(report.lengths) == 4
    problems = check(
        [{**PAIR, "rejected": "long " * 200}], templates.processor("vicuna", "bpe"), max_length=100
    )
    assert list(problems.problems) == ["too long"]


def test_a_file_has_one_kind_but_questions_with_answers_may_stand_among_conversations(check):
    (problem,) = check([record("1"), REGION]).problems.values()
    assert "1 SFT, 1 region" in problem.examples[0] and "its own file" in problem.examples[0]
    assert check([record("1"), QUESTION]).ok
    assert not check([record("1"), CAPTION]).ok


def test_what_may_not_be_meant_is_noted_once(check):
    rows = [record("1", image=None, question="q") | {"score": 1}, record("2") | {"score": 2}]
    rows[1]["conversations"][1]["note"] = "?"
    report = check([*rows, {**QUESTION, "answer": None, "objects": ["cat"], "images": []}])
    assert report.notes == {
        "field `score` is not known here and not used": 2,
        "field `conversations[].note` is not known here and not used": 1,
        "no image": 2,
        "no `answer`, which self-training and GRPO need,": 1,
    }


@pytest.mark.parametrize(
    ("texts", "remark"),
    [
        (["plain"], "none of the 1 answers has verification tags"),
        ([*["plain"] * 40, TAGGED], "only 1 of 41 answers"),
        (["plain", TAGGED], None),
        (["<SPAN> a cat </CN>"], "none of 1 tagged answers has </UN>"),
        (["plain", "<SPAN> a cat </UN>"], "none of 1 tagged answers has </CN>"),
    ],
)
def test_few_tags_are_remarked(check, texts, remark):
    report = check([record(str(i), text) for i, text in enumerate(texts)])
    assert report.ok and (report.remarks == [] if remark is None else remark in report.remarks[0])


def test_verdicts_without_a_tag_teach_nothing(check):
    row = record("1")
    row["conversations"][1]["supervise"] = "verdicts"
    assert list(check([row]).problems) == ["no supervised token"]
    row["conversations"][1]["value"] = TAGGED
    assert check([row]).ok


@pytest.mark.parametrize("row", [REGION, CAPTION])
def test_duplicate_ids(check, row):
    assert list(check([row, row]).problems) == ["duplicate id"]


@pytest.mark.parametrize("form", ["%s", "%s\n", "[%s]"])
def test_a_key_that_is_given_twice_is_named(tmp_path, form):
    row = '{"id": "a", "id": "b", "messages": [{"role": "user", "content": "q", "content": "q"}, '
    path = tmp_path / "rows.json"
    path.write_text(form % (row + '{"role": "assistant", "content": "a"}]}'))
    report = validate(path, progress=False)
    assert report.ok
    assert {note for note in report.notes if "twice" in note} == {TWICE.format(k) for k in ("content", "id")}
    with pytest.raises(UserError, match=r"the key '(id|content)' is given twice"):
        read_json(path)


def test_a_report_steers_no_terminal(tmp_path):
    path = tmp_path / "a\x1b[31m.jsonl"
    path.write_text(json.dumps({"messages": [], "x\x1b[2J": 1, "completion": "\x1b]0;"}) + "\n")
    page = io.StringIO()
    Console(file=page, width=200).print(validate(path, progress=False))
    assert "\x1b" not in page.getvalue() and "\\u001b[31m" in page.getvalue()
