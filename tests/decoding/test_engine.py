"""The engine against full recomputation: every distribution it ever sampled from must be the one of a fresh pass."""

import random

import families
import numpy as np
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding import capabilities
from vlm_sft_rl.decoding import generate as hf
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.cache import RecomputeBackend, RewindBackend, prefill
from vlm_sft_rl.decoding.capabilities import rewind_obstacle, structural_obstacle
from vlm_sft_rl.decoding.config import RetrospectiveConfig, SamplingConfig
from vlm_sft_rl.decoding.retrospective import Retrospective
from vlm_sft_rl.decoding.sampling import Sampler
from vlm_sft_rl.errors import UserError

PROMPTS = [
    "What is it?",
    "Describe the picture in one short sentence.",
    "Hm",
    "Is there a red kettle?",
    "Go on.",
]
FAMILIES = ["llava", "llava_mistral", "llava_more", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES += ["idefics3", "smolvlm", "internvl"]


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40 + 10 * i, 60, 3), dtype=np.uint8)) for i in range(count)]


def sharp(family: str):
    """A tiny model with tags whose logits react visibly to every key: random weights of the usual scale hardly do."""
    model, processor = families.with_tags(getattr(families, family)())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model, processor


class ScriptedSampler(Sampler):
    """Draws tags, dots and ends at random from each row's own stream, and notes every distribution it was given."""

    def __init__(self, grammar, dot: int, seed: int, **options):
        super().__init__(**options)
        self.grammar, self.dot = grammar, dot
        self.seen = []
        self.streams: dict[str, random.Random] = {}
        self.seed = seed

    def choose(self, logits, rows):
        tokens = super().choose(logits, rows)
        for i, row in enumerate(rows):
            stream = self.streams.setdefault(row.job.id, random.Random(f"{self.seed} {row.job.id}"))
            sequence = row.prompt[: row.cut] + row.insertion + row.prompt[row.cut :] + row.machine.ids
            self.seen.append(
                (int(row.job.id), sequence, len(sequence) - len(row.machine.ids), logits[i].clone())
            )
            inside = row.machine._open is not None
            draw = stream.random()
            if draw < 0.25:
                tokens[i] = stream.choice([self.grammar.confident, self.grammar.unconfident])
                tokens[i] = tokens[i] if inside else self.grammar.open
            elif draw < 0.4:
                tokens[i] = self.dot
            elif draw < 0.42 and not inside:
                tokens[i] = min(self.grammar.ends)
            elif tokens[i] in self.grammar.watched:
                tokens[i] = self.dot
        return tokens

    def p_unconfident(self, logits, row, unconfident):
        true = super().p_unconfident(logits, row, unconfident)
        assert true == pytest.approx(float(logits.float().softmax(-1)[unconfident]), rel=1e-4)
        return self.streams[row.job.id].choice([0.1, 0.6, 0.9])


def run_scripted(model, processor, config, *, batch_size, seed=0):
    """All answers of a scripted run, and the notes of its sampler."""
    grammar = build_grammar(model, processor, required=True)
    dot = processor.tokenizer.encode(".", add_special_tokens=False)[-1]
    suppress = prompting.suppressed_ids(model, processor.tokenizer, grammar.ends)
    sampler = ScriptedSampler(grammar, dot, seed, suppress=suppress)
    images = pictures(len(PROMPTS))
    batch = hf.PromptBatch(model, processor, images, PROMPTS)
    answers = hf.decode(batch, Retrospective, config, batch_size=batch_size, sampler=sampler)
    return answers, sampler.seen


def fresh_logits(model, processor, row: int, sequence: list[int]) -> torch.Tensor:
    text = prompting.render(processor, PROMPTS[row], 1)
    inputs = hf.encode_batch(model, processor, [text], [[pictures(len(PROMPTS))[row]]])
    old = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.tensor([sequence])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = torch.zeros(1, len(sequence), dtype=inputs["mm_token_type_ids"].dtype)
        types[:, : min(old, len(sequence))] = inputs["mm_token_type_ids"][:, : len(sequence)]
        inputs["mm_token_type_ids"] = types
    if (seeing := inputs.get("cross_attention_mask")) is not None:
        rows = [min(i, old - 1) for i in range(len(sequence))]
        inputs["cross_attention_mask"] = seeing[:, rows]
    return prefill(model, inputs).logits[0]


