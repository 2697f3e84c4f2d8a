import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from vlm_sft_rl.data.collators import RegionCollator
from vlm_sft_rl.data.rows import (
    preference_row,
    question_row,
    question_text,
    read_regions,
    read_rows,
    region_row,
    sft_row,
    strip_none,
    typed_messages,
)
from vlm_sft_rl.errors import RowError, UserError


def turns(*values):
    return [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)]


def contents(row):
    return [(m["role"], m["content"]) for m in row["messages"]]


TYPED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.mark.parametrize(
    "raw",
    [
        {"id": 7, "image": "a.png", "conversations": turns("<image>\nWhat?", "A cat.")},
        {"id": "7", "images": ["a.png"], "messages": TYPED},
        {"id": "7", "images": ["a.png"], "prompt": "<image>\nWhat?", "completion": "A cat."},
        {"id": "7", "image": ["a.png"], "question": "<image>\nWhat?", "answer": "A cat."},
    ],
)
def test_the_four_schemas_give_the_same_row(raw):
    row = sft_row(raw, "f:1")
    assert contents(row) == [("user", "<image>\nWhat?"), ("assistant", "A cat.")]
    assert (row["id"], row["images"], row["source"]) == ("7", ["a.png"], "f:1")
    assert sft_row(row, row["source"]) == row


def test_the_published_tagged_schema():
    marked = {"A_type": "general_answer", "hint": "a red blender"}
    talk = turns("<image>\nWhat is there?", "<SPAN> A kettle </CN>.", "Is it on?", "<SPAN> Yes </UN>")
    talk[1] |= marked
    answer = sft_row({"id": "x", "image": "a.png", "conversations": talk}, "f:1")["messages"][1]
    assert (answer["answer_type"], answer["hint"]) == ("general_answer", "a red blender")


def test_keys_that_arrow_filled_in_are_dropped():
    words = [{"type": "text", "text": "Hi", "image": None}]
    messages = [
        {"role": "user", "content": words, "weight": None},
        {"role": "assistant", "content": "Hello", "hint": None, "answer_type": None},
    ]
    row = sft_row({"id": "1", "image": None, "images": None, "messages": messages}, "f:1")
    assert row["images"] == [] and row["messages"][1] == {"role": "assistant", "content": "Hello"}
    assert strip_none([{"a": None, "b": [{"c": None}]}]) == [{"b": [{}]}]


def test_leading_assistant_turn_is_dropped_and_counted(tmp_path, caplog):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"conversations": [{"from": "gpt", "value": "Hi"}, *turns("Q", "A")]}]))
    (row,) = read_rows(path)
    assert contents(row) == [("user", "Q"), ("assistant", "A")] and row["id"] == "a-1"
    assert "leading assistant turn dropped in 1 rows" in caplog.text


HEAVY = {"role": "assistant", "content": "b", "weight": 2}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"text": "x"}, ["unknown row", "conversations"]),
        ({"conversations": "x"}, ["`conversations`", "list of messages"]),
        ({"conversations": [{"from": "bot", "value": "x"}]}, ["`conversations[0]`", "'bot'"]),
        ({"conversations": [{"from": "human", "value": 3}]}, ["`conversations[0]`", "expected text"]),
        ({"conversations": turns("a", "b"), "image": 5}, ["`image`", "5"]),
        ({"conversations": turns("a", "b"), "image": ""}, ["`image`", "Leave the field out"]),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, ["turn 2", "alternate"]),
        ({"messages": [{"role": "user", "content": "a"}, HEAVY]}, ["`messages[1].weight`", "0 or 1"]),
        ({"question": "a", "answer": ["b"]}, ["`answer`", "expected text"]),
    ],
)
def test_errors_name_the_place_and_the_field(raw, words):
    with pytest.raises(RowError) as caught:
        sft_row(raw, "some.json:12")
    assert all(word in str(caught.value) for word in ["some.json:12", *words])


def question(text, answer, images):
    return sft_row({"id": "1", "images": images, "question": text, "answer": answer}, "f:3")


def test_placeholders_become_typed_content():
    row = question("See <image> and\n<image>", "x", ["a", "b"])
    image = {"type": "image"}
    see, also = {"type": "text", "text": "See "}, {"type": "text", "text": " and"}
    assert typed_messages(row)[0]["content"] == [see, image, also, image]
    row["messages"][0]["content"] = "What?"
    assert [p["type"] for p in typed_messages(row)[0]["content"]] == ["image", "image", "text"]


