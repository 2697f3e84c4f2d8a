"""Preference pairs from traces and from several answers: what is compared, what is left out and counted."""

import json
import random
import tracemalloc
from collections import Counter

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from json_lines import read_lines, write_lines

from vlm_sft_rl.data.rows import preference_row
from vlm_sft_rl.data.tagging import pairs
from vlm_sft_rl.data.tagging.config import PairConfig
from vlm_sft_rl.data.tagging.pairs import places_of, same_thing, sentences, write_pairs
from vlm_sft_rl.decoding.answers import Grammar
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.decoding.machines import FINISH, Rewind
from vlm_sft_rl.decoding.retrospective import Retrospective
from vlm_sft_rl.errors import UserError

END, OPEN, CN, UN = range(4)
WORDS = ["", " <SPAN>", " </CN>", " </UN>", ".", " a", " cup", " star", " moon", ",", " red"]
ID = {word.strip(): number for number, word in enumerate(WORDS)}


def decode(ids):
    return "".join(WORDS[t] for t in ids)


def plain(ids):
    return "".join(WORDS[t] for t in ids if t not in (OPEN, CN, UN)).strip()


GRAMMAR = Grammar(OPEN, CN, UN, frozenset([END]), decode, lambda t: WORDS[t], plain)


def line(answer, identity="1", **more):
    """What `decode --traces` writes of an answer."""
    values = answer.to_json()
    names = ("tagged_answer", "ok", "trace", "spans")
    made = {"id": identity, "images": ["a.png"], "prompt": "Describe.", "answer": answer.text}
    return made | {"tagged_answer": values.pop("tagged_text"), **{n: values[n] for n in names[1:]}} | more


def decoded(*phrases, **settings):
    """An answer that tries these phrases: `(words, P(</UN>))`, None for the end of a sentence and of the answer."""
    machine = Retrospective(RetrospectiveConfig(threshold=0.5, rewrite_query=False, **settings), GRAMMAR)
    for entry in phrases:
        tokens = [4, END] if entry is None else [OPEN, *(ID[w] for w in entry[0].split()), CN]
        for token in tokens:
            action = machine.observe(token, None if entry is None else entry[1])
    assert action == FINISH
    return machine.answer()


CAPTION = (("a cup", 0.1), ("a star", 0.9), ("a moon", 0.2), ("a cup", 0.1), None)


def written(tmp_path, lines, finished=None, **settings):
    source = write_lines(tmp_path / "traces.jsonl", lines)
    counts = write_pairs(source, tmp_path / "pairs.jsonl", PairConfig(**settings), finished)
    return read_lines(tmp_path / "pairs.jsonl"), counts


def texts(row):
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def stops(row):
    """The sides that stop in the middle of their answer."""
    return [side for side in ("chosen", "rejected") if row[side][0].get("supervise") == "text"]


def test_a_rewind_is_a_pair_behind_the_same_text(tmp_path):
    made = [line(decoded(*CAPTION, reject_repeats=True))]
    rows, counts = written(tmp_path, made, tmp_path / "sft.jsonl")
    whole = "<SPAN> a cup </CN> <SPAN> a moon </CN>."
    doubt, repeat = rows
    assert texts(doubt) == (whole, "<SPAN> a cup </CN> <SPAN> a star </UN>")
    assert doubt["pair_kind"] == "doubt" and doubt["pair_weight"] == pytest.approx(0.9 - 0.2)
    # the model would have named the cup again, and the answer ends instead
    assert texts(repeat) == (whole, "<SPAN> a cup </CN> <SPAN> a moon </CN> <SPAN> a cup </CN>")
    assert repeat["pair_kind"] == "repeat" and repeat["pair_weight"] == 1
    assert stops(doubt) == stops(repeat) == ["rejected"]
    assert counts == {"answers": 1, "pairs": 2, "pairs: doubt": 1, "pairs: repeat": 1, "finished answers": 1}
    assert [preference_row(row, "here")["pair_kind"] for row in rows] == ["doubt", "repeat"]
    (row,) = read_lines(tmp_path / "sft.jsonl")
    assert row["messages"][1] == {"role": "assistant", "content": whole, "doubts": [0.1, 0.2]}


