from dataclasses import replace

import families
import pytest
import torch
from PIL import Image

from vlm_sft_rl.decoding import SamplingConfig, generate_plain, sample_many
from vlm_sft_rl.decoding import generate as many
from vlm_sft_rl.decoding.generate import R3V_SAMPLING
from vlm_sft_rl.errors import UserError

FAMILIES = {"llava": families.llava, "qwen2_5_vl": families.qwen2_5_vl, "paligemma": families.paligemma}


def pictures(count):
    return [Image.new("RGB", (40 + 8 * i, 40), (60 * i % 255, 90, 200 - 30 * i)) for i in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch_size", [2, 8])
def test_answers_are_those_of_separate_calls(family, batch_size):
    model, processor = FAMILIES[family]()
    images, prompts = pictures(3), ["What?", "How many circles are there?", "Yes"]
    settings = replace(R3V_SAMPLING, max_new_tokens=8, seed=3)
    many = sample_many(
        model, processor, images, prompts, 3, settings, ids=["a", "b", "c"], batch_size=batch_size
    )
    for k in range(3):
        names = [f"{name}#{k}" for name in "abc"]
        one = generate_plain(model, processor, images, prompts, settings, ids=names)
        assert [group[k].text for group in many] == [answer.text for answer in one]
    assert [[a.id for a in group] for group in many] == [[f"{n}#{k}" for k in range(3)] for n in "abc"]


def test_an_answer_does_not_depend_on_how_many_are_drawn():
    model, processor = families.llava()
    image, options = pictures(1), replace(R3V_SAMPLING, max_new_tokens=6, seed=1)
    two = sample_many(model, processor, image, ["Q"], 2, options)[0]
    five = sample_many(model, processor, image, ["Q"], 5, options)[0]
    assert [a.text for a in two] == [a.text for a in five[:2]]
    assert len({a.text for a in five}) > 1


def test_prompt_and_image_are_computed_once_for_all_answers(monkeypatch):
    model, processor = families.llava()
    calls = []
    tower = model.model.vision_tower
    original = tower.forward
    monkeypatch.setattr(tower, "forward", lambda *a, **k: calls.append(1) or original(*a, **k))
    groups = sample_many(
        model, processor, pictures(2), ["Q", "R"], 4, replace(R3V_SAMPLING, max_new_tokens=5), batch_size=8
    )
    assert len(calls) == 1
    for group in groups:
        assert [a.counts.image_encodes for a in group] == [1, 0, 0, 0]
        assert group[0].counts.tokens_forwarded > group[0].counts.prompt_tokens
        for answer in group[1:]:
            assert answer.counts.tokens_forwarded < answer.counts.prompt_tokens


def force(model, processor, text):
    """Make greedy decoding write `text`, whatever the prompt: the output embedding prefers one token a step."""
    ids = processor.tokenizer.encode(text, add_special_tokens=False)

    def hook(module, args, output):
        step = hook.step
        hook.step += 1
        output = torch.full_like(output, -10.0)
        output[..., ids[min(step, len(ids) - 1)]] = 10.0
        return output

    hook.step = 0
    return model.get_output_embeddings().register_forward_hook(hook)


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (["END"], "abc"),
        (["ND", "cE"], "ab"),
        ([], "abcENDxyz"),
        (["nothing"], "abcENDxyz"),
        ([""], "abcENDxyz"),
    ],
)
def test_stop_strings_end_an_answer_and_are_left_out(stop, expected):
    model, processor = families.llava()
    # the answer must have ended: the self-test of the cache runs first, so that the hook counts answer steps only
    sample_many(model, processor, [None], ["Q"], 1, SamplingConfig(max_new_tokens=1))
    handle = force(model, processor, "abcENDxyz")
    answer = sample_many(model, processor, [None], ["Q"], 1, SamplingConfig(max_new_tokens=9), stop=stop)[0][
        0
    ]
    handle.remove()
    assert answer.text == expected
    if stop == ["END"]:
        assert answer.counts.tokens_kept == len("abcEND")


def test_bad_settings():
    model, processor = families.llava()
    with pytest.raises(UserError, match="equally long"):
        sample_many(model, processor, [None], ["Q", "R"], 2)
    with pytest.raises(UserError, match="n = 0"):
        sample_many(model, processor, [None], ["Q"], 0)


def test_long_prompts_are_loaded_a_few_at_a_time_and_answered_the_same(monkeypatch):
    model, processor = families.qwen2_5_vl()
    images = [Image.new("RGB", (56 + 28 * i, 56), (40 * i, 90, 10)) for i in range(4)]
    prompts = ["What is it?", "Who?", "And what is at the left of it?", "Where?"]
    answers, loads, load = [], [], many.prefill

    def noted(model, inputs, **more):
        loads[-1].append(len(inputs["input_ids"]))
        return load(model, inputs, **more)

    monkeypatch.setattr(many, "prefill", noted)
    for tokens in (10**6, 40):
        monkeypatch.setattr(many, "PASS", tokens)
        loads.append([])
        answers.append(
            sample_many(model, processor, images, prompts, 2, replace(R3V_SAMPLING, max_new_tokens=6, seed=3))
        )
    assert loads == [[4], [1, 1, 1, 1]]
    one, other = ([(a.text, a.counts) for own in each for a in own] for each in answers)
    assert one == other
