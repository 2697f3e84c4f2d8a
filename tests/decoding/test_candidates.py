"""Searches on a model: kept prompts against prompts computed anew, reflections against plain loops."""

from functools import partial

import families
import pytest
from decoded import count_encodes, pictures
from PIL import Image

from vlm_sft_rl.decoding import (
    SamplingConfig,
    SearchConfig,
    generate_by,
    generate_plain,
    generate_searched,
    sample_many,
)
from vlm_sft_rl.decoding.candidates import CandidateSource, PromptCache
from vlm_sft_rl.decoding.capabilities import backend_for
from vlm_sft_rl.decoding.generate import PromptBatch
from vlm_sft_rl.decoding.search import SEARCHES, Ask, Continue, sample_candidates, self_refine, self_select
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.graders.prompts import load_prompts, plain_reflection

FAMILIES = ["llava", "qwen2_5_vl", "qwen2_vl", "llava_next", "idefics3", "llava_mistral"]
COLOURS = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue", "green")]
QUESTIONS = ["How?", "What is at the left?", "Why?"]
SAMPLING = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": 5}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_on_kept_prompts_are_those_of_prompts_computed_anew(family):
    images = [*pictures(2), None]
    questions, names = ["What is it?", "Describe the thing at the left.", "And you?"], ["q0", "q1", "q2"]
    model, processor = getattr(families, family)()
    config = SamplingConfig(temperature=0.9, top_p=0.95, max_new_tokens=6, seed=3)
    kept, anew = (
        CandidateSource(model, processor, images, questions, names, config, batch_size=3) for _ in range(2)
    )
    assert kept.cache is not None
    anew.cache = None
    first = [(0, Continue("", 3)), (1, Continue("", 3)), (2, Continue("", 3))]
    longer = [(1, Continue("It is ", 2)), (0, Continue("A ", 2)), (0, Continue("A cat", 2))]
    asks = [(i, Ask(f"Question: {questions[i]} {k}?", whole=k == 1)) for i in (2, 0, 1) for k in range(2)]
    # at last back to a shorter beginning than the row holds then
    for requests in (first, longer, first[:2]):
        texts = [[[c.text for c in group] for group in source.draw(requests)] for source in (kept, anew)]
        assert texts[0] == texts[1]
        assert kept.ask(asks) == anew.ask(asks)
    assert [count.image_encodes for count in kept.counts] == [1, 1, 0]
    assert anew.counts[0].image_encodes > 1
    assert kept.counts[0].tokens_forwarded < anew.counts[0].tokens_forwarded


def test_only_what_differs_is_fed():
    model, processor = families.llava()
    with backend_for(model) as backend:
        batch = PromptBatch(model, processor, pictures(1), ["What is it?"])
        cache, (rendered,) = PromptCache(batch, backend), batch.rendered
        longer = cache.tail(0, rendered + "It is")
        assert cache.prefill([(0, longer, False), (0, longer, True)]).forwarded == [5, 5]
        # now the row holds the longer prompt; the last token is fed for its logits
        assert cache.prefill([(0, longer, False)]).forwarded == [1]
        assert cache.prefill([(0, cache.tail(0, rendered), True)]).forwarded == [1]
        assert cache.tail(0, "Hello <image>\n" + rendered) is None
        assert len(backend.lengths) == 1


def test_a_search_runs_the_vision_tower_once_a_question():
    model, processor = families.llava()
    encodes = count_encodes(model)
    config = SearchConfig(search="best_of_n", beams=3, max_new_tokens=8)
    answers = generate_searched(model, processor, pictures(3), ["How?"] * 3, config, batch_size=2)
    assert encodes == [2, 1]
    assert [a.counts.image_encodes for a in answers] == [1, 1, 1]
    assert all(a.trace[-1]["asked"] for a in answers)


def test_models_that_cannot_rewind_search_all_the_same():
    model, processor = families.paligemma()
    config = SearchConfig(search="best_of_n", beams=2, max_new_tokens=3)
    (answer,) = generate_searched(model, processor, pictures(1), ["How?"], config)
    assert len(answer.trace[0]["texts"]) == 2 and answer.counts.image_encodes > 1


@pytest.mark.parametrize("search", SEARCHES)
def test_searches_on_a_model_do_not_depend_on_their_batch(search):
    model, processor = families.llava()
    config = SearchConfig(search=search, max_new_tokens=6, beams=2, max_rounds=1, captions=2)
    images, prompts, ids = COLOURS[:2], ["How?", "Why?"], ["a", "b"]
    both = generate_searched(model, processor, images, prompts, config, ids=ids, batch_size=4)
    (alone,) = generate_searched(model, processor, images[1:], ["Why?"], config, ids=["b"], batch_size=2)
    assert both[1] == alone
    assert both[0].counts.tokens_forwarded > both[0].counts.tokens_kept > 0
    assert both[0].counts.image_encodes == 1