def test_an_answer_that_ended_without_text_wins_nothing(tmp_path):
    silent = line(decoded(("a star", 0.9), None), "silent") | {"answer": "", "tagged_answer": " "}
    rows, counts = written(tmp_path, [line(decoded(*CAPTION)), silent])
    assert {row["id"].split("/")[0] for row in rows} == {"1"} and counts[pairs.EMPTY] == 1


@pytest.mark.parametrize(
    ("settings", "chosen", "count"),
    [
        ({"chosen": "phrase"}, "<SPAN> a cup </CN> <SPAN> a moon </CN>", 2),
        ({"places": "first"}, "<SPAN> a cup </CN> <SPAN> a moon </CN>.", 1),
        ({"repeats": False}, "<SPAN> a cup </CN> <SPAN> a moon </CN>.", 1),
        ({"ends": False}, "<SPAN> a cup </CN> <SPAN> a moon </CN>.", 1),
    ],
)
def test_how_far_the_chosen_side_goes_and_which_places_count(tmp_path, settings, chosen, count):
    rows, _ = written(tmp_path, [line(decoded(*CAPTION, reject_repeats=True))], **settings)
    assert len(rows) == count and texts(rows[0])[0] == chosen


def test_the_chosen_side_may_end_with_its_sentence(tmp_path):
    answer = decoded(("a star", 0.9), ("a cup", 0.1), ("a moon", 0.2), None)
    made = line(answer)
    made["tagged_answer"] = made["tagged_answer"].replace("</CN> <SPAN> a moon", "</CN>. <SPAN> a moon")
    rows, _ = written(tmp_path, [made], chosen="sentence")
    assert texts(rows[0]) == ("<SPAN> a cup </CN>.", "<SPAN> a star </UN>")


def test_what_is_left_out_is_counted(tmp_path):
    same = decoded(("a red cup", 0.9), ("a cup", 0.1), None)
    twice = decoded(("a star", 0.9), ("a moon", 0.8), ("a cup", 0.1), None)
    back = decoded(("a cup", 0.1), ("a star", 0.9), ("a star", 0.8), ("a moon", 0.1), None, local_attempts=1)
    flagged = decoded(("a star", 0.9), ("a moon", 0.9), total_attempts=1)
    lines = [line(same), line(twice, "2"), line(back, "3"), line(flagged, "4"), {"row": 5, "error": "bad"}]
    rows, counts = written(tmp_path, lines, tries="first")
    assert [row["id"] for row in rows] == ["2/0"]
    assert texts(rows[0])[1] == "<SPAN> a star </UN>"  # what the model said by itself
    assert counts == {
        pairs.NO_ANSWER: 1,
        "answers": 4,
        pairs.SAME_THING: 1,
        pairs.LATER: 1,
        pairs.TAKEN_BACK: 2,
        pairs.NOT_VERIFIED: 1,
        "pairs": 1,
        "pairs: doubt": 1,
    }


def test_every_phrase_that_was_rejected_at_a_place_loses_once(tmp_path):
    answer = decoded(
        *[(phrase, 0.9) for phrase in ("a star", "a moon", "star", "a cup")], ("a red cup", 0.1), None
    )
    rows, counts = written(tmp_path, [line(answer)])
    assert [(row["id"], texts(row)[1]) for row in rows] == [
        ("1/0", "<SPAN> a star </UN>"),
        ("1/0.1", "<SPAN> a moon </UN>"),
    ]
    assert counts[pairs.SAME_THING] == 1  # the red cup is a cup


