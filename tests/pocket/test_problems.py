import random
import re

import numpy as np
import pytest
from json_lines import read_lines
from PIL import Image

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.pocket.problems import CHART_KINDS, KINDS, SCENE_KINDS, build_problem_set, draw_problem
from vlm_sft_rl.pocket.render import AXIS, PAPER, draw_chart, render_chart, value
from vlm_sft_rl.pocket.world import CELLS, COLOURS, NOUNS, draw_scene


def solve(question, scene):
    """The answer, worked out from the words of the question and the picture's things alone."""
    is_chart = scene.theme == "chart"
    heights = {item.noun: "4321".index(item.cell[1]) + 1 for item in scene.objects}
    parts = [
        sum(heights.get(noun, 0) if is_chart else noun in heights for noun in re.findall(_NOUNS, part))
        for part in re.split(r"than|plus(?!:)", question)
    ]
    if question.startswith(("Are", "Is")):
        return "more" if parts[0] > parts[1] else "fewer" if parts[0] < parts[1] else "equal"
    if start := re.search(r"(\d) (plus|minus):", question):
        return str(int(start[1]) + (1 if start[2] == "plus" else -1) * sum(parts))
    return str(sum(parts))


_NOUNS = rf"\b(?:{'|'.join(NOUNS)})\b"


def numbers_follow(rationale):
    """Every sum and comparison in a rationale holds."""
    for a, b, c in re.findall(r"(\d+) plus (\d+) equals (\d+)", rationale):
        if int(a) + int(b) != int(c):
            return False
    for a, relation, b in re.findall(r"(\d+) is (more|fewer) than (\d+)", rationale):
        if (int(a) > int(b)) != (relation == "more") or a == b:
            return False
    return all(a == b for a, b in re.findall(r"\. (\d+) equals (\d+)\.", rationale))


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_rationales_are_exact(kind):
    rng, grade = random.Random(kind), load_grader("pocket")
    answers = set()
    for _ in range(200):
        scene = draw_chart(rng) if kind in CHART_KINDS else draw_scene(rng, 0.0)
        problem = {**SCENE_KINDS, **CHART_KINDS}[kind](scene, rng)
        assert problem.kind == kind
        assert problem.answer == solve(problem.question, scene), (problem, scene)
        assert numbers_follow(problem.rationale)
        looked_up = re.findall(rf"({_NOUNS}) (\w+) (\d+)", problem.rationale)
        assert [noun for noun, _, _ in looked_up] == re.findall(_NOUNS, problem.question)
        for noun, cell, _ in looked_up:
            assert cell == (scene.find(noun).cell if scene.find(noun) else "nowhere")
        question = {"id": "q", "answer": problem.answer}
        assert grade(problem.rationale, question).correct and grade(problem.answer, question).correct
        answers.add(problem.answer)
    assert len(answers) >= 3


@pytest.mark.parametrize("kind", ["count", "add", "subtract"])
def test_the_number_changes_where_something_is_there_and_only_there(kind):
    rng, step = random.Random(kind), -1 if kind == "subtract" else 1
    for _ in range(50):
        scene = draw_scene(rng, 0.0)
        problem = SCENE_KINDS[kind](scene, rng)
        start = re.search(r"\d", problem.question)
        number = int(start[0]) if start else 0
        for cell, after in re.findall(r" (\w+) (\d+)[,.]", problem.rationale.split(" So ")[0]):
            number += step * (cell != "nowhere")
            assert number == int(after)
        assert str(number) == problem.answer


def test_a_chart_has_one_symbol_in_a_column_and_its_height_is_its_value():
    rng = random.Random(0)
    heights = set()
    for _ in range(50):
        chart = draw_chart(rng)
        assert len({item.cell[0] for item in chart.objects}) == len(chart.objects) in (3, 4)
        assert len(set(chart.nouns)) == len(chart.objects)
        places = [CELLS.index(item.cell) for item in chart.objects]
        assert places == sorted(places)
        for item in chart.objects:
            assert (128 - item.box[3]) // 32 == value(item) - 1
            heights.add(value(item))
    assert heights == {1, 2, 3, 4}


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
        rows = read_lines(folder / f"{split}.jsonl")
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