def worst_difference(model, processor, seen, *, most: int = 60) -> tuple[float, float]:
    chosen = random.Random(0).sample(seen, min(most, len(seen)))
    pairs = [(fresh_logits(model, processor, row, sequence), logits) for row, sequence, _, logits in chosen]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampled_distribution_equals_a_full_recompute(family, attention, record_property):
    model, processor = sharp(family)
    model.set_attn_implementation(attention)
    assert rewind_obstacle(model) is None
    config = RetrospectiveConfig(threshold=0.5, local_attempts=3, total_attempts=12, max_new_tokens=60)
    answers, seen = run_scripted(model, processor, config, batch_size=3)
    kinds = {event["kind"] for answer in answers for event in answer.trace}
    assert {"accept", "reject", "local_rewind", "sentence_rewind", "hint", "finish"} <= kinds
    difference, scale = worst_difference(model, processor, seen)
    print(f"\n{family} {attention}: max difference {difference:.2e} at scale {scale:.2f}, {len(seen)} states")
    assert scale > 2
    assert difference < 1e-4
    assert all(answer.counts.image_encodes == 1 for answer in answers)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_mistral"])
@pytest.mark.parametrize("fault", ["position", "slot"])
def test_the_comparison_sees_a_fault_of_one_position_or_one_slot(family, fault, monkeypatch):
    model, processor = sharp(family)
    if fault == "position":
        add = RewindBackend.add

        def shifted(self, start):
            add(self, start)
            self.offsets = [offset + 1 for offset in self.offsets]

        monkeypatch.setattr(RewindBackend, "add", shifted)
    else:
        rewind = RewindBackend.rewind
        monkeypatch.setattr(RewindBackend, "rewind", lambda self, row, length: rewind(self, row, length - 1))
    monkeypatch.setattr(capabilities, "choose_backend", lambda model, copies: RewindBackend(model))
    config = RetrospectiveConfig(threshold=0.5, local_attempts=3, total_attempts=12, max_new_tokens=60)
    _, seen = run_scripted(model, processor, config, batch_size=3)
    difference, _ = worst_difference(model, processor, seen)
    assert difference > 1e-2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("parallel", [1, 3])
def test_an_answer_that_goes_on_unverified_equals_recompute(family, parallel):
    model, processor = sharp(family)
    config = RetrospectiveConfig(
        threshold=0.5,
        local_attempts=3,
        total_attempts=4,
        max_new_tokens=60,
        on_exhausted="continue",
        parallel_attempts=parallel,
    )
    answers, seen = run_scripted(model, processor, config, batch_size=3)
    kinds = {event["kind"] for answer in answers for event in answer.trace}
    assert {"resume", "flag", "reject"} <= kinds
    difference, _ = worst_difference(model, processor, seen)
    assert difference < 1e-4


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_parallel_attempts_sample_from_the_same_distributions(family, batch_size, monkeypatch):
    model, processor = sharp(family)
    adopted = []
    adopt = RewindBackend.adopt
    monkeypatch.setattr(RewindBackend, "adopt", lambda self, *a: adopted.append(a) or adopt(self, *a))
    config = RetrospectiveConfig(
        threshold=0.5, local_attempts=4, total_attempts=20, max_new_tokens=60, parallel_attempts=3
    )
    answers, seen = run_scripted(model, processor, config, batch_size=batch_size)
    difference, _ = worst_difference(model, processor, seen)
    assert difference < 1e-4
    assert len(adopted) >= 2
    kinds = {event["kind"] for answer in answers for event in answer.trace}
    assert {"hint", "local_rewind"} <= kinds


