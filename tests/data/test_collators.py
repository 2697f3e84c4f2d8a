import pickle
from functools import partial

import families
import pytest
import templates
import torch
from fussy import fussy_processor
from json_lines import read_lines
from PIL import Image
from torch.utils.data import DataLoader, _utils

from vlm_sft_rl.data.collators import RegionCollator, VisionCollator
from vlm_sft_rl.data.marks import IGNORE, verification_ids, verification_mark, verification_marks
from vlm_sft_rl.errors import FORMAT, RowError, UserError

PICTURES = [Image.new("RGB", (60, 40), c) for c in ("red", "blue", "green")]


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


def check_answers(batch, decode, end):
    for i, one in enumerate(ROWS):
        answers = [m["content"] for m in one["messages"] if m["role"] == "assistant"]
        pieces = decode(supervised(batch, i)).split(end)
        assert [piece.strip() for piece in pieces] == [*answers, ""]


def for_model(batch):
    return {name: value for name, value in batch.items() if name not in ("labels", "loss_weights")}


def test_exactly_the_answers_and_their_end_are_supervised(chat):
    batch = VisionCollator(chat.processor)(ROWS)
    check_answers(batch, chat.decode, chat.end)
    end = chat.processor.tokenizer.convert_tokens_to_ids(chat.end)
    assert all(supervised(batch, i)[-1] == end for i in range(len(ROWS)))
    on = batch["labels"] != IGNORE
    assert torch.equal(on.float(), batch["loss_weights"])
    assert torch.equal(batch["labels"][on], batch["input_ids"][on])
    assert batch["loss_weights"].dtype == torch.float32


def test_the_unsupervised_prefix_is_what_generation_starts_from(chat):
    """A model trained on the labels must be asked, at inference, from just before the first of them."""
    collator = VisionCollator(chat.processor)
    example = collator.encode(row("What is in the picture?", "There is a cat and a dog."))
    first = example.turns[0].start
    prompt = collator.renderer.prompt("What is in the picture?", images=0)
    tokenizer = chat.processor.tokenizer
    assert (
        example.input_ids[:first]
        == tokenizer(prompt, add_special_tokens=not prompt.startswith("<s>"))["input_ids"]
    )
    # the header's blank is in the first word's token where the tokenizer merges them
    if chat.template in ("vicuna", "llava_1_5") and chat.kind != "bytes":
        assert tokenizer.convert_ids_to_tokens(example.input_ids[first]) in ("ĠThere", "▁There")


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
    logits = model(**for_model(batch)).logits
    for i, one in enumerate(ROWS):
        alone = collator([one])
        n = int(alone["attention_mask"].sum())
        assert torch.equal(batch["labels"][i, :n], alone["labels"][0])
        assert (batch["labels"][i, n:] == IGNORE).all() and (batch["loss_weights"][i, n:] == 0).all()
        assert torch.allclose(logits[i, :n], model(**for_model(alone)).logits[0], atol=1e-5)


@pytest.mark.parametrize("family", [templates.llava_next, templates.idefics3, templates.gemma3])
def test_families_that_expand_images_in_their_own_ways(family):
    processor, end = family()
    batch = VisionCollator(processor)(ROWS)
    check_answers(batch, partial(processor.tokenizer.decode, clean_up_tokenization_spaces=False), end)
    images = set(processor.image_token_ids)
    assert not any(images & set(supervised(batch, i)) for i in range(len(ROWS)))
    names = [k for k, v in batch.items() if k.endswith(("ids", "mask", "labels")) and v.dim() == 2]
    assert len({batch[name].shape[1] for name in names}) == 1, "what goes with the tokens has their length"


def test_collator_survives_being_sent_to_a_worker():
    processor = templates.processor("chatml", "bpe")
    collator = VisionCollator(processor, marks=verification_marks(processor.tokenizer))
    batch, copy = collator(ROWS), pickle.loads(pickle.dumps(collator))(ROWS)
    assert all(torch.equal(batch[key], copy[key]) for key in batch)


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


def test_bad_arguments():
    with pytest.raises(UserError, match="between 0 and 1"):
        VisionCollator(templates.processor("vicuna", "bytes"), hint_probability=1.5)


GONE = {"id": "gone", "messages": ROWS[0]["messages"], "images": ["gone.png"], "source": "f.json:9"}
BAD = {
    "too long": row("<image>\nq", "long " * 100, images=1, id="long"),
    "missing image": GONE,
    "placeholder mismatch": row("<image><image>", "x", images=1, id="two"),
    "no supervised token": row("q", "a", id="none", weight=0),
    "unbalanced tags": row("q", "a <SPAN> b", id="tags"),
    "format": {"id": "strange", "text": "x"},
}


def strict(**kwargs):
    processor = templates.processor("vicuna", "bpe")
    mark = partial(verification_mark, ids=verification_ids(processor.tokenizer))
    return VisionCollator(processor, marks=[mark], max_length=100, **kwargs)


def skipping(folder):
    return {"rejects_path": folder / "rejects.jsonl"}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_errors_that_name_the_row(kind):
    with pytest.raises(RowError) as caught:
        strict()([ROWS[0], BAD[kind]])
    assert caught.value.kind == kind
    assert BAD[kind].get("source", BAD[kind]["id"]) in str(caught.value)


def test_bad_rows_are_skipped_and_recorded_once(tmp_path):
    collator = strict(**skipping(tmp_path))
    good = strict()(ROWS[:2])
    for _ in range(2):
        batch = collator([ROWS[0], *BAD.values(), ROWS[1]])
        assert {k: v.shape for k, v in batch.items()} == {k: v.shape for k, v in good.items()}
        assert all(torch.equal(batch[k], good[k]) for k in good)
    records = read_lines(tmp_path / "rejects.jsonl")
    assert {r["id"]: r["kind"] for r in records} == {one["id"]: kind for kind, one in BAD.items()}
    assert len(records) == len(BAD) and all(r["reason"] and r["source"] for r in records)
    assert collator.rejected == dict.fromkeys(BAD, 1)


