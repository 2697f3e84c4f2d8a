"""`VisionGRPOTrainer`: TRL's GRPO trainer with our checkpoints, and an honest count of the tokens it spends."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer, prepare_multimodal_messages

from ..data.chat import get_tokenizer
from ..data.marks import IGNORE
from ..data.tagging.config import CHECK_QUESTION
from ..errors import UserError
from ..rewards.verdicts import JudgedPhrases
from ..settings import setting
from .base import OpenPrecision, VisionTrainer, loaded
from .checks import FIRST_ROWS, check_processor, check_reference, warn_without_images
from .losses import span_advantages
from .vllm_rollouts import check_vllm, sample_with_vllm


@dataclass
class VisionGRPOConfig(OpenPrecision, GRPOConfig):
    """TRL's `GRPOConfig` (group-relative policy optimisation, arXiv 2402.03300), with the grader that gives the reward, and
    `bf16` only where a GPU has it."""

    grader: str | None = setting(
        None, "Who judges answers, by name (vlm_sft_rl.graders). Must be set for the reward `answer`."
    )
    rules: str = setting("ours", "Of the grader: `ours`, or `released` for a released code's own rules.")
    staged: bool = setting(
        True,
        "Answers are scored by their conclusion alone, and one without it earns nothing. False: an answer "
        "without stages is graded as a whole.",
    )
    rewards: list[str] = setting(
        ["answer"],
        "Reward functions by name (vlm_sft_rl.rewards): answer, format, length, objects, verdicts. TRL's "
        "`reward_weights` weighs them.",
    )
    span_credit: float = setting(
        0.0,
        "Advantages of tokens in wrong phrases become A - span_credit * |A|; 0.1 in arXiv 2604.24583. 0: all "
        "tokens of an answer have one.",
    )
    checker: str | None = setting(
        None,
        "Who says whether the thing that a tagged phrase names is there: checkpoint folder or endpoint address. "
        "None: the row's `objects`. A yes or no is compared with the row's `answer` in either case.",
    )
    checker_model: str | None = setting(None, "The endpoint's name for the checker.")
    check_question: str = setting(CHECK_QUESTION, "What it is asked; {phrase} is filled in.")
    nouns: str | None = setting(
        None,
        "Text file of the nouns that answers may name, one a line. None: all in `objects` of the rows. Not for a "
        "`checker`.",
    )


class VisionGRPOTrainer(VisionTrainer, GRPOTrainer):
    """`trl.GRPOTrainer` on questions with images: same constructor, same rows, same reward functions.

    With `span_credit` the advantage of an answer is lowered on the tokens of its wrong phrases; nothing else of its scoring
    or loss is changed. Of its sampling the precision is changed to that of training, and with `use_vllm` what vLLM is
    handed (`trainers.vllm_rollouts`; a `rollout_func` of the caller's is left alone). Logged besides TRL's metrics, both
    summed over the run: `tokens_forwarded` (tokens of prompts and answers through the network without gradient: sampling,
    and the log-probabilities of the sampling policy and of the reference where those are asked for) and `tokens_trained`
    (through forward and backward passes); with `span_credit` also `span_credit/tokens`, the share of tokens it is on.

    Args:
        phrases: for `span_credit`; reads and judges the phrases of answers. The rows' column `row` is handed to it.

    Raises:
        UserError: settings or models with which TRL would fail late, or train nothing.
    """

    _tag_names = ["trl", "grpo", "vlm-sft-rl"]  # noqa: RUF012 - a list, as in TRL
    CONFIG = VisionGRPOConfig
    METHOD = "grpo"
    COLUMNS: ClassVar = {
        "reward": "reward",
        "reward_std": "spread",
        "completions/mean_length": "length",
        "answers/unreadable": "unreadable",
        "verdicts/right": "verdicts right",
        "kl": "KL",
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: VisionGRPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        phrases: JudgedPhrases | None = None,
        **kwargs,
    ):
        source, args, processor = self.begin(model, args, processing_class)
        check_vllm(args, source)
        if args.use_vllm and (kwargs.get("tools") or kwargs.get("environment_factory")):
            raise UserError(
                "`use_vllm`: answers in several turns, with tools, cannot be sampled by vLLM here."
            )
        check_grpo(args, processor, train_dataset)
        if args.span_credit and phrases is None:
            raise UserError(
                "`span_credit`: nothing says which phrases are wrong. Give the trainer `phrases=` "
                "(vlm_sft_rl.rewards.verdicts.JudgedPhrases), or train by a recipe."
            )
        self.phrases = phrases
        if args.beta and not isinstance(model, str | PeftModel) and kwargs.get("peft_config") is None:
            check_reference(model, source, "GRPO with `beta`")
        get_tokenizer(processor).padding_side = "left"
        super().__init__(
            loaded(model, args, kwargs),
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processor,
            *positional,
            **kwargs,
        )
        if args.use_vllm:
            sample_with_vllm(self)
        self.finish_model()

    def _generate_single_turn(self, *args, **kwargs):
        # accelerate puts autocast around the wrapper's forward, which is not the one that PEFT's `generate` calls: it would
        # sample in another precision than it trains in, or meet a float32 projector with 16-bit features
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.args.span_credit:
            mask = batch["completion_mask"].bool()
            wrong = self._wrong_tokens(inputs, batch["completion_ids"], mask)
            batch["advantages"] = span_advantages(batch["advantages"], wrong, self.args.span_credit)
            self.record_means(("span_credit/tokens",), wrong.sum()[None], mask.sum()[None])
        return batch

    def _wrong_tokens(self, inputs: list[dict], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(answers, length), True at the tokens of phrases that are not true."""
        answers = [own[keep].tolist() for own, keep in zip(ids, mask, strict=True)]
        wrong = torch.zeros_like(mask)
        for number, phrases in enumerate(self.phrases(answers, [row["row"] for row in inputs])):
            for phrase in phrases:
                if phrase.true is False:
                    wrong[number, phrase.start : phrase.end] = True
        return wrong

    def _get_train_sampler(self, dataset=None) -> Sampler:
        return EpochSampler(partial(super()._get_train_sampler, dataset))

    @property
    def _updates_per_answers(self) -> tuple[int, int]:
        return self.args.steps_per_generation, self.args.num_iterations

    def running_state(self) -> dict[str, Any]:
        state = super().running_state()
        if self._step % math.prod(self._updates_per_answers):
            # what is still to be trained of the answers sampled last
            state["answers"] = (self._updates_per_answers, self._step, self._buffered_inputs)
        return state

    def take_running_state(self, state: dict[str, Any]) -> None:
        super().take_running_state(state)
        updates, step, batches = state.get("answers", (None, 0, None))
        if updates == self._updates_per_answers and not self.args.ignore_data_skip:
            self._step, self._buffered_inputs = step, batches

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            sampled = self.state.num_input_tokens_seen
            logs["tokens_forwarded"] = sampled * passes_without_gradient(self.args)
            logs["tokens_trained"] = sampled * self.args.num_iterations
        super().log(logs, start_time)


class EpochSampler(Sampler):
    """A sampler that draws a new order each time it is asked, moved on to its epoch.

    TRL's goes on from the order before, which a run that was resumed in a later epoch has not drawn: it would begin with
    the order of the first.

    Args:
        make: gives the sampler as it is before its first order.
    """

    def __init__(self, make: Callable[[], Sampler]):
        self.make, self.epoch = make, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.make())

    def __iter__(self) -> Iterator[int]:
        sampler = self.make()
        for _ in range(self.epoch):
            next(iter(sampler), None)
        return iter(sampler)