@pytest.mark.parametrize(
    ("text", "answer", "images"),
    [("<image> <image>", "x", ["a"]), ("<image>", "x", []), ("q", "an <image>", ["a"])],
)
def test_placeholder_mismatch(text, answer, images):
    with pytest.raises(RowError, match="f:3") as caught:
        typed_messages(question(text, answer, images))
    assert caught.value.kind == "placeholder mismatch"


def region(box=(1, 2, 30, 40), **fields) -> dict:
    return {"id": "a", "image": "a.png", "width": 100, "height": 80, "box": list(box), **fields}


TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
MEDIA = [
    ("imgs", ["a.png"]),
    ("img", "a.png"),
    ("Image", "a.png"),
    ("IMAGES", ["a.png"]),
    ("image_path", "a"),
    ("imagePaths", ["a"]),
    ("image_url", {"url": "http://x/a"}),
    ("input_image", b"\x89PNG"),
    ("picture", {"bytes": b"\x89PNG"}),
    ("photos", ["a"]),
    ("videos", ["v.mp4"]),
    ("video", "v"),
    ("audio_file", "s.wav"),
    ("pixel_values", [[0.5]]),
    ("file_name", "a.png"),
    ("screenshot", "https://x.org/a.jpg"),
    ("base64", "iVBORw0KGgo="),
]
KINDS = {
    "sft": (sft_row, {"messages": TALK}),
    "question": (question_row, {"question": "q", "answer": "a"}),
    "preference": (preference_row, {"prompt": "q", "chosen": "a", "rejected": "b"}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "value"), MEDIA, ids=[name for name, _ in MEDIA])
def test_pictures_under_another_name_are_refused_with_the_cure(kind, name, value):
    read, row = KINDS[kind]
    with pytest.raises(RowError, match=f"`{name}`.*Rename it to `images` .*--map images={name}"):
        read({**row, name: value}, "f:1")


def test_pictures_inside_of_messages_under_another_name():
    for turn in ({"images": ["a.png"]}, {"image": "a.png"}):
        with pytest.raises(RowError, match=r"`messages\[0\].image.*the row's `images`"):
            sft_row({"messages": [TALK[0] | turn, TALK[1]]}, "f:1")
    parts = [{"type": "text", "text": "q", "image": "a.png"}]
    with pytest.raises(RowError, match="a picture in a part of text"):
        sft_row({"messages": [{"role": "user", "content": parts}, TALK[1]]}, "f:1")


@pytest.mark.parametrize(
    "more",
    [
        {"image_id": 17, "num_images": 2, "video": None, "imgs": [], "audio": "", "image_size": [3, 4]},
        {"images": ["coco/a.png"], "image_path": "old/a.png", "image_id": "a.png", "mask": "m.png"},
        {"image": {"bytes": b"x"}, "image_path": "train/1.png"},  # as RLAIF-V has it
    ],
)
def test_names_and_old_paths_of_pictures_lose_nothing(more):
    assert sft_row({"messages": TALK, **more}, "f:1")


@pytest.mark.parametrize("kind", KINDS)
def test_one_picture_or_a_list_under_either_name(kind):
    read, row = KINDS[kind]
    for more in (
        {"image": "a.png"},
        {"images": "a.png"},
        {"images": ["a.png"]},
        {"image": ["a.png"], "images": []},
    ):
        assert read({**row, **more}, "f:1")["images"] == ["a.png"]
    assert read({**row, "image": {"path": "a.png", "bytes": None}}, "f:1")["images"] == ["a.png"]
    with pytest.raises(RowError, match="`image` and `images` disagree"):
        read({**row, "image": "a.png", "images": ["b.png"]}, "f:1")
    for data, words in (("iVBORw0=", "holds text"), ([137, 80], "holds a list")):
        with pytest.raises(RowError, match=f"{words}.*give its path"):
            read({**row, "image": {"bytes": data}}, "f:1")


def test_pictures_stand_in_the_row_or_in_its_messages():
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "q"}]
    row = {"messages": [{"role": "user", "content": parts}, TALK[1]]}
    assert (
        sft_row(row, "f:1")["images"] == sft_row({**row, "images": ["a.png"]}, "f:1")["images"] == ["a.png"]
    )
    with pytest.raises(RowError, match="in one place"):
        sft_row({**row, "images": ["b.png"]}, "f:1")


