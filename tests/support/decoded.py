"""Shared by the tests of decoding: tiny models that react to every key, a sampler with a script, full recomputation."""

import math
import random

import families
import numpy as np
import pytest
import torch
from PIL import Image

from vlm_sft_rl.data import chat
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.cache import prefill
from vlm_sft_rl.decoding.generate import PromptBatch, decode, encode_batch
from vlm_sft_rl.decoding.retrospective import Retrospective
from vlm_sft_rl.decoding.sampling import Sampler

PROMPTS = [
    "What is it?",
    "Describe the picture in one short sentence.",
    "Hm",
    "Is there a red kettle?",
    "Go on.",
]
FAMILIES = ["llava", "llava_mistral", "llava_more", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES += ["idefics3", "smolvlm", "internvl", "gemma3", "wide_gemma3"]
ROUNDING = 1e-4  # of probabilities and logits, between two engines


def equal(a, b) -> bool:
    """Up to the rounding of numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=ROUNDING, abs_tol=ROUNDING)
    return a == b


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (40 + 10 * i, 60, 3), dtype=np.uint8)) for i in range(count)]


def family_pair(family: str, **sizes):
    return families.gemma3(window=512) if family == "wide_gemma3" else getattr(families, family)(**sizes)


def sharp(family: str, **sizes):
    """A tiny model with tags whose logits react visibly to every key: random weights of the usual scale hardly do."""
    model, processor = families.with_tags(family_pair(family, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model, processor


def suppressed(model, processor) -> list[int]:
    tokenizer = chat.get_tokenizer(processor)
    return sorted(chat.suppressed_ids(model, tokenizer, chat.end_ids(model, tokenizer)))


def prompt_inputs(model, processor, prompt: str, image) -> dict:
    return encode_batch(model, processor, [chat.render(processor, prompt, 1)], [[image]])


def longer(inputs: dict, ids: list[int]) -> dict:
    """The inputs with these ids, prompt included, in place of the prompt."""
    old = inputs["input_ids"].shape[1]
    inputs = {**inputs, "input_ids": torch.tensor([ids])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:  # 0 = text
        kinds = inputs["mm_token_type_ids"][:, : len(ids)]
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, len(ids) - kinds.shape[1]))
    if (seeing := inputs.get("cross_attention_mask")) is not None:
        inputs["cross_attention_mask"] = seeing[:, [min(i, old - 1) for i in range(len(ids))]]
    return inputs


def generated(model, processor, prompt: str, image, limit: int, **options) -> list[int]:
    """The greedy answer of `model.generate`, one row, nothing shared."""
    inputs = prompt_inputs(model, processor, prompt, image)
    options = {"suppress_tokens": suppressed(model, processor), **options}
    out = model.generate(**inputs, max_new_tokens=limit, do_sample=False, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def count_encodes(model) -> list[int]:
    """Rows of every later pass of the vision tower."""
    ends = ("vision_tower", "visual", "vision_model")
    tower = next(module for name, module in model.named_modules() if name.endswith(ends))
    passes: list[int] = []
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(len(args[0] if args else next(iter(kwargs.values())))),
        with_kwargs=True,
    )
    return passes


class ScriptedSampler(Sampler):
    """Draws tags, dots and ends at random from each row's own stream, and notes every distribution it was given.

    `seen`: (number of the prompt, the live sequence, logits).
    """

    def __init__(self, model, processor):
        super().__init__(suppress=suppressed(model, processor))
        self.grammar = build_grammar(model, processor, required=True)
        self.dot = processor.tokenizer.encode(".", add_special_tokens=False)[-1]
        self.seen: list[tuple[int, list[int], torch.Tensor]] = []
        self.streams: dict[str, random.Random] = {}

    def choose(self, logits, rows):
        tokens, grammar = super().choose(logits, rows), self.grammar
        for i, row in enumerate(rows):
            stream = self.streams.setdefault(row.job.id, random.Random(f"0 {row.job.id}"))
            ids = row.machine.ids
            sequence = row.prompt[: row.cut] + row.insertion + row.prompt[row.cut :] + ids
            self.seen.append((int(row.job.id), sequence, logits[i].clone()))
            tags = [token for token in ids if token == grammar.open or token in grammar.closes]
            inside = bool(tags) and tags[-1] == grammar.open
            draw = stream.random()
            if draw < 0.25:
                tokens[i] = stream.choice([grammar.confident, grammar.unconfident])
                tokens[i] = tokens[i] if inside else grammar.open
            elif draw < 0.4:
                tokens[i] = self.dot
            elif draw < 0.42 and not inside:
                tokens[i] = min(grammar.ends)
            elif tokens[i] in grammar.watched:
                tokens[i] = self.dot
        return tokens

    def p_unconfident(self, logits, row, unconfident):
        true = super().p_unconfident(logits, row, unconfident)
        assert true == pytest.approx(float(logits.float().softmax(-1)[unconfident]), rel=1e-4)
        return self.streams[row.job.id].choice([0.1, 0.6, 0.9])


def run_scripted(model, processor, config, *, batch_size=3):
    """All answers of a scripted run, the kinds of their events, and what the sampler saw."""
    sampler = ScriptedSampler(model, processor)
    batch = PromptBatch(model, processor, pictures(len(PROMPTS)), PROMPTS)
    answers = decode(batch, Retrospective, config, batch_size=batch_size, sampler=sampler)
    return answers, {event["kind"] for answer in answers for event in answer.trace}, sampler.seen


def worst_difference(model, processor, seen, *, most: int = 60) -> tuple[float, float]:
    """The largest difference from the logits of fresh passes over the same sequences, and their scale."""
    chosen = random.Random(0).sample(seen, min(most, len(seen)))
    images, differences, scales = pictures(len(PROMPTS)), [], []
    for row, sequence, logits in chosen:
        inputs = longer(prompt_inputs(model, processor, PROMPTS[row], images[row]), sequence)
        fresh = prefill(model, inputs).logits[0]
        differences.append(float((fresh - logits).abs().max()))
        scales.append(float(fresh.abs().max()))
    return max(differences), max(scales)
