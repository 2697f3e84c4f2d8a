import math

import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.config import OperaConfig
from vlm_sft_rl.decoding.generate import encode_batch
from vlm_sft_rl.decoding.opera import (
    Beam,
    OperaSearch,
    agreed_anchor,
    expand,
    generate_opera,
)
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


def beams_of(*anchors):
    return [Beam((1,), 0.0, (), tuple(own)) for own in anchors]


def test_all_beams_must_look_at_one_place_often_enough():
    config = OperaConfig(overlap=3, earliest=2)
    assert agreed_anchor(beams_of([2, 2, 2, 5], [2, 2, 2]), config) == 2
    assert agreed_anchor(beams_of([2, 2, 2, 5], [2, 2, 4]), config) is None
    assert agreed_anchor(beams_of([1, 1, 1]), config) is None
    assert agreed_anchor(beams_of([2, 2, 2, 7]), OperaConfig(overlap=3, earliest=2, window=3)) is None


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
    choices = [(1, -0.1), (2, -0.5), (3, -2.0)]
    seen = list(steps(search, [choices] * 6))
    # the third anchor at token 0 sends it back to choose token 1 anew
    assert seen[:3] == [([(1,)], False), ([(1, 1)], False), ([(1, 2)], True)]
    # the same again: token 1 was chosen anew once, so now token 0 is
    assert seen[3] == ([(2,)], True)
    # both places are used up
    assert seen[4:] == [([(2, 1)], False), ([(2, 1, 1)], False)]
    assert search.returns == [1, 0]


def test_answers_that_ended_behind_the_place_are_forgotten():
    config = OperaConfig(beams=2, candidates=2, overlap=3, earliest=0, rollbacks=1)
    search = OperaSearch(config, frozenset({9}))
    seen = list(steps(search, [[(1, -0.1), (2, -3.0)], [(1, -0.1), (2, -3.0)], [(1, -0.5), (9, -0.1)]]))
    assert seen[-1][1] and search.finished == []


def slow_opera(model, processor, prompt, config, limit):
    """No cache, every sequence anew with all its attention; without going back."""
    text = prompting.render(processor, prompt, 1)
    inputs = encode_batch(model, processor, [text], [[PICTURE]])
    asked = inputs["input_ids"].shape[1]
    tokenizer = prompting.get_tokenizer(processor)
    ends = prompting.end_ids(model, tokenizer)
    suppress = sorted(prompting.suppressed_ids(model, tokenizer, ends))

    def run(tokens):
        ids = torch.tensor([[*inputs["input_ids"][0].tolist(), *tokens]])
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in whole:  # 0 = text
            whole["mm_token_type_ids"] = torch.nn.functional.pad(whole["mm_token_type_ids"], (0, len(tokens)))
        out = model(**whole, output_attentions=True)
        logits = out.logits[0, -1].float()
        logits[suppress] = float("-inf")
        return logits, out.attentions[-1][0].float().amax(0)

    beams, finished = [((), 0.0)], []
    for length in range(1, limit + 1):
        grown = []
        for ids, score in beams:
            values, tokens = run(ids)[0].topk(config.candidates)
            penalised = []
            for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
                weights = run((*ids, token))[1]
                weights = (weights / weights.sum(-1, keepdim=True))[asked:, asked:].double().tolist()
                penalised.append(value - slow_penalty(weights, config)[1])
            shares = torch.tensor(penalised).double().log_softmax(0).tolist()
            grown += [((*ids, t), score + s) for t, s in zip(tokens.tolist(), shares, strict=True)]
        grown.sort(key=lambda pair: -pair[1])
        finished += [(s / length, ids) for ids, s in grown[: config.beams] if ids[-1] in ends]
        beams = [pair for pair in grown if pair[0][-1] not in ends][: config.beams]
    return max([*finished, *((s / limit, ids) for ids, s in beams)])[1]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("factor", [0.0, 0.05])
def test_answers_are_those_of_a_search_without_a_cache(family, factor):
    model, processor = getattr(families, family)()
    config = OperaConfig(beams=2, candidates=3, factor=factor, earliest=99, max_new_tokens=4)
    (answer,) = generate_opera(model, processor, [PICTURE], ["Why?"], config)
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        wanted = slow_opera(model, processor, "Why?", config, 4)
    grammar = build_grammar(model, processor, required=False)
    assert answer.text == grammar.plain([t for t in wanted if t not in grammar.ends])
    assert answer.counts.image_encodes == 1 and answer.trace == [{"kind": "opera", "returns": []}]


def test_the_penalty_changes_the_answer_and_attention_is_put_back():
    model, processor = families.llava()
    before = model.config._attn_implementation
    said = [
        generate_opera(model, processor, [PICTURE], ["Why?"], OperaConfig(factor=f, max_new_tokens=6))[0].text
        for f in (0.0, 1.0)
    ]
    assert said[0] != said[1] and model.config._attn_implementation == before


def test_a_model_goes_back_and_still_ends():
    model, processor = families.llava()
    # so strongly scaled, every product grows, and the first token is the anchor of all others
    config = OperaConfig(
        beams=2, candidates=2, overlap=3, earliest=0, rollbacks=1, scale=1000, factor=0, max_new_tokens=12
    )
    (answer,) = generate_opera(model, processor, [PICTURE], ["Why?"], config)
    assert answer.trace[0]["returns"] and answer.text


def test_models_that_cannot_and_settings_out_of_range_are_refused():
    model, processor = families.paligemma()
    with pytest.raises(UserError, match=r"cannot go back.*another decoder"):
        generate_opera(model, processor, [PICTURE], ["Why?"])
    for wrong in ({"candidates": 1}, {"beams": 0}, {"scale": 0}, {"overlap": 2.5}):
        with pytest.raises(UserError, match="OPERA"):
            OperaConfig(**wrong)
