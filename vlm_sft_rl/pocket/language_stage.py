"""Stage 2 of the pocket VLM: many question turns over one image prefix in one sequence.

All turns of a scene share the image prefix: attention is block-diagonal over turns and positions restart at each turn,
so the result equals separate sequences at a third of the cost. Each turn's loss is a mean over its own tokens: one
yes/no token must not drown among sixty caption tokens.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .language import Drill, Turn


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