def passes_without_gradient(args: GRPOConfig) -> int:
    """How often TRL sends a sampled sequence through the network without gradient.

    Once to sample it; once more for the sampling policy's log-probabilities where a later policy trains on them (TRL:
    `_generate_and_score_completions`); once more for the reference's, with `beta`.
    """
    reused = args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations) != 0
    corrected = args.use_vllm and args.vllm_importance_sampling_correction
    return 1 + (reused or corrected) + (args.beta != 0)


def check_grpo(args: VisionGRPOConfig, processor, train_dataset: Dataset | None) -> None:
    """Raises UserError: settings, rows or models with which TRL would fail late, or train nothing."""
    check_processor(processor)
    if args.remove_unused_columns:
        raise UserError("`remove_unused_columns`: it would take away what the rewards read; set it to false.")
    if "aspect_ratio_ids" in processor.model_input_names:
        raise UserError(
            f"{type(processor).__name__}: TRL's GRPO does not hand `aspect_ratio_ids` on to the model, so this family "
            "(Llama 3.2 Vision) cannot be trained by it. Train a LLaVA, Qwen-VL or Idefics model."
        )
    needed = args.generation_batch_size // args.num_generations
    if train_dataset is None or len(train_dataset) < needed:
        count = 0 if train_dataset is None else len(train_dataset)
        raise UserError(
            f"A step takes {needed} questions with {args.num_generations} answers each, and there are {count} training "
            "questions: TRL leaves incomplete steps out, so nothing would be trained. Lower "
            "`per_device_train_batch_size` or `gradient_accumulation_steps`, or raise `num_generations`."
        )
    warn_without_images(list(islice(train_dataset, FIRST_ROWS)))


class PromptPreview:
    """A collator for the report before step 1: each prompt, followed by as many tokens as may be sampled.

    Calling it with rows (`prompt`, `images`) returns `input_ids`, `attention_mask` and `labels`, all (rows, length).
    """

    def __init__(self, processor, max_completion_length: int):
        self.processor, self.length = processor, max_completion_length

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
        batch = self.processor.apply_chat_template(
            prompts,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
        ids, mask = batch["input_ids"], batch["attention_mask"]
        answer = torch.full((len(rows), self.length), get_tokenizer(self.processor).eos_token_id)
        return {
            "input_ids": torch.cat([ids, answer], 1),
            "attention_mask": torch.cat([mask, torch.ones_like(answer)], 1),
            "labels": torch.cat([torch.full_like(ids, IGNORE), answer], 1),
        }
