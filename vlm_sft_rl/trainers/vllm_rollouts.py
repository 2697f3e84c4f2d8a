"""Answers for GRPO, sampled by vLLM in the trainer's process: what vLLM is handed, and for which families that is right."""

from importlib.util import find_spec

from trl import GRPOConfig, GRPOTrainer

from ..data.chat import encode_text
from ..errors import UserError
from ..models.load import check_config

WITHOUT = "Set `use_vllm: false`"
# model types for which both engines find the same tokens equally likely, before and after trained weights are handed over
EQUAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "internvl")
_TOWER = "vLLM 0.32 knows its vision tower by other names than transformers, so TRL cannot hand trained weights over"
UNEQUAL = {"llava": _TOWER, "llava_next": _TOWER}


def unequal_reason(model_type: str | None) -> str | None:
    """Why GRPO does not sample with vLLM from models of this type; None where it may."""
    if model_type in EQUAL:
        return None
    return UNEQUAL.get(model_type, "its answers on vLLM were not compared with the trainer")


def check_vllm(args: GRPOConfig, source: str) -> None:
    """Before a weight is read.

    Args:
        source: folder of the model, or its name on the Hub.

    Raises UserError: `use_vllm` with a family or a mode in which vLLM was not seen to agree with the trainer.
    """
    if not args.use_vllm:
        return
    kind = (check_config(source) or {}).get("model_type")
    if (reason := unequal_reason(kind)) is not None:
        raise UserError(
            f"`use_vllm`: {source} is of type {kind!r}: {reason}. {WITHOUT}, or train {', '.join(EQUAL)}."
        )
    for name, needed in (("vllm_mode", "colocate"), ("vllm_model_impl", "vllm")):
        if getattr(args, name) != needed:
            raise UserError(
                f"`{name}: {getattr(args, name)}` was not compared with the trainer. Set `{name}: {needed}`. {WITHOUT} to "
                "sample without vLLM."
            )


def check_machine(args: GRPOConfig) -> None:
    """Before a weight is read. Raises UserError: `use_vllm` where vLLM is not installed, or cannot take over weights."""
    if not args.use_vllm:
        return
    if find_spec("vllm") is None:
        raise UserError(
            "`use_vllm`: the package vllm is not installed. Install it: `pip install vlm-sft-rl[vllm]`. "
            f"{WITHOUT} to sample without it."
        )
    if args.device.type == "cpu":
        raise UserError(
            "`use_vllm`: on a CPU vLLM packs its weights when it loads them, and cannot take over trained ones. Train on a "
            f"GPU. {WITHOUT} to sample without vLLM."
        )


def sample_with_vllm(trainer: GRPOTrainer) -> None:
    """Behind TRL's constructor: answers come from `sample`, unless the caller has a `rollout_func`, and hold no image token,
    which TRL keeps from transformers' `generate` alone: the model would look for its features."""
    trainer.rollout_func = trainer.rollout_func or sample
    generation = trainer.vllm_generation
    bias = generation.generation_kwargs.get("logit_bias") or {}
    never = {trainer.model.config.image_token_id: -100.0}  # the least that vLLM takes
    generation.generation_kwargs = generation.generation_kwargs | {"logit_bias": bias | never}


def sample(prompts: list[list[dict]], trainer: GRPOTrainer) -> dict[str, list]:
    """TRL's `rollout_func` for a colocated vLLM.

    TRL 1.16 by itself hands vLLM the trainer's tokens, in which an image is as many tokens as it has features. vLLM takes
    the first of them for the image, puts all of its features there, and leaves the others where they are (trl#6294). Here
    an image is the one token of the chat template, and what vLLM makes of the prompt is compared with the trainer's tokens.

    Args:
        prompts: conversations with their images, those of this process, each as often as answers are sampled to it.

    Returns:
        For each prompt `prompt_ids` as the trainer reads it, `completion_ids`, and `logprobs` of the latter.

    Raises UserError: vLLM reads a prompt as other tokens.
    """
    expected, images, _ = trainer._tokenize_prompts(prompts)
    texts = trainer.processing_class.apply_chat_template(
        prompts,
        chat_template=trainer.chat_template,
        add_generation_prompt=True,
        tokenize=False,
        **trainer.chat_template_kwargs,
    )
    placeholders = [encode_text(trainer.processing_class, text) for text in texts]
    # TRL drops the keys that older weights computed, but not the image features: the projector is trained, too
    trainer.vllm_generation.llm.llm_engine.reset_encoder_cache()
    read, answers, log_probs, _ = trainer.vllm_generation.generate(
        placeholders, images, trainer.num_generations
    )
    for ids, others, text in zip(expected, read, texts, strict=True):
        if list(ids) != list(others):
            raise UserError(
                f"vLLM reads a prompt as {len(others)} tokens that are not the {len(ids)} of the trainer: {text!r}. Its "
                "answers would be to another prompt. Set `use_vllm: false`."
            )
    return {
        "prompt_ids": expected,
        "completion_ids": answers,
        "logprobs": [[token[0] for token in answer] for answer in log_probs],
    }
