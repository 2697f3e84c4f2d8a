"""`data tag` from a file of plain answers to rows that validate, with a teacher and a checker behind real endpoints."""

import io
import json
import re

import pytest
from endpoint_server import EndpointServer
from json_lines import read_lines, write_lines
from PIL import Image
from rich.console import Console

from vlm_sft_rl.data.images import open_image
from vlm_sft_rl.data.tagging.build import REPEATED
from vlm_sft_rl.data.tagging.config import TagConfig
from vlm_sft_rl.data.tagging.negatives import fault, read_teacher
from vlm_sft_rl.data.tagging.phrases import VocabularyTagger
from vlm_sft_rl.data.tagging.pipeline import EMPTY, UNDECIDED, UNDESCRIBED, UNTRUE, tag, tag_with, view
from vlm_sft_rl.data.tagging.verdicts import Checker, EndpointChecker, question_about
from vlm_sft_rl.data.tags import spans, strip_tags
from vlm_sft_rl.data.validate import validate
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.teacher import EndpointClient

NOUNS = ["dog", "cat", "sofa", "table", "cup", "plate", "moon", "star"]
QUESTION = "Is there {phrase}?"


def source(folder, count=12):
    rows = []
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
        first, second = NOUNS[i % 8], NOUNS[(i + 1 + i % 3) % 8]
        turns = [
            ("<image>\nDescribe the image.", f"There is a {first} and a red {second}."),
            (f"Is there a {first}?", "Yes"),
            ("How many things are there?", "There are two things."),
        ]
        talk = [{"from": who, "value": text} for q, a in turns for who, text in (("human", q), ("gpt", a))]
        rows.append({"id": f"r{i}", "image": f"{i}.png", "conversations": talk})
    (folder / "plain.json").write_text(json.dumps(rows))
    return folder / "plain.json"


def run(folder, checker=None, client=None, **settings):
    path, tagger = folder / "tagged.jsonl", VocabularyTagger(NOUNS)
    config = TagConfig(**settings)
    return tag(folder / "plain.json", path, tagger, config, checker=checker, client=client), read_lines(path)


def answers(row):
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def test_rows_are_tagged_true_to_the_text_and_validate(tmp_path):
    source(tmp_path)
    report, rows = run(tmp_path, negatives=2)
    plain = {
        r["id"]: [t["value"] for t in r["conversations"] if t["from"] == "gpt"]
        for r in rows_of_json(tmp_path)
    }
    for row in rows:
        identity, kind = row["id"].split("-")
        for text, original in zip(answers(row), plain[identity], strict=True):
            last = spans(text)[-1] if spans(text) else None
            if kind == "pos":
                assert strip_tags(text) == original and all(s.confident for s in spans(text))
            elif last is not None and not last.confident:
                assert text.endswith("</UN>") and all(s.confident for s in spans(text)[:-1])
                before = strip_tags(text[: text.rindex("<SPAN>")]).rstrip()
                assert original.startswith(before) and last.phrase not in original
    assert [row["id"] for row in rows[:3]] == ["r0-pos", "r0-neg0", "r0-neg1"] and len(rows) == 36
    assert rows[0]["messages"][1]["hint"] == spans(rows[1]["messages"][1]["content"])[-1].phrase
    kinds = [m["answer_type"] for m in rows[0]["messages"] if m["role"] == "assistant"]
    assert kinds == ["general_answer", "yes_no", "count"]
    checked = validate(tmp_path / "tagged.jsonl", progress=False)
    assert checked.ok, checked.problems
    assert report["rows"] == {"positive": 12, "negative": 24}
    assert report["phrases"]["unconfident"] == checked.tags["unconfident"]
    assert report["answer_types"]["yes_no"] == {"answers": 12, "negatives": 24, "by_kind": {"yes_no": 24}}
    assert json.loads((tmp_path / "tagged.jsonl.report.json").read_text()) == report
    assert view(report)


def rows_of_json(folder):
    return json.loads((folder / "plain.json").read_text())