def test_nothing_to_learn_from_is_an_error_that_says_why(tmp_path):
    with pytest.raises(
        UserError, match=r"no pair in it \(1 answers, 1 finished answers, 1 answers without a trace\)"
    ):
        written(tmp_path, [line(decoded(("a cup", 0.1), None), trace=[])], tmp_path / "sft.jsonl")
    broken = line(decoded(*CAPTION), tagged_answer="<SPAN> a sun </CN>.")
    with pytest.raises(UserError, match=r"traces.jsonl:1.*not those of `tagged_answer`"):
        written(tmp_path, [broken])
    assert [path.name for path in tmp_path.iterdir()] == ["traces.jsonl"]


def test_no_pairs_says_what_to_change(tmp_path):
    flagged = line(decoded(("a star", 0.9), ("a moon", 0.9), total_attempts=1))
    for lines, cure in (
        ([], r"\(no answers\)\. Give what"),
        ([flagged], r"not fully verified\)\. Let decoding doubt less"),
        ([line(decoded(("a cup", 0.1), None))], r"\(1 answers\)\. Nothing was taken back.*doubt more"),
    ):
        with pytest.raises(UserError, match=cure):
            written(tmp_path, lines)


def test_a_file_that_is_named_twice_is_refused(tmp_path):
    source = write_lines(tmp_path / "traces.jsonl", [line(decoded(*CAPTION))])
    for target, finished in ((source, None), (tmp_path / "a", tmp_path / "a"), (tmp_path / "a", source)):
        with pytest.raises(UserError, match="named twice"):
            write_pairs(source, target, PairConfig(), finished)
    assert len(read_lines(source)) == 1 and not (tmp_path / "a").exists()


def test_answers_in_which_not_everything_was_verified_are_no_finished_ones(tmp_path):
    odd = {"tagged_answer": "<SPAN> a cup <SPAN> a moon </CN>."}
    made = [line(decoded(*CAPTION)), line(decoded(None), "2"), line(decoded(*CAPTION), "3") | odd]
    _, counts = written(tmp_path, made, tmp_path / "sft.jsonl")
    assert [row["id"] for row in read_lines(tmp_path / "sft.jsonl")] == ["1"]
    assert (counts["finished answers"], counts[pairs.UNTAGGED], counts[pairs.ODD_TAGS]) == (1, 1, 1)


def test_words_outside_of_phrases_win_nothing(tmp_path):
    """What was doubted came back without its tags, or after other words: to prefer that would teach to leave tags out."""
    escaped = line(decoded(("a cup", 0.1), ("a star", 0.9), None), "2")
    escaped["tagged_answer"] = escaped["tagged_answer"].removesuffix(".") + " a star."
    led = line(decoded(*CAPTION), "3")
    led["tagged_answer"] = led["tagged_answer"].replace("<SPAN> a moon", "a star <SPAN> a moon")
    rows, counts = written(tmp_path, [line(decoded(*CAPTION)), escaped, led])
    assert {row["id"].split("/")[0] for row in rows} == {"1"} and counts[pairs.UNVERIFIED] == 2


def test_what_the_length_limit_cut_off_teaches_no_end(tmp_path):
    cut = line(decoded(("a cup", 0.1), ("a star", 0.9), ("a moon", 0.2), max_new_tokens=8), "2")
    assert cut["ok"] and cut["trace"][-1]["reason"] == "length"
    rows, counts = written(tmp_path, [line(decoded(*CAPTION)), cut], tmp_path / "sft.jsonl")
    assert {row["id"].split("/")[0] for row in rows} == {"1"}
    assert counts["finished answers"] == 1 and counts[pairs.CUT] == 1
    # plain decoders do not say it
    torn = [plain_line("A cup is here. A star", "a"), plain_line("A cup is here. A moon.", "b")]
    settings = {"judge": "truth", "vocabulary": write_nouns(tmp_path)}
    (row,), _ = written(tmp_path, torn, level="answer", **settings)
    assert stops(row) == ["chosen"]
    torn.append(plain_line("A cup is here. A star is near.", "c"))
    (row,), counts = written(tmp_path, torn, level="sentence", **settings)
    assert texts(row)[0] == "A cup is here. A star is near." and counts[pairs.CUT_SENTENCE] == 1


