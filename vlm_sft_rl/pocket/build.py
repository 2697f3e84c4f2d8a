"""`vlm-sft-rl pocket build`: pre-train the pocket VLM from nothing, in two resumable stages, and measure it."""

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..errors import UserError
from ..evaluation.metrics.chair import Chair
from ..io import give_user_mode, read_json, write_json, write_text, writing
from ..roc import roc_auc
from . import language
from .language import Drill, Turn
from .model import build_model, build_processor, initialise_attention
from .render import render
from .world import CELLS, COLOURS, COMPANIONS, NOUNS, SIZES, THEMES, Scene, draw_scene

# Stage 1 of the pocket VLM: tower and projector learn to write each patch in the basis of the word embeddings.
NOTHING = "nothing"
OCCUPIED_WEIGHT = 4.0
SHARPNESS = 8.0


@dataclass(frozen=True)
class PatchWords:
    """Token ids of the words of a patch, by kind; index 0 of nouns, colours and sizes is `nothing`."""

    nouns: torch.Tensor
    colours: torch.Tensor
    sizes: torch.Tensor
    themes: torch.Tensor
    columns: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def from_tokenizer(cls, tokenizer) -> "PatchWords":
        def one(text: str) -> int:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ValueError(f"{text!r} must be one token, found {len(ids)}")
            return ids[0]

        def words(names) -> torch.Tensor:
            return torch.tensor([one(f" {NOTHING}"), *(one(f" {name}") for name in names)])

        columns = torch.tensor([one(f" {cell[0]}") for cell in CELLS])
        rows = torch.tensor([one(cell[1]) for cell in CELLS])
        return cls(words(NOUNS), words(COLOURS), words(SIZES), words(THEMES)[1:], columns, rows)


def patch_labels(scenes: list[Scene]) -> torch.Tensor:
    """Labels of shape (scenes, cells, 4): index of noun, colour, size (0 where the cell is empty), and of the theme."""
    nouns, colours, sizes = ({name: i for i, name in enumerate(kind, 1)} for kind in (NOUNS, COLOURS, SIZES))
    labels = torch.zeros(len(scenes), len(CELLS), 4, dtype=torch.long)
    for row, scene in enumerate(scenes):
        labels[row, :, 3] = THEMES.index(scene.theme)
        for item in scene.objects:
            place = CELLS.index(item.cell)
            labels[row, place, :3] = torch.tensor([nouns[item.noun], colours[item.colour], sizes[item.size]])
    return labels


