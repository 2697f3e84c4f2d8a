from dataclasses import replace
from functools import partial

import families
import pytest
from PIL import Image

from vlm_sft_rl.decoding import SamplingConfig, generate_by, generate_plain, sample_many
from vlm_sft_rl.decoding.search import sample_candidates, self_refine, self_select
from vlm_sft_rl.graders.prompts import load_prompts, plain_reflection

PICTURES = [Image.new("RGB", (28, 28), colour) for colour in ("red", "blue", "green")]
QUESTIONS = ["How?", "What is at the left?", "Why?"]
NAMES = ["a", "b", "c"]
SAMPLING = SamplingConfig(max_new_tokens=8, temperature=0.9, top_p=0.95, top_k=50, seed=5)


def by(name, make, *, chosen=(0, 1, 2), batch_size=4, seed=5):
    model, processor = families.llava()
    return generate_by(
        model,
        processor,
        [PICTURES[i] for i in chosen],
        [QUESTIONS[i] for i in chosen],
        name,
        lambda prompt, _: make(prompt),
        replace(SAMPLING, seed=seed),
        ids=[NAMES[i] for i in chosen],
        batch_size=batch_size,
    )


def drawn(n):
    """The candidates, by a plain call for each question."""
    model, processor = families.llava()
    return [
        [
            answer.text
            for answer in sample_many(
                model, processor, [picture], [question], n, SAMPLING, ids=[f"{name}/0.0"]
            )[0]
        ]
        for picture, question, name in zip(PICTURES, QUESTIONS, NAMES, strict=True)
    ]  # fmt: skip


def greedy(prompts):
    model, processor = families.llava()
    return [
        generate_plain(model, processor, [picture], [prompt], SamplingConfig(max_new_tokens=8))[0].text
        for picture, prompt in zip(PICTURES, prompts, strict=True)
    ]


@pytest.mark.parametrize("prompts", [plain_reflection(), load_prompts("pocket")])
def test_self_select_is_samples_and_a_greedy_pass_over_them(prompts):
    answers = by("self-select", partial(self_select, n=3, write=prompts.selecting))
    candidates = drawn(3)
    assert [[t.strip() for t in a.trace[0]["texts"]] for a in answers] == candidates
    assert [a.text for a in answers] == greedy(map(prompts.selecting, QUESTIONS, candidates))
    assert [a.trace[-1] for a in answers] == [
        {"kind": "search", "name": "self-select", "drawn": 3, "asked": 1, "scored": 0}
    ] * 3
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


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_do_not_depend_on_their_batch(batch_size):
    make = partial(self_select, n=2, write=plain_reflection().selecting)
    whole = by("self-select", make)
    alone = by("self-select", make, chosen=(2, 0), batch_size=batch_size)
    assert [a.to_json() for a in alone] == [whole[2].to_json(), whole[0].to_json()]


def test_the_seed_matters():
    make = partial(sample_candidates, n=2)
    assert by("majority", make)[0].trace != by("majority", make, seed=6)[0].trace
