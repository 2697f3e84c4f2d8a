"""Rows from answers with ground truth: synthetic negatives, yes and no, and a model's own answers."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data import tags
from vlm_sft_rl.data.tagging.build import on_policy_rows, synthetic_rows, yes_no_rows
from vlm_sft_rl.data.tagging.phrases import find_phrases
from vlm_sft_rl.data.tagging.verdicts import Scene, object_grader
from vlm_sft_rl.errors import RowError

NOUNS = ["umbrella", "star", "fish", "phone", "anchor", "kettle"]
PRIOR = {
    "beach": {"umbrella": 4.0, "fish": 4.0, "anchor": 2.0, "star": 0.0},
    "kitchen": {"kettle": 1.0, "phone": 1.0},
}


def captions(objects, theme="beach", identity="1"):
    listed = ", ".join(f"a {o}" for o in objects)
    messages = [
        {"role": "user", "content": "<image>\nDescribe."},
        {"role": "assistant", "content": f"At the {theme} there is {listed}."},
    ]
    return {"id": identity, "messages": messages, "images": ["a.png"]}


def scenes(objects, theme="beach"):
    return lambda row: Scene(objects, theme)


@given(
    objects=st.lists(st.sampled_from(NOUNS), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 50),
    negatives=st.integers(0, 3),
)
def test_positives_and_negatives(objects, seed, negatives):
    row = captions(objects)
    notes = Counter()
    built = list(synthetic_rows([row], scenes(objects), NOUNS, negatives=negatives, seed=seed, notes=notes))
    assert len(built) == 1 + negatives - notes["duplicate negative"]
    assert len({r["messages"][1]["content"] for r in built}) == len(built)
    caption = row["messages"][1]["content"]
    positive = built[0]["messages"][1]
    assert tags.strip_tags(positive["content"]) == caption
    assert [s.confident for s in tags.spans(positive["content"])] == [True] * len(objects)
    assert len({r["id"] for r in built}) == len(built)
    for negative in built[1:]:
        answer = negative["messages"][1]
        *right, wrong = tags.spans(answer["content"])
        assert all(s.confident for s in right) and not wrong.confident
        assert answer["content"].endswith("</UN>")
        (phrase,) = find_phrases(wrong.phrase, NOUNS)
        assert phrase.head not in objects
        assert answer["hint"] == wrong.phrase and answer["answer_type"] == "general_answer"
        kept = tags.strip_tags(answer["content"])[: -len(wrong.phrase)]
        assert caption.startswith(kept)
        assert [s.phrase for s in right] == [p.text for p in find_phrases(kept, NOUNS)]
        assert negative["images"] == row["images"] and negative["messages"][0] == row["messages"][0]
    assert built == list(synthetic_rows([row], scenes(objects), NOUNS, negatives=negatives, seed=seed))
    assert row == captions(objects)


@pytest.mark.parametrize("prior", [PRIOR, lambda scene: PRIOR[scene.theme]], ids=["mapping", "callable"])
def test_absent_nouns_follow_the_prior_of_the_theme(prior):
    rows = [captions(["fish"], identity=str(i)) for i in range(3000)]
    built = synthetic_rows(rows, scenes(["fish"]), NOUNS, prior=prior)
    drawn = Counter(
        find_phrases(r["messages"][1]["hint"], NOUNS)[0].head for r in built if r["id"].endswith("neg0")
    )
    assert set(drawn) == {"umbrella", "anchor"}
    assert 0.64 < drawn["umbrella"] / 3000 < 0.70


def test_captions_that_give_nothing_are_counted():
    notes = Counter()
    rows = [captions(["fish"]), captions([], identity="2"), captions(["fish", "star"], identity="3")]
    built = list(synthetic_rows(rows, scenes(["fish"]), NOUNS, prior={"beach": {"fish": 1.0}}, notes=notes))
    assert [r["id"] for r in built] == ["1-pos"] and "hint" not in built[0]["messages"][1]
    assert notes == {"no absent noun": 1, "no phrase": 1, "untrue caption": 1}


def test_a_conversation_goes_wrong_in_one_answer():
    row = captions(["fish", "star"])
    row["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Only a fish."}]
    for seed in range(10):
        negative = list(synthetic_rows([row], scenes(["fish", "star"]), NOUNS, seed=seed))[1]
        verdicts = [s.confident for m in negative["messages"] for s in (tags.spans(m["content"]))]
        assert verdicts.count(False) == 1


def test_yes_no():
    row = {
        "id": "1",
        "images": ["a.png"],
        "messages": [
            {"role": "user", "content": "Is there a fish?"},
            {"role": "assistant", "content": "yes, there is."},
            {"role": "user", "content": "A star?"},
            {"role": "assistant", "content": "No"},
        ],
    }
    positive, negative = yes_no_rows([row])
    assert [m["content"] for m in positive["messages"][1::2]] == [
        "<SPAN> Yes </CN>, there is.",
        "<SPAN> No </CN>",
    ]
    assert [m["content"] for m in negative["messages"][1::2]] == ["<SPAN> No </UN>", "<SPAN> Yes </UN>"]
    row["messages"][1]["content"] = "nothing of the kind"
    with pytest.raises(RowError, match="yes or no"):
        list(yes_no_rows([row]))


@pytest.mark.parametrize(
    ("answer", "supervise", "expected"),
    [
        (
            "There is a fish, a red phone and a kettle.",
            "all",
            {"content": "There is <SPAN> a fish </CN>, <SPAN> a red phone </UN>", "hint": "a red phone"},
        ),
        (
            "<SPAN> A fish </UN> and <SPAN> a star </CN>.",
            "verdicts",
            {"content": "<SPAN> A fish </CN> and <SPAN> a star </CN>.", "supervise": "verdicts"},
        ),
    ],
)
def test_on_policy_answers_stop_at_their_first_wrong_phrase(answer, supervise, expected):
    sample = {"id": 5, "images": ["a.png"], "prompt": "Describe.", "answer": answer}
    sample["reference"] = {"objects": ("fish", "star")}
    (row,) = on_policy_rows([sample], object_grader(NOUNS), NOUNS, supervise=supervise)
    question, message = row["messages"]
    assert message == {"role": "assistant", "answer_type": "general_answer", **expected}
    assert (row["id"], row["images"], question["content"]) == ("5", ["a.png"], "Describe.")
