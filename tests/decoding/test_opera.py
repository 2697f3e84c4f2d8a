import math

import families
import pytest
import torch
from decoded import longer, prompt_inputs, suppressed
from PIL import Image

from vlm_sft_rl.decoding import OperaConfig, generate_opera
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.opera import Beam, OperaSearch, agreed_anchor, expand
from vlm_sft_rl.errors import UserError

PICTURE = Image.new("RGB", (28, 28), "red")


def slow_penalty(rows, config):
    """Section 3.2 as printed, from the whole matrix: rows[i][j] is the attention of token i to token j <= i."""
    t = len(rows)
    products = {
        j: math.prod(config.scale * rows[i][j] for i in range(j, t))
        for j in range(max(0, t - config.window), t)
    }
    place = max(products, key=products.get)
    return place, config.alpha * config.factor * products[place]


def test_columns_are_the_products_of_the_whole_matrix():
    config = OperaConfig(window=3, factor=1.0)
    rows = [[0.3], [0.2, 0.05], [0.01, 0.1, 0.02], [0.02, 0.09, 0.02, 0.03], [0.01, 0.3, 0.2, 0.1, 0.02]]
    beam = Beam()
    for t, row in enumerate(rows, 1):
        (beam,) = expand(beam, [t], [0.0], [row], config)
        place, penalty = slow_penalty(rows[:t], config)
        assert beam.anchors[-1] == place and math.exp(beam.columns[place]) == pytest.approx(penalty)


def test_the_penalty_lowers_a_candidate_that_leans_on_the_anchor():
    config = OperaConfig(scale=10, factor=1.0, candidates=2)
    start = Beam((7,), -1.0, (math.log(10 * 0.5),), (0,))
    leaning, free = expand(start, [1, 2], [2.0, 2.0], [[0.5, 0.1], [0.1, 0.1]], config)
    # 10 * 0.5 * 10 * 0.5 = 25 and 10 * 0.5 * 10 * 0.1 = 5
    assert free.score - leaning.score == pytest.approx(20)
    assert math.exp(free.score + 1) + math.exp(leaning.score + 1) == pytest.approx(1)
    assert leaning.ids == (7, 1) and leaning.anchors == (0, 0)


@pytest.mark.parametrize(
    ("anchors", "window", "place"),
    [
        ([[2, 2, 2, 5], [2, 2, 2]], 512, 2),
        ([[2, 2, 2, 5], [2, 2, 4]], 512, None),
        ([[1, 1, 1]], 512, None),  # too early
        ([[2, 2, 2, 7]], 3, None),
    ],
)
def test_all_beams_must_look_at_one_place_often_enough(anchors, window, place):
    config = OperaConfig(overlap=3, earliest=2, window=window)
    assert agreed_anchor([Beam((1,), 0.0, (), tuple(own)) for own in anchors], config) == place


def steps(search, script):
    """Feed candidates that all look at token 0; `script` gives (token, score) of one beam's candidates a step."""
    beams = [Beam()]
    for choices in script:
        candidates = [
            Beam((*beam.ids, token), beam.score + score, (), (*beam.anchors, 0))
            for beam in beams
            for token, score in choices
        ]
        beams, went_back = search.choose(candidates)
        yield [beam.ids for beam in beams], went_back


def test_the_search_goes_back_behind_the_anchor_and_takes_other_tokens():
    config = OperaConfig(beams=1, candidates=3, overlap=3, earliest=0, rollbacks=1)
    search = OperaSearch(config, frozenset({9}))
    seen = list(steps(search, [[(1, -0.1), (2, -0.5), (3, -2.0)]] * 6))
    assert seen == [
        ([(1,)], False),
        ([(1, 1)], False),
        ([(1, 2)], True),  # the third anchor at token 0 sends it back to choose token 1 anew
        ([(2,)], True),  # the same again: token 1 was chosen anew once, so now token 0 is
        ([(2, 1)], False),  # both places are used up
        ([(2, 1, 1)], False),
    ]
    assert search.returns == [1, 0]


