"""Packed training for any of our SFT trainers: settings, planning, and the proof that the model can be packed."""

import copy
import logging
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..data.collators import VisionCollator
from ..errors import RowError, UserError
from ..models.parts import capture_outputs, tolerance
from ..settings import data_seed, setting
from .attention import enable_packing
from .collator import PackedCollator
from .layout import SEGMENTS, as_table, row_lengths, rows_of
from .plan import PackedDataset, Size, TokenCounter, count_tokens, image_keys, plan_packs

logger = logging.getLogger(__name__)

MODES = ("none", "rows", "image")
LEAK = 1e-5
ROWS_TRIED = 16


@dataclass
class PackingSettings:
    """To be named before a TRL config among the bases of a trainer's config."""

    vision_packing: str = setting(
        "none",
        "`rows` lays the rows of a batch end to end instead of padding them. `image` also lets rows about "
        "one image share it: it is encoded once and its tokens pass the language model once. Losses and gradients "
        "stay those of the padded batch.",
        choices=list(MODES),
    )
    vision_packing_tokens: int | None = setting(
        None,
        "Fill packs up to this many tokens; a pack is then one batch (`per_device_train_batch_size: 1`). "
        "None: `per_device_train_batch_size` rows a pack.",
    )


class PackingMixin:
    """To be named before a TRL trainer among the bases; call `start_packing()` at the end of `__init__`.

    Logged in training: `packed_tokens_share`, the tokens of a pack over those of a padded batch of the same rows.
    """

    _packs: PackedDataset | None = None
    _packing_unproved = False

    def start_packing(self) -> None:
        """Prepare model and data for `vision_packing`; does nothing where it is "none".

        Raises UserError: a collator, data or a model that cannot be packed.
        """
        args = self.args
        mode, packs = args.vision_packing, getattr(self.data_collator, "packing", "none")
        if packs != mode:
            raise UserError(
                f"`vision_packing` is {mode!r}, the data collator ({type(self.data_collator).__name__}) packs {packs!r}. "
                f"Leave `data_collator` out, or pass PackedCollator(…, packing={mode!r})."
            )
        if mode == "none":
            return
        grouped = mode == "image" or args.vision_packing_tokens is not None
        self._check_loading(grouped)
        enable_packing(self.plain_model, prefixes=mode == "image")
        if grouped:
            self._packs = self._plan()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # the weights are in shards until the first step
            self._packing_unproved = True
        else:
            self.prove_packing(self.model)

    def _check_loading(self, grouped: bool) -> None:
        args, config = self.args, self.args.accelerator_config
        streamed = not hasattr(self.train_dataset, "__len__")
        if streamed and grouped:
            raise UserError(
                "A streamed dataset has no rows to choose from: rows cannot be grouped by image or by tokens. Load it as a "
                "file, or set `vision_packing: rows` without `vision_packing_tokens`."
            )
        cut = config.split_batches or (streamed and config.dispatch_batches is not False)
        if cut and args.world_size > 1:
            raise UserError(
                "One process would read a batch and cut it for the others, and a pack cannot be cut. Set "
                "`accelerator_config: {split_batches: false, dispatch_batches: false}`."
            )

    def _plan(self) -> PackedDataset:
        args, rows = self.args, self.train_dataset
        with args.main_process_first(desc="planning packs"):
            if args.vision_packing_tokens:
                counter = TokenCounter(self.data_collator)
                sizes = count_tokens(rows, counter, args.dataset_num_proc)
            else:
                sizes = [Size(1)] * len(rows)
        keys: list[Any] = [None] * len(rows)
        if args.vision_packing == "image":
            keys = [key and (key, size.head) for key, size in zip(image_keys(rows), sizes, strict=True)]
            if len(set(keys) - {None}) == sum(key is not None for key in keys):
                logger.warning(
                    "No two rows are about the same image: `vision_packing: image` is no better than `rows`."
                )
        capacity = args.vision_packing_tokens or args.per_device_train_batch_size
        plan = plan_packs(keys, sizes, capacity, data_seed(args))
        logger.info("%d rows in %d packs", len(rows), len(plan))
        return PackedDataset(rows, plan)

    def get_train_dataloader(self):
        if self._packs is None:
            return super().get_train_dataloader()
        return self._get_dataloader(
            dataset=self._packs,
            description="Training",
            batch_size=1,
            sampler_fn=self._get_train_sampler,
            is_training=True,
        )

    def training_step(self, model, inputs, *args, **kwargs):
        if self._packing_unproved:
            self._packing_unproved = False
            self.prove_packing(model)
        if SEGMENTS in inputs:
            lengths = row_lengths(inputs[SEGMENTS])
            share = inputs["input_ids"].shape[1] / (len(lengths) * max(lengths))
            self._metrics["train"]["packed_tokens_share"].append(share)
        return super().training_step(model, inputs, *args, **kwargs)

    def prove_packing(self, model) -> None:
        """Raises UserError: the model's packed rows are not what they are in a padded batch."""

        def hidden(batch: dict[str, Tensor]) -> Tensor:
            inputs = {name: value.to(self.accelerator.device) for name, value in batch.items()}
            for name in ("loss_weights", "doubts"):
                inputs.pop(name, None)
            with capture_outputs(self.plain_model.base_model) as outputs:
                model(**inputs, use_cache=False, fused_lm_head=True)
            return outputs[0].last_hidden_state

        batches = proof_batches(self.data_collator, self.train_dataset)
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.accelerator.autocast():
                reason = why_not(hidden, *batches)
        except UserError:
            raise
        except Exception as error:  # each model refuses in its own way
            reason = f"it refuses the packed inputs ({type(error).__name__}: {error})"
        finally:
            model.train(training)
        if reason is not None:
            raise UserError(
                f"`vision_packing: {self.args.vision_packing}` is not possible with {type(self.plain_model).__name__}: "
                f"{reason}. Set `vision_packing: none`."
            )


