import json
import pickle
from functools import partial

import families
import pytest
import templates
import torch
from fussy import fussy_processor
from PIL import Image
from torch.utils.data import DataLoader

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.marks import IGNORE, verification_ids, verification_mark, verification_marks
from vlm_sft_rl.errors import RowError, UserError

PICTURES = [Image.new("RGB", (60, 40), c) for c in ("red", "blue", "green")]
KINDS = ["bytes", "bpe", "metaspace"]


def row(*texts, images=0, id="r", **last):
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]
    messages[-1].update(last)
    return {"id": id, "messages": messages, "images": PICTURES[:images]}


ROWS = [
    row("<image>\nWhat is in the picture?", "There is a cat and a dog.", images=1),
    row("Look <image> and <image>", "Yes", "And <image>?", "No, the mat.\nReally.", images=3),
    row("user", "The ünïcode 猫 cat 🐈"),
    row("a", "b", "c", "d", "e", "There"),
]


def supervised(batch, i):
    return batch["input_ids"][i][batch["labels"][i] != IGNORE].tolist()


def answers(row):
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_exactly_the_answers_and_their_end_are_supervised(template, kind):
    processor = templates.processor(template, kind)
    tokenizer, end = processor.tokenizer, templates.END_OF_TURN[template]
    batch = VisionCollator(processor)(ROWS)
    for i, one in enumerate(ROWS):
        text = tokenizer.decode(supervised(batch, i), clean_up_tokenization_spaces=False)
        said = [piece.strip() for piece in text.split(end)]
        assert said == [*answers(one), ""]
        assert supervised(batch, i)[-1] == tokenizer.convert_tokens_to_ids(end)
    on = batch["labels"] != IGNORE
    assert torch.equal(on.float(), batch["loss_weights"])
    assert torch.equal(batch["labels"][on], batch["input_ids"][on])
    assert batch["loss_weights"].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", templates.TEMPLATES)
def test_the_unsupervised_prefix_is_what_generation_starts_from(template, kind):
    """A model trained on the labels must be asked, at inference, from just before the first of them."""
    processor = templates.processor(template, kind)
    collator = VisionCollator(processor)
    one = row("What is in the picture?", "There is a cat and a dog.")
    example = collator.encode(one)
    first = example.turns[0].start
    content = [{"type": "text", "text": one["messages"][0]["content"]}] if collator.renderer.typed else None
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content or one["messages"][0]["content"]}], add_generation_prompt=True
    )
    add = not prompt.startswith("<s>")
    prefix = processor.tokenizer(prompt, add_special_tokens=add)["input_ids"]
    assert example.input_ids[:first] == prefix
    # the header's blank is in the first word's token where the tokenizer merges them
    merged = template in ("vicuna", "llava_1_5") and kind != "bytes"
    text = processor.tokenizer.convert_ids_to_tokens(example.input_ids[first])
    if merged:
        assert text in ("ĠThere", "▁There")


def test_a_header_blank_that_the_generation_prompt_lacks_is_learnt():
    """Without merges the blank of `ASSISTANT: There` is a token of its own, which the model must produce."""
    processor = templates.processor("vicuna", "bytes")
    example = VisionCollator(processor).encode(row("Q", "There"))
    kept = [t for t in example.labels if t != IGNORE]
    assert processor.tokenizer.decode(kept) == " There</s>"


@pytest.mark.parametrize("family", [families.llava, families.qwen2_5_vl])
def test_model_takes_the_batch_and_rows_do_not_see_each_other(family):
    model, processor = family()
    collator = VisionCollator(processor)
    batch = collator(ROWS)
    keys = {"labels", "loss_weights"}
    logits = model(**{k: v for k, v in batch.items() if k not in keys}).logits
    for i, one in enumerate(ROWS):
        alone = collator([one])
        n = int(alone["attention_mask"].sum())
        assert torch.equal(batch["labels"][i, :n], alone["labels"][0])
        assert (batch["labels"][i, n:] == IGNORE).all() and (batch["loss_weights"][i, n:] == 0).all()
        single = model(**{k: v for k, v in alone.items() if k not in keys}).logits
        assert torch.allclose(logits[i, :n], single[0], atol=1e-5)


@pytest.mark.parametrize("family", [templates.llava_next, templates.idefics3, templates.gemma3])
def test_families_that_expand_images_in_their_own_ways(family):
    processor, end = family()
    batch = VisionCollator(processor)(ROWS)
    for i, one in enumerate(ROWS):
        text = processor.tokenizer.decode(supervised(batch, i), clean_up_tokenization_spaces=False)
        assert [piece.strip() for piece in text.split(end)] == [*answers(one), ""]
        assert not any(t in processor.image_token_ids for t in supervised(batch, i))
    lengths = {
        k: v.shape[1] for k, v in batch.items() if k.endswith(("ids", "mask", "labels")) and v.dim() == 2
    }
    assert len(set(lengths.values())) == 1, "tensors that go with the tokens have their length"


def test_collator_survives_being_sent_to_a_worker():
    processor = templates.processor("chatml", "bpe")
    collator = VisionCollator(processor, marks=verification_marks(processor.tokenizer))
    copy = pickle.loads(pickle.dumps(collator))
    one, two = collator(ROWS), copy(ROWS)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_left_padding_and_multiples():
    _, processor = families.llava()
    right = VisionCollator(processor)(ROWS)
    left = VisionCollator(processor, padding_side=None, pad_to_multiple_of=16)(ROWS)
    assert left["labels"].shape[1] % 16 == 0
    for i in range(len(ROWS)):
        assert left["attention_mask"][i, -1] == 1 and supervised(left, i) == supervised(right, i)


