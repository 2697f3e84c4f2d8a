import io
import json
from functools import partial

import families
import pytest
import templates
from PIL import Image
from rich.console import Console

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.marks import IGNORE, closing_weight_mark, verification_ids, verification_mark
from vlm_sft_rl.data.preview import preview, preview_file, preview_tokens
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.regions import region_views

ASKED = {"role": "user", "content": "<image>\nWhat is in the picture?"}
TAGGED = {"role": "assistant", "content": "There is <SPAN> a cat </CN> and <SPAN> a dog </UN>"}
ROW = {
    "id": "r1",
    "images": [Image.new("RGB", (60, 40), "red")],
    "messages": [{"role": "system", "content": "Be brief."}, ASKED, TAGGED],
}
PROCESSOR = templates.processor("chatml", "bpe")
IDS = verification_ids(PROCESSOR.tokenizer)
MARKS = [partial(verification_mark, ids=IDS), partial(closing_weight_mark, ids=IDS, weight=2.0)]


def printed(row, processor, marks=()):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(preview(row, processor, marks))
    return console.export_text()


def test_every_token_once_with_its_own_loss_and_weight():
    example = VisionCollator(PROCESSOR, marks=MARKS).encode(ROW)
    tokens = list(preview_tokens(example, PROCESSOR))
    index = 0
    for token in tokens:
        assert token.index == index
        for i in range(index, index + token.count):
            assert token.loss == (example.labels[i] != IGNORE) and token.weight == example.weights[i]
        index += token.count
    assert index == len(example.input_ids)
    texts = {
        role: "".join(t.text for t in tokens if t.role == role) for role in ("system", "user", "assistant")
    }
    assert texts["system"] == "Be brief." and texts["user"] == "What is in the picture?"
    assert texts["assistant"].endswith("</UN><|im_end|>")
    assert [t.count for t in tokens if t.role == "image"] == [4]


def test_the_view_says_it_in_plain_text_too():
    text = printed(ROW, PROCESSOR, MARKS)
    for words in ("<image> ×4", "row r1", "</UN>", "assistant", "template", "·a", "between tokens"):
        assert words in text
    masked = next(line for line in text.splitlines() if "d" in line and "|·" in line and " - " in line)
    assert "assistant" in masked


@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl])
def test_real_families(family):
    row = {**ROW, "messages": [ASKED, {"role": "assistant", "content": "A cat."}]}
    assert " ×" in printed(row, family()[1])


def test_a_row_of_a_file_by_position_or_id(tmp_path, capsys):
    PROCESSOR.save_pretrained(tmp_path / "model")
    path = tmp_path / "rows.json"
    rows = [{"id": f"n{i}", "question": "q", "answer": f"<SPAN> a{i} </UN>"} for i in range(3)]
    path.write_text(json.dumps(rows))
    for row in ("1", "n1", 1):
        preview_file(path, tmp_path / "model", row=row)
        out = capsys.readouterr().out
        assert "row n1:" in out and "</UN>" in out
    with pytest.raises(UserError, match="0 to 2"):
        preview_file(path, tmp_path / "model", row="7")
    with pytest.raises(UserError, match="no loadable processor"):
        preview_file(path, tmp_path, row=0)


def shown(folder, rows, capsys, model=None, **options):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    preview_file(path, model or folder / "model", **options)
    return capsys.readouterr().out


def test_pairs_and_questions_are_shown_as_they_are_used(tmp_path, capsys):
    PROCESSOR.save_pretrained(tmp_path / "model")
    prompt = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "and?"},
    ]
    pair = {"id": "p", "prompt": prompt, "chosen": "good", "rejected": "bad", "pair_weight": 0.5}
    text = shown(tmp_path, [{"broken": 1}, pair], capsys, row="p")
    assert "other pair p, weight 0.5, chosen:" in text and "rejected:" in text
    loss = "".join(line for line in text.splitlines() if " yes " in line)
    assert "g" in loss and "first" not in loss.replace("|", "")  # of the prompt nothing is learnt
    question = {"id": "q", "question": "Which?", "choices": ["cat", "dog"], "objects": ["cat"]}
    for row in (question, question | {"answer": "B"}):
        text = "".join(line.split("-  ")[-1].strip() for line in shown(tmp_path, [row], capsys).splitlines())
        assert "(B)" in text.replace("|", "").replace("·", "")


def test_both_questions_about_a_region_are_shown(tmp_path, capsys):
    model = tmp_path / "qwen"
    families.save(*families.qwen2_5_vl(), model)
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    row = {
        "id": "r",
        "image": "a.png",
        "width": 56,
        "height": 56,
        "box": [4, 5, 30, 40],
        "expressions": ["a cup"],
    }
    text = shown(tmp_path, [row], capsys, model, regions=region_views)
    assert "region r, describe:" in text and "0 with loss" in text and "region r, locate:" in text
    with pytest.raises(UserError, match="the image has 56 x 56"):
        shown(tmp_path, [row | {"width": 60}], capsys, model, regions=region_views)