def check_packing_settings(args) -> None:
    """Raises UserError for settings that exclude each other."""
    mode, tokens = args.vision_packing, args.vision_packing_tokens
    if mode not in MODES:
        raise UserError(f"`vision_packing` must be one of {', '.join(MODES)}, not {mode!r}.")
    if tokens is not None and (mode == "none" or tokens <= 0):
        raise UserError(
            "`vision_packing_tokens` needs `vision_packing: rows` or `image`, and a number above 0."
        )
    if tokens is not None and args.per_device_train_batch_size != 1:
        raise UserError(
            f"`vision_packing_tokens` fills one pack a batch, and `per_device_train_batch_size` is "
            f"{args.per_device_train_batch_size}. Set it to 1."
        )
    strategy = str(args.train_sampling_strategy)
    if (mode == "image" or tokens) and strategy in ("group_by_length", "batch_rebalance"):
        raise UserError(
            f"`train_sampling_strategy: {strategy}` chooses rows by length, and so do packs. Set it to `random`."
        )


def proof_batches(collator: PackedCollator, dataset) -> tuple[dict, dict, dict]:
    """Two versions of one row of the dataset: padded; packed; packed with other tokens in the first version's answer.

    The shortest usable row of the first few is taken, one with an image if there is any; its second version has the
    answer twice.
    """
    collator = copy.copy(collator)
    collator.max_length = collator.rejects = collator.pad_to_multiple_of = None
    collator.hint_probability = 0.0
    padded = VisionCollator(collator.processor, collator.image_root, collator.marks)
    usable = []
    for raw in islice(dataset, ROWS_TRIED):
        try:
            row = collator.prepare(raw).row
            usable.append((not row["images"], len(collator.encode(row).input_ids), row))
        except RowError:
            continue
    if not usable:
        raise UserError(f"None of the first {ROWS_TRIED} rows can be used. See `vlm-sft-rl data validate`.")
    row = min(usable, key=lambda item: item[:2])[2]
    answer = {
        key: value for key, value in row["messages"][-1].items() if key != "doubts"
    }  # one for each phrase
    longer = {**answer, "content": f"{answer['content']} {answer['content']}"}
    rows = [row, {**row, "messages": [*row["messages"][:-1], longer]}]
    packed = collator(rows)
    end = next(rows_of(as_table(packed[SEGMENTS])))[1]
    changed = packed["input_ids"].clone()
    at = (packed["labels"] != -100) & (torch.arange(changed.shape[1]) < end)
    changed[at] = changed[at].flip(0).where(changed[at].flip(0) != changed[at], changed[0, 0])
    return padded(rows), packed, {**packed, "input_ids": changed}


def why_not(hidden, padded: dict, packed: dict, changed: dict) -> str | None:
    """Why a model's packed rows are not what they are in a padded batch; None where they are.

    Args:
        hidden: batch -> last hidden states, (rows, length, width) or (1, length, width).
        padded, packed, changed: see `proof_batches`.
    """
    one, two, three = hidden(padded), hidden(packed), hidden(changed)
    table = as_table(packed[SEGMENTS])
    last = table[-1][0]
    leak = _difference(three[0, last:], two[0, last:])
    if leak > LEAK:
        return f"a row sees the other rows of its pack (hidden states change by {leak:.1e} when another row changes)"
    allowed = tolerance(two, 1e-4)
    for i, (start, end, p, q) in enumerate(rows_of(table)):
        rows = torch.cat([two[0, p:q], two[0, start:end]])
        if (difference := _difference(rows, one[i, : len(rows)])) > allowed:
            return (
                f"its attention or positions are others in a pack (hidden states differ from the padded batch's by "
                f"{difference:.1e}, relative; allowed is {allowed})"
            )
    return None


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())
