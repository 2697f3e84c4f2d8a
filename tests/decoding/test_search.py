import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_sft_rl.data.stages import STAGES, Staged, format_stage, parse
from vlm_sft_rl.decoding import SearchConfig
from vlm_sft_rl.decoding.search import SEARCHES, Continuation, read_choice, run_searches


class Table:
    """A policy over a tiny language: each stage holds a number, and the judge knows which number is right.

    Args:
        right: the best number; candidates nearer to it win.
        position: 1 or 2: a judge that names this response whatever it holds; None: a fair one.
    """

    def __init__(self, numbers, right=9, position=None, scores=None):
        self.numbers, self.right, self.position, self.scores = iter(numbers), right, position, scores
        self.draws, self.asks, self.scored = [], [], []

    def draw(self, requests):
        results = []
        for i, r in requests:
            self.draws.append((i, r))
            stage = STAGES[len(re.findall("</", r.prefix))]
            left = STAGES[STAGES.index(stage) :] if not r.stop else (stage,)
            drawn = []
            for _ in range(r.n):
                number = next(self.numbers)
                text = "\n\n".join(format_stage(s, str(number)) for s in left)
                drawn.append(Continuation(text, not r.stop, -abs(number - self.right) / 10))
            results.append(drawn)
        return results

    def ask(self, requests):
        verdicts = []
        for _, r in requests:
            self.asks.append(r)
            if self.position is not None:
                verdicts.append(f"I choose response {self.position}.")
                continue
            first, second = (
                int(re.search(rf"Response {k}:.*?(\d+)", r.prompt, re.DOTALL)[1]) for k in (1, 2)
            )
            better = 1 if abs(first - self.right) <= abs(second - self.right) else 2
            verdicts.append(f"I choose response {better}")
        return verdicts

    def score(self, requests):
        self.scored += [r for _, r in requests]
        if self.scores is not None:
            return [next(self.scores) for _ in requests]
        return [-abs(int(re.findall(r"\d+", r.text)[-1]) - self.right) for _, r in requests]


def run(search, policy, **config):
    settings = SearchConfig(**config)
    return run_searches([SEARCHES[search]("q", settings, random.Random(0))], policy)[0]


numbers = st.lists(st.integers(0, 20), min_size=60, max_size=60)


@given(numbers, st.integers(1, 5))
def test_a_fair_judge_finds_the_best_candidate_of_every_stage(values, beams):
    policy = Table(values)
    result = run("stage_beam", policy, beams=beams)
    best = [min(values[k * beams : (k + 1) * beams], key=lambda v: abs(v - 9)) for k in range(4)]
    chosen = [int(parse(result.text).get(s)) for s in STAGES]
    assert [abs(c - 9) for c in chosen] == [abs(b - 9) for b in best]
    assert result.drawn == 4 * beams
    # equal candidates are never shown to the judge; every other pair costs two questions
    assert result.asked <= 8 * (beams - 1) and result.asked % 2 == 0
    assert policy.draws[0][1].prefix == "" and all(len(r.stop) == 1 for _, r in policy.draws)


@given(numbers)
def test_a_judge_that_looks_at_the_place_decides_nothing(values):
    """Its two verdicts contradict each other, so the likelier candidate wins, whichever place it names."""
    texts = [run("best_of_n", Table(values, position=p), beams=4).text for p in (1, 2)]
    likeliest = min(values[:4], key=lambda v: abs(v - 9))
    for text in texts:
        assert abs(int(parse(text).conclusion) - 9) == abs(likeliest - 9)


def test_the_released_judge_is_asked_once_and_leans_to_the_second():
    result = run("best_of_n", Table([1, 2], position="none"), beams=2, rules="released")
    assert result.asked == 1


@pytest.mark.parametrize(
    ("text", "ours", "released"),
    [
        ("I choose response 1.", 0, 0),
        ("I choose response 2", 1, 1),
        ("2", 1, 1),
        ("Response 1!", 0, 1),
        ("response 1 beats response 2", None, 1),
        ("neither", None, 1),
        ("<think>response 1?</think>Response 2.", 1, 1),
    ],
)
def test_choices_are_read(text, ours, released):
    assert (read_choice(text), read_choice(text, "released")) == (ours, released)