def test_a_scorer_of_ones_own():
    model, processor = families.llava()
    seen = []

    def scorer(candidates):
        seen.extend(candidates)
        return [float(len(text)) for _, _, text, _ in candidates]

    config = SearchConfig(search="swires", max_rounds=1, threshold=1e9, max_new_tokens=4)
    asked = model, processor, COLOURS[:1], ["How?"], config
    generate_searched(*asked, scorer=scorer)
    assert [stage for *_, stage in seen] == ["CAPTION"] * 4 + ["REASONING"] * 4 + [None] * 3
    assert seen[0][0] == COLOURS[:1] and seen[0][1] == "How?"
    with pytest.raises(UserError, match="gave 0 scores"):
        generate_searched(*asked, scorer=lambda candidates: [])


# answers that look at answers
def by(name, search, *, chosen=(0, 1, 2), batch_size=4, **changes):
    model, processor = families.llava()
    lists = [[values[i] for i in chosen] for values in (COLOURS, QUESTIONS, "abc")]
    config = SamplingConfig(**SAMPLING | changes)
    begin = lambda prompt, _: search(prompt)  # noqa: E731
    asked = model, processor, *lists[:2], name, begin, config
    return generate_by(*asked, ids=lists[2], batch_size=batch_size)


def drawn(n):
    """The candidates, by a plain call for each question."""
    model, processor = families.llava()
    config, texts = SamplingConfig(**SAMPLING), []
    for picture, question, name in zip(COLOURS, QUESTIONS, "abc", strict=True):
        (group,) = sample_many(model, processor, [picture], [question], n, config, ids=[f"{name}/0.0"])
        texts.append([answer.text for answer in group])
    return texts


def greedy(prompts):
    model, processor = families.llava()
    config = SamplingConfig(max_new_tokens=8)
    return [
        generate_plain(model, processor, [picture], [prompt], config)[0].text
        for picture, prompt in zip(COLOURS, prompts, strict=True)
    ]


@pytest.mark.parametrize("prompts", [plain_reflection(), load_prompts("pocket")])
def test_self_select_is_samples_and_a_greedy_pass_over_them(prompts):
    answers = by("self-select", partial(self_select, n=3, write=prompts.selecting))
    candidates = drawn(3)
    assert [[text.strip() for text in a.trace[0]["texts"]] for a in answers] == candidates
    assert [a.text for a in answers] == greedy(map(prompts.selecting, QUESTIONS, candidates))
    event = {"kind": "search", "name": "self-select", "drawn": 3, "asked": 1, "scored": 0}
    assert [a.trace[-1] for a in answers] == [event] * 3
    assert [a.counts.image_encodes for a in answers] == [1, 1, 1]


def test_self_refine_is_a_greedy_answer_and_a_greedy_second_look():
    prompts = plain_reflection()
    answers = by("self-refine", partial(self_refine, write=prompts.refining))
    first = greedy(QUESTIONS)
    assert [a.trace[0]["text"].strip() for a in answers] == first
    assert [a.text for a in answers] == greedy(map(prompts.refining, QUESTIONS, first))


def test_candidates_alone_give_the_first_and_keep_the_rest():
    answers = by("majority", partial(sample_candidates, n=4))
    assert [a.text for a in answers] == [texts[0] for texts in drawn(4)]
    assert answers[0].trace != by("majority", partial(sample_candidates, n=4), seed=6)[0].trace


def test_distinct_candidates_are_new_and_say_how_probable_they_are():
    again, new = (
        by("majority", partial(sample_candidates, n=4, distinct=distinct), temperature=0.01)
        for distinct in (False, True)
    )
    for i, answer in enumerate(new):
        event = answer.trace[0]
        assert event["texts"][0] == answer.tagged_text and len(event["probabilities"]) == len(event["texts"])
        assert len(set(event["texts"])) >= len(set(again[i].trace[0]["texts"]))
        assert answer.counts.image_encodes == 1
    assert "probabilities" not in again[0].trace[0]
    assert max(len(set(answer.trace[0]["texts"])) for answer in new) > 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_do_not_depend_on_their_batch(batch_size):
    search = partial(self_select, n=2, write=plain_reflection().selecting)
    whole = by("self-select", search)
    alone = by("self-select", search, chosen=(2, 0), batch_size=batch_size)
    assert [a.to_json() for a in alone] == [whole[2].to_json(), whole[0].to_json()]