def test_parallel_attempts_do_not_depend_on_the_batch():
    model, processor = families.with_tags(families.llava())
    config = RetrospectiveConfig(
        threshold=0.003,
        temperature=1.0,
        max_new_tokens=30,
        total_attempts=9,
        local_attempts=4,
        parallel_attempts=3,
    )
    images = pictures(len(PROMPTS))
    together = hf.generate_retrospective(model, processor, images, PROMPTS, config, batch_size=3)
    alone = hf.generate_retrospective(model, processor, images, PROMPTS, config, batch_size=1)
    assert [a.tagged_text for a in together] == [a.tagged_text for a in alone]
    assert [[e["kind"] for e in a.trace] for a in together] == [[e["kind"] for e in a.trace] for a in alone]
    assert any(e["kind"] == "reject" for a in together for e in a.trace)


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("on_exhausted", ["finish", "continue"])
def test_an_answer_does_not_depend_on_its_batch(rewrite, on_exhausted):
    model, processor = families.with_tags(families.llava())
    config = RetrospectiveConfig(
        threshold=0.005,
        temperature=1.0,
        max_new_tokens=40,
        rewrite_query=rewrite,
        total_attempts=8,
        on_exhausted=on_exhausted,
    )
    images = pictures(len(PROMPTS))
    together = hf.generate_retrospective(model, processor, images, PROMPTS, config, batch_size=4)
    alone = [
        hf.generate_retrospective(model, processor, [i], [p], config, ids=[str(n)])[0]
        for n, (i, p) in enumerate(zip(images, PROMPTS, strict=True))
    ]
    assert [a.tagged_text for a in together] == [a.tagged_text for a in alone]
    assert [[e["kind"] for e in a.trace] for a in together] == [[e["kind"] for e in a.trace] for a in alone]


@pytest.mark.parametrize("family", [*FAMILIES, "mllama", "paligemma"])
def test_plain_greedy_decoding_equals_generate(family):
    model, processor = families.with_tags(getattr(families, family)())
    images = pictures(3)
    answers = hf.generate_plain(
        model, processor, images, PROMPTS[:3], SamplingConfig(max_new_tokens=30), batch_size=2
    )
    grammar = build_grammar(model, processor, required=True)
    suppress = sorted(prompting.suppressed_ids(model, processor.tokenizer, grammar.ends))
    for image, question, answer in zip(images, PROMPTS, answers, strict=False):
        text = prompting.render(processor, question, 1)
        inputs = hf.encode_batch(model, processor, [text], [[image]])
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False, suppress_tokens=suppress)
        new = [t for t in out[0, inputs["input_ids"].shape[1] :].tolist() if t not in grammar.ends]
        assert grammar.decode(new) == answer.tagged_text


def count_vision_passes(model) -> list[int]:
    tower = next(
        m for n, m in model.named_modules() if n.endswith(("vision_tower", "visual", "vision_model"))
    )
    passes: list[int] = []
    tower.register_forward_hook(lambda *_: passes.append(1))
    return passes


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_custom_generate_gives_the_answers_of_the_function(family):
    model, processor = families.with_tags(getattr(families, family)())
    config = RetrospectiveConfig(threshold=0.003, temperature=0.8, max_new_tokens=40, total_attempts=6)
    images = pictures(3)
    expected = hf.generate_retrospective(model, processor, images, PROMPTS[:3], config, batch_size=3)
    texts = [prompting.render(processor, p, 1) for p in PROMPTS[:3]]
    inputs = hf.encode_batch(model, processor, texts, [[i] for i in images])
    passes = count_vision_passes(model)
    answers = model.generate(
        **inputs,
        max_new_tokens=40,
        custom_generate=hf.retrospective_custom_generate,
        rewind={"processor": processor, "config": config},
    )
    assert [a.tagged_text for a in answers] == [a.tagged_text for a in expected]
    assert [a.trace for a in answers] == [a.trace for a in expected]
    assert len(passes) == 1
    assert [a.counts for a in answers] == [a.counts for a in expected]


