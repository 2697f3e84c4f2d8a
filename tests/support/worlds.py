"""A benchmark of six drawn pictures, and a tiny checkpoint that knows the tags: what the runner's tests run on."""

from dataclasses import fields
from pathlib import Path

import families
import torch
from json_lines import write_lines
from PIL import Image, ImageDraw

from vlm_sft_rl.data.tags import VERIFICATION_TOKENS
from vlm_sft_rl.decoding.answers import Answer, SpanRecord
from vlm_sft_rl.evaluation.runner import evaluate_spec
from vlm_sft_rl.evaluation.specs import EvalOptions
from vlm_sft_rl.models.sidecar import Sidecar, write_sidecar

SPEC = """
name: shapes
description: objects in drawn pictures
questions: questions.jsonl
prompt: "{question} Be brief."
metric: chair
metric_options: {vocabulary: [circle, square]}
decoding: {max_new_tokens: 12, threshold: {llava: 0.25, default: 0.5}}
files:
  - {path: questions.jsonl, source: "draw them with draw_shapes.py"}
  - {path: images, source: "draw them with draw_shapes.py"}
published:
  - {system: Baseline-1B, source: "a paper, Table 1", values: {chair_i: 0.2, coverage: 0.5}}
"""


def write_world(folder: Path, count: int = 6) -> Path:
    """`spec.yaml` and `data/` with pictures and questions; returns the spec's path."""
    (folder / "data/images").mkdir(parents=True)
    rows = []
    for index in range(count):
        picture = Image.new("RGB", (28, 28), (index * 40, 90, 200 - index * 30))
        draw = ImageDraw.Draw(picture)
        shape = ["circle", "square"][index % 2]
        (draw.ellipse if shape == "circle" else draw.rectangle)((6, 6, 20, 20), fill="white")
        picture.save(folder / f"data/images/{index}.png")
        rows.append(
            {
                "id": f"q{index}",
                "images": [f"images/{index}.png"],
                "question": "What is it?",
                "objects": [shape],
            }
        )
    write_questions(folder, rows)
    (folder / "spec.yaml").write_text(SPEC)
    return folder / "spec.yaml"


def write_questions(folder: Path, rows: list[dict]) -> None:
    write_lines(folder / "data/questions.jsonl", rows)


def write_checkpoint(folder: Path, *, tags: bool = True) -> Path:
    """A tiny random LLaVA whose output embedding makes tags frequent, so that answers have phrases."""
    model, processor = families.llava()
    if tags:
        processor.tokenizer.add_tokens(list(VERIFICATION_TOKENS))
        model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
        with torch.no_grad():
            model.get_output_embeddings().weight[-len(VERIFICATION_TOKENS) :] *= 4
        write_sidecar(folder, Sidecar(threshold=0.4))
    return families.save(model, processor, folder)


def evaluate(
    spec, model, output_dir, data_dir, *, decoder="greedy", judge=None, workers=None, **values
) -> dict:
    """`evaluate_spec` with its options and the decoder's settings as keywords, without a report."""
    names = {item.name for item in fields(EvalOptions)}
    options = {name: value for name, value in values.items() if name in names}
    return evaluate_spec(
        spec,
        model,
        output_dir=output_dir,
        data_dir=data_dir,
        decoder=decoder,
        settings={name: value for name, value in values.items() if name not in names},
        options=EvalOptions(**{"report": False} | options),
        judge=judge,
        workers=workers,
    )


def answer(*spans: tuple[str, float]) -> Answer:
    records = [SpanRecord(text, p, p < 0.5) for text, p in spans]
    tagged = ", ".join(f"<SPAN> {text} </CN>" for text, _ in spans)
    text = ", ".join(text for text, _ in spans)
    return Answer(text, tagged, True, text, text, records)
