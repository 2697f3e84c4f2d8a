import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.data.stages import Staged, format_staged
from vlm_sft_rl.decoding import CorrectionConfig, generate_corrected, generate_plain
from vlm_sft_rl.decoding.answers import Grammar, build_grammar
from vlm_sft_rl.decoding.config import SamplingConfig
from vlm_sft_rl.decoding.correct import Dialogue, between_drafts
from vlm_sft_rl.decoding.machines import CONTINUE, FINISH, Feed
from vlm_sft_rl.errors import UserError

PICTURES = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue", "green")]
QUESTIONS = ["How many cats?", "Why?", "Where is the dog?"]
END = 0


def reference_drafts(model, processor, image, question, config, count):
    """Each draft by a call of `generate` on the whole conversation so far, image and all."""
    tokenizer = processor.tokenizer
    text = prompting.render(processor, question, 1)
    options = {"add_special_tokens": not prompting.starts_with_bos(tokenizer, text), "return_tensors": "pt"}
    inputs = processor(text=[text], images=[[image]], **options)
    between = torch.tensor([prompting.follow_up_ids(processor, config.correction_prompt)])
    suppress = prompting.suppressed_ids(model, tokenizer, prompting.end_ids(model, tokenizer))
    drafts = []
    for _ in range(count):
        start = inputs["input_ids"].shape[1]
        out = model.generate(
            **inputs, max_new_tokens=config.max_new_tokens, do_sample=False, suppress_tokens=sorted(suppress)
        )
        new = out[:, start:]
        ends = prompting.end_ids(model, tokenizer)
        kept = [t for t in new[0].tolist() if t not in ends]
        drafts.append(kept)
        ids = torch.cat([inputs["input_ids"], torch.tensor([kept], dtype=torch.long), between], 1)
        extra = ids.shape[1] - start
        inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
        if "mm_token_type_ids" in inputs:
            old = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.cat([old, old.new_zeros(1, extra)], 1)
    return drafts


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_drafts_on_cached_keys_equal_whole_recomputation(family):
    model, processor = getattr(families, family)()
    config = CorrectionConfig(corrections=2, max_new_tokens=9, correction_prompt="Check again.")
    answers = generate_corrected(model, processor, PICTURES, QUESTIONS, config, batch_size=2)
    for image, question, answer in zip(PICTURES, QUESTIONS, answers, strict=True):
        wanted = reference_drafts(model, processor, image, question, config, 3)
        grammar = build_grammar(model, processor, required=False)
        assert [turn["text"] for turn in answer.trace] == [grammar.plain(ids) for ids in wanted]
        assert answer.counts.image_encodes == 1
        assert answer.counts.tokens_kept >= sum(turn["tokens"] for turn in answer.trace)
        assert answer.text == answer.trace[-1]["text"]


def test_one_shot_is_plain_decoding():
    model, processor = families.llava()
    plain = generate_plain(model, processor, PICTURES, QUESTIONS, SamplingConfig(max_new_tokens=8))
    shot = generate_corrected(
        model, processor, PICTURES, QUESTIONS, CorrectionConfig(corrections=0, max_new_tokens=8)
    )
    assert [a.text for a in shot] == [a.text for a in plain]
    assert [a.counts.tokens_forwarded for a in shot] == [a.counts.tokens_forwarded for a in plain]


def test_answers_do_not_depend_on_their_batch():
    model, processor = families.llava()
    config = CorrectionConfig(corrections=1, max_new_tokens=6, temperature=0.8, top_p=0.9, seed=3)
    together = generate_corrected(model, processor, PICTURES, QUESTIONS, config, batch_size=3)
    alone = generate_corrected(model, processor, PICTURES, QUESTIONS, config, batch_size=1)
    assert [a.trace for a in together] == [
        [{**t, **{k: pytest.approx(t[k], rel=1e-3) for k in ("probability", "least_sure")}} for t in a.trace]
        for a in alone
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_the_follow_up_is_what_training_renders(family):
    """Answer, follow-up and second answer, put together from ids, are the ids of the training text."""
    from vlm_sft_rl.data.collators import VisionCollator

    _, processor = getattr(families, family)()
    row = {
        "id": "r",
        "images": [],
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": "first"},
            {"role": "user", "content": "Check again."},
            {"role": "assistant", "content": "second"},
        ],
    }
    example = VisionCollator(processor).encode(row)
    one, two = example.turns
    between = example.input_ids[one.end - 1 : two.start]
    lead = processor.tokenizer.decode(example.input_ids[two.start : two.start + 1])
    follow = prompting.follow_up_ids(processor, "Check again.")
    assert follow[: len(between)] == between
    # what is left of the header is at most the blank that training lets the model produce
    assert len(follow) - len(between) <= (1 if lead.isspace() else 0)


