from collections import Counter

import pools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.data.rows import sft_row
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders.prompts import DATASETS, STYLES, load_prompts
from vlm_sft_rl.self_training.builders import (
    SHORTEST_CANDIDATE,
    BuildSettings,
    balance,
    build_mixture,
    build_pairs,
    reflection_rows,
    row_kind,
)
from vlm_sft_rl.self_training.pool import Candidate, build_pool, grade_samples, pool_figures

PROMPTS = load_prompts("pocket")
STATUSES = st.text("RWF", min_size=0, max_size=12)
SIZES = st.lists(st.sampled_from([2, 3, 4, 5, 6]), min_size=1, max_size=3, unique=True)


def rows_of(statuses, **options):
    return reflection_rows(pools.QUESTION, pools.candidates(statuses), PROMPTS, BuildSettings(**options))


def kinds(rows):
    return Counter(map(row_kind, rows))


def target(row):
    return row["messages"][-1]["content"]


def prompt(row):
    return row["messages"][0]["content"]


@given(STATUSES)
def test_which_rows_exist(statuses):
    right, wrong = statuses.count("R"), len(statuses) - statuses.count("R")
    found = kinds(rows_of(statuses))
    assert found["cot"] == (right >= 1)
    assert found["refine"] == (right >= 1 and wrong >= 1)
    assert found["select"] == (right >= 2 and wrong >= 1) + (right >= 1 and wrong >= 2)


@given(STATUSES, SIZES)
def test_gold_stands_nowhere_and_targets_are_right_candidates(statuses, sizes):
    own = {c.text for c in pools.candidates(statuses) if c.right}
    for row in rows_of(statuses, select_sizes=tuple(sizes)):
        text = prompt(row) + target(row)
        assert "GOLD" not in text
        if row_kind(row) == "select":
            assert target(row) == "So the answer is 7."
        else:
            assert target(row) in own
        sft_row(row, "test:1")  # a row that training takes


@given(STATUSES, SIZES)
def test_select_rows_show_right_and_wrong_candidates_once(statuses, sizes):
    rows = [r for r in rows_of(statuses, select_sizes=tuple(sizes)) if row_kind(r) == "select"]
    for row in rows:
        shown = [c for c in pools.candidates(statuses) if f"\n{c.text}" in prompt(row)]
        assert len(shown) in sizes
        assert any(c.right for c in shown) and not all(c.right for c in shown)
        assert [f"Try {i}:" in prompt(row) for i in range(1, 8)] == [i <= len(shown) for i in range(1, 8)]
    for size in sizes:
        count = sum(f"Try {size}:" in prompt(r) and f"Try {size + 1}:" not in prompt(r) for r in rows)
        assert count <= 2
    texts = [c.text for c in pools.candidates(statuses)]
    assert len({tuple(t in prompt(r) for t in texts) for r in rows}) == len(rows)


def test_the_newest_candidates_are_used():
    rows = {row_kind(r): r for r in rows_of("RWRWRW")}
    assert target(rows["cot"]).startswith("right4") and target(rows["refine"]).startswith("right4")
    assert "wrong5" in prompt(rows["refine"]) and "wrong3" not in prompt(rows["refine"])
    two_right, two_wrong = [prompt(r) for r in rows_of("RWRWRW") if row_kind(r) == "select"]
    assert all(name in two_right for name in ("right4", "right2", "wrong5"))
    assert all(name in two_wrong for name in ("right4", "wrong5", "wrong3"))


def test_candidates_are_shuffled_but_the_same_every_time():
    orders = set()
    for seed in range(12):
        row = next(r for r in rows_of("RRW", seed=seed) if row_kind(r) == "select")
        assert row == next(r for r in rows_of("RRW", seed=seed) if row_kind(r) == "select")
        orders.add(tuple(sorted(("right0", "right1", "wrong2"), key=prompt(row).index)))
    assert len(orders) >= 4