def test_draws_depend_on_seed_and_row_alone(tmp_path):
    source(tmp_path)
    _, first = run(tmp_path)
    assert run(tmp_path)[1] == first
    assert run(tmp_path, seed=1)[1] != first
    rows = rows_of_json(tmp_path)
    (tmp_path / "plain.json").write_text(json.dumps(rows[::-1]))
    _, turned = run(tmp_path)
    assert sorted(turned, key=lambda r: r["id"]) == sorted(first, key=lambda r: r["id"])


def test_negatives_are_absent_from_all_that_is_said_of_the_image(tmp_path):
    source(tmp_path)
    _, rows = run(tmp_path, kinds="object", negatives=3)
    for row in rows:
        wrong = [s.phrase.split()[-1] for text in answers(row) for s in spans(text) if not s.confident]
        caption = strip_tags(
            answers(rows[[r["id"] for r in rows].index(row["id"].split("-")[0] + "-pos")])[0]
        )
        assert not any(noun in caption for noun in wrong)


def test_objects_of_the_images(tmp_path):
    source(tmp_path)
    # image 0 says dog and cat, but only a dog is there; everything is known to be in image 1
    lines = [
        {"image": "./0.png", "objects": ["dog"]},
        *({"image": f"{i}.png", "category": n} for i in range(1, 12) for n in NOUNS),
    ]
    write_lines(tmp_path / "objects.jsonl", lines)
    report, rows = run(tmp_path, objects=tmp_path / "objects.jsonl", kinds="object")
    assert not any(row["id"].startswith("r0-") for row in rows)
    assert report["rows"] == {"positive": 11} and report["notes"][UNTRUE] == 1
    (tmp_path / "objects.jsonl").write_text('{"image": "0.png"}\n')
    with pytest.raises(UserError, match=r"objects.jsonl:1: field `objects`"):
        run(tmp_path, objects=tmp_path / "objects.jsonl")


def swap(body):
    """A teacher that makes the last phrase a teapot; every third answer is of no use."""
    text = body["messages"][-1]["content"]
    text = text if isinstance(text, str) else text[-1]["text"]
    number, phrase = re.findall(r"\[(\d+): ([^\]]+)\]", text)[-1]
    if "moon" in text:
        return "I cannot do that."
    if "cup" in text:
        return json.dumps({"reason": "-", "phrase": int(number), "replacement": phrase})
    return (
        "```json\n"
        + json.dumps({"reason": "r", "phrase": int(number), "replacement": "a red teapot"})
        + "\n```"
    )


def test_teacher(tmp_path):
    source(tmp_path)

    def taught(server, **options):
        with EndpointClient(
            server.url, "t", ledger=tmp_path / "ledger.jsonl", backoff=0.01, **options
        ) as client:
            return run(tmp_path, client=client)

    with EndpointServer(swap, fail_rate=0.3) as server:
        report, rows = taught(server, attempts=12, input_price=1.0)
        kinds = report["answer_types"]["general_answer"]["by_kind"]
        wrong = [spans(answers(row)[0])[-1].phrase for row in rows if row["id"].endswith("-neg0")]
        assert wrong.count("a red teapot") == kinds["teacher"] >= 4
        assert sum(kinds.values()) == 12 and report["not_used"]["teacher: same as the positive"] >= 1
        assert report["teacher"]["answered"] == 12 and report["teacher"]["cost"] > 0
        images = [p for p in server.bodies[0]["messages"][-1]["content"] if p["type"] == "image_url"]
        assert len(images) == 1 and validate(tmp_path / "tagged.jsonl", progress=False).ok
        calls = server.calls
        again, same = taught(server, input_price=1.0)
        assert same == rows and server.calls == calls and again["teacher"]["cached"] == 12
        assert again["teacher"]["cost"] == report["teacher"]["cost"]


