"""LoRA for vision-language models: on the language model only, with trainable rows for new tokens."""

import copy
import logging
import re
from collections.abc import Sequence

from peft import LoraConfig, PeftConfig, PeftModel
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..errors import UserError
from .load import VLMModelConfig
from .parts import LANGUAGE, SIXTEEN_BIT, part_of, projector_modules, unwrap
from .tokens import is_tied

logger = logging.getLogger(__name__)


def build_peft_config(model, args: VLMModelConfig, token_ids: Sequence[int]) -> LoraConfig | None:
    """The LoRA settings of a recipe for this model; None without `use_peft`.

    LoRA goes on the language model's linear layers (`lora_target_modules` narrows them by their last name; a string
    with a special character is a regular expression and used as it is). The rows of `token_ids` are trained in
    the input embedding and in the output embedding, tied or not. With `train_projector` the projector is trained in
    full.
    """
    if not args.use_peft:
        return None
    if not args.freeze_vision:
        raise UserError(
            "`freeze_vision: false` with `use_peft: true`: LoRA here is for the language model. Train the tower in "
            "full (`use_peft: false`), or leave it frozen and name its layers by a regular expression in "
            "`lora_target_modules`."
        )
    modules = list(args.lora_modules_to_save or [])
    if args.train_projector:
        modules += [name for name in projector_modules(model) if name not in modules]
    rows = None
    if token_ids:  # no rows are a choice, too: `with_token_rows` adds none then
        rows = token_rows(model, token_ids) if args.train_new_tokens else {}
    return LoraConfig(
        task_type=args.lora_task_type,
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        bias="none",
        use_rslora=args.use_rslora,
        use_dora=args.use_dora,
        target_modules=language_targets(model, args.lora_target_modules),
        target_parameters=args.lora_target_parameters,
        modules_to_save=modules or None,
        trainable_token_indices=rows,
    )


def language_targets(model: nn.Module, targets: str | Sequence[str] | None = None) -> str:
    """A regular expression for PEFT that matches the language model's linear layers and nothing else.

    Args:
        targets: `lora_target_modules` of a recipe.
    """
    if isinstance(targets, str) and re.search(r"[.*\\|()^$]", targets):
        try:
            matches = any(re.fullmatch(targets, name) for name, _ in model.named_modules())
        except re.error as error:
            raise UserError(
                f"`lora_target_modules`: {targets!r} is no regular expression ({error})."
            ) from error
        if not matches:
            raise UserError(
                f"`lora_target_modules`: {targets!r} matches no module of {type(model).__name__}. It must match a "
                "whole name, such as `.*language_model.*q_proj`."
            )
        return targets
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(name) == LANGUAGE
    ]
    leaves = {name.split(".")[-1] for name in names}
    if targets and targets not in ("all-linear", ["all-linear"]):
        chosen = {targets} if isinstance(targets, str) else set(targets)
        if unknown := sorted(chosen - leaves):
            raise UserError(
                f"`lora_target_modules` names {', '.join(unknown)}; the language model of {type(model).__name__} has "
                f"the linear layers {', '.join(sorted(leaves))}."
            )
        leaves = chosen
    if not leaves:
        raise UserError(f"{type(model).__name__}: no linear layer found in the language model.")
    stem = names[0].split(".")[:-1]  # the path that all of them start with
    for name in names:
        while name.split(".")[:-1][: len(stem)] != stem:
            stem.pop()
    return rf"{re.escape('.'.join(stem))}\.(?:.*\.)?(?:{'|'.join(sorted(leaves))})"


def token_rows(model, token_ids: Sequence[int]) -> dict[str, list[int]]:
    """`trainable_token_indices` by full module name: the input embedding, and the output embedding unless tied.

    Full names, because PEFT matches by suffix and a vision tower may have an embedding of the same last name. For
    tied embeddings PEFT itself makes the output follow the input rows. A bias its wrapper would drop without a word.
    """
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise UserError(
            f"{type(model).__name__}: the output embedding has a bias, so single rows of it cannot be trained. Set "
            "`train_new_tokens: false` and `lora_modules_to_save: [embed_tokens, lm_head]`."
        )
    rows = {names[id(model.get_input_embeddings())]: list(token_ids)}
    if head is not None and not is_tied(model):
        rows[names[id(head)]] = list(token_ids)
    return rows


def with_token_rows(model, config: PeftConfig | None, token_ids: Sequence[int]) -> PeftConfig | None:
    """LoRA settings that also train the rows of `token_ids`, and a warning that says so.

    LoRA alone leaves the rows of new tokens as they were made. Settings that say themselves which part of an embedding
    trains come back as they are.
    """
    settled = not isinstance(config, LoraConfig) or config.trainable_token_indices is not None
    if settled or is_deepspeed_zero3_enabled():  # rows of a shard cannot be told apart, see `check_sharding`
        return config
    embeddings = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = [name for name, module in model.named_modules() if module in embeddings]
    chosen = [*(config.modules_to_save or []), *_listed(config.target_modules)]
    if any(name == choice or name.endswith(f".{choice}") for name in names for choice in chosen):
        return config
    config = copy.copy(config)
    config.trainable_token_indices = token_rows(model, token_ids)
    # PEFT decides by the config whether to tie the new rows; some checkpoints' configs contradict their weights
    model.config.tie_word_embeddings = is_tied(model)
    logger.warning(
        "`peft_config` trains no rows of the embeddings: those of the tokens %s are added (%s). To decide it yourself, set "
        "`trainable_token_indices` or `modules_to_save`.",
        list(token_ids),
        ", ".join(config.trainable_token_indices),
    )
    return config


def _listed(targets: str | Sequence[str] | None) -> list[str]:
    return [targets] if isinstance(targets, str) else list(targets or [])


def frozen_rows(model: nn.Module, token_ids: Sequence[int]) -> list[str]:
    """Names of the embeddings in which not all rows of `token_ids` train."""
    plain, rows, names = unwrap(model), trainable_rows(model), []
    for name, module in plain.named_modules():
        if module in (plain.get_input_embeddings(), plain.get_output_embeddings()):
            whole = any(p.requires_grad and p.shape[0] > len(token_ids) for p in module.parameters())
            matching = [ids for place, ids in rows.items() if place.endswith(name)]
            if not whole and not any(set(token_ids) <= set(ids) for ids in matching):
                names.append(name)
    return names


def finish_peft(model: PeftModel, *, upcast: bool = True) -> PeftModel:
    """Make a freshly wrapped model fit for TRL's fused output head and for mixed precision.

    TRL reads `lm_head.bias`; PEFT's wrapper for trainable rows has no such attribute (`token_rows` has made sure that
    there is no bias to lose). What trains becomes float32: PEFT raises LoRA weights and leaves `modules_to_save` in
    bfloat16, and TRL's trainers round all of it to bfloat16 where the base is quantised. Updates of a projector, of LoRA's A
    and of an embedding row round to nothing there, and fp16's gradient scaler takes no bfloat16.

    Args:
        upcast: False under DeepSpeed, which keeps float32 copies and wants one dtype, and where nothing makes the input of
            a float32 projector fit it.
    """
    head = model.get_base_model().get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        head.bias = None
    if upcast:
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dtype in SIXTEEN_BIT:
                parameter.data = parameter.data.float()
    return model


def trainable_rows(model: nn.Module) -> dict[str, list[int]]:
    """Which rows of which embedding train through PEFT: `{module name: ids}`."""
    return {
        name: list(ids)
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensWrapper)
        for ids in module.token_adapter.token_indices.values()
    }