def test_what_the_released_rules_take_back_behind_the_phrase_is_no_part_of_the_pair(tmp_path):
    made = line(decoded(*CAPTION))
    (event,) = (event for event in made["trace"] if event["kind"] == "local_rewind")
    event["removed"] += ", <SPAN> a cup </CN>."
    rows, _ = written(tmp_path, [made])
    assert texts(rows[0])[1] == "<SPAN> a cup </CN> <SPAN> a star </UN>"


@pytest.mark.parametrize(
    "settings", [{}, *({"judge": "truth", "level": level} for level in ("phrase", "sentence", "answer"))]
)
def test_lines_are_not_held(tmp_path, settings):
    """100 million answers do not fit into the memory; what is compared of several answers are their texts."""
    kinds = [decoded(*CAPTION, reject_repeats=True), decoded(("a cup", 0.1), None)]
    if settings.get("level", "phrase") != "phrase":
        settings = settings | {"vocabulary": write_nouns(tmp_path)}
    padded = {"reference": {"objects": ["cup"]}, "counts": {"padding": "x" * 20_000}}
    made = [line(kinds[n % 2], str(n), **padded) for n in range(100)]
    source = write_lines(tmp_path / "traces.jsonl", made)
    del made
    tracemalloc.start()
    counts = write_pairs(source, tmp_path / "pairs.jsonl", PairConfig(**settings), tmp_path / "sft.jsonl")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert counts["answers"] == counts["finished answers"] == 100
    assert peak < source.stat().st_size / 3


def test_ground_truth_decides_instead_of_the_verifier(tmp_path):
    # the verifier doubts the star, which is there, and lets the moon stand, which is not
    made = line(decoded(*CAPTION, reject_repeats=True), reference={"objects": ["cup", "star"]})
    rows, counts = written(tmp_path, [made], judge="truth", vocabulary=write_nouns(tmp_path))
    assert texts(rows[0]) == (
        "<SPAN> a cup </CN> <SPAN> a star </CN>",
        "<SPAN> a cup </CN> <SPAN> a moon </UN>",
    )
    assert counts["pairs: error"] == 1 and counts["pairs: repeat"] == 1


@pytest.mark.parametrize("level", ["sentence", "answer"])
def test_what_only_other_pictures_show_is_wrong_too(tmp_path, level):
    (tmp_path / "objects.jsonl").write_text(
        '{"image": "a.png", "objects": ["cup", "star"]}\n{"image": "b.png", "objects": ["moon"]}\n'
    )
    rows, _ = written(tmp_path, SEVERAL, judge="truth", level=level, objects=tmp_path / "objects.jsonl")
    assert "moon" in texts(rows[0])[1]


def write_nouns(folder):
    path = folder / "nouns.txt"
    path.write_text("cup\nstar\nmoon\n")
    return path


def plain_line(text, identity, objects=("cup", "star")):
    made = {"id": identity, "images": ["a.png"], "prompt": "Describe.", "answer": text, "tagged_answer": ""}
    return made | {"ok": True, "trace": [], "reference": {"objects": list(objects)}}


SEVERAL = [
    plain_line("A cup is here. A moon shines.", "a"),
    plain_line("A cup is here. A star shines. A moon, too.", "b"),
    plain_line("A moon.", "c"),
]


def test_the_first_wrong_sentence_loses_against_a_right_one_behind_the_same_text(tmp_path):
    rows, counts = written(
        tmp_path, SEVERAL, judge="truth", level="sentence", vocabulary=write_nouns(tmp_path)
    )
    assert [texts(row) for row in rows] == [
        ("A cup is here. A star shines.", "A cup is here. A moon shines."),
        ("A cup is here.", "A moon."),
    ]
    assert counts[pairs.NO_CONTEXT] == 1  # the moon at the end of b
    assert all(stops(row) == ["chosen", "rejected"] for row in rows)