def test_weight_zero_messages_have_no_loss():
    one = row("q", "first try", "wrong", "second try")
    one["messages"][1]["weight"] = 0
    processor = templates.processor("chatml", "bpe")
    batch = VisionCollator(processor)([one])
    assert processor.tokenizer.decode(supervised(batch, 0)) == "second try<|im_end|>"


def test_rows_are_not_changed_and_none_keys_are_harmless():
    one = row("<image>\nq", "a", images=1)
    one["messages"][0]["weight"] = None
    before = repr(one)
    VisionCollator(templates.processor("vicuna", "bpe"), hint_probability=1.0)([one])
    assert repr(one) == before


def test_template_that_rewrites_answers_is_refused():
    processor = templates.processor("vicuna", "bpe")
    processor.chat_template = processor.chat_template.replace(
        "part['text']", "part['text'].split('</think>')[-1]"
    )
    with pytest.raises(RowError, match="rewrites"):
        VisionCollator(processor).encode(row("q", "<think>x</think>y"))


def test_processor_without_template():
    processor = templates.processor("vicuna", "bpe")
    processor.chat_template = None
    with pytest.raises(UserError, match="chat_template"):
        VisionCollator(processor)


BAD = {
    "too long": row("<image>\nq", "long " * 100, images=1, id="long"),
    "missing image": {
        "id": "gone",
        "messages": ROWS[0]["messages"],
        "images": ["gone.png"],
        "source": "f.json:9",
    },
    "placeholder mismatch": row("<image><image>", "x", images=1, id="two"),
    "no supervised token": row("q", "a", id="none", weight=0),
    "unbalanced tags": row("q", "a <SPAN> b", id="tags"),
    "format": {"id": "strange", "text": "x"},
}


def strict(**kwargs):
    processor = templates.processor("vicuna", "bpe")
    mark = partial(verification_mark, ids=verification_ids(processor.tokenizer))
    return VisionCollator(processor, marks=[mark], max_length=100, **kwargs)


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_errors_that_name_the_row(kind):
    with pytest.raises(RowError) as caught:
        strict()([ROWS[0], BAD[kind]])
    assert caught.value.kind == kind
    assert BAD[kind].get("source", BAD[kind]["id"]) in str(caught.value)


def test_bad_rows_are_skipped_and_recorded_once(tmp_path):
    rejects = tmp_path / "rejects.jsonl"
    collator = strict(on_bad_row="skip", rejects_path=rejects)
    good = strict()(ROWS[:2])
    for _ in range(2):
        batch = collator([ROWS[0], *BAD.values(), ROWS[1]])
        assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in good.items()}
        assert all(torch.equal(batch[k], good[k]) for k in good)
    records = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert {r["id"]: r["kind"] for r in records} == {one["id"]: kind for kind, one in BAD.items()}
    assert len(records) == len(BAD) and all(r["reason"] and r["source"] for r in records)
    assert collator.rejected == dict.fromkeys(BAD, 1)


def test_a_batch_of_bad_rows_gives_a_stand_in_without_loss(tmp_path):
    batch = strict(on_bad_row="skip", rejects_path=tmp_path / "r.jsonl")([BAD["too long"]])
    assert (batch["labels"] == IGNORE).all() and batch["loss_weights"].sum() == 0
    assert "pixel_values" not in batch


def test_rows_that_go_alone_but_not_together_are_split_from_their_batch(tmp_path):
    first, text, last = (
        row("q", "a cat", images=1, id="1"),
        row("q", "no", id="2"),
        row("q", "a dog", images=2, id="3"),
    )
    fussy = partial(VisionCollator, fussy_processor())
    with pytest.raises(
        RowError, match=r"row 2: the processor takes it alone but not beside row 1.*batch_size: 1"
    ):
        fussy()([first, text, last])
    collator = fussy(on_bad_row="skip", rejects_path=tmp_path / "r.jsonl")
    batch, wanted = collator([first, text, last]), fussy()([first, last])
    assert all(torch.equal(batch[k], wanted[k]) for k in wanted)
    assert [json.loads(line)["id"] for line in (tmp_path / "r.jsonl").read_text().splitlines()] == ["2"]
    assert collator.rejected == {"refused beside others": 1}
    assert collator.trial(1) is collator.trial(0) is collator.trial(2, 1) is None
    assert "an image for every text" in collator.trial(1, 0)


def test_a_stand_in_has_an_image_where_the_processor_wants_one(tmp_path):
    collator = VisionCollator(families.paligemma()[1], on_bad_row="skip", rejects_path=tmp_path / "r.jsonl")
    batch = collator([row("q", "no", id="1")])
    assert "pixel_values" in batch and (batch["labels"] == IGNORE).all()
    assert collator.rejected == {"refused by the processor": 1}


@pytest.mark.parametrize(
    "kwargs", [{"on_bad_row": "ignore"}, {"on_bad_row": "skip"}, {"hint_probability": 1.5}]
)
def test_bad_arguments(kwargs):
    with pytest.raises(UserError):
        VisionCollator(templates.processor("vicuna", "bytes"), **kwargs)


def hinted_rows(n=24):
    return [row("What?", "A cat.", id=str(i), hint="A Dog", answer_type="general_answer") for i in range(n)]


def test_batches_are_the_same_for_any_number_of_workers():
    collator = VisionCollator(templates.processor("vicuna", "bpe"), hint_probability=0.5, seed=3)
    rows = hinted_rows()
    batches = [
        [b["input_ids"] for b in DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    lengths = {len(collator.encode(one).input_ids) for one in rows}
    assert len(lengths) == 2, "some rows are hinted and some are not"
