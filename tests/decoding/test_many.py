from dataclasses import replace

import families
import pytest
import torch
from decoded import count_encodes
from PIL import Image

from vlm_sft_rl.decoding import SamplingConfig, generate, generate_plain, sample_distinct, sample_many
from vlm_sft_rl.decoding.generate import R3V_SAMPLING
from vlm_sft_rl.errors import UserError


def pictures(count):
    return [Image.new("RGB", (40 + 8 * i, 40), (60 * i % 255, 90, 200 - 30 * i)) for i in range(count)]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "paligemma"])
@pytest.mark.parametrize("batch_size", [2, 8])
def test_answers_are_those_of_separate_calls(family, batch_size):
    model, processor = getattr(families, family)()
    images, prompts = pictures(3), ["What?", "How many circles are there?", "Yes"]
    config, names = replace(R3V_SAMPLING, max_new_tokens=8, seed=3), ["a", "b", "c"]
    groups = sample_many(model, processor, images, prompts, 3, config, ids=names, batch_size=batch_size)
    for k in range(3):
        ids = [f"{name}#{k}" for name in names]
        apart = generate_plain(model, processor, images, prompts, config, ids=ids)
        assert [(group[k].text, group[k].id) for group in groups] == [(a.text, a.id) for a in apart]


def test_an_answer_does_not_depend_on_how_many_are_drawn():
    model, processor = families.llava()
    config = replace(R3V_SAMPLING, max_new_tokens=6, seed=1)
    two, five = (
        [answer.text for answer in sample_many(model, processor, pictures(1), ["Q"], n, config)[0]]
        for n in (2, 5)
    )
    assert two == five[:2] and len(set(five)) > 1


def test_prompt_and_image_are_computed_once_for_all_answers():
    model, processor = families.llava()
    passes = count_encodes(model)
    config = replace(R3V_SAMPLING, max_new_tokens=5)
    for group in sample_many(model, processor, pictures(2), ["Q", "R"], 4, config, batch_size=8):
        assert [a.counts.image_encodes for a in group] == [1, 0, 0, 0]
        fed = [a.counts.tokens_forwarded > a.counts.prompt_tokens for a in group]
        assert fed == [True, False, False, False]
    assert passes == [2]


def test_distinct_answers_are_new_and_begin_with_the_one_that_is_drawn_alone():
    model, processor = families.llava()
    config = SamplingConfig(max_new_tokens=3, temperature=0.006, seed=2)
    images, prompts, names = pictures(2), ["What?", "Yes"], ["a", "b"]
    passes = count_encodes(model)
    groups = sample_distinct(model, processor, images, prompts, 6, config, ids=names, batch_size=2)
    assert sum(passes) == 2
    again = sample_many(model, processor, images, prompts, 6, config, ids=names)
    for i, (group, others) in enumerate(zip(groups, again, strict=True)):
        assert [answer.id for answer in group] == [f"{names[i]}#{k}" for k in range(6)]
        assert all(answer.trace[-1]["kind"] == "drawn" for answer in group)
        shares = [answer.trace[-1]["probability"] for answer in group]
        assert min(shares) > 0 and sum(shares) <= 1 + 1e-6
        assert [answer.counts.image_encodes for answer in group] == [1, 0, 0, 0, 0, 0]
        # so cold, the same one comes again; different bytes may read alike
        assert len({answer.text for answer in group}) >= 5 > len({answer.text for answer in others})
        alone = sample_distinct(
            model, processor, images[i : i + 1], prompts[i : i + 1], 1, config, ids=names[i : i + 1]
        )
        assert alone[0][0].text == group[0].text


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}])
def test_distinct_answers_stay_within_what_top_k_and_top_p_leave(cut):
    model, processor = families.llava()
    config = SamplingConfig(max_new_tokens=3, temperature=1.0, **cut)
    (answers,) = sample_distinct(model, processor, pictures(1), ["What?"], 6, config)
    (alone,) = generate_plain(model, processor, pictures(1), ["What?"], SamplingConfig(max_new_tokens=3))
    assert [answer.text for answer in answers] == [alone.text]


def test_there_are_fewer_distinct_answers_where_the_model_has_no_others():
    model, processor = families.paligemma()  # computes everything again after every rewind
    config = SamplingConfig(max_new_tokens=3, temperature=0.01)
    (answers,) = sample_distinct(model, processor, pictures(1), ["What?"], 6, config)
    assert len(answers) == 1


def force(model, processor, text):
    """Make greedy decoding write `text`, whatever the prompt: the output embedding prefers one token a step."""
    ids = iter(processor.tokenizer.encode(text, add_special_tokens=False))

    def hook(module, args, output):
        output = torch.full_like(output, -10.0)
        output[..., next(ids)] = 10.0
        return output

    model.get_output_embeddings().register_forward_hook(hook)


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
    # the self-test of the cache runs first, so that the hook counts answer steps only
    sample_many(model, processor, [None], ["Q"], 1, SamplingConfig(max_new_tokens=1))
    force(model, processor, "abcENDxyz")
    config = SamplingConfig(max_new_tokens=9)
    ((answer,),) = sample_many(model, processor, [None], ["Q"], 1, config, stop=stop)
    assert answer.text == expected
    assert answer.counts.tokens_kept == {"abc": len("abcEND"), "ab": len("abcE")}.get(expected, 9)


def test_bad_settings():
    model, processor = families.llava()
    with pytest.raises(UserError, match="equally long"):
        sample_many(model, processor, [None], ["Q", "R"], 2)
    for draw in (sample_many, sample_distinct):
        with pytest.raises(UserError, match="n = 0"):
            draw(model, processor, [None], ["Q"], 0)
    with pytest.raises(UserError, match="batch_size = 0"):
        sample_many(model, processor, [None], ["Q"], 1, batch_size=0)


@pytest.mark.parametrize(("n", "limit"), [(2, "PASS"), (1, "LARGEST_PASS")])
def test_long_prompts_are_loaded_a_few_at_a_time_and_answered_the_same(monkeypatch, n, limit):
    model, processor = families.qwen2_5_vl()
    images = [Image.new("RGB", (56 + 28 * i, 56), (40 * i, 90, 10)) for i in range(4)]
    prompts = ["What is it?", "Who?", "And what is at the left of it?", "Where?"]
    answers, loads, config = [], [], replace(R3V_SAMPLING, max_new_tokens=6, seed=3)
    load = generate.PromptBatch.load
    monkeypatch.setattr(
        generate.PromptBatch, "load", lambda self, i, *a: loads[-1].append(len(i)) or load(self, i, *a)
    )
    for tokens in (10**6, 40):
        monkeypatch.setattr(generate, limit, tokens)
        loads.append([])
        groups = sample_many(model, processor, images, prompts, n, config)
        answers.append([(answer.text, answer.counts) for group in groups for answer in group])
    assert loads == [[4], [1, 1, 1, 1]] and answers[0] == answers[1]
