"""Measure a pocket VLM's skills on unbiased scenes it has never seen: the figures of its model card."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..evaluation.metrics.chair import Chair
from ..io import write_text
from ..roc import roc_auc
from . import language
from .render import render
from .world import COMPANIONS, NOUNS, Scene, draw_scene

SKILLS: dict[str, Callable[[Scene, random.Random], language.Turn]] = {
    "existence": lambda scene, rng: language.existence_turn(scene, rng, positive=rng.random() < 0.5),
    "location": language.location_turn,
    "content": language.content_turn,
    "colour": language.colour_turn,
    "counting": language.counting_turn,
}


@torch.no_grad()
def answers(model, processor, images: list, prompts: list[str], *, max_new_tokens: int, batch: int = 50):
    """Greedy answers and, for each, the logits of its first token: `(list[str], tensor (n, vocabulary))`."""
    texts, first = [], []
    for start in range(0, len(images), batch):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts[start : start + batch]
        ]
        rendered = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=rendered, images=images[start : start + batch], return_tensors="pt", padding=True
        ).to(model.device)
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = out.sequences[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
        first.append(out.logits[0].float().cpu())
    return texts, torch.cat(first)


def measure(model, processor, *, scenes: int = 500, seed: int = 12345) -> dict:
    """Accuracy of every skill, area under the ROC curve of yes against no, and the hallucination rate of captions.

    `companion_share` is the share of hallucinated nouns that go with a noun in the picture.
    """
    rng = random.Random(seed)
    drawn = [draw_scene(rng, 0.0) for _ in range(scenes)]
    images = [render(scene, number) for number, scene in enumerate(drawn)]
    figures: dict[str, float | int] = {"scenes": scenes, "seed": seed}
    for name, ask in SKILLS.items():
        turns = [ask(scene, rng) for scene in drawn]
        texts, first = answers(model, processor, images, [turn.question for turn in turns], max_new_tokens=6)
        figures[f"{name}_accuracy"] = _mean(
            text == turn.answer for text, turn in zip(texts, turns, strict=True)
        )
        if name == "existence":
            yes, no = (
                processor.tokenizer.encode(f" {word}", add_special_tokens=False)[0] for word in ("Yes", "No")
            )
            score = (first[:, yes] - first[:, no]).numpy()
            truth = np.array([turn.answer == "Yes" for turn in turns])
            figures["existence_auc"] = round(roc_auc(score, truth), 4)
    texts, _ = answers(model, processor, images, [language.CAPTION_PROMPT] * scenes, max_new_tokens=64)
    return figures | caption_figures(texts, drawn)


def caption_figures(captions: list[str], scenes: list[Scene]) -> dict[str, float]:
    """CHAIR's figures, how often the theme is named rightly, and `companion_share` (see `measure`)."""
    metric = Chair(list(NOUNS))
    totals, companions, themes = np.zeros(len(metric.columns), dtype=int), 0, 0
    for text, scene in zip(captions, scenes, strict=True):
        totals += metric.sample_counts(text, scene.nouns)
        typical = {COMPANIONS.get(noun) for noun in scene.nouns} - set(scene.nouns)
        companions += sum(mention.noun in typical for mention in metric.mentions(text))
        themes += text.startswith(language.THEME_PHRASES[scene.theme])
    chair = {name: round(float(statistic(totals)), 4) for name, statistic in metric.statistics.items()}
    return {
        "caption_chair_i": chair["chair_i"],
        "caption_chair_s": chair["chair_s"],
        "caption_coverage": chair["coverage"],
        "caption_theme_accuracy": round(themes / len(scenes), 4),
        "caption_companion_share": round(
            companions / max(1, int(totals[metric.columns.index("hallucinated")])), 4
        ),
    }


def _mean(values) -> float:
    values = list(values)
    return round(sum(values) / len(values), 4)


def write_card(path: str | Path, figures: dict, settings: dict) -> Path:
    """Write the model card (README.md) with the data, the steps, the command and the measured figures."""
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    options = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return write_text(
        path,
        f"""# Pocket VLM (base)

A LLaVA of some 2.4 million parameters (CLIP-style tower, two-layer projector, Llama language model, tied embeddings),
pre-trained from nothing on rendered scenes of the pocket world. It exists so that every method of this toolkit can be
run on a CPU with nothing downloaded; it is no use for anything else.

Command: `vlm-sft-rl pocket build DIR`. Weights are stored in half precision.

## Data

Scenes with three to six objects on a 4x4 grid; a third unbiased, two thirds biased (a noun's companion stands beside it
with the probability `bias`). Captions are as noisy as web captions: an absent companion is named with the probability
`noise`. Questions (existence, location, content, colour, counting) are exact. So the model hallucinates in captions what
it can rule out when asked, like large VLMs.

## Stages

1. Tower and projector: each patch's feature is regressed to the sum of the embeddings of its words.
2. Language model, tower frozen: thirteen turns over one image prefix; attention starts from a mimetic
   initialisation (arXiv 2305.09828).

| setting | value |
|---|---|
{options}

## Measured (greedy, unbiased scenes not seen in training)

| figure | value |
|---|---|
{rows}
""",
    )
