"""Prompts whose keys are kept between calls: pictures and whatever text a later prompt shares are computed once.

A search asks about the same picture again and again: the next stage of an answer, then whether one candidate is better
than another. Each of these prompts begins like one that was computed before; only what differs is fed.
"""

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from . import prompt as prompting
from .admission import layer_windows
from .backends import Chunk, RewindBackend
from .hf import encode_batch
from .prefill import Prefill, prefill


class HeldPrompts:
    """One row a question, prefilled once; `open` gives prefills of other prompts about the same pictures.

    Args:
        rendered: one rendered prompt a row (`decoding.prompt.render`).
        pictures: the images of each row; rows with and without images may be mixed.
    """

    def __init__(self, model, processor, rendered: Sequence[str], pictures: Sequence[list]):
        self.processor = processor
        self.backend = RewindBackend(model, layer_windows(model))
        self.order: dict[int, int] = {}  # question -> row of the backend
        self.ids: list[list[int]] = [[] for _ in rendered]  # what a row holds, image tokens expanded
        self.heads: list[list[int] | None] = [None for _ in rendered]  # up to the last picture, not expanded
        self.fixed = [0 for _ in rendered]
        # processors do not mix rows with and without images
        for with_images in (True, False):
            chosen = [i for i, own in enumerate(pictures) if bool(own) == with_images]
            if not chosen:
                continue
            inputs = encode_batch(
                model, processor, [rendered[i] for i in chosen], [pictures[i] for i in chosen]
            )
            start = prefill(model, inputs)
            self.backend.add(start, inputs)
            for i, ids in zip(chosen, start.prompts, strict=True):
                self.order[i], self.ids[i] = len(self.order), ids
                head, tail = self._split(rendered[i], bool(pictures[i]))
                if head is not None and ids[len(ids) - len(tail) :] == tail:
                    self.heads[i], self.fixed[i] = head, len(ids) - len(tail)

    def _split(self, rendered: str, with_images: bool) -> tuple[list[int] | None, list[int]]:
        """Ids up to the last picture and behind it; (None, []) where the processor names no image token."""
        ids = prompting.encode_text(self.processor, rendered)
        if not with_images:
            return [], ids
        mark = getattr(self.processor, "image_token", None)
        image = prompting.tokenizer_of(self.processor).convert_tokens_to_ids(mark) if mark else None
        if image is None or image not in ids:
            return None, []
        at = len(ids) - ids[::-1].index(image)
        return ids[:at], ids[at:]

    def tail(self, question: int, rendered: str) -> list[int] | None:
        """What follows the pictures in this prompt; None where its beginning is not the question's own."""
        head, tail = self._split(rendered, bool(self.heads[question]))
        return tail if tail and head is not None and head == self.heads[question] else None

    @torch.inference_mode()
    def open(self, wanted: Sequence[tuple[int, list[int], bool]]) -> Prefill:
        """A prefill of prompts that share their questions' pictures, in one forward pass over what differs.

        Args:
            wanted: (question, ids behind its pictures, whether the row moves on to hold this prompt); a question moves
                at most once in a call.
        """
        backend, rows = self.backend, len(self.order)
        places = [0] * len(wanted)
        texts: list[list[int]] = [[] for _ in wanted]
        fed: list[list[int]] = [[] for _ in wanted]
        # forks first: they take what their row held before it moves
        for k in sorted(range(len(wanted)), key=lambda k: wanted[k][2]):
            question, tail, moves = wanted[k]
            held, row = self.ids[question], self.order[question]
            texts[k] = held[: self.fixed[question]] + tail
            shared = min(_common(held, texts[k]), len(texts[k]) - 1)
            places[k] = row if moves else backend.fork(row)
            backend.rewind(places[k], shared)
            fed[k] = texts[k][shared:]
            if moves:
                self.ids[question] = texts[k]
        logits = backend.extend([Chunk(place, new) for place, new in zip(places, fed, strict=True)])
        start = Prefill(
            self._left_padded(places),
            logits,
            texts,
            [backend.offsets[place] for place in places],
            backend.planes,
            {},
            [len(new) for new in fed],
        )
        while len(backend.lengths) > rows:
            backend.remove(len(backend.lengths) - 1)
        return start

    def _left_padded(self, places: Sequence[int]) -> DynamicCache:
        lengths = [self.backend.lengths[place] for place in places]
        width = max(lengths)
        cache = DynamicCache()
        for number, layer in enumerate(self.backend.cache.layers):
            padded = []
            for kept in (layer.keys, layer.values):
                new = kept.new_zeros(len(places), kept.shape[1], width, kept.shape[3])
                for i, (place, length) in enumerate(zip(places, lengths, strict=True)):
                    new[i, :, width - length :] = kept[place, :, :length]
                padded.append(new)
            cache.update(*padded, number)
        return cache


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two sequences share at their beginning."""
    count = 0
    while count < min(len(one), len(two)) and one[count] == two[count]:
        count += 1
    return count
