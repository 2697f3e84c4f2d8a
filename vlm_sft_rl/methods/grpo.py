"""GRPO on questions with a known answer or known objects: a recipe and its files to TRL's `GRPOTrainer`."""

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from ..data.chat import get_tokenizer
from ..data.images import open_image
from ..data.marks import VerificationIds
from ..data.messages import typed_messages
from ..data.model_files import check_hub_name
from ..data.rows import question_text
from ..data.tagging.config import CHECK_QUESTION
from ..data.tagging.phrases import find_phrases
from ..dry_run import Plan
from ..errors import UserError
from ..graders import Grader, load_grader
from ..graders.grade import grade_staged
from ..models.load import processor_for_training
from ..models.memory import meta_model
from ..models.tokens import require_verification_tokens
from ..rewards.answers import answer_rewards, check_names
from ..rewards.regions import check_weights
from ..rewards.verdicts import JudgedPhrases, objects_reward, verdicts_reward
from ..self_training.pool import read_questions
from ..trainers.checks import sharded_by
from ..trainers.grpo import PromptPreview, VisionGRPOConfig, VisionGRPOTrainer, check_grpo
from ..trainers.vllm_rollouts import check_machine, check_vllm
from . import check_files, load_start, remember_recipe, subsampled, train_source, training_image_root
from .phrase_judges import load_judge, truth_nouns

CONFIG = VisionGRPOConfig
REWARDS = ("answer", "format", "length", "objects", "verdicts")


class Questions(NamedTuple):
    """What a recipe's files give: training rows, evaluation rows or None, and the nouns that answers may name."""

    grader: Grader | None
    rows: Dataset
    eval_rows: Dataset | None
    nouns: Collection[str]


def build(recipe: dict, model_args, data_args, args) -> VisionGRPOTrainer:
    """Model, data and trainer of a recipe, ready for `train()`; `train_file` holds questions."""
    check_sampler(args, model_args)
    check_machine(args)
    data = load_data(data_args, args)
    start = load_start(model_args, args)
    phrases = judged_phrases(args, data_args, start, model_args.model_name_or_path, data.nouns)
    further = {
        "objects": objects_reward(lambda text: [phrase.head for phrase in find_phrases(text, data.nouns)]),
        "verdicts": verdicts_reward(phrases),
    }
    trainer = VisionGRPOTrainer(
        start.model,
        answer_rewards(args.rewards, partial(grade_staged, data.grader, staged=args.staged), further),
        args,
        data.rows,
        data.eval_rows,
        start.processor,
        peft_config=start.peft_config,
        phrases=phrases,
    )
    trainer.report_collator = PromptPreview(start.processor, args.max_completion_length)
    remember_recipe(trainer, recipe, model_args, data_args, args)
    return trainer


def judged_phrases(args, data_args, start, source: str, nouns: Collection[str]) -> JudgedPhrases | None:
    """What reads and judges the phrases of answers; None where nothing asks for it.

    Raises UserError: the model has no verification tokens, or as `load_judge`.
    """
    if not judges_phrases(args):
        return None
    tags = VerificationIds(*require_verification_tokens(start.processor, source))
    judge = load_judge(args, nouns, training_image_root(data_args))
    return JudgedPhrases(tags, get_tokenizer(start.processor).decode, judge)


def judges_phrases(args) -> bool:
    """Whether a recipe's settings ask for verdicts on phrases."""
    return "verdicts" in args.rewards or args.span_credit > 0


