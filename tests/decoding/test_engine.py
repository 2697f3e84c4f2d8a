"""The engine against full recomputation: every distribution it ever sampled from must be the one of a fresh pass."""

import random

import families
import pytest
import torch
from decoded import (
    FAMILIES,
    PROMPTS,
    count_encodes,
    family_pair,
    generated,
    pictures,
    run_scripted,
    sharp,
    suppressed,
    worst_difference,
)

from vlm_sft_rl.data import chat
from vlm_sft_rl.decoding import RetrospectiveConfig, SamplingConfig, capabilities
from vlm_sft_rl.decoding import generate as hf
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.cache import RecomputeBackend, RewindBackend
from vlm_sft_rl.decoding.machines import Rewind
from vlm_sft_rl.decoding.retrospective import Retrospective
from vlm_sft_rl.decoding.sampling import Sampler, Sampling
from vlm_sft_rl.errors import UserError

SCRIPTED = {"threshold": 0.5, "local_attempts": 3, "total_attempts": 12, "max_new_tokens": 60}


def on_backend(monkeypatch, backend):
    monkeypatch.setattr(capabilities, "choose_backend", lambda model, copies=1: backend(model))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampled_distribution_equals_a_full_recompute(family, attention):
    model, processor = sharp(family)
    model.set_attn_implementation(attention)
    assert capabilities.rewind_obstacle(model) is None
    answers, kinds, seen = run_scripted(model, processor, RetrospectiveConfig(**SCRIPTED))
    assert {"accept", "reject", "local_rewind", "sentence_rewind", "hint", "finish"} <= kinds
    difference, scale = worst_difference(model, processor, seen)
    assert scale > 2 and difference < 1e-4
    assert all(answer.counts.image_encodes == 1 for answer in answers)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_mistral"])
@pytest.mark.parametrize("fault", ["position", "slot"])
def test_the_comparison_sees_a_fault_of_one_position_or_one_slot(family, fault, monkeypatch):
    class Faulty(RewindBackend):
        def add(self, start):
            super().add(start)
            self.offsets = [offset + (fault == "position") for offset in self.offsets]

        def rewind(self, row, length):
            super().rewind(row, length - (fault == "slot"))

    model, processor = sharp(family)
    on_backend(monkeypatch, Faulty)
    _, _, seen = run_scripted(model, processor, RetrospectiveConfig(**SCRIPTED))
    assert worst_difference(model, processor, seen)[0] > 1e-2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("settings", "batch_size", "expected"),
    [
        ({"total_attempts": 4, "on_exhausted": "continue"}, 3, {"resume", "flag", "reject"}),
        ({"total_attempts": 4, "on_exhausted": "continue", "parallel_attempts": 3}, 3, {"resume", "flag"}),
        ({"local_attempts": 4, "total_attempts": 20, "parallel_attempts": 3}, 1, {"hint", "local_rewind"}),
        ({"local_attempts": 4, "total_attempts": 20, "parallel_attempts": 3}, 4, {"hint", "local_rewind"}),
    ],
)
def test_unverified_endings_and_parallel_attempts_equal_recompute(
    family, settings, batch_size, expected, monkeypatch
):
    adopted = []

    class Noting(RewindBackend):
        def adopt(self, *rows):
            adopted.append(rows)
            super().adopt(*rows)

    model, processor = sharp(family)
    on_backend(monkeypatch, Noting)
    config = RetrospectiveConfig(**SCRIPTED | settings)
    _, kinds, seen = run_scripted(model, processor, config, batch_size=batch_size)
    assert expected <= kinds
    assert worst_difference(model, processor, seen)[0] < 1e-4
    assert "local_attempts" not in settings or len(adopted) >= 2


@pytest.mark.parametrize(
    "settings",
    [
        *(
            {"rewrite_query": rewrite, "on_exhausted": ending, "threshold": 0.005, "total_attempts": 8}
            for rewrite in (False, True)
            for ending in ("finish", "continue")
        ),
        {"threshold": 0.003, "total_attempts": 9, "local_attempts": 4, "parallel_attempts": 3},
    ],
)
def test_an_answer_does_not_depend_on_its_batch(settings):
    model, processor = families.with_tags(families.llava())
    config = RetrospectiveConfig(temperature=1.0, max_new_tokens=30, **settings)
    images = pictures(len(PROMPTS))
    together = hf.generate_retrospective(model, processor, images, PROMPTS, config, batch_size=4)
    alone = [
        hf.generate_retrospective(model, processor, [image], [prompt], config, ids=[str(i)])[0]
        for i, (image, prompt) in enumerate(zip(images, PROMPTS, strict=True))
    ]
    assert [a.tagged_text for a in together] == [a.tagged_text for a in alone]
    kinds = [[event["kind"] for event in a.trace] for a in together]
    assert kinds == [[event["kind"] for event in a.trace] for a in alone]
    assert any("reject" in own for own in kinds)