# the machine alone, over characters: id = code point, 0 ends
def machine(between=None, **settings):
    def text(ids):
        return "".join(map(chr, ids))

    grammar = Grammar(None, None, None, frozenset({END}), text, chr, text)
    config = CorrectionConfig(**{"max_new_tokens": 40, **settings})
    return Dialogue(config, grammar, list(BETWEEN if between is None else between))


def play(dialogue, *drafts):
    """Feed drafts as the model would write them; returns what was fed in between."""
    fed = []
    for draft in drafts:
        for token in [*map(ord, draft), END]:
            action = dialogue.observe(token, 0.9)
            if action == FINISH:
                return fed, dialogue.answer()
            if isinstance(action, Feed):
                fed.append("".join(map(chr, action.tokens)))
                break
            assert action == CONTINUE
    raise AssertionError("the dialogue did not end")


def said(answer):
    return [turn["text"] for turn in answer.trace]


BETWEEN = tuple(map(ord, "\x00U"))


def test_forced_turns_and_self_stopped_turns():
    drafts = ("1", "2", "2", "3")
    fed, answer = play(machine(corrections=3), *drafts)
    assert said(answer) == ["1", "2", "2", "3"] and fed == ["\x00U"] * 3
    _, answer = play(machine(corrections=3, stop="same"), *drafts)
    assert said(answer) == ["1", "2", "2"]
    _, answer = play(machine(corrections=3, stop="confident", confidence=0.8), *drafts)
    assert said(answer) == ["1"]


def test_agreement_is_about_the_conclusion_alone():
    one = format_staged(Staged("a", "b", "c", "2"))
    two = format_staged(Staged("d", "e", "f", "2."))
    _, answer = play(machine(corrections=3, stop="same", max_new_tokens=400), one, two, "never read")
    assert said(answer) == [one, two]


def test_a_draft_that_is_cut_says_so_and_is_still_checked():
    fed, answer = play(machine(max_new_tokens=3), "abcdef", "gh")
    assert [turn["cut"] for turn in answer.trace] == [True, False]
    # the token that reached the limit was not in the cache yet: it is fed too
    assert fed == ["c\x00U"] and answer.ok


def test_one_message():
    line = "\nCheck.\n"
    plan = {"between": tuple(map(ord, line)), "correction_line": "Check.", "layout": "message"}
    # the model corrects once by itself
    _, answer = play(machine(corrections=1, forced=False, **plan), f"one{line}two")
    assert [t.strip() for t in said(answer)] == ["one", "two"]
    # it does not, and is made to
    fed, answer = play(machine(corrections=1, **plan), "one", "two")
    assert said(answer) == ["one", "two"] and fed == [line]
    # it does not, and is left alone
    _, answer = play(machine(corrections=1, forced=False, **plan), "one")
    assert said(answer) == ["one"]
    # one shot: what would follow the line is not decoded
    _, answer = play(machine(corrections=0, **plan), f"one{line}two")
    assert [t.strip() for t in said(answer)] == ["one"]
    # more corrections than asked for
    _, answer = play(machine(corrections=1, **plan), f"one{line}two{line}three")
    assert [t.strip() for t in said(answer)] == ["one", "two"]


def test_confidence_is_of_the_conclusion():
    dialogue = machine(corrections=0, max_new_tokens=100)
    for token, p in [
        *[(ord(c), 0.2) for c in "<CAPTION> x </CAPTION> <CONCLUSION"],
        (ord(">"), 0.9),
        (ord("2"), 0.8),
    ]:
        dialogue.observe(token, p)
    dialogue.observe(END, 1.0)
    assert dialogue.trace[0]["least_sure"] == 0.8
    assert 0.2 < dialogue.trace[0]["probability"] < 0.3


@pytest.mark.parametrize(
    "wrong",
    [
        {"layout": "tree"},
        {"corrections": -1},
        {"stop": "soon"},
        {"confidence": 2},
        {"correction_prompt": " "},
        {"correction_line": ""},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError):
        CorrectionConfig(**wrong)


def test_the_line_is_encoded_as_it_stands_in_a_text():
    _, processor = families.llava()
    between = between_drafts(processor, CorrectionConfig(layout="message", correction_line="Check."))
    assert processor.tokenizer.decode(between) == "\n\nCheck.\n\n"