def check_judge(args) -> None:
    """Raises UserError: a `checker` that nothing asks, whose name is missing, that is not there, or that the engine would
    load in parts; settings that nothing reads."""
    if args.nouns and "objects" not in args.rewards and not (judges_phrases(args) and args.checker is None):
        raise UserError(
            "`nouns` is not read: it serves the reward `objects`, and judging phrases without `checker`. Leave it out."
        )
    if args.checker is None:
        if args.checker_model is not None or args.check_question != CHECK_QUESTION:
            raise UserError(
                "`checker_model` and `check_question` belong to `checker`, which is not set. Set it, or leave them out."
            )
        return
    if not judges_phrases(args):
        raise UserError(
            "`checker` is not asked: it serves the reward `verdicts` and `span_credit`. Set one of them, or leave it out."
        )
    if "://" in args.checker:
        if args.checker_model is None:
            raise UserError("`checker` is an address: name the model there by `checker_model`.")
    elif (engine := sharded_by(args)) is not None:
        raise UserError(
            f"`checker` is a checkpoint, and under {engine} no process would load all of it. Serve it (`vlm-sft-rl serve "
            f"{args.checker}`) and give its address, or train with accelerate_configs/zero2.yaml or ddp.yaml."
        )
    elif args.checker_model is not None:
        raise UserError(
            "`checker_model` names a model at an address, and `checker` is a folder. Leave it out."
        )
    elif not Path(args.checker).is_dir():
        check_hub_name(args.checker, None)


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    check_sampler(args, model_args)
    rows = load_data(data_args, args).rows
    processor = processor_for_training(model_args, verification=False)
    if judges_phrases(args):
        require_verification_tokens(processor, model_args.model_name_or_path)
    check_grpo(args, processor, rows)
    notes = [
        "A step of GRPO samples before it trains; the keys cached then, while there are no activations, are not counted."
    ]
    if args.beta and not model_args.use_peft:
        notes.append("`beta` keeps the start as a reference model: its weights are not counted.")
    refused = {}
    if args.checker is not None and "://" not in args.checker:
        notes.append("`checker` is held beside the model: its weights are not counted.")
        parts = "`checker` is a checkpoint, of which each process would load a part."
        refused = {"zero3": parts, "fsdp2": parts}
    return Plan(
        meta_model(model_args, ()),
        processor,
        rows,
        PromptPreview(processor, args.max_completion_length),
        refused=refused,
        notes=notes,
    )


def check_sampler(args, model_args) -> None:
    """Raises UserError: vLLM is to sample from 4 or 8 bits, or as `check_vllm`."""
    check_vllm(args, model_args.model_name_or_path)
    if args.use_vllm and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise UserError(
            "`use_vllm`: answers from quantised weights (`load_in_4bit`, `load_in_8bit`) were not compared with the "
            "trainer. Set `use_vllm: false`, or train without them."
        )


def load_data(data_args, args) -> Questions:
    """Grader, questions and nouns.

    Raises UserError: no such reward, weights of another number, no questions are named, bad ones are to be skipped, no such
    grader, a question lacks what a reward reads, or as `check_judge` and `read_questions`.
    """
    check_names(args.rewards, REWARDS)
    check_weights(args.rewards, args.reward_weights)
    check_judge(args)
    check_files(
        data_args, "the questions", "questions are checked when the file is read; correct or remove them."
    )
    by_answer = "answer" in args.rewards
    grader = load_grader(args.grader, args.rules) if by_answer or args.grader is not None else None
    root = training_image_root(data_args)
    source = train_source(data_args)
    if data_args.dataset_name and source.picture_columns:
        raise UserError(
            f"`dataset_name`: the pictures of {source} lie inside of it, and TRL's GRPO reads them from files. Write "
            "both with `vlm-sft-rl data convert FOLDER rows.jsonl --format hf`, and name them by `train_file`."
        )
    fields = ("answer",) if grader is not None else ()
    questions = read_questions(source, root, grader, fields=fields)
    eval_file = data_args.eval_file
    held_out = read_questions(eval_file, root, grader, fields=fields) if eval_file else []
    nouns = []
    if "objects" in args.rewards or judges_phrases(args):
        nouns = truth_nouns(
            args, questions + held_out
        )  # an answer may name what rows outside of `subsample` have
    eval_rows = question_dataset(held_out, root) if eval_file else None
    return Questions(grader, question_dataset(subsampled(questions, data_args), root), eval_rows, nouns)


def question_dataset(questions: list[dict], image_root: Path) -> Dataset:
    """Questions as TRL's GRPO reads them: `prompt`, `images` (opened when asked for) and `row`, the question as JSON.

    Raises:
        RowError: placeholders that do not match the images.
        UserError: some questions have images and some have none.
    """
    for question in questions:
        _prompt(question)
    without = sum(not question["images"] for question in questions)
    if 0 < without < len(questions):
        raise UserError(
            f"{without} of {len(questions)} questions have no image. TRL's GRPO cannot score a batch of both kinds: train "
            "them apart."
        )

    def opened(batch: dict[str, list[str]]) -> dict[str, list]:
        rows = [json.loads(text) for text in batch["row"]]
        return {
            "prompt": [_prompt(row) for row in rows],
            "images": [[open_image(name, image_root) for name in row["images"]] for row in rows],
            "row": batch["row"],
        }

    return Dataset.from_dict({"row": [json.dumps(question) for question in questions]}).with_transform(opened)


def _prompt(question: dict) -> list[dict]:
    message = {"role": "user", "content": question_text(question)}
    return typed_messages({"id": question["id"], "images": question["images"], "messages": [message]})