@pytest.mark.parametrize("family", [*FAMILIES, "mllama", "paligemma"])
def test_plain_greedy_decoding_equals_generate(family):
    model, processor = families.with_tags(family_pair(family))
    images, config = pictures(3), SamplingConfig(max_new_tokens=30)
    answers = hf.generate_plain(model, processor, images, PROMPTS[:3], config, batch_size=2)
    grammar = build_grammar(model, processor, required=True)
    for image, prompt, answer in zip(images, PROMPTS, answers, strict=False):
        new = generated(model, processor, prompt, image, 30)
        assert grammar.decode([token for token in new if token not in grammar.ends]) == answer.tagged_text


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_custom_generate_gives_the_answers_of_the_function(family):
    model, processor = families.with_tags(getattr(families, family)())
    config = RetrospectiveConfig(threshold=0.003, temperature=0.8, max_new_tokens=40, total_attempts=6)
    images, prompts = pictures(3), PROMPTS[:3]
    expected = hf.generate_retrospective(model, processor, images, prompts, config, batch_size=3)
    texts = [chat.render(processor, prompt, 1) for prompt in prompts]
    inputs = hf.encode_batch(model, processor, texts, [[image] for image in images])
    passes = count_encodes(model)
    answers = model.generate(
        **inputs,
        max_new_tokens=40,
        custom_generate=hf.retrospective_custom_generate,
        rewind={"processor": processor, "config": config},
    )
    assert [(a.tagged_text, a.trace, a.counts) for a in answers] == [
        (a.tagged_text, a.trace, a.counts) for a in expected
    ]
    assert len(passes) == 1


def custom(processor, model, **options):
    inputs = hf.encode_batch(model, processor, [chat.render(processor, PROMPTS[0], 1)], [pictures(1)])
    return model.generate(**inputs, custom_generate=hf.retrospective_custom_generate, **options)


def test_custom_generate_applies_other_processors_to_live_ids():
    model, processor = families.with_tags(families.llava())
    options = {"max_new_tokens": 25, "repetition_penalty": 1.6}
    rewind = {"processor": processor, "config": {"threshold": 0.999, "max_new_tokens": 25}}
    (answer,) = custom(processor, model, **options, rewind=rewind)
    grammar = build_grammar(model, processor, required=True)
    new = generated(
        model, processor, PROMPTS[0], pictures(1)[0], 25, repetition_penalty=1.6, suppress_tokens=None
    )
    assert set(new).isdisjoint(grammar.watched | set(suppressed(model, processor)))
    assert answer.tagged_text == grammar.decode(new)


@pytest.mark.parametrize(
    ("rewind", "message"),
    [
        (None, "processor"),
        ({"tau": 1}, "unknown keys"),
        ({"config": {"tau": 1}}, "there is no 'tau'"),
        ({"config": {"threshold": 1.0}}, "threshold"),
    ],
)
def test_custom_generate_refuses_what_it_cannot_do(rewind, message):
    model, processor = families.with_tags(families.llava())
    rewind = rewind and {"processor": processor, **rewind}
    with pytest.raises(UserError, match=message):
        custom(processor, model, max_new_tokens=5, rewind=rewind)


def test_a_model_without_the_tokens_is_refused_but_decodes_plainly():
    model, processor = families.llava()
    with pytest.raises(UserError, match="<SPAN>"):
        hf.generate_retrospective(model, processor, pictures(1), ["x"])
    assert not hf.generate_plain(model, processor, pictures(1), ["x"], SamplingConfig(max_new_tokens=5))[
        0
    ].spans
    with pytest.raises(UserError, match="equally long"):
        hf.generate_plain(model, processor, pictures(1), ["x", "y"])
    with pytest.raises(UserError, match="marks"):
        hf.generate_plain(model, processor, pictures(1), ["<image> and <image>"])


