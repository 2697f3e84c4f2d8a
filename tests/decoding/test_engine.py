"""The engine against full recomputation: every distribution it ever sampled from must be the one of a fresh pass."""

import random

import families
import numpy as np
import pytest
import torch
from PIL import Image

from vlm_sft_rl.decoding import hf
from vlm_sft_rl.decoding import prompt as prompting
from vlm_sft_rl.decoding.admission import rewind_obstacle
from vlm_sft_rl.decoding.prefill import prefill
from vlm_sft_rl.decoding.records import RetrospectiveConfig
from vlm_sft_rl.decoding.retrospective import Retrospective
from vlm_sft_rl.decoding.sampling import Sampler

PROMPTS = ["What is it?", "Describe the picture in one short sentence.", "Hm", "Is there a red kettle?", "Go on."]
FAMILIES = ["llava", "llava_mistral", "llava_next", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm"]


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40 + 10 * i, 60, 3), dtype=np.uint8)) for i in range(count)]


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
            self.seen.append((int(row.job.id), sequence, len(sequence) - len(row.machine.ids), logits[i].clone()))
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
    grammar = prompting.build_grammar(model, processor, required=True)
    dot = processor.tokenizer.encode(".", add_special_tokens=False)[-1]
    suppress = prompting.suppressed_ids(model, processor.tokenizer, grammar.ends)
    sampler = ScriptedSampler(grammar, dot, seed, suppress=suppress)
    images = pictures(len(PROMPTS))
    answers = hf.decode_with(
        model,
        processor,
        images,
        PROMPTS,
        config,
        grammar,
        Retrospective,
        batch_size=batch_size,
        sampler=sampler,
    )
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
    return prefill(model, inputs).logits[0]


def worst_difference(model, processor, seen, *, most: int = 60) -> tuple[float, float]:
    chosen = random.Random(0).sample(seen, min(most, len(seen)))
    pairs = [(fresh_logits(model, processor, row, sequence), logits) for row, sequence, _, logits in chosen]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(a.abs().max()) for a, _ in pairs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_sampled_distribution_equals_a_full_recompute(family, attention, record_property):
    model, processor = families.with_tags(getattr(families, family)())
    model.set_attn_implementation(attention)
    assert rewind_obstacle(model) is None
    config = RetrospectiveConfig(threshold=0.5, local_attempts=3, total_attempts=12, max_new_tokens=60)
    answers, seen = run_scripted(model, processor, config, batch_size=3)
    kinds = {event["kind"] for answer in answers for event in answer.trace}
    assert {"accept", "reject", "local_rewind", "sentence_rewind", "hint", "finish"} <= kinds
    difference, scale = worst_difference(model, processor, seen)
    print(f"\n{family} {attention}: max difference {difference:.2e} at scale {scale:.2f}, {len(seen)} states")
    assert scale > 0.05
    assert difference < 1e-4
    assert all(answer.counts.image_encodes == 1 for answer in answers)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_parallel_attempts_sample_from_the_same_distributions(batch_size):
    model, processor = families.with_tags(families.llava())
    config = RetrospectiveConfig(
        threshold=0.5, local_attempts=6, total_attempts=20, max_new_tokens=60, parallel_attempts=3
    )
    answers, seen = run_scripted(model, processor, config, batch_size=batch_size)
    difference, _ = worst_difference(model, processor, seen)
    assert difference < 1e-4
    assert any(event["kind"] == "hint" for answer in answers for event in answer.trace)


@pytest.mark.parametrize("rewrite", [False, True])
def test_an_answer_does_not_depend_on_its_batch(rewrite):
    model, processor = families.with_tags(families.llava())
    config = RetrospectiveConfig(
        threshold=0.005, temperature=1.0, max_new_tokens=40, rewrite_query=rewrite, total_attempts=8
    )
    images = pictures(len(PROMPTS))
    together = hf.generate_retrospective(model, processor, images, PROMPTS, config, batch_size=4)
    alone = [
        hf.generate_retrospective(model, processor, [i], [p], config, ids=[str(n)])[0]
        for n, (i, p) in enumerate(zip(images, PROMPTS, strict=True))
    ]
    assert [a.tagged_text for a in together] == [a.tagged_text for a in alone]
    assert [[e["kind"] for e in a.trace] for a in together] == [[e["kind"] for e in a.trace] for a in alone]


@pytest.mark.parametrize("family", [*FAMILIES, "paligemma"])
def test_plain_greedy_decoding_equals_generate(family):
    model, processor = families.with_tags(getattr(families, family)())
    images = pictures(3)
    answers = hf.generate_plain(model, processor, images, PROMPTS[:3], max_new_tokens=30, batch_size=2)
    grammar = prompting.build_grammar(model, processor, required=True)
    suppress = sorted(prompting.suppressed_ids(model, processor.tokenizer, grammar.ends))
    for image, question, answer in zip(images, PROMPTS, answers, strict=False):
        text = prompting.render(processor, question, 1)
        inputs = hf.encode_batch(model, processor, [text], [[image]])
        out = model.generate(**inputs, max_new_tokens=30, do_sample=False, suppress_tokens=suppress)
        new = [t for t in out[0, inputs["input_ids"].shape[1] :].tolist() if t not in grammar.ends]
        assert grammar.decode(new) == answer.tagged_text