def test_what_means_the_same_elsewhere_is_taken():
    row = sft_row({"system": "Be brief.", "messages": [*TALK, TALK[0], TALK[1] | {"loss": False}]}, "f:1")
    assert contents(row)[0] == ("system", "Be brief.") and row["messages"][-1]["weight"] == 0
    assert sft_row({"system": "S", "messages": [{"role": "system", "content": "S"}, *TALK]}, "f:1")
    implicit = {"chosen": TALK, "rejected": [TALK[0], {"role": "assistant", "content": "b"}]}
    assert preference_row(implicit, "f:1")["prompt"] == TALK[:1]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (
            {"messages": TALK, "conversations": turns("x", "y")},
            "several conversations.*`conversations`.*`messages`",
        ),
        ({"messages": TALK, "question": "q", "answer": "a"}, "several conversations"),
        ({"messages": [{"role": "system", "content": "a"}, *TALK], "system": "b"}, "`system` differs"),
        ({"messages": TALK, "tools": [{"name": "f"}]}, "`tools`: tool calls"),
        ({"messages": [TALK[0], TALK[1] | {"tool_calls": [{}]}]}, r"`messages\[1\].tool_calls`"),
        ({"messages": [TALK[0] | {"loss": True}, TALK[1]]}, "Loss is on answers alone"),
        ({"messages": [TALK[0], TALK[1] | {"weight": 1, "loss": False}]}, "must say the same"),
        ({"messages": [TALK[0], TALK[1] | {"weight": True}]}, "expected 0 or 1, found True"),
        ({"messages": [TALK[0], TALK[1] | {"doubts": [0.5, 2]}]}, "expected a list of numbers from 0 to 1"),
        ({"messages": [TALK[0], TALK[1] | {"weight": float("nan")}]}, "expected 0 or 1, found nan"),
        ({"messages": [{"role": ["user"], "content": "x"}, TALK[1]]}, r"role \['user'\] is not one of"),
        ({"messages": [TALK[0] | {"from": "gpt"}, TALK[1]]}, "`from` and `role` differ"),
        ({"messages": [TALK[0] | {"value": "r"}, TALK[1]]}, "`value` and `content` differ"),
        ({"messages": TALK, "id": [1]}, "field `id`"),
        ({"messages": [TALK[0], TALK[1] | {"answer_type": "attempt"}]}, "attempt without a correction"),
        (
            {"chosen": "a", "rejected": "b", "prompt": "q"},
            "a preference row, for the method reflection_dpo; expected a SFT",
        ),
        (region(), "this is a region row"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(raw, words):
    with pytest.raises(RowError, match=words):
        sft_row(raw, "f:1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected": " a\n"}, "are equal"),
        ({"rejected": " "}, "without text"),
        ({"chosen": TALK}, "begin and end with the assistant"),
        ({"prompt": [*TALK]}, "turn 3 is by the assistant"),
        ({"prompt": None, "question": "q"}, "no field `prompt`, but `question`"),
        ({"pair_weight": float("nan")}, "`pair_weight` must be a number >= 0, found nan"),
        ({"pair_weight": float("inf")}, "`pair_weight`"),
        ({"pair_weight": True}, "`pair_weight`"),
        (
            {"chosen": [TALK[1] | {"supervise": "verdicts"}]},
            "`supervise` is verdicts; a pair takes `all` and",
        ),
        ({"rejected": [TALK[1] | {"content": "no", "doubts": []}]}, "`doubts` belong to SFT rows"),
        ({"prompt": "<image>"}, "1 <image> placeholders but 0 images"),
        ({"messages": TALK}, "`messages` beside `chosen`"),
        ({"chosen": [TALK[1] | {"weight": 0}]}, "weight 0 in a pair"),
    ],
)
def test_bad_pairs(change, words):
    with pytest.raises(RowError, match=words):
        preference_row({"prompt": "q", "chosen": "a", "rejected": "b", **change}, "f:1")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": float("nan")}, "field `answer`: expected a finite number"),
        ({"truth": {"x": [float("inf")]}}, r"field `truth.x\[0\]`"),
        ({"answer": True}, "field `answer`"),
        ({"answer": None}, "without `answer` or any other truth"),
        ({"question": "<image> q"}, "1 <image> placeholders but 0 images"),
        ({"choices": ["B. x", "A. y"], "answer": "A"}, "their own letters are B, A"),
        ({"choices": ["x", "x"], "answer": "x"}, "means the choices A and B"),
        ({"system": "s"}, "no system turn"),
        ({"answer": "a <SPAN> b"}, "field `answer`: <SPAN>"),
    ],
)
def test_bad_questions(change, words):
    with pytest.raises(RowError, match=words):
        question_row({"question": "q", "answer": "a", **change}, "f:1")


