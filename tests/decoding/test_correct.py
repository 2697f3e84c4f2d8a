import families
import pytest
from decoded import longer, prompt_inputs, suppressed
from PIL import Image

from vlm_sft_rl.data import chat
from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.stages import Staged, format_staged
from vlm_sft_rl.decoding import CorrectionConfig, SamplingConfig, generate_corrected, generate_plain
from vlm_sft_rl.decoding.answers import Grammar, build_grammar
from vlm_sft_rl.decoding.correct import Dialogue, between_drafts
from vlm_sft_rl.decoding.machines import CONTINUE, FINISH, Feed

PICTURES = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue", "green")]
QUESTIONS = ["How many cats?", "Why?", "Where is the dog?"]
END = 0


def reference_drafts(model, processor, image, question, config, count):
    """Each draft by a call of `generate` on the whole conversation so far, image and all."""
    inputs = prompt_inputs(model, processor, question, image)
    ids, ends = inputs["input_ids"][0].tolist(), chat.end_ids(model, processor.tokenizer)
    options = {"max_new_tokens": config.max_new_tokens, "do_sample": False}
    drafts = []
    for _ in range(count):
        whole = longer(inputs, ids)
        out = model.generate(**whole, **options, suppress_tokens=suppressed(model, processor))
        drafts.append([token for token in out[0, len(ids) :].tolist() if token not in ends])
        ids = [*ids, *drafts[-1], *chat.follow_up_ids(processor, config.correction_prompt)]
    return drafts


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_drafts_on_cached_keys_equal_whole_recomputation(family):
    model, processor = getattr(families, family)()
    config = CorrectionConfig(corrections=2, max_new_tokens=9, correction_prompt="Check again.")
    answers = generate_corrected(model, processor, PICTURES, QUESTIONS, config, batch_size=2)
    plain = build_grammar(model, processor, required=False).plain
    for image, question, answer in zip(PICTURES, QUESTIONS, answers, strict=True):
        expected = reference_drafts(model, processor, image, question, config, 3)
        assert texts(answer) == [plain(ids) for ids in expected]
        assert answer.counts.image_encodes == 1 and answer.text == answer.trace[-1]["text"]
        assert answer.counts.tokens_kept >= sum(turn["tokens"] for turn in answer.trace)


def test_one_shot_is_plain_decoding():
    asked = *families.llava(), PICTURES, QUESTIONS
    plain = generate_plain(*asked, SamplingConfig(max_new_tokens=8))
    shot = generate_corrected(*asked, CorrectionConfig(corrections=0, max_new_tokens=8))
    assert [(a.text, a.counts.tokens_forwarded) for a in shot] == [
        (a.text, a.counts.tokens_forwarded) for a in plain
    ]


def test_answers_do_not_depend_on_their_batch():
    asked = *families.llava(), PICTURES, QUESTIONS
    config = CorrectionConfig(corrections=1, max_new_tokens=6, temperature=0.8, top_p=0.9, seed=3)
    together = generate_corrected(*asked, config, batch_size=3)
    alone = generate_corrected(*asked, config, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        for turn, same in zip(one.trace, other.trace, strict=True):
            assert turn == {
                **same,
                **{k: pytest.approx(same[k], rel=1e-3) for k in ("probability", "least_sure")},
            }


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_the_follow_up_is_what_training_renders(family):
    """Answer, follow-up and second answer, put together from ids, are the ids of the training text."""
    _, processor = getattr(families, family)()
    talk = ("user", "Q"), ("assistant", "first"), ("user", "Check again."), ("assistant", "second")
    messages = [{"role": role, "content": content} for role, content in talk]
    example = VisionCollator(processor).encode({"id": "r", "images": [], "messages": messages})
    first, second = example.turns
    between = example.input_ids[first.end - 1 : second.start]
    lead = processor.tokenizer.decode(example.input_ids[second.start : second.start + 1])
    follow = chat.follow_up_ids(processor, "Check again.")
    assert follow[: len(between)] == between
    # what is left of the header is at most the blank that training lets the model produce
    assert len(follow) - len(between) <= (1 if lead.isspace() else 0)


# the machine alone, over characters: id = code point, 0 ends
BETWEEN = "\x00U"


def machine(between=BETWEEN, **settings):
    def text(ids):
        return "".join(map(chr, ids))

    grammar = Grammar(None, None, None, frozenset({END}), text, chr, text)
    config = CorrectionConfig(**{"max_new_tokens": 40, **settings})
    return Dialogue(config, grammar, list(map(ord, between)))


def play(dialogue, *drafts):
    """Feed drafts as the model would write them; returns what was fed in between, and the answer."""
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


def texts(answer):
    return [turn["text"].strip() for turn in answer.trace]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ["1", "2", "2", "3"]),
        ({"stop": "same"}, ["1", "2", "2"]),
        ({"stop": "confident", "confidence": 0.8}, ["1"]),
    ],
)
def test_forced_turns_and_self_stopped_turns(settings, expected):
    fed, answer = play(machine(corrections=3, **settings), "1", "2", "2", "3")
    assert texts(answer) == expected and fed == [BETWEEN] * (len(expected) - 1)


