"""Packed training steps beside stock TRL's padded ones, on the same rows: what `vision_packing` buys."""

import copy
import random
import statistics
import tempfile
from pathlib import Path

from bench import random_images, tiny_llava
from datasets import Dataset
from sft_steps import TEMPLATE, measure_pair, peak_memory, step
from trl import SFTConfig, SFTTrainer

from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator

SIZES = {"cpu": {"hidden": 256, "layers": 6}, "cuda": {"hidden": 2048, "layers": 16, "heads": 16}}
KINDS = {"rows": (16, 1, 8), "image": (8, 4, 24)}  # rows a batch, rows an image, the image's side in patches


def run(steps: int = 10, batches: int = 2, seed: int = 0, device: str = "cpu") -> dict:
    """Both kinds of packing, each against TRL's `SFTTrainer` on the padded batches of the same rows.

    `rows`: 16 rows a batch, 64 image tokens each, answers of log-normal length (median 60 words, sigma 1, at most
    1,000). `image`: 2 images a batch and 4 rows an image, 576 image tokens and about 100 of text each.

    Returns:
        For `rows` and `image`: `speedup` (median over the pairs of TRL's step time over ours, wall clock), its
        quartiles, `speedup_cpu_time` (processor time), `token_ratio` (tokens of the padded batches over ours: what the
        speed-up would be if time were proportional to tokens), `memory_ratio` (peak of TRL's over ours), and
        `loss_difference`, the largest relative one over the batches.
    """
    return {
        **{mode: compare(mode, *workload(mode, batches, seed), steps, seed, device) for mode in KINDS},
        "model": SIZES[device],
        "steps": steps,
        "batches": batches,
    }


def workload(mode: str, batches: int, seed: int) -> tuple[Dataset, int, int]:
    """Rows as `run` says, how many of them are a batch, and an image's side in patches."""
    batch_size, each, side = KINDS[mode]
    rng = random.Random(seed)
    skewed = [min(1000, max(5, round(rng.lognormvariate(4.1, 1.0)))) for _ in range(16 * batches)]
    level = [rng.randint(70, 100) for _ in range(8 * batches)]
    return make_rows(skewed if mode == "rows" else level, each, side, seed), batch_size, side


def make_rows(words: list[int], each: int, side: int, seed: int) -> Dataset:
    """Rows with answers of so many words, tags among them; `each` neighbouring rows share an image."""
    rng = random.Random(seed)
    images = random_images(-(-len(words) // each), side=14 * side, seed=seed)
    rows = []
    for i, count in enumerate(words):
        answer = [f"w{rng.randrange(900)}" for _ in range(count)]
        answer = [*answer[:-1], "<SPAN>", answer[-1], "</UN>" if i % 2 else "</CN>"]
        question = {"role": "user", "content": f"<image>\nw{rng.randrange(900)} x 7"}
        rows.append(
            {
                "id": str(i),
                "messages": [question, {"role": "assistant", "content": " ".join(answer)}],
                "images": [images[i // each]],
            }
        )
    return Dataset.from_list(rows)


def compare(
    mode: str,
    rows: Dataset,
    batch_size: int,
    side: int,
    steps: int,
    seed: int,
    device: str,
    *,
    size: dict | None = None,
    attention: str = "sdpa",
) -> dict:
    """One kind of packing.

    Args:
        size: arguments of `tiny_llava`; None takes those of the device.
        attention: implementation of the packed side; the padded one has `sdpa`.
    """
    model, processor = tiny_llava(image_side=side, seed=seed, **(size or SIZES[device]))
    processor.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "per_device_train_batch_size": 1,
            "use_cpu": device == "cpu",
            "bf16": device != "cpu",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "remove_unused_columns": False,
        }
        trl = SFTConfig(str(Path(folder) / "trl"), max_length=None, **common)
        # compiled for few lengths
        multiple = {"pad_to_multiple_of": 128} if attention == "flex_attention" else {}
        packed = VerificationSFTConfig(
            str(Path(folder) / "packed"), vision_packing=mode, **multiple, **common
        )
        padding = VerificationSFTConfig(str(Path(folder) / "padding"), **common)
        ours, theirs = (
            cls(
                with_attention(copy.deepcopy(model), attention if args is packed else "sdpa"),
                args,
                data_collator=build_collator(processor, packed if args is packed else padding),
                train_dataset=rows,
                processing_class=processor,
            )
            for cls, args in ((VerificationSFTTrainer, packed), (SFTTrainer, trl))
        )
    ours.model.train(), theirs.model.train()
    pairs = []
    for i in range(0, len(rows), batch_size):
        batch = [rows[j] for j in range(i, i + batch_size)]
        pairs.append((ours.data_collator(batch), theirs.data_collator(batch)))
    losses = [(step(ours, a), step(theirs, b, weighted=False)) for a, b in pairs]
    times = [measure_pair(ours, theirs, *pairs[i % len(pairs)], bool(i % 2)) for i in range(steps)]
    low, middle, high = statistics.quantiles([b[0] / a[0] for a, b in times], n=4)
    peaks = [peak_memory(ours, pairs[0][0], True), peak_memory(theirs, pairs[0][1], False)]
    return {
        "speedup": middle,
        "speedup_low": low,
        "speedup_high": high,
        "speedup_cpu_time": statistics.median(b[1] / a[1] for a, b in times),
        "token_ratio": sum(b["input_ids"].numel() for _, b in pairs)
        / sum(a["input_ids"].numel() for a, _ in pairs),
        "memory_ratio": peaks[1] / peaks[0],
        "loss_difference": max(abs(a - b) / b for a, b in losses),
        "step_s": {
            "ours": statistics.median(a[0] for a, _ in times),
            "trl": statistics.median(b[0] for _, b in times),
        },
        "rows_per_batch": batch_size,
    }


def with_attention(model, attention: str):
    model.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    return model