@pytest.mark.parametrize("name", ["options", "Options", "answer_choices", "candidates", "choice", "A"])
@pytest.mark.parametrize("read", [question_row, sft_row])
def test_choices_under_another_name_are_refused(name, read):
    raw = {"question": "q", "answer": "A", name: ["cup", "sun"], "B": "sun"}
    with pytest.raises(RowError, match=f"field `{name}` looks like the choices .* --map choices={name}"):
        read(raw, "f:1")
    read(raw | {"choices": ["cup", "sun"]}, "f:1")  # a copy of them


@pytest.mark.parametrize(
    ("choices", "answer", "asked"),
    [
        (["A. cup", "B. sun"], "cup", "(A) cup (B) sun"),
        (["C. elegans", "mouse"], "C. elegans", "(A) C. elegans (B) mouse"),
        (["(A) cup", "sun"], "cup", "(A) cup (B) sun"),
        (["A. thaliana", "mouse"], "B", "(A) A. thaliana (B) mouse"),
        (["B", "A"], "A", "(A) B (B) A"),
        (["C", "D"], "C", "(A) C (B) D"),
    ],
)
def test_letters_of_choices(choices, answer, asked):
    assert question_text(question_row({"question": "q", "answer": answer, "choices": choices}, "f:1")) == (
        f"q Options: {asked}"
    )


@pytest.mark.parametrize(
    "name", ["loss", "weight", "loss_mask", "loss_scale", "train", "trainable", "do_train"]
)
def test_what_steers_the_loss_elsewhere_is_refused(name):
    with pytest.raises(RowError, match=f"field `{name}` is not read here"):
        sft_row({"messages": TALK, name: 0}, "f:1")
    with pytest.raises(RowError, match=f"field `{name}` is not read here"):
        preference_row({"prompt": "q", "chosen": "a", "rejected": "b", name: 0}, "f:1")
    if name not in ("loss", "weight"):
        with pytest.raises(RowError, match=rf"field `messages\[1\].{name}` is not read here"):
            sft_row({"messages": [TALK[0], TALK[1] | {name: False}]}, "f:1")
    assert question_row({"question": "q", "answer": "a", name: 0.5}, "f:1")[name] == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rejected_images", ["b.png"]),
        ("solution_image", "b.png"),
        ("choice_images", ["b.png", "c.png"]),
        ("meta", {"image": "b.png"}),
        ("extra_info", {"x": [{"images": ["b.png"]}]}),
        ("url", "https://x/b.png?size=2"),
    ],
)
def test_further_pictures_are_not_lost(field, value):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", field: value}
    talk = {"messages": TALK, field: value}
    beside = {"image": "a.png"} if "image" in field else {}
    for read, raw in (
        (preference_row, pair),
        (sft_row, talk),
        (question_row, {"question": "q", "answer": "a", field: value}),
    ):
        with pytest.raises(RowError, match=f"field `{field}` looks like a picture"):
            read(raw | beside, "f:1")
    assert sft_row({"messages": TALK, "images": ["x/b.png"], "orig_image_name": "b.png"}, "f:1")


def test_a_picture_with_a_second_one_in_it_is_refused():
    with pytest.raises(RowError, match=r"field `images\.mask`|would be lost"):
        sft_row({"messages": TALK, "images": [{"path": "a.png", "mask": "b.png"}]}, "f:1")
    assert sft_row({"messages": TALK, "images": [{"path": "a.png", "width": 3}]}, "f:1")["images"] == [
        "a.png"
    ]


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ("<image>\n<video>\nWhat?", "<video>"),
        ("<Image>\nWhat?", "<Image>"),
        ("<img>What?", "<img>"),
        ("What?\n<audio>", "<audio>"),
        ("<image_1> and <image_2>", "<image_1>"),
        ("<image 1>", "<image 1>"),
        ("see <|image_pad|>", "<|image_pad|>"),
        ("Picture 1: <img>im/a.png</img>", "<img>im/a.png</img>"),
        ("<ImageHere>", "<ImageHere>"),
    ],
)
def test_marks_of_other_systems_are_refused(text, mark):
    for images in ([], ["a.png"]):
        with pytest.raises(RowError, match=re.escape(repr(mark))):
            typed_messages(sft_row({"question": text, "answer": "a", "images": images}, "f:1"))


@pytest.mark.parametrize(
    "text", ["What is <video> for?", "Mend it:\n<img src='a'>\n<video>\n</video>", "<b>x</b>", "a < image"]
)
def test_markup_in_a_question_is_no_mark(text):
    assert typed_messages(sft_row({"question": text, "answer": "a"}, "f:1"))[0]["content"][0]["text"] == text