def test_custom_generate_applies_other_processors_to_live_ids():
    model, processor = families.with_tags(families.llava())
    text = prompting.render(processor, PROMPTS[0], 1)
    inputs = hf.encode_batch(model, processor, [text], [pictures(1)])
    options = {"max_new_tokens": 25, "repetition_penalty": 1.6}
    config = RetrospectiveConfig(threshold=0.999, max_new_tokens=25)
    ours = model.generate(
        **inputs,
        **options,
        custom_generate=hf.retrospective_custom_generate,
        rewind={"processor": processor, "config": config},
    )[0]
    grammar = build_grammar(model, processor, required=True)
    bad = sorted(grammar.watched | prompting.suppressed_ids(model, processor.tokenizer, grammar.ends))
    out = model.generate(**inputs, **options, do_sample=False)
    new = out[0, inputs["input_ids"].shape[1] :].tolist()
    if set(new).isdisjoint(bad):
        assert ours.tagged_text == grammar.decode(new)
    else:
        pytest.skip("the random model said a tag")


def test_custom_generate_refuses_what_it_cannot_do():
    model, processor = families.with_tags(families.llava())
    inputs = hf.encode_batch(model, processor, [prompting.render(processor, "x", 1)], [pictures(1)])
    call = {**inputs, "custom_generate": hf.retrospective_custom_generate, "max_new_tokens": 5}
    with pytest.raises(UserError, match="processor"):
        model.generate(**call)
    with pytest.raises(UserError, match="unknown keys"):
        model.generate(**call, rewind={"processor": processor, "tau": 1})
    with pytest.raises(UserError, match="there is no 'tau'"):
        model.generate(**call, rewind={"processor": processor, "config": {"tau": 1}})
    with pytest.raises(UserError, match="threshold"):
        model.generate(**call, rewind={"processor": processor, "config": {"threshold": 1.0}})


def test_a_model_without_the_tokens_is_refused_but_decodes_plainly():
    model, processor = families.llava()
    with pytest.raises(UserError, match="<SPAN>"):
        hf.generate_retrospective(model, processor, pictures(1), ["x"])
    assert (
        hf.generate_plain(model, processor, pictures(1), ["x"], SamplingConfig(max_new_tokens=5))[0].spans
        == []
    )
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
    monkeypatch.setattr(capabilities, "choose_backend", lambda model, copies: RecomputeBackend(model))
    slow, seen = run_scripted(model, processor, config, batch_size=3)
    assert {"hint", "sentence_rewind"} <= {e["kind"] for a in slow for e in a.trace}
    monkeypatch.undo()
    if family in ("mllama", "paligemma"):
        if (
            family == "mllama"
        ):  # a whole PaliGemma sequence as a prompt would be attended to in both directions
            difference, _ = worst_difference(model, processor, seen)
            assert difference < 1e-4
        assert isinstance(capabilities.choose_backend(model), RecomputeBackend)
        return
    fast, quick = run_scripted(model, processor, config, batch_size=3)
    assert [a.trace for a in slow] == [a.trace for a in fast]
    mine = {(row, tuple(sequence)): logits for row, sequence, _, logits in quick}
    worst = max(float((mine[row, tuple(s)] - logits).abs().max()) for row, s, _, logits in seen)
    assert worst < 1e-4


def test_a_family_that_cannot_rewind_is_named():
    model, _ = families.paligemma()
    assert "both directions" in structural_obstacle(model)
    broken, _ = sharp("llava")
    original = broken.forward

    def deaf(input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **options):
        return original(input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **options)

    broken.forward = deaf  # a release that ignores the positions it is given
    assert "self-test" in rewind_obstacle(broken)


def test_suppressed_ids_are_never_said():
    model, processor = families.with_tags(families.qwen2_5_vl())
    grammar = build_grammar(model, processor, required=True)
    suppressed = prompting.suppressed_ids(model, processor.tokenizer, grammar.ends)
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") in suppressed
    assert len(processor.tokenizer) in suppressed or model.config.text_config.vocab_size == len(
        processor.tokenizer
    )
    sampler = Sampler(suppress=suppressed)
    row = type("Row", (), {"temperature": 0.0, "rng": random.Random(0)})()
    logits = torch.zeros(1, model.config.text_config.vocab_size)
    logits[:, sorted(suppressed)] = 9.0
    assert sampler.choose(logits, [row])[0] not in suppressed
    row.temperature = 1.0
    assert all(sampler.choose(logits, [row])[0] not in suppressed for _ in range(20))