def test_a_batch_of_bad_rows_gives_a_stand_in_without_loss(tmp_path):
    batch = strict(**skipping(tmp_path))([BAD["too long"]])
    assert (batch["labels"] == IGNORE).all() and batch["loss_weights"].sum() == 0
    assert "pixel_values" not in batch


def test_rows_that_go_alone_but_not_together_are_split_from_their_batch(tmp_path):
    first, last = row("q", "a cat", images=1, id="1"), row("q", "a dog", images=2, id="3")
    text = row("q", "no", id="2")
    fussy = partial(VisionCollator, fussy_processor())
    message = r"row 2: the processor takes it alone but not beside row 1.*batch_size: 1"
    with pytest.raises(RowError, match=message):
        fussy()([first, text, last])
    collator = fussy(**skipping(tmp_path))
    batch, expected = collator([first, text, last]), fussy()([first, last])
    assert all(torch.equal(batch[k], expected[k]) for k in expected)
    assert [record["id"] for record in read_lines(tmp_path / "rejects.jsonl")] == ["2"]
    assert collator.rejected == {"refused beside others": 1}
    assert collator.trial(1) is collator.trial(0) is collator.trial(2, 1) is None
    assert "an image for every text" in collator.trial(1, 0)


def test_a_stand_in_has_an_image_where_the_processor_wants_one(tmp_path):
    collator = VisionCollator(families.paligemma()[1], **skipping(tmp_path))
    batch = collator([row("q", "no", id="1")])
    assert "pixel_values" in batch and (batch["labels"] == IGNORE).all()
    assert collator.rejected == {"refused by the processor": 1}


def test_batches_are_the_same_for_any_number_of_workers():
    collator = VisionCollator(templates.processor("vicuna", "bpe"), hint_probability=0.5, seed=3)
    hint = {"hint": "A Dog", "answer_type": "general_answer"}
    rows = [row("What?", "A cat.", id=str(i), **hint) for i in range(24)]
    batches = [
        [b["input_ids"] for b in DataLoader(rows, batch_size=4, collate_fn=collator, num_workers=workers)]
        for workers in (0, 2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    lengths = {len(collator.encode(one).input_ids) for one in rows}
    assert len(lengths) == 2, "some rows are hinted and some are not"


# --- A batch without images on one of several processes: it gets a picture without loss ---

TEXT, SEEN = row("Why?", "So."), row("Why?", "So.", images=1)
FAMILIES = ["llava", "llava_more", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_used_and_nothing_is_learnt_from_it(family):
    model, processor = getattr(families, family)()
    plain = VisionCollator(processor)([TEXT, TEXT])
    batch = VisionCollator(processor, always_image=True)([TEXT, TEXT])
    assert "pixel_values" not in plain and "pixel_values" in batch
    assert batch["labels"].shape[0] == 3 and (batch["labels"][2] == IGNORE).all()
    assert (batch["loss_weights"][2] == 0).all()
    assert torch.equal(batch["labels"][:2, : plain["labels"].shape[1]], plain["labels"])
    loss, bare = (model(**for_model(b), labels=b["labels"]).loss for b in (batch, plain))
    assert loss.item() == pytest.approx(bare.item(), abs=1e-6)
    loss.backward()
    # part of the graph, with a gradient of zero
    names = ("projector", "merger", "connector")
    projector = [p for name, p in model.named_parameters() if any(part in name for part in names)]
    assert projector and all(p.grad is not None and p.grad.abs().sum() == 0 for p in projector)


def test_batches_with_images_and_single_rows_are_left_as_they_are():
    _, processor = families.llava()
    collator, plain = VisionCollator(processor, always_image=True), VisionCollator(processor)
    mixed, same = collator([TEXT, SEEN]), plain([TEXT, SEEN])
    assert mixed.keys() == same.keys() and all(torch.equal(mixed[key], same[key]) for key in same)
    assert collator.encode(TEXT) == plain.encode(TEXT)


# --- A bad row is one message whether the main process meets it or a worker of the data loader ---

REGION = {"id": "r", "image": "a.png", "width": 9, "height": 9, "box": [1, 2, 3, 4]}


def several_lines(rows):
    try:
        raise RowError(FORMAT, "the cause")
    except RowError as error:
        raise RowError(FORMAT, "first line:\n  second line.", "file:3") from error


def collators(root):
    Image.new("RGB", (8, 8)).save(root / "a.png")
    return {
        "rows": (VisionCollator(families.llava()[1], root), GONE),
        "regions": (RegionCollator(root), {**REGION, "image": "absent.png"}),
        "size": (RegionCollator(root), REGION),
        "several lines": (several_lines, GONE),
    }


@pytest.mark.parametrize("name", ["rows", "regions", "size", "several lines"])
def test_a_workers_error_reads_as_the_main_process_says_it(tmp_path, name, monkeypatch):
    # seconds for which the loader waits for a worker that already stopped
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    collator, bad = collators(tmp_path)[name]
    messages = []
    for workers in (0, 1):
        with pytest.raises(RowError) as caught:
            list(DataLoader([bad], collate_fn=collator, num_workers=workers))
        messages.append(str(caught.value))
    assert messages[0] == messages[1] != ""


def test_what_pickle_carries_is_whole():
    error = pickle.loads(pickle.dumps(RowError(FORMAT, "no box.", "file:3")))
    assert (error.kind, error.reason, error.where) == (FORMAT, "no box.", "file:3")
    assert str(error) == "file:3: no box."