def test_answers_that_ended_behind_the_place_are_forgotten():
    config = OperaConfig(beams=2, candidates=2, overlap=3, earliest=0, rollbacks=1)
    search = OperaSearch(config, frozenset({9}))
    seen = list(steps(search, [[(1, -0.1), (2, -3.0)], [(1, -0.1), (2, -3.0)], [(1, -0.5), (9, -0.1)]]))
    assert seen[-1][1] and search.finished == []


def slow_opera(model, processor, prompt, config):
    """No cache, every sequence anew with all its attention; without going back."""
    inputs = prompt_inputs(model, processor, prompt, PICTURE)
    start, never = inputs["input_ids"][0].tolist(), suppressed(model, processor)
    ends = build_grammar(model, processor, required=False).ends

    def run(tokens):
        out = model(**longer(inputs, [*start, *tokens]), output_attentions=True)
        logits = out.logits[0, -1].float()
        logits[never] = float("-inf")
        weights = out.attentions[-1][0].float().amax(0)
        return logits, (weights / weights.sum(-1, keepdim=True))[len(start) :, len(start) :].double().tolist()

    beams, finished = [((), 0.0)], []
    for length in range(1, config.max_new_tokens + 1):
        grown = []
        for ids, score in beams:
            values, tokens = run(ids)[0].topk(config.candidates)
            pairs = zip(values.tolist(), tokens.tolist(), strict=True)
            penalised = [value - slow_penalty(run((*ids, token))[1], config)[1] for value, token in pairs]
            shares = torch.tensor(penalised).double().log_softmax(0).tolist()
            grown += [((*ids, t), score + s) for t, s in zip(tokens.tolist(), shares, strict=True)]
        grown.sort(key=lambda pair: -pair[1])
        finished += [(s / length, ids) for ids, s in grown[: config.beams] if ids[-1] in ends]
        beams = [pair for pair in grown if pair[0][-1] not in ends][: config.beams]
    best = max([*finished, *((s / length, ids) for ids, s in beams)])[1]
    return [token for token in best if token not in ends]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("factor", [0.0, 0.05])
def test_answers_are_those_of_a_search_without_a_cache(family, factor):
    model, processor = getattr(families, family)()
    config = OperaConfig(beams=2, candidates=3, factor=factor, earliest=99, max_new_tokens=4)
    (answer,) = generate_opera(model, processor, [PICTURE], ["Why?"], config)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = slow_opera(model, processor, "Why?", config)
    assert answer.text == build_grammar(model, processor, required=False).plain(expected)
    assert answer.counts.image_encodes == 1 and answer.trace == [{"kind": "opera", "returns": []}]


def test_the_penalty_changes_the_answer_and_attention_is_put_back():
    model, processor = families.llava()
    before = model.config._attn_implementation
    configs = [OperaConfig(factor=factor, max_new_tokens=6) for factor in (0.0, 1.0)]
    texts = [generate_opera(model, processor, [PICTURE], ["Why?"], config)[0].text for config in configs]
    assert texts[0] != texts[1] and model.config._attn_implementation == before


def test_a_model_goes_back_and_still_ends():
    # so strongly scaled, every product grows, and the first token is the anchor of all others
    options = {"beams": 2, "candidates": 2, "overlap": 3, "earliest": 0, "rollbacks": 1, "scale": 1000}
    config = OperaConfig(**options, factor=0, max_new_tokens=12)
    (answer,) = generate_opera(*families.llava(), [PICTURE], ["Why?"], config)
    assert answer.trace[0]["returns"] and answer.text


def test_models_that_cannot_go_back_are_refused():
    with pytest.raises(UserError, match=r"cannot go back.*another decoder"):
        generate_opera(*families.paligemma(), [PICTURE], ["Why?"])
