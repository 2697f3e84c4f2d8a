"""Both engines on the same questions: `python eval/speed/engines.py [--json FILE] [--models pocket llava]`.

Run it in an environment with vLLM. `pocket` is the shipped model that verifies itself, with retrospective resampling;
`llava` has LLaVA-1.5's widths with random weights and few layers, decoded greedily.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch
import vllm
from bench import random_images, tiny_llava

from vlm_sft_rl.decoding import SamplingConfig, generate_plain, generate_retrospective
from vlm_sft_rl.decoding.vllm_engine import VLLMModel, load_vllm
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.evaluation.decoders import configure
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import draw_scene

LLAVA = {
    "hidden": 4096,
    "heads": 32,
    "layers": 2,
    "image_side": 24,
    "vision_hidden": 1024,
    "vision_layers": 2,
    "vision_heads": 16,
}
WARM_UP = 2  # answers
# model, processor, number of answers, batch size, seed -> answers
Generate = Callable[[object, object, int, int, int], list]


def pocket() -> tuple[Path, Generate]:
    config = configure("retrospective", VERIFIER, {"max_new_tokens": 96})

    def generate(model, processor, answers: int, batch_size: int, seed: int) -> list:
        rng = random.Random(seed)
        images = [render(draw_scene(rng, 0.5), number) for number in range(answers)]
        prompts = ["Describe the image."] * answers
        return generate_retrospective(model, processor, images, prompts, config, batch_size=batch_size)

    return VERIFIER, generate


def llava(folder: Path, layers: int) -> tuple[Path, Generate]:
    model, processor = tiny_llava(**LLAVA | {"layers": layers})
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    side = processor.image_processor.crop_size["height"]
    config = SamplingConfig(max_new_tokens=32)

    def generate(model, processor, answers: int, batch_size: int, seed: int) -> list:
        images = random_images(answers, side=side, seed=seed)
        return generate_plain(
            model, processor, images, ["What is there?"] * answers, config, batch_size=batch_size
        )

    return folder, generate


def measure(model, processor, generate: Generate, count: int, batch_size: int, seed: int) -> dict:
    """Answers a second of the wall and of the processor, and what was read for them. The pictures differ from those of every
    other measurement: vLLM keeps what it has seen."""
    before = model.traffic.copy() if isinstance(model, VLLMModel) else None
    wall, processor_time = time.perf_counter(), time.process_time()
    answers = generate(model, processor, count, batch_size, seed)
    figures = {
        "answers_a_second": len(answers) / (time.perf_counter() - wall),
        "answers_a_cpu_second": len(answers) / (time.process_time() - processor_time),
        "tokens_kept": sum(answer.counts.tokens_kept for answer in answers),
        "tokens_forwarded": sum(answer.counts.tokens_forwarded for answer in answers),
    }
    if before is not None:
        made = model.traffic - before
        figures["requests"] = made["requests"]
        figures["cached_tokens"] = made["cached"]
        figures["recomputed_tokens"] = made["prompt_tokens"] - made["cached"]
    return figures


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("--models", nargs="+", choices=["pocket", "llava"], default=["pocket", "llava"])
    command.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128])
    command.add_argument("--answers", type=int, default=128, help="of each measurement")
    command.add_argument("--layers", type=int, default=LLAVA["layers"], help="of llava's language model")
    command.add_argument("--json", type=Path)
    options = command.parse_args()
    report: dict = {
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
        "vllm": vllm.__version__,
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory() as place:
        for name in options.models:
            folder, generate = pocket() if name == "pocket" else llava(Path(place), options.layers)
            for engine in ("hf", "vllm"):
                if engine == "hf":
                    model, processor = load_for_inference(folder)[:2]
                else:
                    model, processor = load_vllm(folder, None, "float32", max(options.batches))
                generate(model, processor, WARM_UP, WARM_UP, 0)
                for seed, batch_size in enumerate(options.batches, start=1):
                    figures = measure(model, processor, generate, options.answers, batch_size, seed)
                    report[f"{name}, {engine}, batch {batch_size}"] = figures
                    print(f"{name}, {engine}, batch {batch_size}:", json.dumps(figures), flush=True)
                del model
    if options.json:
        options.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
