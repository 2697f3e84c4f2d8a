"""N answers to each prompt: one launch with a shared prefill against N separate `generate` launches, as released.

A random LLaVA of 3M parameters with LLaVA-1.5's 576 image tokens. Every answer has exactly `length` tokens on both sides
(the end token is made impossible), and both work on the same number of questions side by side. A launch is a process:
it starts, loads the model and opens the images, as each pass of the released runners does. What is left of the ratio without
starts is given too.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench import main, random_images, tiny_llava

from vlm_sft_rl.decoding import sample_many
from vlm_sft_rl.decoding.generate import R3V_SAMPLING
from vlm_sft_rl.models.load import load_for_inference

QUESTION = "how many of the things in this picture are there and which of them is the largest one"
IMAGE_SIDE = 24  # patches: 576 image tokens


def run(
    *, questions: int = 64, samples: int = 3, length: int = 24, side_by_side: int = 16, repeats: int = 3
) -> dict:
    """Answers a second of both, alternating in one run; the quickest of `repeats` rounds counts.

    Args:
        side_by_side: questions in a batch, on both sides.

    Returns:
        `ratios` of wall time (separate over ours), answers a second, image encodes and tokens per answer.
    """
    model, processor = tiny_llava(image_side=IMAGE_SIDE)
    images, prompts = _material(questions)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        loaded = _load(folder)
        sizes = [str(number) for number in (questions, samples, length, side_by_side)]
        for _ in range(repeats):
            for name, work in (
                ("ours", lambda: _launch(folder, "ours", sizes)),
                ("separate", lambda: [_launch(folder, str(seed), sizes) for seed in range(samples)]),
                (
                    "ours_without_start",
                    lambda: _ours(*loaded, images, prompts, samples, length, side_by_side),
                ),
                (
                    "separate_without_start",
                    lambda: [_one(*loaded, images, prompts, length, side_by_side, s) for s in range(samples)],
                ),
            ):
                started = time.perf_counter()
                result = work()
                seconds.setdefault(name, []).append(time.perf_counter() - started)
                if name == "ours_without_start":
                    answers = [answer for group in result for answer in group]
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "machine": {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "answers": len(answers),
        "answers_per_second": {name: round(len(answers) / value, 2) for name, value in best.items()},
        "ratios": {
            "separate_over_ours": round(best["separate"] / best["ours"], 2),
            "without_start": round(best["separate_without_start"] / best["ours_without_start"], 2),
        },
        "spread": {name: round(max(v) / min(v), 2) for name, v in seconds.items()},
        "image_encodes_per_answer": {
            "ours": round(statistics.mean(a.counts.image_encodes for a in answers), 3),
            "separate": 1.0,
        },
        "tokens_per_answer": round(statistics.mean(a.counts.tokens_kept for a in answers), 1),
    }


def _material(questions: int):
    return random_images(questions), [f"{QUESTION} {i}" for i in range(questions)]


def _launch(folder: str, what: str, sizes: list[str]) -> None:
    subprocess.run(
        [sys.executable, str(Path(__file__)), "launch", folder, what, *sizes], check=True, capture_output=True
    )


def launch(words: list[str]) -> None:
    """One launch: FOLDER, `ours` or a seed, and the four sizes."""
    folder, what, *sizes = words
    questions, samples, length, side_by_side = map(int, sizes)
    own, (images, prompts) = _load(folder), _material(questions)
    if what == "ours":
        _ours(*own, images, prompts, samples, length, side_by_side)
    else:
        _one(*own, images, prompts, length, side_by_side, int(what))


def _ours(model, processor, images, prompts, samples: int, length: int, side_by_side: int):
    return sample_many(
        model,
        processor,
        images,
        prompts,
        samples,
        replace(R3V_SAMPLING, max_new_tokens=length),
        batch_size=samples * side_by_side,
    )


def _load(folder: str | Path):
    model, processor, _ = load_for_inference(folder, device="cpu")
    never_end(model)
    return model, processor


def never_end(model) -> None:
    """Make the end token impossible, so that every answer has its full length."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]

    def hook(module, args, output):
        output[..., ends] = -1e9
        return output

    model.get_output_embeddings().register_forward_hook(hook)


@torch.inference_mode()
def _one(model, processor, images, prompts, length: int, batch_size: int, seed: int) -> None:
    """One pass of a released runner: batches in file order, `model.generate`, one answer each."""
    torch.manual_seed(seed)
    for start in range(0, len(prompts), batch_size):
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            for prompt in prompts[start : start + batch_size]
        ]
        text = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        inputs = processor(
            text=text, images=images[start : start + batch_size], return_tensors="pt", padding=True
        )
        model.generate(**inputs, do_sample=True, temperature=0.9, top_p=0.95, top_k=50, max_new_tokens=length)


if __name__ == "__main__":
    if sys.argv[1:2] == ["launch"]:
        launch(sys.argv[2:])
    else:
        main(__file__, run)
