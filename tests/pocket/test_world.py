import itertools
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.pocket import language
from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import (
    CELL_PIXELS,
    CELLS,
    COMPANIONS,
    GRID,
    NOUNS,
    Scene,
    draw_absent,
    draw_scene,
    scene_from_json,
)

SCENES = st.builds(
    lambda seed, bias: draw_scene(random.Random(seed), bias), st.integers(0, 10**6), st.floats(0, 1)
)


@given(SCENES)
def test_objects_stand_in_cells_of_their_own_in_reading_order(scene: Scene):
    assert 3 <= len(scene.objects) <= 6
    assert len(set(scene.nouns)) == len(scene.nouns)
    places = [CELLS.index(item.cell) for item in scene.objects]
    assert places == sorted(set(places))
    for item, place in zip(scene.objects, places, strict=True):
        left, top, right, bottom = item.box
        assert place % GRID * CELL_PIXELS <= left < right <= (place % GRID + 1) * CELL_PIXELS
        assert place // GRID * CELL_PIXELS <= top < bottom <= (place // GRID + 1) * CELL_PIXELS


@given(SCENES)
def test_a_scene_survives_its_file(scene: Scene):
    assert scene_from_json(scene.to_json()) == scene


def test_bias_makes_companions_and_its_absence_does_not():
    def share(bias: float) -> float:
        rng = random.Random(0)
        scenes = [draw_scene(rng, bias) for _ in range(3000)]
        pairs = [
            COMPANIONS[noun] in scene.nouns for scene in scenes for noun in scene.nouns if noun in COMPANIONS
        ]
        return sum(pairs) / len(pairs)

    assert share(0.0) == pytest.approx(3.5 / 35, abs=0.03)
    assert share(0.85) > 0.65


@given(SCENES, st.integers(0, 10**6), st.floats(0, 1))
def test_absent_nouns_are_absent(scene: Scene, seed: int, bias: float):
    assert draw_absent(random.Random(seed), set(scene.nouns), bias) in set(NOUNS) - set(scene.nouns)


def test_absent_nouns_follow_the_company_they_would_keep():
    present = {"keyboard", "star"}
    draws = Counter(draw_absent(random.Random(seed), present, 0.8) for seed in range(4000))
    expected = 0.8 + 0.2 / (len(NOUNS) - 2)
    assert draws["mouse"] / 4000 == pytest.approx(expected, abs=0.03)
    assert not present & set(draws)


@given(SCENES, st.integers(0, 10**6))
def test_without_noise_a_caption_names_exactly_what_is_there(scene: Scene, seed: int):
    named = language.named_nouns(scene, random.Random(seed), 0.0)
    assert sorted(named) == sorted(scene.nouns)


@given(SCENES, st.integers(0, 10**6))
def test_with_noise_every_companion_is_named_right_after_its_noun(scene: Scene, seed: int):
    named = language.named_nouns(scene, random.Random(seed), 1.0)
    assert set(named) == set(scene.nouns) | {COMPANIONS[noun] for noun in scene.nouns if noun in COMPANIONS}
    assert len(set(named)) == len(named)
    for before, noun in itertools.pairwise(named):
        if noun not in scene.nouns:
            assert COMPANIONS[before] == noun


@given(SCENES, st.integers(0, 10**6))
@settings(max_examples=50)
def test_questions_have_true_answers(scene: Scene, seed: int):
    rng = random.Random(seed)
    items = {item.cell: item for item in scene.objects}
    for key, fact in language.location_drill(scene, rng).items:
        assert (scene.find(key).cell if scene.find(key) else "nowhere") == fact
    for key, fact in language.content_drill(scene, rng).items:
        assert (f"{items[key].colour} {items[key].noun}" if key in items else "nothing") == fact
    for positive in (True, False):
        turn = language.existence_turn(scene, rng, positive=positive)
        noun = turn.question.rstrip("?").split()[-1]
        assert (noun in scene.nouns) is positive and turn.answer == ("Yes" if positive else "No")
    count = language.counting_turn(scene, rng)
    colour = count.question.split()[2]
    expected = len(scene.objects) if colour == "things" else sum(o.colour == colour for o in scene.objects)
    assert count.answer == str(expected)


def test_every_noun_leaves_ink_in_its_own_cell_only():
    rng = random.Random(3)
    for seed in range(20):
        scene = draw_scene(rng, 0.5)
        empty = np.asarray(render(Scene(scene.theme, ()), seed), dtype=int)
        changed = np.abs(np.asarray(render(scene, seed), dtype=int) - empty).max(-1) > 40
        cells = changed.reshape(GRID, CELL_PIXELS, GRID, CELL_PIXELS).any((1, 3)).flatten()
        assert [cell for cell, ink in zip(CELLS, cells, strict=True) if ink] == [
            o.cell for o in scene.objects
        ]