def test_checker_finds_what_is_not_there(tmp_path):
    source(tmp_path)

    def eye(body):
        return "No." if "a cat" in body["messages"][-1]["content"][-1]["text"] else "Yes"

    with EndpointServer(eye) as server:
        with EndpointClient(server.url, "c") as client:
            report, rows = run(tmp_path, checker=EndpointChecker(client, QUESTION, tmp_path))
        calls = server.calls
        with EndpointClient(server.url, "c") as client:
            assert run(tmp_path, checker=EndpointChecker(client, QUESTION, tmp_path))[1] == rows
        assert server.calls == calls, "verdicts are kept"
    cut = {row["id"]: row for row in rows if row["id"].endswith("-found")}
    assert set(cut) == {
        f"r{i}-found" for i, r in enumerate(rows_of_json(tmp_path)) if "a cat" in str(r["conversations"][1])
    }
    assert cut and report["answer_types"]["general_answer"]["by_kind"]["found"] == len(cut)
    for row in cut.values():
        assert answers(row)[0].endswith("<SPAN> a cat </UN>") and answers(row)[1] == "<SPAN> Yes </CN>"
    assert not any("cat </CN>" in answers(row)[0] for row in rows if "red cat" not in answers(row)[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("The cat", "Is there a cat?"), ("a red dog", "Is there a red dog?"), ("two cups", "Are there two cups?"),
     ("the cups", "Are there cups?"), ("A star", "Is there a star?")],
)  # fmt: skip
def test_questions_about_phrases(text, expected):
    assert question_about(next(iter(VocabularyTagger(NOUNS).tag([text])))[0], QUESTION) == expected


class Parrot(Checker):
    def answers(self, images, questions):
        return list(images)


def test_verdicts():
    phrase = next(iter(VocabularyTagger(NOUNS).tag(["a cat"])))[0]
    claims = [(answer, phrase) for answer in ("Yes.", " no, there", "Maybe", "None", "")]
    assert Parrot("parrot", QUESTION).verdicts(claims) == [True, False, None, None, None]
    claims = [(answer, phrase) for answer in ("<think>No.</think>\nYes", "<think>Yes", "<answer>no</answer>")]
    assert Parrot("parrot", QUESTION).verdicts(claims) == [True, None, False]
    with pytest.raises(UserError, match=r"has no \{phrase\} in it"):
        Parrot("parrot", "Is it there?")


class Interrupted(Exception):
    pass


class Dying(VocabularyTagger):
    left = 10**9

    def tag(self, answers):
        for phrases in super().tag(answers):
            if self.left <= 0:
                raise Interrupted
            self.left -= 1
            yield phrases


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("vlm_sft_rl.data.tagging.pipeline.BATCH_ROWS", 2)
    source(tmp_path)
    _, whole = run(tmp_path)
    target = tmp_path / "again.jsonl"
    dying = Dying(NOUNS)
    dying.left = 17  # answers: five rows and two answers of the sixth
    with pytest.raises(Interrupted):
        tag(tmp_path / "plain.json", target, dying)
    (phrases,) = (tmp_path / "again.jsonl.work").glob("phrases-*.jsonl")
    assert len(phrases.read_text().splitlines()) == 4 and not target.exists()
    phrases.write_text(phrases.read_text() + '{"phrases": {"1": [[0')
    dying.left, before = 10**9, 10**9
    tag(tmp_path / "plain.json", target, dying)
    assert read_lines(target) == whole and before - dying.left == 24, "only the rows that were missing"


def test_rows_without_an_answer_stay_in_their_place(tmp_path):
    question = {"role": "user", "content": "Describe."}
    answer = {"role": "assistant", "content": "A dog and a cat."}
    talks = [[question], [question, answer], [question], [question], [question, answer], [question]]
    rows = [{"id": str(i), "messages": talk} for i, talk in enumerate(talks)]
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    tagged = run(tmp_path, kinds="yes_no")[1]
    assert [row["id"] for row in tagged] == [f"{i}-pos" for i in range(6)]
    assert [answers(row) for row in tagged[:2]] == [[], ["<SPAN> A dog </CN> and <SPAN> a cat </CN>."]]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kinds": "colour,colr"}, "Unknown kinds of negatives: colr"),
        ({"negatives": 0}, "negatives = 0, expected an integer >= 1"),
        ({"teacher": "http://h"}, "--teacher and --teacher-model go together"),
        ({"checker": "http://h"}, "needs --checker-model"),
    ],
)
def test_settings_that_do_not_go_together(settings, complaint):
    with pytest.raises(UserError, match=complaint):
        TagConfig(**settings).check()


