import random

import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding import SamplingConfig, SearchConfig, generate_searched
from vlm_sft_rl.decoding.cache import RewindBackend
from vlm_sft_rl.decoding.candidates import CandidateSource, PromptCache
from vlm_sft_rl.decoding.capabilities import rewindable_attention
from vlm_sft_rl.decoding.generate import PromptBatch
from vlm_sft_rl.decoding.search import Ask, Continue

FAMILIES = ["llava", "qwen2_5_vl", "qwen2_vl", "llava_next", "idefics3", "llava_mistral"]


def pictures(count: int) -> list[Image.Image]:
    rng = random.Random(0)
    return [
        Image.new("RGB", (40 + 9 * i, 56), tuple(rng.randrange(256) for _ in range(3))) for i in range(count)
    ]


def policies(family: str, images: list, questions: list[str]):
    """One that keeps prompts and one that computes everything anew."""
    model, processor = getattr(families, family)()
    config = SamplingConfig(temperature=0.9, top_p=0.95, max_new_tokens=6, seed=3)
    names = [f"q{i}" for i in range(len(questions))]
    kept, anew = (CandidateSource(model, processor, images, questions, names, config, 3) for _ in range(2))
    assert kept.cache is not None
    anew.cache = None
    return kept, anew


def texts(groups) -> list[list[str]]:
    return [[one.text for one in group] for group in groups]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_on_kept_prompts_are_those_of_prompts_computed_anew(family):
    images, questions = [*pictures(2), None], ["What is it?", "Describe the thing at the left.", "And you?"]
    kept, anew = policies(family, images, questions)
    draws = [(0, Continue("", 3)), (1, Continue("", 3)), (2, Continue("", 3))]
    assert texts(kept.draw(draws)) == texts(anew.draw(draws))
    asks = [(i, Ask(f"Question: {questions[i]} {k}?", whole=k == 1)) for i in (2, 0, 1) for k in range(2)]
    assert kept.ask(asks) == anew.ask(asks)
    longer = [(1, Continue("It is ", 2)), (0, Continue("A ", 2)), (0, Continue("A cat", 2))]
    assert texts(kept.draw(longer)) == texts(anew.draw(longer))
    # back to a shorter beginning than the row holds now
    assert texts(kept.draw(draws[:2])) == texts(anew.draw(draws[:2]))
    assert [c.image_encodes for c in kept.counts] == [1, 1, 0]
    assert anew.counts[0].image_encodes > 1
    assert kept.counts[0].tokens_forwarded < anew.counts[0].tokens_forwarded


def test_only_what_differs_is_fed():
    model, processor = families.llava()
    rendered = [prompting.render(processor, "What is it?", 1)]
    with rewindable_attention(model), torch.inference_mode():
        batch = PromptBatch(model, processor, pictures(1), ["What is it?"])
        held = PromptCache(batch, RewindBackend(model))
        longer = held.tail(0, rendered[0] + "It is")
        assert held.prefill([(0, longer, False), (0, longer, True)]).forwarded == [5, 5]
        # now the row holds the longer prompt; the last token is fed for its logits
        assert held.prefill([(0, longer, False)]).forwarded == [1]
        assert held.prefill([(0, held.tail(0, rendered[0]), True)]).forwarded == [1]
        assert held.tail(0, "Hello <image>\n" + rendered[0]) is None
        assert len(held.backend.lengths) == 1


def test_a_search_runs_the_vision_tower_once_a_question(monkeypatch):
    model, processor = families.llava()
    encoded = []
    tower = model.model.vision_tower
    original = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a, **k: encoded.append(len(a[0])) or original(*a, **k))
    config = SearchConfig(search="best_of_n", beams=3, max_new_tokens=8)
    answers = generate_searched(model, processor, pictures(3), ["How?"] * 3, config, batch_size=2)
    assert encoded == [2, 1]
    assert [a.counts.image_encodes for a in answers] == [1, 1, 1]
    assert all(a.trace[-1]["asked"] for a in answers)


def test_models_that_cannot_rewind_search_all_the_same():
    model, processor = families.paligemma()
    config = SearchConfig(search="best_of_n", beams=2, max_new_tokens=3)
    (answer,) = generate_searched(model, processor, pictures(1), ["How?"], config)
    assert len(answer.trace[0]["texts"]) == 2 and answer.counts.image_encodes > 1