def test_positives_of_a_selection_agree():
    group = [
        pools.candidate(0, "right", key="7"),
        pools.candidate(1, "right", key="8"),
        pools.candidate(2, "wrong"),
    ]
    rows = reflection_rows(pools.QUESTION, group, PROMPTS, BuildSettings(cot=False, refine=False))
    assert rows == []  # two right answers within a tolerance, one wrong: no set of 2 + 1 has a single target


@pytest.mark.parametrize("kind", ["cot", "refine", "select"])
def test_switches(kind):
    assert kind not in kinds(rows_of("RRWW", **{kind: False}))
    others = {"cot", "refine", "select"} - {kind}
    assert set(kinds(rows_of("RRWW", **{kind: False}))) == others


def questions(count):
    return [{**pools.QUESTION, "id": f"q{i}", "answer": str(i % 3)} for i in range(count)]


def test_mixture_counts_shuffles_and_keeps_direct_rows():
    asked = questions(6)
    pool = {f"q{i}": pools.candidates("RRWW", f"q{i}") for i in range(3)}
    warmup = [{**pools.QUESTION, "id": "w", "answer": "1", "rationale": "one. So the answer is 1."}]
    mixture = build_mixture(asked, pool, warmup, PROMPTS, BuildSettings(seed=1))
    expected = {"direct": 6, "cot": 4, "refine": 3, "select": 6}
    assert {k: mixture.counts[k] for k in expected} == expected == dict(kinds(mixture.rows))
    assert len({r["id"] for r in mixture.rows}) == len(mixture.rows)
    again = build_mixture(asked, pool, warmup, PROMPTS, BuildSettings(seed=1))
    assert again.rows == mixture.rows
    other = build_mixture(asked, pool, warmup, PROMPTS, BuildSettings(seed=2))
    assert [r["id"] for r in other.rows] != [r["id"] for r in mixture.rows]


def words(row):
    return sum(len(m["content"].split()) for m in row["messages"])


@settings(max_examples=60)
@given(STATUSES, st.integers(10, 120), st.integers(1, 60))
def test_long_rows_lose_candidates_never_targets(statuses, limit, length):
    long = [
        c.__class__(**{**c.to_json(), "text": " ".join([c.status] * length) + f" So the answer is {c.key}."})
        for c in pools.candidates(statuses)
    ]
    options = BuildSettings(direct=False, select_sizes=(3, 4))
    mixture = build_mixture([pools.QUESTION], {"q1": long}, [], PROMPTS, options, lambda r: words(r) <= limit)
    whole = build_mixture([pools.QUESTION], {"q1": long}, [], PROMPTS, options)
    assert all(words(row) <= limit for row in mixture.rows)
    targets = {row["id"]: target(row) for row in whole.rows}
    assert all(target(row) == targets[row["id"]] for row in mixture.rows)
    left_out = sum(count for name, count in mixture.counts.items() if name.endswith("too long"))
    assert len(mixture.rows) + left_out == len(whole.rows)
    for row in mixture.rows:
        if row_kind(row) == "select":
            assert "right" in prompt(row) or "So the answer is 7" in prompt(row)
            assert "Try 2:" in prompt(row)


def test_a_shortened_candidate_keeps_its_end_and_is_counted():
    wrong = pools.candidate(1, "wrong", text=" ".join(f"s{i}" for i in range(60)) + " So the answer is 9.")
    pool = {"q1": [pools.candidate(0, "right"), wrong]}
    options = BuildSettings(direct=False, cot=False, select=False)
    mixture = build_mixture([pools.QUESTION], pool, [], PROMPTS, options, lambda r: words(r) <= 50)
    assert mixture.counts["refine candidate shortened"] == 1 and mixture.counts["refine"] == 1
    assert "So the answer is 9." in prompt(mixture.rows[0]) and "s0 " not in prompt(mixture.rows[0])
    tight = build_mixture(
        [pools.QUESTION], pool, [], PROMPTS, options, lambda r: words(r) <= SHORTEST_CANDIDATE
    )
    assert tight.rows == [] and tight.counts["refine too long"] == 1