def test_errors(tmp_path):
    source(tmp_path)
    with pytest.raises(UserError, match="same file"):
        tag(tmp_path / "plain.json", tmp_path / "plain.json", VocabularyTagger(NOUNS))
    run(tmp_path)
    with pytest.raises(UserError, match=r"tagged.jsonl:1: message 2 has the tag <SPAN> already"):
        tag(tmp_path / "tagged.jsonl", tmp_path / "twice.jsonl", VocabularyTagger(NOUNS))


def test_rows_of_one_id_are_told_apart_and_counted(tmp_path):
    source(tmp_path, 3)
    rows = rows_of_json(tmp_path)
    whole = {row["id"]: row for row in run(tmp_path)[1]}
    for row, name in zip(rows, ("r0", "r0", "r0~2"), strict=True):
        row["id"] = name
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    report, tagged = run(tmp_path)
    assert [row["id"] for row in tagged if row["id"].endswith("-pos")] == ["r0-pos", "r0~2-pos", "r0~2~2-pos"]
    assert report["notes"][REPEATED] == 2 and report["rows"] == {"positive": 3, "negative": 3}
    assert [answers(row) for row in tagged if row["id"].endswith("-pos")] == [
        answers(row) for name, row in whole.items() if name.endswith("-pos")
    ]
    assert validate(tmp_path / "tagged.jsonl", progress=False).ok


def test_answers_without_text_are_left_out_and_counted(tmp_path):
    source(tmp_path, 3)
    rows = rows_of_json(tmp_path)
    rows[1]["conversations"][3]["value"] = " \n"
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    report, tagged = run(tmp_path)
    assert {row["id"].split("-")[0] for row in tagged} == {"r0", "r2"} and report["notes"][EMPTY] == 1


@pytest.mark.parametrize(("answer", "warned"), [("No", True), ("Yes", False)])
def test_a_checker_that_denies_everything_is_said(tmp_path, answer, warned):
    class Same(Checker):
        def answers(self, images, questions):
            return [answer] * len(questions)

    source(tmp_path, 4)
    report, _ = run(tmp_path, checker=Same("same", QUESTION, tmp_path))
    console = Console(width=1000, record=True, file=io.StringIO())
    console.print(view(report))
    assert ("no row is positive" in console.export_text()) == warned == (not report["rows"].get("positive"))


def test_an_image_that_cannot_be_read_is_named_with_its_row(tmp_path):
    class Looks(Checker):
        def answers(self, images, questions):
            return ["Yes" for row in images for image in row if open_image(image, self.image_root)]

    path = source(tmp_path, 4)
    whole = (tmp_path / "3.png").read_bytes()
    (tmp_path / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"plain\.json:4: image '3\.png' .*data validate"):
        run(tmp_path, checker=Looks("looks", QUESTION, tmp_path))
    (tmp_path / "3.png").unlink()
    (tmp_path / "nouns.txt").write_text("\n".join(NOUNS))
    settings = TagConfig(
        nouns=tmp_path / "nouns.txt", checker="no/such/model"
    )  # images are looked for before it is
    with pytest.raises(UserError, match=r"plain\.json:4: image '3\.png' does not exist"):
        tag_with(path, tmp_path / "tagged.jsonl", settings)


def test_tags_in_an_answer_are_met_before_anything_is_asked(tmp_path):
    source(tmp_path, 3)
    rows = rows_of_json(tmp_path)
    rows[2]["conversations"][1]["value"] = "A <SPAN> dog </CN>."
    (tmp_path / "plain.json").write_text(json.dumps(rows))
    with EndpointServer(lambda body: "Yes") as server, EndpointClient(server.url, "c") as client:
        with pytest.raises(UserError, match=r"plain.json:3: message 2 has the tag <SPAN> already"):
            run(tmp_path, checker=EndpointChecker(client, QUESTION, tmp_path))
        assert server.calls == 0


