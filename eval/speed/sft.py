"""A training step of `VerificationSFTTrainer` beside one of TRL's `SFTTrainer`: time and memory, on the same rows."""

import copy
import random
import statistics
import tempfile
import time
from pathlib import Path

import sft_packing
import torch
from bench import main, random_images, tiny_llava
from datasets import Dataset
from sft_steps import TEMPLATE, measure_pair, peak_memory, step
from trl import SFTConfig, SFTTrainer

from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator


def run(
    steps: int = 30,
    batch_size: int = 8,
    warmup: int = 3,
    packing_steps: int = 10,
    seed: int = 0,
    device: str | None = None,
) -> dict:
    """Alternate the two trainers' steps over the same batches (which of them goes first alternates too).

    A step is forward, loss, logging and backward. Ours carries token weights (closing tags weigh 2) and all verdict
    metrics. Collating is the same work for both and is left out; `collate_s` says what it takes.

    Args:
        steps: timed steps of each trainer.
        packing_steps: timed steps of each for each kind of packing; 0 leaves packing out.
        device: None takes the GPU when there is one.

    Returns:
        `ratios` = ours over TRL's: `step_time` (median of the pairs' ratios, wall clock), `step_time_low` and
        `step_time_high` (quartiles), `step_cpu_time` (the same of processor time, which other programs on the machine
        disturb less), `peak_memory` (largest allocation within a step above what was there before). Then the seconds
        and bytes behind them, and `max_loss_difference` with all weights 1, which must be 0 on a CPU. `packing`: see
        `sft_packing.run`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = tiny_llava(seed=seed)
    processor.chat_template = TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(batch_size * 4, seed)
        ours = trainer(VerificationSFTTrainer, VerificationSFTConfig, model, processor, rows, folder, device)
        theirs = trainer(SFTTrainer, SFTConfig, model, processor, rows, folder, device)
        start = time.perf_counter()
        batches = [
            ours.data_collator([rows[i + j] for j in range(batch_size)])
            for i in range(0, len(rows), batch_size)
        ]
        collate = (time.perf_counter() - start) / len(batches)
        difference = max(abs(step(ours, b, ones=True) - step(theirs, b, weighted=False)) for b in batches)
        for batch in batches[:warmup]:
            step(ours, batch), step(theirs, batch, weighted=False)
        pairs = [
            measure_pair(ours, theirs, *2 * (batches[i % len(batches)],), bool(i % 2)) for i in range(steps)
        ]
        peaks = [peak_memory(t, batches[0], weighted) for t, weighted in ((ours, True), (theirs, False))]
    low, middle, high = statistics.quantiles([a[0] / b[0] for a, b in pairs], n=4)
    return {
        "ratios": {
            "step_time": middle,
            "step_time_low": low,
            "step_time_high": high,
            "step_cpu_time": statistics.median(a[1] / b[1] for a, b in pairs),
            "peak_memory": peaks[0] / peaks[1],
        },
        "step_s": {
            "ours": statistics.median(a[0] for a, _ in pairs),
            "trl": statistics.median(b[0] for _, b in pairs),
        },
        "peak_bytes": {"ours": peaks[0], "trl": peaks[1]},
        "collate_s": collate,
        "max_loss_difference": difference,
        "packing": sft_packing.run(packing_steps, seed=seed, device=device) if packing_steps else None,
        "steps": steps,
        "batch_size": batch_size,
        "tokens_per_row": int(batches[0]["input_ids"].shape[1]),
        "device": device,
        "seed": seed,
    }


def make_rows(count: int, seed: int) -> Dataset:
    """Rows of one image and about 60 answer tokens, every fifth phrase hallucinated."""
    rng = random.Random(seed)
    rows = []
    for i, image in enumerate(random_images(count, seed=seed)):
        words = []
        for phrase in range(8):
            words += [f"w{rng.randrange(900)}" for _ in range(3)]
            close = "</UN>" if phrase == 7 and i % 2 else "</CN>"
            words += ["<SPAN>", f"w{rng.randrange(900)}", f"w{rng.randrange(900)}", close]
        question = {"role": "user", "content": "<image>\nx 7"}
        rows.append(
            {
                "id": str(i),
                "messages": [question, {"role": "assistant", "content": " ".join(words)}],
                "images": [image],
            }
        )
    return Dataset.from_list(rows)


def trainer(cls, config_cls, model, processor, rows: Dataset, folder: str, device: str):
    """A trainer with its own copy of the model, in training mode."""
    args = config_cls(
        str(Path(folder) / cls.__name__),
        per_device_train_batch_size=1,
        use_cpu=device == "cpu",
        bf16=device != "cpu",
        max_length=None,
        remove_unused_columns=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        **({"close_tag_weight": 2.0} if config_cls is VerificationSFTConfig else {}),
    )
    settings = VerificationSFTConfig(args.output_dir, use_cpu=device == "cpu", close_tag_weight=2.0)
    made = cls(
        copy.deepcopy(model),
        args,
        data_collator=build_collator(processor, settings),
        train_dataset=rows,
        processing_class=processor,
    )
    made.model.train()
    return made


if __name__ == "__main__":
    main(__file__, run)
