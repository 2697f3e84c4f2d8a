"""One forward pass over the prompts, through `model.generate`'s own preparation, so that no family needs code here.

`generate` encodes the images (once), builds position ids and hands everything to the `custom_generate` callable.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, GenerationConfig


@dataclass
class Prefill:
    """State after the prompts.

    Attributes:
        cache: keys and values, left padded as the prompts were.
        logits: `(rows, vocabulary)` for the first answer token.
        prompts: token ids of each row without padding, image tokens included.
        offsets: per row, position id minus index for every token that follows the prompt.
        planes: 0 for `(rows, width)` position ids, otherwise the number of planes of multimodal rotary positions.
        model_kwargs: what `generate` had prepared (for backends that go on step by step).
        forwarded: tokens of each row that were really computed, where the rest was held already; None: all.
    """

    cache: Cache
    logits: torch.Tensor
    prompts: list[list[int]]
    offsets: list[int]
    planes: int
    model_kwargs: dict[str, Any]
    forwarded: list[int] | None = None

    def step(self, model, input_ids: torch.Tensor) -> torch.Tensor:
        """Run the last token of `input_ids` `(rows, whole width)` as `generate` would; logits `(rows, vocabulary)`."""
        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **self.model_kwargs)
        outputs = model(**inputs, return_dict=True)
        self.model_kwargs = follow(model, outputs, self.model_kwargs)
        return outputs.logits[:, -1].to(torch.float32)


def forward_prompt(
    model, input_ids: torch.Tensor, model_kwargs: dict[str, Any], cache: Cache | None = None
) -> Prefill:
    """Run the prompts. `model_kwargs` is what a `custom_generate` callable receives; its cache is replaced,
    because the one made for sliding windows forgets keys by slot count."""
    kwargs = dict(model_kwargs)
    kwargs["past_key_values"] = DynamicCache() if cache is None else cache
    kwargs["use_cache"] = True
    mask = kwargs.get("attention_mask")
    rows = input_ids.tolist()
    if mask is None:
        prompts = rows
    else:
        prompts = [
            [t for t, keep in zip(r, m, strict=True) if keep]
            for r, m in zip(rows, mask.tolist(), strict=True)
        ]
    inputs = model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **kwargs)
    outputs = model(**inputs, return_dict=True)
    positions = inputs.get("position_ids")
    planes, offsets = 0, [0] * len(prompts)
    if positions is not None:
        if positions.ndim == 3:
            planes = min(positions.shape[0], 3)
            positions = positions[-3:].amax(0)
        following = (positions.amax(-1) + 1).tolist()
        if len(following) == 1:
            following = following * len(prompts)
        offsets = [next_ - len(p) for next_, p in zip(following, prompts, strict=True)]
    logits = outputs.logits[:, -1].to(torch.float32)
    kwargs = follow(model, outputs, kwargs)
    return Prefill(outputs.past_key_values, logits, prompts, offsets, planes, kwargs)


def follow(model, outputs, model_kwargs: dict[str, Any]) -> dict[str, Any]:
    """`model_kwargs` for the next forward pass, as `generate` makes them."""
    # some families demand the argument that others leave out
    return model._update_model_kwargs_for_generation(
        outputs, model_kwargs, is_encoder_decoder=model.config.is_encoder_decoder
    )


def prefill(model, inputs: dict[str, Any], *, own_cache: bool = True) -> Prefill:
    """Prefill `inputs` (a processor's tensors, left padded). `own_cache=False` keeps the family's own cache."""

    def capture(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        cache = None if own_cache else model_kwargs["past_key_values"]
        return forward_prompt(model, input_ids, model_kwargs, cache)

    config = GenerationConfig(max_new_tokens=1, do_sample=False, pad_token_id=0)
    return model.generate(**inputs, generation_config=config, custom_generate=capture)