@pytest.mark.parametrize(
    "spoil",
    [lambda t: "", lambda t: t[: t.index("\n") + 1], lambda t: t.replace('"phrases"', '"words"'),
     lambda t: t.replace("[[", "[[999, ", 1), lambda t: t.replace('{"1"', '{"7"', 1), lambda t: t.replace('{"1"', '{"x"', 1),
     lambda t: '{"phrases": {"1": 5}}\n' + t, lambda t: '{"phrases": {"1": [["a", 2, "", "", false, ""]]}}\n' + t],
)  # fmt: skip
def test_a_damaged_work_folder_is_one_message(tmp_path, spoil):
    source(tmp_path)
    run(tmp_path)
    (path,) = (tmp_path / "tagged.jsonl.work").glob("phrases-*.jsonl")
    before = (tmp_path / "tagged.jsonl").read_bytes()
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UserError, match=r"phrases-\w+\.jsonl: ends too soon, or has lines that do not fit"):
        run(tmp_path)
    path.unlink()
    run(tmp_path)
    assert (tmp_path / "tagged.jsonl").read_bytes() == before


def test_phrases_without_a_verdict_are_counted(tmp_path):
    source(tmp_path)

    def eye(body):
        return {"choices": [{"message": {"refusal": "no"}}]} if "cat" in str(body["messages"][-1]) else "Yes"

    with EndpointServer(eye) as server, EndpointClient(server.url, "c") as client:
        report, rows = run(tmp_path, checker=EndpointChecker(client, QUESTION, tmp_path))
    assert report["notes"][UNDECIDED] == report["checker"]["failed"] > 0 and len(rows) == 24


@pytest.mark.parametrize(
    "reply",
    ['{"phrase": true, "replacement": "a cup"}', '{"phrase": 1.0, "replacement": "a cup"}', '{"phrase": 1}', "{" * 5000,
     '{"phrase": ' + "9" * 5000 + "}", '{"phrase": 9, "replacement": "x"}', '{"phrase": 1, "replacement": ["a"]}', "",
     '{"reason": NaN}', "null"],
)  # fmt: skip
def test_a_teacher_s_reply_that_is_none(reply):
    phrases = next(iter(VocabularyTagger(NOUNS).tag(["There is a cat."])))
    assert read_teacher(reply, "Describe.", phrases) is None


@pytest.mark.parametrize("text", ["a \x1b[31mcup", "a\u2028cup", "a cup\x00", "a \u202epuc"])
def test_a_teacher_s_words_that_cannot_be_shown_are_not_learnt(text):
    phrases = next(iter(VocabularyTagger(NOUNS).tag(["There is a cat."])))
    proposal = read_teacher(json.dumps({"phrase": 1, "replacement": text}), "Describe.", phrases)
    assert fault(proposal, set()) == "empty or with breaks"


def test_a_teacher_that_ignores_the_temperature_gives_no_two_negatives(tmp_path):
    source(tmp_path)
    with (
        EndpointServer(swap) as server,
        EndpointClient(server.url, "t") as client,
        pytest.raises(UserError, match="ignores `temperature`"),
    ):
        run(tmp_path, client=client, negatives=2)
    assert not (tmp_path / "tagged.jsonl").exists()


@pytest.mark.parametrize(
    ("objects", "reason"),
    [
        (None, "the file has none"),
        ({"1.png": ["cup"]}, UNDESCRIBED),
        ({"0.png": ["dog"], "1.png": ["cup"]}, UNTRUE),
    ],
)
def test_tagging_that_leaves_no_row_is_an_error(tmp_path, objects, reason):
    rows = [{"question": "q", "answer": "A cup.", "image": "0.png"}]
    write_lines(tmp_path / "plain.json", rows if objects else [])
    truth = [{"image": image, "objects": nouns} for image, nouns in (objects or {}).items()]
    write_lines(tmp_path / "objects.jsonl", truth)
    with pytest.raises(UserError, match=f"no row to tag .*{reason}"):
        run(tmp_path, objects=str(tmp_path / "objects.jsonl") if objects else None)
    assert not (tmp_path / "tagged.jsonl").exists()
