"""GRPO's answers on vLLM: do both engines read the same prompt, and find the same tokens as likely?

Runs where vLLM is installed (`make test-vllm`), on a CPU. There vLLM packs the weights of linear layers when it loads them
and can take over no others; here it is told to leave them as they are, as it does on a GPU. All else is as it is delivered.
"""

import gc
import os
from types import SimpleNamespace
from unittest.mock import patch

import families
import pytest
import staged_world
import torch
from image_rows import picture
from peft import LoraConfig
from training import history, trainer_of

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")
os.environ |= {
    # compiling takes longer than all of these tests
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "VLLM_USE_BYTECODE_HOOK": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model is in this process, as it is beside a trainer
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import vllm
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.model_executor.layers import utils as linear_layers

from vlm_sft_rl.data.chat import encode_text
from vlm_sft_rl.methods.grpo import question_dataset
from vlm_sft_rl.models.vllm_names import for_vllm
from vlm_sft_rl.self_training.pool import read_questions
from vlm_sft_rl.trainers.grpo import PromptPreview, VisionGRPOTrainer
from vlm_sft_rl.trainers.vllm_rollouts import EQUAL, UNEQUAL

HIDDEN = 128  # four heads of 32 numbers: vLLM takes none that are smaller
PROMPTS = [("What is it?", [0]), ("What is there?", [1]), ("Which one is larger?", [1, 2])]
ANSWER = " two boats and a tree"
EXACT = 1e-4  # between log-probabilities of engines that agree, both in float32
WRONG = 1e-2  # what one picture in another's place changes at least


@pytest.fixture(scope="module", autouse=True)
def unpacked():
    with pytest.MonkeyPatch.context() as context:
        context.setattr(linear_layers.ops, "_supports_onednn", False)
        context.setattr(linear_layers, "check_cpu_sgl_kernel", lambda *size: False)
        yield


def register(architecture: str) -> None:
    """Name vLLM's class itself: vLLM asks an unloaded one for its abilities in a process that imports all of vLLM again."""
    lazy = vllm.ModelRegistry.models[architecture]
    if hasattr(lazy, "module_name"):
        vllm.ModelRegistry.register_model(architecture, lazy.load_model_cls())


def sharpened(pair):
    """Weights three times as large: what a picture changes is far above what rounding does."""
    model, processor = pair
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.ndim > 1):
            weight.mul_(3)
    return model, processor


@pytest.fixture(scope="module", params=[*EQUAL, *UNEQUAL])
def pair(request, tmp_path_factory):
    """The same weights twice: as a transformers model, and in vLLM with the arguments that TRL gives it."""
    model, processor = sharpened(getattr(families, request.param)(hidden=HIDDEN))
    folder = families.save(model, processor, tmp_path_factory.mktemp(request.param))
    register(type(model).__name__)
    llm = vllm.LLM(
        str(for_vllm(folder)),
        dtype="float32",
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=4096,
        logprobs_mode="processed_logprobs",
        enforce_eager=True,
        seed=0,
    )
    yield SimpleNamespace(kind=request.param, model=model, processor=processor, llm=llm)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def conversation(question: str, count: int) -> list[dict]:
    content = [{"type": "image"}] * count + [{"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def by_trainer(pair, question: str, images: list) -> tuple[list[int], torch.Tensor]:
    """The prompt's tokens as GRPO trains on them, and the log-probabilities of ANSWER's tokens by transformers."""
    row = {"prompt": conversation(question, len(images)), "images": images}
    preview = PromptPreview(pair.processor, 0)([row])
    answer = torch.tensor([encode_text(pair.processor, ANSWER)])
    ids = torch.cat([preview["input_ids"], answer], 1)
    inputs = pair.processor(
        images=[images], text=[rendered(pair, question, len(images))], return_tensors="pt"
    )
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answer)], 1)
    with torch.no_grad():
        logits = pair.model(**inputs).logits
    log_probs = logits[0, -answer.shape[1] - 1 : -1].log_softmax(-1)
    return preview["input_ids"][0].tolist(), log_probs.gather(1, answer.T)[:, 0]


def rendered(pair, question: str, count: int) -> str:
    prompt = conversation(question, count)
    return pair.processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)


