"""`vlm-sft-rl pocket build`: pre-train the pocket VLM from nothing, in two resumable stages, and measure it."""

import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..errors import UserError
from ..io import read_json, write_json, writing
from . import language
from .language_stage import Packer, packed_loss
from .measure import measure, write_card
from .mimetic import initialise_attention
from .model import build_model, build_processor
from .render import render
from .vision_stage import PatchWords, patch_labels, project, vision_loss
from .world import Scene, draw_scene


@dataclass(frozen=True)
class BuildConfig:
    """Everything that decides the weights. Scenes: a third unbiased, the rest biased as the demo's training scenes."""

    seed: int = 0
    scenes: int = 8000
    bias: float = 0.85
    noise: float = 0.7
    vision_steps: int = 2400
    vision_batch: int = 48
    vision_learning_rate: float = 5e-3
    language_steps: int = 2000
    language_batch: int = 16
    language_learning_rate: float = 1.5e-3


KIND_WEIGHTS = {"caption": 6.0, "locate-drill": 6.0, "read-drill": 3.0}
CHECKPOINT_EVERY = 100


def build(folder: str | Path, config: BuildConfig | None = None) -> Path:
    """Pre-train into `folder`; killed at any moment, the same call goes on from the last hundred steps.

    Raises:
        UserError: `folder` holds the state of a build with other settings; the disk is full.
    """
    config = config or BuildConfig()
    folder = Path(folder)
    state = folder / "build"
    settings = state / "config.json"
    if settings.exists() and read_json(settings) != asdict(config):
        raise UserError(
            f"{settings}: a build with other settings was begun here. Choose another folder or delete it."
        )
    write_json(settings, asdict(config))
    processor = build_processor()
    model = build_model(processor, seed=config.seed)
    initialise_attention(model, seed=config.seed)
    scenes = _scenes(config)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        pixels = _pixels(scenes, processor, progress)
        _vision_stage(model, processor, scenes, pixels, config, state, progress)
        _language_stage(model, processor, scenes, pixels, config, state, progress)
    with writing(folder, "the training is finished and kept."):
        model.half().save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def build_and_measure(folder: str | Path, config: BuildConfig | None = None) -> dict:
    """`build`, then measure the result and write its card; returns the figures."""
    config = config or BuildConfig()
    folder = build(folder, config)
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    figures = measure(model, processor)
    write_json(folder / "metrics.json", figures)
    write_card(folder / "README.md", figures, asdict(config))
    return figures


def _scenes(config: BuildConfig) -> list[Scene]:
    rng = random.Random(config.seed)
    return [draw_scene(rng, config.bias if number % 3 else 0.0) for number in range(config.scenes)]


def _pixels(scenes: list[Scene], processor, progress: Progress) -> torch.Tensor:
    task = progress.add_task("drawing scenes", total=len(scenes))
    first = np.asarray(render(scenes[0], 0))
    pixels = torch.empty(len(scenes), 3, *first.shape[:2], dtype=torch.uint8)
    for number, scene in enumerate(scenes):
        pixels[number] = torch.from_numpy(np.array(render(scene, number))).permute(2, 0, 1)
        progress.advance(task)
    check = processor.image_processor(Image.fromarray(first), return_tensors="pt")["pixel_values"][0]
    if not torch.allclose(check, _normalise(pixels[:1], processor)[0], atol=1e-4):
        raise AssertionError("the image processor resizes or crops pictures of the pocket world")
    return pixels


def _normalise(pixels: torch.Tensor, processor) -> torch.Tensor:
    mean = torch.tensor(processor.image_processor.image_mean)[:, None, None]
    deviation = torch.tensor(processor.image_processor.image_std)[:, None, None]
    return (pixels.float() / 255 - mean) / deviation


class _Stage:
    """Optimizer, one-cycle schedule and checkpoints of one stage; every step's randomness depends on its number only."""

    def __init__(self, name: str, model, parameters: list, steps: int, learning_rate: float, state: Path):
        self.path, self.model, self.steps = state / f"{name}.pt", model, steps
        self.parameters, self.learning_rate, self.step = parameters, learning_rate, 0
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        if self.path.exists():
            saved = torch.load(self.path, weights_only=True)
            model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
        self.kept = self.step

    def update(self, loss: torch.Tensor) -> None:
        warmup = min(1.0, (self.step + 1) / min(100, self.steps / 10))
        cosine = 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * warmup * (0.02 + 0.98 * cosine)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step += 1
        if self.step % CHECKPOINT_EVERY == 0 or self.step == self.steps:
            saved = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            }
            temporary = self.path.with_suffix(".tmp")
            with writing(temporary, f"it goes on from step {self.kept}."):
                try:
                    torch.save(saved, temporary)
                    temporary.replace(self.path)
                finally:
                    temporary.unlink(missing_ok=True)  # room for another try
            self.kept = self.step


def _vision_stage(model, processor, scenes, pixels, config, state, progress) -> None:
    words, labels = PatchWords.from_tokenizer(processor.tokenizer), patch_labels(scenes)
    parameters = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    stage = _Stage("vision", model, parameters, config.vision_steps, config.vision_learning_rate, state)
    task = progress.add_task("tower and projector", total=config.vision_steps, completed=stage.step)
    embeddings = model.get_input_embeddings().weight
    while stage.step < config.vision_steps:
        draw = torch.Generator().manual_seed(config.seed * 1_000_003 + stage.step)
        index = torch.randint(0, len(scenes), (config.vision_batch,), generator=draw)
        loss, accuracy = vision_loss(
            project(model, _normalise(pixels[index], processor)), labels[index], embeddings, words
        )
        stage.update(loss)
        progress.update(
            task,
            advance=1,
            description=f"tower and projector: loss {loss.item():.3f}, sight {accuracy.item():.2f}",
        )


def _language_stage(model, processor, scenes, pixels, config, state, progress) -> None:
    parameters = list(model.model.language_model.parameters())
    stage = _Stage("language", model, parameters, config.language_steps, config.language_learning_rate, state)
    with torch.no_grad():
        features = torch.cat([project(model, _normalise(part, processor)) for part in pixels.split(250)])
    packer = Packer(processor, KIND_WEIGHTS)
    task = progress.add_task("language model", total=config.language_steps, completed=stage.step)
    while stage.step < config.language_steps:
        rng = random.Random(config.seed * 1_000_003 + stage.step)
        index = rng.sample(range(len(scenes)), config.language_batch)
        batch = packer.pack([training_turns(scenes[i], rng, config.noise) for i in index])
        loss = packed_loss(model, batch, features[index], packer.image_start)
        stage.update(loss)
        progress.update(task, advance=1, description=f"language model: loss {loss.item():.3f}")


def training_turns(scene: Scene, rng: random.Random, noise: float) -> list[language.Turn | language.Drill]:
    """One caption as noisy as the web, and clean questions: the asymmetry that verification lives on."""
    turns = [language.caption_turn(scene, rng, noise)]
    turns += [language.location_drill(scene, rng), language.content_drill(scene, rng)]
    for _ in range(2):
        turns += [language.existence_turn(scene, rng, positive=positive) for positive in (True, False)]
    turns += [
        language.location_turn(scene, rng),
        language.location_turn(scene, rng, positive=rng.random() < 0.5),
    ]
    turns += [language.content_turn(scene, rng), language.colour_turn(scene, rng)]
    return turns + [language.counting_turn(scene, rng) for _ in range(2)]