def test_answers_of_several_seeds_have_the_same_id_and_their_pairs_do_not(tmp_path):
    again = [plain_line(text, "a", ["cup", "star"]) for text in ("A moon.", "A moon. A cup.", "A cup.")]
    rows, _ = written(tmp_path, again, judge="truth", level="sentence", vocabulary=write_nouns(tmp_path))
    assert [row["id"] for row in rows] == ["a/0", "a#1/0"]


def test_whole_answers_are_compared_by_their_share_of_wrong_mentions(tmp_path):
    rows, _ = written(tmp_path, SEVERAL, judge="truth", level="answer", vocabulary=write_nouns(tmp_path))
    (row,) = rows
    assert texts(row) == (SEVERAL[1]["answer"], "A moon.")
    assert row["pair_weight"] == pytest.approx(1 - 1 / 3, abs=1e-6) and stops(row) == []
    alone = [plain_line("A cup.", "d", ["cup"]) | {"images": ["b.png"]}]
    _, counts = written(
        tmp_path, SEVERAL + alone, judge="truth", level="answer", vocabulary=write_nouns(tmp_path)
    )
    assert counts[pairs.ALONE] == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"level": "answer"},
        {"objects": "o.jsonl"},
        {"judge": "truth", "level": "sentence", "places": "first"},
        {"judge": "truth", "level": "sentence", "ends": False},
        {"judge": "oracle"},
    ],
)
def test_settings_without_effect_are_refused(settings):
    with pytest.raises(UserError):
        PairConfig(**settings)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("a cup", "the red cup", True), ("a red cup", "a blue cup", False), ("An Envelope,", "envelope", True)],
)
def test_phrases_that_say_the_same(one, other, same):
    assert same_thing(one, other) is same and same_thing(other, one) is same


@given(st.text("ab .!\n。", max_size=30))
def test_sentences_are_a_partition(text):
    parts = sentences(text)
    assert "".join(parts).strip() == text.strip() and all(parts[:-1])


@given(st.integers(0, 100_000))
def test_every_place_of_a_random_trace_lies_in_the_finished_answer(seed):
    rng = random.Random(seed)
    machine = Retrospective(
        RetrospectiveConfig(
            threshold=0.5,
            local_attempts=rng.randint(1, 4),
            reject_repeats=rng.random() < 0.5,
            without_replacement=False,
            max_new_tokens=60,
        ),
        GRAMMAR,
    )
    action, ahead = None, []
    while action != FINISH:
        if not ahead:
            words = rng.choices(range(5, len(WORDS)), k=rng.randint(0, 2))
            closed = [OPEN, *words, *([CN] if rng.random() < 0.9 else [])]
            ahead = rng.choices([closed, words, [4], [END]], [6, 1, 1, 1])[0][:]
        if not ahead:
            continue
        token = ahead.pop(0)
        action = machine.observe(token, rng.choice([0.1, 0.2, 0.7, 0.9]) if token in (CN, UN) else None)
        if isinstance(action, Rewind):
            ahead = []
    made = json.loads(json.dumps(line(machine.answer())))
    places = places_of(made, "here", Counter()) if made["ok"] else []
    for place in places:
        assert made["tagged_answer"].startswith(place.context)
        assert place.context.count("<SPAN>") == place.number
        for attempt in place.rejected:
            tail = attempt.text.removeprefix(place.context)
            assert attempt.text.startswith(place.context) and tail.rstrip().endswith(("</CN>", "</UN>"))
            assert attempt.phrase in tail and (attempt.p >= 0.5 or attempt.reason == "repeat")
        if place.accepted is not None:
            assert made["tagged_answer"].startswith(place.accepted.text) and place.accepted.p < 0.5
    event(f"{min(len(places), 3)} places")