def project(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """Projected patch features, shape (images, patches, hidden)."""
    hidden = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    return model.model.multi_modal_projector(hidden[model.config.vision_feature_layer][:, 1:])


def vision_loss(features: torch.Tensor, labels: torch.Tensor, embeddings: torch.Tensor, words: PatchWords):
    """Regression to the summed word embeddings plus classification by dot product.

    Args:
        features: (images, cells, hidden); labels: (images, cells, 4); embeddings: (vocabulary, hidden), fixed.

    Returns:
        (loss, noun accuracy over occupied cells)
    """
    embeddings = embeddings.detach()
    kinds = (words.nouns, words.colours, words.sizes, words.themes)
    target = sum(embeddings[kind[labels[..., i]]] for i, kind in enumerate(kinds))
    target = target + embeddings[words.columns] + embeddings[words.rows]
    occupied = labels[..., 0] > 0
    # two thirds of the cells are empty and easy: without the weight, sight stays at half of the nouns for long
    weights = torch.where(occupied, OCCUPIED_WEIGHT, 1.0)
    error = (features - target).pow(2).sum(-1)
    accuracy = None
    for i, kind in enumerate(kinds):
        logits = SHARPNESS * features @ embeddings[kind].T
        error = error + F.cross_entropy(
            logits.flatten(0, 1), labels[..., i].flatten(), reduction="none"
        ).view_as(error)
        if accuracy is None:
            accuracy = (logits.argmax(-1) == labels[..., 0])[occupied].float().mean()
    return (weights * error).sum() / weights.sum(), accuracy


# Stage 2 of the pocket VLM: many question turns over one image prefix in one sequence.
@dataclass(frozen=True)
class PackedBatch:
    """`ids`, `positions`, `turns`: (scenes, length); `turns` is 0 for the prefix and −1 for padding.

    `weights`: (scenes, length), the loss weight of predicting the token at that place.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    turns: torch.Tensor
    weights: torch.Tensor


class Packer:
    """Packs lists of turns into packed batches with the strings the chat template writes."""

    def __init__(self, processor, kind_weights: dict[str, float]):
        tokenizer = processor.tokenizer
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self._eos, self._pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        image = [tokenizer.convert_tokens_to_ids("<image>")] * processor_image_tokens(processor)
        self.prefix = [tokenizer.bos_token_id, *self._encode("USER: "), *image, *self._encode("\n")]
        self.image_start = self.prefix.index(image[0])
        self._kind_weights = kind_weights

    def pack(self, scenes: list[list[Turn | Drill]]) -> PackedBatch:
        rows = [self._row(turns) for turns in scenes]
        length = max(len(row[0]) for row in rows)
        columns = []
        for index, filler in enumerate((self._pad, 0, -1, 0.0)):
            columns.append(torch.tensor([row[index] + [filler] * (length - len(row[index])) for row in rows]))
        return PackedBatch(columns[0], columns[1], columns[2], columns[3].float())

    def _row(self, turns: list[Turn | Drill]):
        ids, start = list(self.prefix), len(self.prefix)
        positions, owner, weights = list(range(start)), [0] * start, [0.0] * start
        for number, turn in enumerate(turns, 1):
            tokens, supervised = [], []
            for text, counts in turn.pieces:
                part = self._encode(text)
                tokens += part
                supervised += [counts] * len(part)
            if supervised[-1]:
                tokens.append(self._eos)
                supervised.append(True)
            share = self._kind_weights.get(turn.kind, 1.0) / sum(supervised)
            ids += tokens
            positions += range(start, start + len(tokens))
            owner += [number] * len(tokens)
            weights += [share * counts for counts in supervised]
        return ids, positions, owner, weights


def processor_image_tokens(processor) -> int:
    size = processor.image_processor.crop_size
    return (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)


def block_mask(turns: torch.Tensor) -> torch.Tensor:
    """Boolean attention mask (scenes, 1, length, length): causal, within the own turn or onto the prefix."""
    length = turns.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same = turns[:, :, None] == turns[:, None, :]
    return ((same | (turns[:, None, :] == 0)) & causal)[:, None]


def packed_loss(model, batch: PackedBatch, features: torch.Tensor, image_start: int) -> torch.Tensor:
    """Weighted negative log-likelihood of the answers, divided by the sum of the weights of whole turns.

    Args:
        features: (scenes, image tokens, hidden), projected patch features.
    """
    language = model.model.language_model
    embeds = model.get_input_embeddings()(batch.ids)
    tokens = features.shape[1]
    embeds = torch.cat([embeds[:, :image_start], features, embeds[:, image_start + tokens :]], dim=1)
    hidden = language(
        inputs_embeds=embeds,
        attention_mask=block_mask(batch.turns),
        position_ids=batch.positions,
        use_cache=False,
    ).last_hidden_state
    wanted = batch.weights[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][wanted])
    losses = F.cross_entropy(logits.float(), batch.ids[:, 1:][wanted], reduction="none")
    weights = batch.weights[:, 1:][wanted]
    return (losses * weights).sum() / weights.sum()


# Measure a pocket VLM's skills on unbiased scenes it has never seen: the figures of its model card.
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
    card = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    return write_text(path, card.format(options=options, rows=rows))


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

    Raises UserError: `folder` holds the state of a build with other settings; the disk is full.
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
        give_user_mode(folder)
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