def test_text_only_and_several_images_in_one_call():
    model, processor = families.with_tags(families.qwen2_5_vl())
    images = [None, pictures(2), pictures(1)[0], []]
    config = RetrospectiveConfig(threshold=0.003, max_new_tokens=12, temperature=0.7)
    answers = hf.generate_retrospective(model, processor, images, PROMPTS[:4], config, batch_size=2)
    alone = hf.generate_retrospective(model, processor, [pictures(2)], [PROMPTS[1]], config, ids=["1"])
    assert [a.counts.image_encodes for a in answers] == [0, 2, 1, 0]
    assert answers[1].tagged_text == alone[0].tagged_text


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "mllama", "paligemma"])
def test_recomputing_gives_the_same_answers(family, monkeypatch):
    model, processor = sharp(family)
    config = RetrospectiveConfig(threshold=0.5, local_attempts=3, total_attempts=8, max_new_tokens=30)
    rewinds = family in ("llava", "qwen2_5_vl")
    assert isinstance(capabilities.choose_backend(model), RewindBackend if rewinds else RecomputeBackend)
    with monkeypatch.context() as patch:
        on_backend(patch, RecomputeBackend)
        slow, kinds, seen = run_scripted(model, processor, config)
    assert {"hint", "sentence_rewind"} <= kinds
    if rewinds:
        fast, _, quick = run_scripted(model, processor, config)
        assert [a.trace for a in slow] == [a.trace for a in fast]
        by_sequence = {(row, tuple(sequence)): logits for row, sequence, logits in quick}
        differences = [(by_sequence[row, tuple(ids)] - logits).abs().max() for row, ids, logits in seen]
        assert max(map(float, differences)) < 1e-4
    elif family == "mllama":  # a whole PaliGemma sequence as a prompt would be attended to in both directions
        assert worst_difference(model, processor, seen)[0] < 1e-4


def test_suppressed_ids_are_never_said():
    model, processor = families.with_tags(families.qwen2_5_vl())
    never, size = suppressed(model, processor), model.config.text_config.vocab_size
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") in never
    assert len(processor.tokenizer) in never or size == len(processor.tokenizer)
    sampler = Sampler(suppress=never)
    logits = torch.zeros(1, size)
    logits[:, never] = 9.0
    for row in [Sampling(), *[Sampling(1.0, random.Random(i)) for i in range(20)]]:
        assert sampler.choose(logits, [row])[0] not in never


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 1000, 32064])
def test_probabilities_of_many_rows_are_those_of_each_alone(dtype, vocabulary):
    logits = (torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0)) * 6).to(dtype)
    tokens = [random.Random(i).randrange(vocabulary) for i in range(9)]
    together = Sampler().probabilities(logits, tokens)
    assert together == [Sampler().p_unconfident(row, None, t) for row, t in zip(logits, tokens, strict=True)]
    exact = logits.double().softmax(-1)[range(9), tokens].tolist()
    assert together == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize("parallel_attempts", [1, 3])
def test_no_continuation_is_rejected_twice_at_one_place(parallel_attempts, monkeypatch):
    model, processor = families.with_tags(families.llava())
    with torch.no_grad():  # tags without a phrase are likely, so much is rejected
        model.lm_head.weight[chat.get_tokenizer(processor).convert_tokens_to_ids("</CN>")] *= 40
    observe, rejected = Retrospective.observe, []

    def noting(machine, token, probability=None):
        text = (id(machine), *machine.ids, "close" if token in machine.grammar.closes else token)
        action = observe(machine, token, probability)
        if isinstance(action, Rewind):
            rejected.append(text)
        return action

    monkeypatch.setattr(Retrospective, "observe", noting)

    def rejections(**options):
        rejected.clear()
        config = RetrospectiveConfig(
            rewrite_query=False,
            temperature_span=0.2,
            temperature_step=0.2,
            parallel_attempts=parallel_attempts,
            max_new_tokens=12,
            **options,
        )
        hf.generate_retrospective(model, processor, pictures(4), PROMPTS[:4], config, batch_size=3)
        return len(rejected), len(set(rejected))

    drawn, different = rejections()
    assert drawn == different > 20
    drawn, different = rejections(without_replacement=False)
    assert drawn > different


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_other_processors_allow_is_all_that_can_be_tried(temperature):
    """Two phrases are allowed; when both were rejected nothing is left, and the logits are no broken ones."""
    model, processor = families.with_tags(families.llava())
    grammar = build_grammar(model, processor, required=True)
    first, second = processor.tokenizer.encode("xy", add_special_tokens=False)[-2:]
    allowed = {grammar.open: [first, second], first: [grammar.confident], second: [grammar.confident]}
    rewind = {"threshold": 1e-9, "rewrite_query": False, "temperature": temperature, "max_new_tokens": 12}
    (answer,) = custom(
        processor,
        model,
        max_new_tokens=12,
        prefix_allowed_tokens_fn=lambda _, ids: allowed.get(int(ids[-1]), [grammar.open]),
        rewind={"processor": processor, "config": rewind},
    )
    rejected = [event["text"] for event in answer.trace if event["kind"] == "reject"]
    assert len(rejected) == len(set(rejected)) == 2 and answer.trace[-1]["reason"] == "nothing_left"
