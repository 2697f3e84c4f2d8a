"""Region rows over drawn pictures, and short settings for the describer-locator loop."""

import random

import families
from PIL import Image, ImageDraw

from vlm_sft_rl.models.parts import set_trainable
from vlm_sft_rl.trainers.sc_tune.config import SCTuneConfig
from vlm_sft_rl.trainers.sc_tune.trainer import SCTuneTrainer


def region_rows(count: int, *, seed: int = 0, side: int = 56, expressions: bool = False) -> list[dict]:
    """One coloured rectangle on each picture, and its box."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        picture = Image.new("RGB", (side, side), (rng.randrange(90), rng.randrange(90), rng.randrange(90)))
        x1, y1 = rng.randrange(side // 2), rng.randrange(side // 2)
        box = [x1, y1, x1 + rng.randrange(10, side // 2), y1 + rng.randrange(10, side // 2)]
        colour = rng.choice(["red", "green", "blue"])
        ImageDraw.Draw(picture).rectangle(box, fill=colour)
        row = {"id": f"r{number}", "image": picture, "width": side, "height": side, "box": box}
        rows.append(row | ({"expressions": [f"the {colour} one"]} if expressions else {}))
    return rows


def config(folder, **settings) -> SCTuneConfig:
    return SCTuneConfig(
        str(folder),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 4,
            "describer_steps": 2,
            "locator_steps": 1,
            "learning_rate": 1e-3,
            "locator_learning_rate": 2e-3,
            "describe_max_new_tokens": 6,
            "locate_max_new_tokens": 8,
            "min_new_tokens": 1,
            "top_p": None,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 3,
            **settings,
        },
    )


def caption_rows(count: int, *, seed: int = 0) -> list[dict]:
    """SFT rows about such pictures."""
    return [
        {
            "id": f"caption-{row['id']}",
            "images": [row["image"]],
            "messages": [
                {"role": "user", "content": "x y"},
                {"role": "assistant", "content": f"a b c {number} d"},
            ],
        }
        for number, row in enumerate(region_rows(count, seed=seed))
    ]


ARGUMENTS = ("reward_funcs", "rec_dataset", "replay_dataset", "eval_dataset", "peft_config", "optimizers")


def trainer(folder, *, family="llava", rows=None, pair=None, **settings) -> SCTuneTrainer:
    """Language model and projector are trained; `settings` may hold ARGUMENTS of the constructor."""
    model, processor = pair or getattr(families, family)()
    set_trainable(model, vision=False, projector=True, language=True)
    more = {name: settings.pop(name) for name in ARGUMENTS if name in settings}
    return SCTuneTrainer(
        model,
        config(folder, **settings),
        train_dataset=rows or region_rows(8),
        processing_class=processor,
        **more,
    )


def opened(trainer: SCTuneTrainer, rows: list[dict]) -> list[dict]:
    """The rows as a step has them."""
    return trainer.prompts.with_sizes(trainer.data_collator(rows)["rows"])


def by_length(completions, **columns) -> list[float]:
    """A reward that a random model can earn: shorter is better, and the boxes do not matter."""
    return [1.0 / (1 + len(text)) for text in completions]


def always(value: float):
    return lambda completions, **columns: [value] * len(completions)
