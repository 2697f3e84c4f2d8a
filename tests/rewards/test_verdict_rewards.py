"""Verdicts as credit, worked out by hand: which phrases are read, what they earn, which tokens lose credit."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.marks import VerificationIds
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.methods.grpo import check_judge
from vlm_sft_rl.methods.phrase_judges import checker_judge, truth_judge, truth_nouns
from vlm_sft_rl.rewards.verdicts import (
    JudgedPhrases,
    f1,
    objects_reward,
    tagged_phrases,
    verdicts_reward,
)
from vlm_sft_rl.trainers.grpo import VisionGRPOConfig
from vlm_sft_rl.trainers.losses import span_advantages

TAGS = VerificationIds(0, 1, 2)
WORDS = dict(enumerate(["<SPAN>", "</CN>", "</UN>", "a", "cat", "dog", "and", "pen", "."]))
SPAN, CN, UN, A, CAT, DOG, AND, PEN, STOP = WORDS
ROW = json.dumps({"id": "q", "images": ["0.png"], "objects": ["cat", "pen"]})
# a cat (there, said so), a dog (not there, said to be), a dog (not there, doubted), a pen (there, doubted)
ANSWER = [SPAN, A, CAT, CN, AND, SPAN, A, DOG, CN, AND, SPAN, A, DOG, UN, AND, SPAN, A, PEN, UN, STOP]


def decode(ids):
    return " ".join(WORDS[i] for i in ids)


def phrases():
    return JudgedPhrases(TAGS, decode, truth_judge(["cat", "dog", "pen"]))


def test_phrases_are_read_with_their_tokens_verdicts_and_truth():
    (read,) = phrases()([ANSWER], [ROW])
    assert [(p.text, p.start, p.end, p.confident, p.true, p.is_right) for p in read] == [
        ("a cat", 1, 3, True, True, True),
        ("a dog", 6, 8, True, False, False),
        ("a dog", 11, 13, False, False, True),
        ("a pen", 16, 18, False, True, False),
    ]


@pytest.mark.parametrize(
    ("ids", "read"),
    [
        ([], []),
        ([A, CAT, CN], []),  # closed without being open
        ([SPAN, A, CAT], []),  # cut off
        ([SPAN, CN, A, UN], []),  # empty, and then not open
        ([SPAN, A, SPAN, DOG, UN, CN], [("dog", 3, 4, False)]),  # the later opening tag counts
    ],
)
def test_tags_that_do_not_pair_up_are_no_verdict(ids, read):
    assert [(p.text, p.start, p.end, p.confident) for p in tagged_phrases(ids, TAGS, decode)] == read


@given(st.lists(st.sampled_from(sorted(WORDS)), max_size=30))
def test_phrases_never_overlap_and_hold_no_tag(ids):
    end = 0
    for phrase in tagged_phrases(ids, TAGS, decode):
        assert end <= phrase.start < phrase.end
        assert not set(ids[phrase.start : phrase.end]) & {SPAN, CN, UN}
        assert ids[phrase.start - 1] == SPAN and ids[phrase.end] == (CN if phrase.confident else UN)
        end = phrase.end


def reward(*answers):
    logged = {}
    rewards = verdicts_reward(phrases())(
        completions=[""] * len(answers),
        completion_ids=answers,
        row=[ROW] * len(answers),
        log_metric=logged.__setitem__,
    )
    return rewards, logged


def test_each_verdict_earns_by_being_right():
    # two of four right: 0; one of one: 1; one of one wrong: -1; none: 0; "a and" names nothing that is known
    rewards, logged = reward(ANSWER, [SPAN, CAT, CN], [SPAN, PEN, UN], [A, CAT], [SPAN, A, AND, CN])
    assert rewards == [0, 1, -1, 0, 0]
    assert logged == pytest.approx(
        {"verdicts/unjudged": 1 / 7, "verdicts/right": 3 / 6, "verdicts/wrong_phrases": 2 / 6}
    )
    assert reward([A, CAT]) == ([0], {})


def test_naming_is_rewarded_by_f1():
    named = objects_reward(lambda text: [word for word in text.split() if word in ("cat", "dog", "pen")])
    # cat and dog named, cat and pen there: precision 1/2, recall 1/2; said twice, a dog is two mistakes
    texts = ["cat dog", "cat dog dog", "cat pen", "", [{"role": "assistant", "content": "cat"}]]
    assert named(completions=texts, row=[ROW] * 5) == pytest.approx([0.5, 2 / 5, 1, 0, 2 / 3])
    assert f1([], []) == 1 and f1(["cat"], []) == 0 and f1(["cat", "cat"], ["cat"]) == 2 / 3


def test_advantages_are_lowered_on_tokens_of_wrong_phrases_alone():
    wrong = torch.tensor([[False, True, True], [False, True, False], [True, False, False]])
    by_token = span_advantages(torch.tensor([2.0, -1.0, 0.0]), wrong, 0.1)
    assert by_token.tolist() == [
        pytest.approx([2, 1.8, 1.8]),
        pytest.approx([-1, -1.1, -1]),
        [0, 0, 0],
    ]


def test_truth_of_yes_and_no_is_the_answer():
    judge = truth_judge(["cat"])
    asked = {"answer": "no", "objects": ["cat"]}
    claims = [("Yes", asked), ("no", asked), ("two cats", asked), ("a thing", asked), ("Yes", {})]
    assert judge(claims) == [False, True, True, None, None]


class Everything:
    """A checker that says yes to cats, and counts what it was asked."""

    def __init__(self):
        self.asked = []

    def verdicts(self, claims):
        self.asked += [(tuple(images), phrase.text) for images, phrase in claims]
        return [None if phrase.text == "hm" else "cat" in phrase.text for _, phrase in claims]


def test_a_checker_is_asked_once_of_each_phrase_and_picture():
    checker = Everything()
    judge = checker_judge(checker)
    first, second = {"images": ["0.png"]}, {"images": ["1.png"]}
    assert judge([("a cat", first), ("A cat", first), ("a cat", second)]) == [True, True, True]
    assert judge([("a cat", first), ("a dog", first)]) == [True, False]
    assert checker.asked == [(("0.png",), "A cat"), (("1.png",), "a cat"), (("0.png",), "a dog")]
    assert judge([]) == []
    # a request that failed is no verdict for ever
    assert judge([("hm", first)]) == judge([("hm", first)]) == [None]
    assert checker.asked[3:] == 2 * [(("0.png",), "hm")]


def test_a_checker_is_not_asked_whether_yes_or_a_number_is_there():
    """`data tag` gives such phrases tags as well, and a reply to "Is there 3 in the image?" says nothing."""
    checker = Everything()
    judge, row = checker_judge(checker), {"images": ["0.png"]}
    vague = ["Yes", "red", "3", "no cats", "On a cat"]
    assert judge([(phrase, row) for phrase in vague]) == [None] * 5 and checker.asked == []
    answered = row | {"answer": "no"}
    assert judge([("Yes", answered), ("no", answered), ("red cats", row)]) == [False, True, True]
    assert judge([("a cat", {"images": []})]) == [None] and checker.asked == [(("0.png",), "red cats")]


def test_a_checker_that_answers_something_else_is_said(caplog):
    checker = Everything()
    checker.name = "folder"
    assert checker_judge(checker)([("hm", {"images": ["0.png"]})]) == [None]
    assert "no reply to 1 questions begins with yes or no, the first about 'hm'" in caplog.text


def test_answers_are_judged_once_for_reward_and_credit():
    calls = []

    def judge(claims):
        calls.append(len(claims))
        return [True] * len(claims)

    judged = JudgedPhrases(TAGS, decode, judge)
    assert judged([ANSWER], [ROW]) is judged([tuple(ANSWER)], [ROW])
    judged([ANSWER, ANSWER], [ROW, ROW])
    assert calls == [4, 8]


def test_a_row_without_truth_is_refused(tmp_path):
    args = VisionGRPOConfig(str(tmp_path), use_cpu=True, rewards=["verdicts"])
    row = {"id": "q", "images": [], "question": "?"}
    assert truth_nouns(args, [row | {"objects": ["Cat"]}, row | {"answer": "Yes"}]) == ["cat"]
    with pytest.raises(UserError, match=r"question 'q': no `objects`.*judging its phrases"):
        truth_nouns(args, [row | {"answer": "red"}])
    args.checker = "folder"
    assert truth_nouns(args, [row]) == []
    args.rewards = ["objects"]
    with pytest.raises(UserError, match="the reward `objects`"):
        truth_nouns(args, [row | {"answer": "yes"}])


def test_objects_outside_of_the_vocabulary_are_said(tmp_path, caplog):
    (tmp_path / "nouns.txt").write_text("cat\n")
    args = VisionGRPOConfig(
        str(tmp_path), use_cpu=True, rewards=["objects"], nouns=str(tmp_path / "nouns.txt")
    )
    row = {"id": "q", "images": [], "question": "?", "objects": ["cat"]}
    assert truth_nouns(args, [row]) == ["cat"] and not caplog.records
    assert truth_nouns(args, [row, row | {"objects": ["dog", "cat"]}]) == ["cat"]
    assert "lacks 1 of 2 objects of the rows, such as dog" in caplog.text


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"checker": "folder"}, "folder: no such folder"),
        ({"checker": ".", "checker_model": "name"}, "`checker` is a folder. Leave it out"),
    ],
)
def test_a_checker_that_is_not_there_is_said_before_the_first_step(tmp_path, settings, complaint):
    args = VisionGRPOConfig(str(tmp_path), use_cpu=True, rewards=["verdicts"], **settings)
    with pytest.raises(UserError, match=complaint):
        check_judge(args)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"rewards": ["objects"], "checker": "folder"}, "`checker` is not asked"),
        ({"rewards": ["verdicts"], "checker_model": "name"}, "belong to `checker`, which is not set"),
        ({"rewards": ["verdicts"], "check_question": "{phrase}?"}, "belong to `checker`, which is not set"),
        ({"rewards": ["answer"], "nouns": "nouns.txt"}, "`nouns` is not read"),
        ({"rewards": ["verdicts"], "checker": "folder", "nouns": "nouns.txt"}, "`nouns` is not read"),
        ({"span_credit": 0.1, "checker": "http://host/v1"}, "name the model there by `checker_model`"),
        ({"rewards": ["verdicts"], "checker": "folder"}, "under FSDP no process would load all of it"),
    ],
)
def test_a_checker_that_cannot_be_asked_is_refused(tmp_path, monkeypatch, settings, complaint):
    args = VisionGRPOConfig(str(tmp_path), use_cpu=True, **settings)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=complaint):
        check_judge(args)