@given(st.lists(st.sampled_from("aaaab"), min_size=1, max_size=30), st.integers(0, 3))
def test_balance_caps_frequent_answers_alone(answers, seed):
    rows = [({"messages": [{}, {"answer_type": "cot"}], "id": i}, a) for i, a in enumerate(answers)]
    kept = balance(rows, seed, counts := Counter())
    before, after = Counter(answers), Counter(a for _, a in kept)
    cap = -(-len(answers) // len(before))
    assert after == {a: min(n, cap) for a, n in before.items()}
    assert len(kept) == len(rows) - counts["cot left out for balance"]


def test_balance_is_of_the_models_own_rows():
    """Seven questions with the answer 0, one with 1: four rows of the former stay, and all that was given."""
    asked = [{**pools.QUESTION, "id": f"q{i}", "answer": str(i // 7)} for i in range(8)]
    pool = {q["id"]: pools.candidates("R", q["id"]) for q in asked}
    warmup = [{**q, "id": f"w{q['id']}", "rationale": "So the answer is 0."} for q in asked]
    mixture = build_mixture(asked, pool, warmup, PROMPTS, BuildSettings(balance=True))
    assert Counter(r["id"].split("/")[1] for r in mixture.rows) == {"direct": 8, "warmup": 8, "cot": 5}
    assert mixture.counts["cot left out for balance"] == 3
    assert sum(r["id"] == "q7/cot" for r in mixture.rows) == 1


def test_easy_questions_can_be_left_out():
    pool = {"q1": pools.candidates("RRR")}
    kept = build_mixture([pools.QUESTION], pool, [], PROMPTS, BuildSettings(direct=False))
    left = build_mixture([pools.QUESTION], pool, [], PROMPTS, BuildSettings(direct=False, max_solve_rate=0.9))
    assert len(kept.rows) == 1 and left.rows == [] and left.counts["question too easy"] == 1
    with pytest.raises(UserError, match="max_solve_rate"):
        BuildSettings(max_solve_rate=1.5)
    with pytest.raises(UserError, match="select_sizes"):
        BuildSettings(select_sizes=(1,))


def test_pool_orders_and_filters():
    group = pools.candidates("RWR")
    same = pools.candidate(3, "right", text=group[0].text)
    bad = [pools.candidate(4, "wrong", text="a <image>"), pools.candidate(5, "wrong", text=" ")]
    pool, counts = build_pool([same, *bad, *reversed(group)])
    assert [(c.round, c.index) for c in pool["q1"]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert counts == {"image placeholder": 1, "empty": 1}
    pool, counts = build_pool([*group, same], deduplicate=True)
    assert [(c.round, c.index) for c in pool["q1"]] == [(0, 1), (0, 2), (1, 0)] and counts["duplicate"] == 1
    pool, counts = build_pool([*group, pools.candidate(3, "right", text="Answer: 3")], min_chars=5)
    assert len(pool["q1"]) == 3 and counts["no rationale"] == 1


def test_pool_figures():
    graded = [*pools.candidates("RRW"), *pools.candidates("RRR", "q2"), *pools.candidates("FFW", "q3")]
    figures = pool_figures(graded, 4)
    assert figures == {
        "samples": 9,
        "right": round(5 / 9, 4),
        "unreadable": round(2 / 9, 4),
        "questions": 4,
        "questions_solved": 0.5,
        "questions_all_right": 0.25,
        "questions_mixed": 0.25,
    }


def test_a_grader_that_fails_names_the_sample():
    def grader(text, question):
        raise ZeroDivisionError("oh")

    sample = {"id": "q1#0", "question_id": "q1", "index": 0, "answer": "text"}
    with pytest.raises(UserError, match=r"'q1#0' \(ZeroDivisionError: oh\).*samples are kept"):
        grade_samples([sample], [pools.QUESTION], grader, round_=0)
    with pytest.raises(UserError, match="is not in the question file"):
        grade_samples([{**sample, "question_id": "x"}], [pools.QUESTION], grader, round_=0)


@given(STATUSES)
def test_pairs(statuses):
    group = pools.candidates(statuses)
    rows, counts = build_pairs([pools.QUESTION], {"q1": group}, PROMPTS, ("cot", "refine", "select"))
    right, wrong = [c for c in group if c.right], [c for c in group if not c.right]
    by_kind = {row["pair_kind"]: row for row in rows}
    assert counts == {f"{kind} pair": 1 for kind in by_kind}
    assert ("cot" in by_kind) == bool(right and wrong)
    assert ("refine" in by_kind) == (bool(right) and len(wrong) >= 2)
    if "cot" in by_kind:
        assert by_kind["cot"]["chosen"][0]["content"] == right[-1].text
        assert by_kind["cot"]["rejected"][0]["content"] == wrong[-1].text
    for row in rows:
        assert row["chosen"] != row["rejected"] and "GOLD" not in str(row)


def test_pair_weights_and_unknown_kinds():
    pool = {"q1": pools.candidates("RW")}
    rows, _ = build_pairs([pools.QUESTION], pool, PROMPTS, weights={"cot": 0.5})
    assert rows[0]["pair_weight"] == 0.5
    with pytest.raises(UserError, match="pair_kinds"):
        build_pairs([pools.QUESTION], pool, PROMPTS, ("cott",))


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("style", STYLES)
def test_prompts_show_question_options_and_unit(dataset, style):
    prompts = load_prompts(dataset, style)
    question = {"question": "What is x?", "choices": ["(A) 3", "(B) 4"], "unit": "cm"}
    for text in (
        prompts.ask(question),
        prompts.ask_directly(question),
        prompts.ask_to_refine(question, "p <image>"),
    ):
        parts = ["What is x? (Unit: cm)", "Options:", "(A) 3", "(B) 4"]
        assert text.startswith((" " if dataset == "pocket" else "\n").join(parts))
        assert "<image>" not in text
    assert dataset == "pocket" or style == "plain" or "option's letter" in prompts.ask(question)
    shown = prompts.ask_to_select(question, ["one", "two"])
    assert shown.index("1:") < shown.index("one") < shown.index("2:") < shown.index("two")
    assert shown.startswith(prompts.ask(question))
    with pytest.raises(UserError):
        load_prompts(dataset, "loud")


def test_published_prompts_have_the_released_form():
    """Question, unit, options and request in lines of their own; a question with options asks for its letter."""
    question = {"question": "Which?", "unit": "kg", "choices": ["1", "2"]}
    lines = load_prompts("tabmwp").ask(question).split("\n")
    assert lines[:4] == ["Which? (Unit: kg)", "Options:", "(A) 1", "(B) 2"] and len(lines) == 5
    assert "letter" in lines[4] and "word or phrase" not in lines[4]
    assert "word or phrase" in load_prompts("tabmwp").ask({"question": "Which?"})
    assert load_prompts("clevr_math", "plain").ask({"question": "Q?"}) == "Q?\nLet's think step by step."
    shown = load_prompts("chartqa", "plain").ask_to_refine({"question": "Q?"}, "P")
    assert shown.split("\n")[:4] == ["Q?", "Let's think step by step.", "Model's prediction:", "P"]
    forms = {
        "tabmwp": "Answer: x",
        "chartqa": "x",
        "clevr_math": "x",
        "geoqa": "Answer:\nx",
        "pocket": "So the answer is x.",
    }
    assert {name: load_prompts(name).selected("x") for name in forms} == forms


def test_the_target_of_a_choice_is_its_letter():
    question = {"id": "q1", "images": [], "question": "?", "answer": "B", "choices": ["1", "2"]}
    pool = [
        Candidate("q1", 0, i, f"text {i}", *said)
        for i, said in enumerate([("(B) 2", "B", "right")] * 2 + [("A", "A", "wrong")])
    ]
    for dataset, target in (("geoqa", "Answer:\nB"), ("tabmwp", "Answer: (B) 2")):
        rows = reflection_rows(question, pool, load_prompts(dataset), BuildSettings())
        assert [row["messages"][1]["content"] for row in rows if row_kind(row) == "select"] == [target]