def test_the_released_stage_beam_checks_reasonings_without_the_image():
    class Checker(Table):
        def ask(self, requests):
            if requests[0][1].image:
                return super().ask(requests)
            self.asks += [r for _, r in requests]
            return [
                "incorrect" if f"> {self.bad} <" in r.prompt.split("Reasoning:")[1] else "correct"
                for _, r in requests
            ]

    policy = Checker([1, 1, 2, 2, 9, 3, 4, 4])
    policy.bad = 9  # the reasoning that the judge would like best
    result = run("stage_beam", policy, beams=2, rules="released")
    assert parse(result.text) == Staged("1", "2", "3", "4")
    blind = [r for r in policy.asks if not r.image]
    assert len(blind) == 2 and all("<CAPTION> 2 </CAPTION>" in r.prompt for r in blind)


def test_a_model_that_does_not_stage_is_not_searched_on():
    class Plain(Table):
        def draw(self, requests):
            return [[Continuation("It is a cat.", True)] * r.n for _, r in requests]

    assert run("stage_beam", Plain([])).text == "It is a cat."


def test_sentences_are_added_until_the_answer_ends():
    class Talker(Table):
        def draw(self, requests):
            self.draws += requests
            step = len(self.draws)
            return [
                [Continuation(f"{step} or so. ", False, 0.0), Continuation("7 indeed.", step == 3, -1.0)]
                for _ in requests
            ]

    policy = Talker([], right=7)
    assert run("sentence_beam", policy).text == "7 indeed.7 indeed.7 indeed."
    assert [r.prefix for _, r in policy.draws] == ["", "7 indeed.", "7 indeed.7 indeed."]


@pytest.mark.parametrize("good_round", [1, 3, 99])
def test_swires_retraces_until_two_reasonings_are_good(good_round):
    def scores():
        for number in range(1, 6):
            yield from (0.1, 0.4, 0.2, 0.3)  # captions: the second and the fourth are kept
            yield from ((5.0, 1.0, -2.0, -3.0) if number >= good_round else (-1.0, -2.0, -3.0, -4.0))
            if number >= good_round:
                break
        yield from (0.5, 0.9, 0.1)  # whole answers: the second wins

    policy = Table(range(1000), scores=scores())
    result = run("swires", policy)
    rounds = min(good_round, 5)
    # summary, then 4 captions and 2 x 2 reasonings a round, then 3 conclusions; the published cost
    assert result.drawn == 1 + 8 * rounds + 3 and result.scored == 8 * rounds + 3
    assert result.drawn in range(12, 45)
    captions = [r.prefix for _, r in policy.draws if r.stop == ("</REASONING>",)]
    first = 1  # number 0 is the summary
    assert captions[0].endswith(format_stage("CAPTION", str(first + 1)))
    assert captions[1].endswith(format_stage("CAPTION", str(first + 3)))
    assert parse(result.text).summary == "0"


@given(st.lists(numbers, min_size=2, max_size=3))
def test_searches_side_by_side_are_the_searches_alone(tables):
    class Several:
        def __init__(self):
            self.tables = [Table(t) for t in tables]

        def each(self, name, requests):
            return [getattr(self.tables[i], name)([(i, r)])[0] for i, r in requests]

        def draw(self, requests):
            return self.each("draw", requests)

        def ask(self, requests):
            return self.each("ask", requests)

        def score(self, requests):
            return self.each("score", requests)

    together = run_searches(
        [SEARCHES["stage_beam"]("q", SearchConfig(), random.Random(i)) for i in range(len(tables))], Several()
    )
    for i, table in enumerate(tables):
        alone = run_searches([SEARCHES["stage_beam"]("q", SearchConfig(), random.Random(i))], Table(table))[0]
        assert together[i].text == alone.text and together[i].asked == alone.asked
