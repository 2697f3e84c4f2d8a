"""Stage 1 of the pocket VLM: tower and projector learn to write each patch in the basis of the word embeddings.

A stand-in for CLIP pre-training: the projected feature of a patch is trained towards the sum of the embeddings of the
words that describe it (noun, colour, size, background, column, row; `nothing` where it is empty), so that looking a word
up in the picture is one similarity.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .world import CELLS, COLOURS, NOUNS, SIZES, THEMES, Scene

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
