import random
import re
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from vlm_sft_rl.data.stages import format_staged, parse
from vlm_sft_rl.decoding.answers import Counts
from vlm_sft_rl.demos.sco import SYSTEMS, SCo, finish
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.io import read_jsonl, write_json, write_jsonl
from vlm_sft_rl.pocket.problems import CHOICE_KINDS, ask, build_staged_set
from vlm_sft_rl.pocket.world import NOUNS, draw_scene

SIZES = {"warmup": 12, "train": 12, "val": 6, "test": 24}


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return build_staged_set(tmp_path_factory.mktemp("set"), seed=3, sizes=SIZES)


def questions(folder, split="test"):
    return [row for _, row in read_jsonl(folder / f"{split}.jsonl")]


def test_staged_answers_are_true(problems):
    grader = load_grader("pocket")
    rows = questions(problems)
    assert {row["category"] for row in rows} == set(CHOICE_KINDS)
    for row in rows:
        staged = parse(row["staged"])
        assert staged.conclusion == row["answer"]
        assert grader(f"Answer: {staged.conclusion}", row).correct
        # the first caption is about the whole picture, the checked one looks up what is asked for
        colours = {item["noun"]: item["colour"] for item in row["scene"]["objects"]}
        assert set(re.findall(rf"\b({'|'.join(NOUNS)})\b", staged.caption)) == set(colours)
        checked = parse(row["checked"])
        asked = row["question"].rstrip("?").split(": ")[1].split(", ")
        assert (checked.conclusion, checked.summary) == (staged.conclusion, staged.summary)
        looked_up = dict(
            item.split(" ") for item in checked.caption.removeprefix("Locate: ")[:-1].split(", ")
        )
        assert list(looked_up) == asked and row["answer"] in asked
        known = colours if row["category"] == "colour" else dict.fromkeys(colours, "there")
        assert looked_up == {noun: known.get(noun, "nowhere") for noun in asked}
        assert f"{looked_up[row['answer']]} {row['answer']}." == checked.reasoning
        assert (problems / row["images"][0]).is_file()


@given(st.sampled_from(CHOICE_KINDS), st.integers(0, 2**32))
def test_exactly_one_choice_fits(kind, seed):
    rng = random.Random(seed)
    scene = draw_scene(rng, rng.choice((0.0, 0.85)))
    question = ask(kind, scene, rng)
    found = question.facts(scene)
    asked = {"nowhere": "nowhere", "colour": question.colour}
    fits = [n for n, fact in found.items() if (fact != "nowhere" if kind == "there" else fact == asked[kind])]
    assert fits == [question.answer]
    assert 3 <= len(set(question.nouns)) <= 5 and question.text.count(",") == len(question.nouns) - 1


def test_splits_share_no_picture(problems):
    seen = [
        (problems / row["images"][0]).read_bytes() for split in SIZES for row in questions(problems, split)
    ]
    assert len(set(seen)) == len(seen)


def test_a_finished_set_stays_and_another_is_refused(problems):
    assert build_staged_set(problems, seed=3, sizes=SIZES) == problems
    with pytest.raises(UserError, match="other settings"):
        build_staged_set(problems, seed=4, sizes=SIZES)


def demo(folder, problems) -> SCo:
    demo = SCo(folder, seed=0, questions=24, steps=None, console=Console(quiet=True))
    demo.problems = problems
    return demo


def sample(row, texts):
    trace = [
        {
            "kind": "turn",
            "number": i + 1,
            "text": t,
            "tokens": 9,
            "cut": False,
            "probability": 0.9,
            "least_sure": 0.5,
        }
        for i, t in enumerate(texts)
    ]
    reference = {key: row[key] for key in ("answer", "category", "staged")}
    return {"id": row["id"], "images": row["images"], "prompt": row["question"], "answer": texts[-1], "ok": True,
            "counts": asdict(Counts(10, 5, 3, 1, 4)), "trace": trace, "reference": reference}  # fmt: skip


def test_the_summary_is_the_arithmetic_of_the_samples(problems, tmp_path):
    """Every fourth answer is wrong at first; of the wrong ones all but the first are repaired, one right one is spoiled."""
    made = demo(tmp_path, problems)
    rows = made.test_questions()
    wrong = {row["id"] for k, row in enumerate(rows) if k % 4 == 0}
    for system, (_, corrections, *_) in SYSTEMS.items():
        samples = []
        for k, row in enumerate(rows):
            bad = format_staged(replace(parse(row["staged"]), conclusion="99"))
            first = bad if row["id"] in wrong else row["staged"]
            second = bad if k in (0, 1) else row["staged"]
            samples.append(sample(row, [first, second][: corrections + 1]))
        write_jsonl(made.run_dir(system) / "samples.jsonl", samples)
    for mode in ("repair", "refine"):
        write_json(made.folder / f"built-{mode}" / "summary.json", {"counts": {"rows": 3}})
    summary = finish(made)
    assert summary["n"] == 24
    assert summary["turn1"]["value"] == 18 / 24 and summary["turn2"]["value"] == 22 / 24
    assert summary["wrong_to_right"]["value"] == 5 / 24 and summary["right_to_wrong"]["value"] == 1 / 24
    assert summary["net_flips"]["value"] == pytest.approx(4 / 24)
    for name in ("turn1", "turn2", "net_flips", "wrong_to_right", "right_to_wrong"):
        assert set(summary[name]) == {"value", "low", "high"}
    assert summary["compare"]["repaired answers against the control"]["net_flips"]["value"] == pytest.approx(
        4 / 24
    )
    assert sum(g["n"] for g in summary["by_category"].values()) == 24
    page = (tmp_path / "report.html").read_text()
    assert "Wrong, then right" in page and "Right, then wrong" in page and "Wrong both times" in page


def test_rows_of_warm_up_and_control(problems, tmp_path):
    made = demo(tmp_path, problems)
    made.write_staged_rows()
    for name, split, field in (
        ("staged", "warmup", "staged"),
        ("control", "train", "staged"),
        ("careful", "train", "checked"),
    ):
        rows = [row for _, row in read_jsonl(made.rows / f"{name}.jsonl")]
        wanted = [q[field] for q in questions(problems, split)]
        assert [row["messages"][1]["content"] for row in rows] == wanted


def test_a_demo_of_other_settings_is_refused(tmp_path, problems):
    demo(tmp_path, problems)
    with pytest.raises(UserError, match=r"other settings.*questions: 24 -> 30"):
        SCo(tmp_path, seed=0, questions=30, steps=None)