def test_a_question_is_asked_with_its_choices():
    raw = {"id": "1", "question": "Which?", "choices": ["(A) cat", "(B) dog"], "answer": "B", "unit": "pet"}
    assert contents(sft_row(raw, "f:1"))[0] == ("user", "Which? (Unit: pet) Options: (A) cat (B) dog")
    assert contents(sft_row({"question": " q ", "answer": "a"}, "f:1"))[0] == ("user", " q ")


def test_numbers_of_question_rows_become_text():
    raw = {"id": 3, "image": "a.png", "question": "How many?", "answer": 4, "unit": None, "grade": 2}
    row = {"id": "3", "question": "How many?", "answer": "4", "grade": 2, "images": ["a.png"]}
    assert question_row(raw, "f:1") == row
    assert contents(sft_row(raw, "f:1"))[1] == ("assistant", "4")


def test_elements_that_are_not_objects(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[[1]]")
    with pytest.raises(UserError, match="row 1: expected a JSON object"):
        list(read_rows(path))


def test_rows_and_tags_do_not_import_torch():
    code = "import sys, vlm_sft_rl.data.rows, vlm_sft_rl.data.tags; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- Region rows ---


@pytest.mark.parametrize(
    "row, message",
    [
        (region(box=(10, 10, 5, 20)), "inside an image of 100 x 80"),
        (region(box=(50, 50, 120, 60)), "--box-format xywh"),
        (region(box=(0.1, 0.2, 0.5, 0.9)), "multiply them by its width and height"),
        (region(box=(10, 10, 10.5, 20)), r"less than a pixel wide or high; boxes are in pixels\.$"),
        (region(category=["cup"]), "field `category`: expected text"),
        (region(crowds="1"), "field `crowds`"),
        (region(crowds=-1), "field `crowds`"),
        (region(box=(1, 2, 3)), "four numbers"),
        (region(box=(1, 2, "3", 4)), "four numbers"),
        (region(box=(1, 2, float("nan"), 4)), "four numbers"),
        (region(image=["a.png", "b.png"]), "field `images`: expected one image"),
        (region(image=[["a.png"]]), "field `image`"),
        (region(image_path="b.png"), "`image_path`"),
        (region(width=100.5), "whole number"),
        (region(height=float("nan")), "field `height`"),
        (region(box=(1, 2, 30, True)), "four numbers"),
        (region(box=(1, 2, 30, 10**400)), "four numbers"),
        (region(question="q"), "this is a question row"),
        (region(width=0), "field `width`: expected a whole number of pixels"),
        (region(expressions=["left cat", " "]), "field `expressions`: expected texts"),
        ({"id": "a", "box": [1, 2, 3, 4]}, "image, width, height missing"),
    ],
)
def test_bad_regions_say_what_is_wrong(row, message):
    with pytest.raises(RowError, match=message):
        region_row(row, "file:3")


def test_files_are_read_with_places(tmp_path):
    path = tmp_path / "regions.jsonl"
    path.write_text(json.dumps(region()) + "\n" + json.dumps(region(box=(9, 9, 9, 9))) + "\n")
    with pytest.raises(RowError, match=r"regions.jsonl:2"):
        read_regions(path)
    path.write_text("")
    with pytest.raises(UserError, match="no region rows"):
        read_regions(path)


def test_boxes_are_not_rounded():
    assert region_row(region(box=(1.23456, 2, 30, 40)))["box"] == [1.23456, 2.0, 30.0, 40.0]


def test_the_collator_opens_images_and_refuses_another_size(tmp_path):
    Image.new("L", (100, 80)).save(tmp_path / "a.png")
    row = RegionCollator(tmp_path)([region()])["rows"][0]
    assert row["picture"].mode == "RGB" and row["box"] == [1.0, 2.0, 30.0, 40.0]
    with pytest.raises(RowError, match="80 x 100, but the image has 100 x 80 pixels"):
        RegionCollator(tmp_path)([region(width=80, height=100)])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_nested_too_deep_are_one_message(kind):
    read, row = KINDS[kind]
    deep = 1
    for _ in range(600):
        deep = [deep, 1]
    with pytest.raises(RowError, match=r"f:1: .*(nested too deep|field `id`)"):
        read({**row, "id": deep}, "f:1")
    if kind != "sft":  # a field that SFT does not read is not looked through
        with pytest.raises(RowError, match=r"f:1: .*nested too deep"):
            read({**row, "note": deep}, "f:1")