def test_agreement_is_about_the_conclusion_alone():
    drafts = [format_staged(Staged("a", "b", "c", "2")), format_staged(Staged("d", "e", "f", "2."))]
    _, answer = play(machine(corrections=3, stop="same", max_new_tokens=400), *drafts, "never read")
    assert texts(answer) == drafts


def test_a_draft_that_is_cut_says_so_and_is_still_checked():
    fed, answer = play(machine(max_new_tokens=3), "abcdef", "gh")
    assert [turn["cut"] for turn in answer.trace] == [True, False]
    # the token that reached the limit was not in the cache yet: it is fed too
    assert fed == ["c\x00U"] and answer.ok


LINE = "\nCheck.\n"


@pytest.mark.parametrize(
    ("corrections", "forced", "drafts", "expected", "feeds"),
    [
        (1, False, [f"one{LINE}two"], ["one", "two"], []),  # the model corrects once by itself
        (1, True, ["one", "two"], ["one", "two"], [LINE]),  # it does not, and is made to
        (1, False, ["one"], ["one"], []),  # it does not, and is left alone
        (0, True, [f"one{LINE}two"], ["one"], []),  # one shot: what would follow the line is not decoded
        (1, True, [f"one{LINE}two{LINE}three"], ["one", "two"], []),  # more corrections than asked for
    ],
)
def test_one_message(corrections, forced, drafts, expected, feeds):
    settings = {
        "layout": "message",
        "correction_line": "Check.",
        "corrections": corrections,
        "forced": forced,
    }
    fed, answer = play(machine(LINE, **settings), *drafts)
    assert texts(answer) == expected and fed == feeds


def test_in_stages_the_model_corrects_on_its_way_unforced():
    settings = {"layout": "stage", "correction_line": "Check.", "corrections": 0}
    assert texts(play(machine(LINE, **settings), f"one{LINE}two")[1]) == ["one", "two"]
    assert texts(play(machine(LINE, **settings), "one")[1]) == ["one"]


def test_confidence_is_of_the_conclusion():
    dialogue = machine(corrections=0, max_new_tokens=100)
    opening = [(ord(c), 0.2) for c in "<CAPTION> x </CAPTION> <CONCLUSION"]
    for token, p in [*opening, (ord(">"), 0.9), (ord("2"), 0.8)]:
        dialogue.observe(token, p)
    dialogue.observe(END, 1.0)
    assert dialogue.trace[0]["least_sure"] == 0.8
    assert 0.2 < dialogue.trace[0]["probability"] < 0.3


def test_the_line_is_encoded_as_it_stands_in_a_text():
    _, processor = families.llava()
    between = between_drafts(processor, CorrectionConfig(layout="message", correction_line="Check."))
    assert processor.tokenizer.decode(between) == "\n\nCheck.\n\n"