def by_vllm(pair, prompt: list[int], images: list) -> tuple[list[int], torch.Tensor]:
    """The prompt as vLLM reads it, and the log-probabilities of ANSWER's tokens behind it."""
    answer = encode_text(pair.processor, ANSWER)
    request = {"prompt_token_ids": prompt + answer, "multi_modal_data": {"image": images}}
    params = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = pair.llm.generate([request], params, use_tqdm=False)
    found = [
        place[token].logprob
        for place, token in zip(output.prompt_logprobs[-len(answer) :], answer, strict=True)
    ]
    return output.prompt_token_ids[: -len(answer)], torch.tensor(found)


@pytest.mark.parametrize(("question", "pictures"), PROMPTS)
def test_placeholders_are_read_as_the_tokens_that_are_trained_on(pair, question, pictures):
    images = [picture(i) for i in pictures]
    ids, expected = by_trainer(pair, question, images)
    read, found = by_vllm(pair, encode_text(pair.processor, rendered(pair, question, len(images))), images)
    assert read == ids
    assert (found - expected).abs().max() < EXACT
    others = by_trainer(pair, question, [picture(i + 3) for i in pictures])[1]
    assert (others - expected).abs().max() > WRONG  # it would be seen if they were other pictures


def test_what_trl_hands_over_by_itself_is_another_prompt(pair):
    """If this fails, TRL or vLLM have changed, and the rollout function may have become needless."""
    question, pictures = PROMPTS[0]
    images = [picture(i) for i in pictures]
    ids, expected = by_trainer(pair, question, images)
    read, found = by_vllm(pair, ids, images)
    assert len(read) > len(ids)
    assert (found - expected).abs().max() > WRONG


def test_trained_weights_are_taken_over(pair):
    """By the names that transformers gives them, as TRL hands them over; pictures are encoded again. In families that are
    refused the names of the tower are unknown; if they are not any more, allow them."""
    question, pictures = PROMPTS[2]
    images = [picture(i) for i in pictures]
    prompt = encode_text(pair.processor, rendered(pair, question, len(images)))
    before = by_trainer(pair, question, images)[1]
    by_vllm(pair, prompt, images)
    engine = pair.llm.llm_engine
    target = engine.model_executor.driver_worker.model_runner.model
    if pair.kind in UNEQUAL:
        with pytest.raises(ValueError, match=r"no module or parameter named 'vision_tower\."):
            target.load_weights(pair.model.named_parameters())
        return
    torch.manual_seed(0)
    for name, parameter in pair.model.named_parameters():
        parameter.data += 0.3 * parameter.std() * torch.randn_like(parameter)
        target.load_weights([(name, parameter.data)])
    pair.llm.reset_prefix_cache()
    expected = by_trainer(pair, question, images)[1]
    assert (expected - before).abs().max() > WRONG
    stale = by_vllm(pair, prompt, images)[1]
    assert (stale - expected).abs().max() > WRONG  # features of pictures that older weights made
    engine.reset_encoder_cache()
    assert (by_vllm(pair, prompt, images)[1] - expected).abs().max() < EXACT


def lengths(completion_ids, **columns) -> list[float]:
    return [float(sum(ids)) for ids in completion_ids]


@pytest.fixture
def one_trainer():
    """TRL and vLLM leave a process group and its environment behind."""
    with patch.dict(os.environ):
        yield
    gc.collect()  # a vLLM that goes later takes the groups of the next one along
    cleanup_dist_env_and_memory()


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.usefixtures("one_trainer")
def test_training_sees_the_probabilities_that_vllm_sampled_with(tmp_path, adapter):
    """Of three steps at a learning rate that would show weights that were not handed over."""
    folder = families.save(*sharpened(families.qwen2_5_vl(hidden=HIDDEN)), tmp_path / "model")
    register("Qwen2_5_VLForConditionalGeneration")
    questions = staged_world.write_questions(tmp_path / "data", 4)
    trainer = trainer_of(
        VisionGRPOTrainer,
        tmp_path,
        question_dataset(read_questions(questions, questions.parent), questions.parent),
        folder,
        reward_funcs=lengths,
        peft_config=LoraConfig(r=4, target_modules=r".*language_model.*_proj") if adapter else None,
        use_vllm=True,
        vllm_max_model_length=256,
        num_generations=2,
        per_device_train_batch_size=4,
        max_completion_length=6,
        gradient_checkpointing=False,
        learning_rate=1e-2,
    )
    trainer.train()
    # the checkpoint says float32, which vLLM takes for 16 bits
    assert max(history(trainer, "sampling/sampling_logp_difference/mean")) < 0.02
    assert max(history(trainer, "sampling/sampling_logp_difference/max")) < 0.1
    assert max(history(trainer, "grad_norm")) > 0
