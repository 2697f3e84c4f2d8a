"""A model whose logits are no numbers: an error that names the answer and the token, from every decoder."""

import re
from contextlib import contextmanager

import pytest
import torch
from decoded import pictures, sharp

from vlm_sft_rl.data import chat
from vlm_sft_rl.decoding.branches import ImageBranches
from vlm_sft_rl.decoding.sampling import GREEDY, Sampler, Sampling, row_rng
from vlm_sft_rl.errors import NotFinite, UserError
from vlm_sft_rl.evaluation.decoders import DECODERS

PROMPTS = ["What is it?", "Describe the picture."]


@pytest.fixture(scope="module")
def loaded():
    model, processor = sharp("llava")
    for decoder in ("greedy", "majority", "opera"):  # the self-tests of its caches
        entry = DECODERS[decoder]
        config = entry.config(**{"max_new_tokens": 2, **entry.fixed})
        entry.generate(model, processor, pictures(1), PROMPTS[:1], config, ids=["a"], batch_size=1)
    return model, processor


@contextmanager
def broken(model, value, passes):
    """The model's logits are `value` at one token from the pass number `passes` on."""
    seen = []

    def hook(module, inputs, logits):
        seen.append(1)
        if len(seen) > passes:
            logits = logits.clone()
            logits[..., 7] = value
        return logits

    handle = model.get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("passes", [0, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_names_the_answer_and_the_token(loaded, decoder, passes):
    entry, value = DECODERS[decoder], float("nan") if passes else float("inf")
    config = entry.config(**{"max_new_tokens": 8, **entry.fixed})
    with broken(loaded[0], value, passes), pytest.raises(NotFinite) as caught:
        entry.generate(*loaded, pictures(2), PROMPTS, config, ids=["a", "b"], batch_size=2)
    assert re.match(
        r"answer to '[ab].*', token \d+: the model's logits are NaN or infinite", str(caught.value)
    )


def test_a_model_that_says_nothing_fails_its_self_test():
    model, processor = sharp("llava")
    entry = DECODERS["greedy"]
    config = entry.config(**entry.fixed)
    with broken(model, float("nan"), 0), pytest.raises(NotFinite, match="self-test before decoding: "):
        entry.generate(model, processor, pictures(1), PROMPTS[:1], config, ids=["a"], batch_size=1)


def test_questions_about_one_image_name_the_token(loaded):
    model, processor = loaded
    branches = ImageBranches(model, processor, pictures(1), [chat.render(processor, PROMPTS[0], 1)])
    # the first token is chosen from logits that are there already
    with broken(model, float("nan"), 1), pytest.raises(NotFinite, match="questions about 1 images, token 3"):
        branches.ask([branches.tails], [[GREEDY]], 8)


@pytest.mark.parametrize("temperature", [1e-45, 1e-30, 0.7, 1e30, 1e300])
def test_no_temperature_leaves_the_numbers(temperature):
    logits = torch.tensor([[3.0, 1.0, -40.0, 9.0]])
    row = Sampling(temperature, row_rng(0, "x"))
    (token,) = Sampler(top_p=0.9, suppress=[3]).choose(logits, [row])
    assert token in (0,) if temperature < 1e-3 else token < 3


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "The prompt 'a' is empty"),
        (" \n", "The prompt 'a' is empty"),
        ("half \ud83d of it", "holds half of a character"),
        ("<image> and <image>", "2 <image> marks and 1 images"),
    ],
)
def test_prompts_that_cannot_be_asked(loaded, prompt, message):
    entry = DECODERS["greedy"]
    with pytest.raises(UserError, match=message):
        entry.generate(*loaded, pictures(1), [prompt], entry.config(**entry.fixed), ids=["a"], batch_size=1)


def test_a_token_that_stands_for_a_picture_is_no_text():
    entry = DECODERS["greedy"]
    model, processor = sharp("qwen2_5_vl")
    with pytest.raises(UserError, match=re.escape(repr(processor.image_token))):
        prompts = [f"What is {processor.image_token}?"]
        entry.generate(
            model, processor, [None], prompts, entry.config(**entry.fixed), ids=["a"], batch_size=1
        )


@pytest.mark.parametrize("prompt", ["\x00\x1b[2J\x7f", "\u202e abc", "a\r\nb"])
def test_control_characters_in_a_prompt_are_text(loaded, prompt):
    entry = DECODERS["greedy"]
    config = entry.config(**{"max_new_tokens": 2, **entry.fixed})
    (answer,) = entry.generate(*loaded, [None], [prompt], config, ids=["a"], batch_size=1)
    assert answer.counts.prompt_tokens > 0
