import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.pocket.chart import AXIS, PAPER, draw_chart, render_chart
from vlm_sft_rl.pocket.problem_set import build_problem_set, draw_problem
from vlm_sft_rl.pocket.problems import CHART_KINDS, KINDS, SCENE_KINDS, two_bars, two_colours
from vlm_sft_rl.pocket.world import CELLS, COLOURS, draw_scene


def solve(question, scene):
    """The answer, worked out from the words of the question alone."""
    named = re.findall("|".join(COLOURS), question)
    counts = [sum(item.colour == colour for item in scene.objects) for colour in named]
    if question.startswith("Are there"):
        return "more" if counts[0] > counts[1] else "fewer" if counts[0] < counts[1] else "equal"
    if "left" in question:
        return str(len(scene.objects) - counts[0])
    return str(sum(counts))


def numbers_follow(rationale):
    """Every sum, difference and comparison in a rationale holds."""
    for a, sign, b, c in re.findall(r"(\d+) (plus|minus) (\d+) equals (\d+)", rationale):
        if int(a) + int(b) * (1 if sign == "plus" else -1) != int(c):
            return False
    for a, relation, b in re.findall(r"(\d+) is (more|fewer) than (\d+)", rationale):
        if (int(a) > int(b)) != (relation == "more") or a == b:
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_rationales_are_exact(kind):
    rng, grade = random.Random(kind), load_grader("pocket")
    answers = set()
    for _ in range(200):
        scene = draw_chart(rng) if kind in CHART_KINDS else draw_scene(rng, 0.0)
        colours = two_bars(scene, rng) if kind in CHART_KINDS else two_colours(scene, rng)
        problem = {**SCENE_KINDS, **CHART_KINDS}[kind](scene, colours)
        assert problem.answer == solve(problem.question, scene), (problem, scene)
        assert numbers_follow(problem.rationale)
        for colour, number in re.findall(rf"({'|'.join(COLOURS)}) (\d+)\.", problem.rationale):
            assert int(number) == sum(item.colour == colour for item in scene.objects)
        question = {"id": "q", "answer": problem.answer}
        assert grade(problem.rationale, question).correct and grade(problem.answer, question).correct
        answers.add(problem.answer)
    assert len(answers) >= 3


def test_charts_are_bars_on_an_axis():
    rng = random.Random(0)
    for _ in range(50):
        chart = draw_chart(rng)
        columns = {}
        for item in chart.objects:
            columns.setdefault(item.cell[0], []).append(item)
        assert 2 <= len(columns) <= 4
        for items in columns.values():
            assert len({(i.noun, i.colour) for i in items}) == 1
            assert sorted(i.cell[1] for i in items) == ["1", "2", "3", "4"][4 - len(items) :]
        assert len({items[0].colour for items in columns.values()}) == len(columns)
        assert [CELLS.index(i.cell) for i in chart.objects] == sorted(
            CELLS.index(i.cell) for i in chart.objects
        )


def test_a_chart_shows_its_symbols_where_they_are():
    chart = draw_chart(random.Random(3))
    pixels = np.asarray(render_chart(chart)).astype(int)
    assert pixels.shape == (128, 128, 3)
    taken = {item.cell: item for item in chart.objects}
    for index, cell in enumerate(CELLS):
        row, column = divmod(index, 4)
        part = pixels[row * 32 + 4 : row * 32 + 28, column * 32 + 4 : column * 32 + 28].reshape(-1, 3)
        if cell in taken:
            ink = np.array(COLOURS[taken[cell].colour])
            assert np.abs(part - ink).sum(1).min() < 60
        else:
            assert np.abs(part - PAPER).max() < 12
    assert np.abs(pixels[60, 0] - AXIS).max() < 60


def test_a_set_is_complete_balanced_and_the_same_again(tmp_path):
    sizes = {"warmup": 12, "train": 18, "test": 24}
    folder = build_problem_set(tmp_path / "a", seed=3, sizes=sizes)
    other = build_problem_set(tmp_path / "b", seed=3, sizes=sizes)
    for split, count in sizes.items():
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert (folder / f"{split}.jsonl").read_text() == (other / f"{split}.jsonl").read_text()
        assert len({row["id"] for row in rows}) == count
        assert [sum(row["kind"] == kind for row in rows) for kind in KINDS] == [count // 6] * 6
        assert all(("rationale" in row) == (split == "warmup") for row in rows)
        image = Image.open(folder / rows[0]["images"][0])
        assert image.size == (128, 128)
        assert image.tobytes() == Image.open(other / rows[0]["images"][0]).tobytes()
    assert build_problem_set(tmp_path / "a", seed=3, sizes=sizes) == folder
    with pytest.raises(UserError, match="other settings"):
        build_problem_set(tmp_path / "a", seed=4, sizes=sizes)


def test_a_drawn_problem_has_its_picture():
    for kind in KINDS:
        picture, problem = draw_problem(kind, random.Random(1))
        assert picture.size == (128, 128) and problem.kind == kind
