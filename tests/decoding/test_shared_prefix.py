"""Copies in one cache row against forks in rows of their own, and against full recomputation."""

from itertools import chain

import families
import pytest
import torch
from decoded import FAMILIES, PROMPTS, pictures, sharp, worst_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.decoding import SamplingConfig, capabilities, sample_many
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.cache import RewindBackend
from vlm_sft_rl.decoding.capabilities import choose_backend, ordinary_ids, prefill_text, rewind_obstacle
from vlm_sft_rl.decoding.engine import Engine, Job
from vlm_sft_rl.decoding.generate import PromptBatch
from vlm_sft_rl.decoding.machines import PlainDecoding, StoppedDecoding
from vlm_sft_rl.decoding.sampling import Sampler
from vlm_sft_rl.decoding.shared_prefix import SharedPrefixBackend, visible_to_copies


def often_ending(family: str):
    """A tiny model with sharp logits whose answers often end early."""
    model, processor = sharp(family)
    end = min(build_grammar(model, processor, required=True).ends)

    def hook(module, args, output):
        output = output.clone()
        rest = output.float().logsumexp(-1)
        output[..., end] = (rest - 3.5).to(output.dtype)
        return output

    model.get_output_embeddings().register_forward_hook(hook)
    return model, processor


def spied(monkeypatch, choose=choose_backend):
    """The backends that are chosen, how many answers were live at each admission, and the tokens of every answer (bytes
    of a random model are hardly text)."""
    backends, live, tokens = [], [], []
    add, answer = SharedPrefixBackend.add, StoppedDecoding.answer

    def chosen(model, copies):
        backends.append(choose(model, copies))
        return backends[-1]

    monkeypatch.setattr(capabilities, "choose_backend", chosen)
    monkeypatch.setattr(
        SharedPrefixBackend, "add", lambda self, start: live.append(len(self.answers)) or add(self, start)
    )
    monkeypatch.setattr(StoppedDecoding, "answer", lambda self: tokens.append(self.ids[:]) or answer(self))
    return backends, live, tokens


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "llava_mistral", "gemma3"])
def test_answers_are_those_of_forked_rows(family, attention, monkeypatch):
    model, processor = often_ending(family)
    model.set_attn_implementation(attention)
    images = pictures(len(PROMPTS))
    for n, batch_size in ((2, 64), (3, 7), (5, 12)):
        config = SamplingConfig(max_new_tokens=14, temperature=1.0, top_k=50, top_p=0.95, seed=n)
        with monkeypatch.context() as patch:
            backends, live, tokens = spied(patch)
            shared = sample_many(model, processor, images, PROMPTS, n, config, batch_size=batch_size)
        assert isinstance(backends[-1], SharedPrefixBackend) and not backends[-1].answers
        # new prompts came in while others were being answered
        assert any(live[1:]) == (batch_size < n * len(PROMPTS))
        with monkeypatch.context() as patch:
            _, _, others = spied(patch, lambda model, copies: RewindBackend(model))
            apart = sample_many(model, processor, images, PROMPTS, n, config, batch_size=batch_size)
        assert tokens == others
        lengths = list(map(len, tokens))
        assert len(set(lengths)) > 3 and max(lengths) == 14
        for mine, theirs in zip(chain(*shared), chain(*apart), strict=True):
            assert mine.counts == theirs.counts
            assert mine.trace[-1]["log_prob"] == pytest.approx(theirs.trace[-1]["log_prob"], abs=1e-4)


class NotingSampler(Sampler):
    """Draws letters from each row's own stream and notes every distribution it was given."""

    def __init__(self, letters: list[int]):
        super().__init__()
        self.letters, self.seen = letters, []

    def choose(self, logits, rows):
        for row, row_logits in zip(rows, logits, strict=True):
            prompt = int(row.job.id.split("#")[0])
            self.seen.append((prompt, row.prompt + row.machine.ids, row_logits.clone()))
        return [row.rng.choice(self.letters) for row in rows]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_distribution_equals_a_full_recompute(family, attention):
    model, processor = sharp(family)
    model.set_attn_implementation(attention)
    assert rewind_obstacle(model) is None
    grammar = build_grammar(model, processor, required=True)
    batch, copies = PromptBatch(model, processor, pictures(len(PROMPTS)), PROMPTS), 3
    # longer than the window of 12, so that it has left the prompt behind
    limits = [17, 4, 9, 2, 2, 2, 20, 1, 6, 3, 18, 7, 5, 5, 12]
    sampler = NotingSampler(processor.tokenizer.encode("a brown fox", add_special_tokens=False))
    jobs = [
        Job(
            PlainDecoding(SamplingConfig(max_new_tokens=limit), grammar),
            f"{i // copies}#{i % copies}",
            sampler=sampler,
        )
        for i, limit in enumerate(limits)
    ]
    backend = SharedPrefixBackend(model, copies, headroom=2)
    engine = Engine(backend, grammar, lambda i: batch.load(i, keeps_keys=True), batch_size=7, answers=copies)
    engine.run(jobs, [range(len(PROMPTS))])
    assert len(sampler.seen) == sum(limits) and not backend.answers and not backend.questions
    difference, scale = worst_difference(model, processor, sampler.seen, most=45)
    assert scale > 2 and difference < 1e-4


def test_the_cache_holds_each_prompt_once(monkeypatch):
    model, processor = families.llava()
    prompts, config = ["What?", "How many?", "Which?", "Well?"], SamplingConfig(max_new_tokens=4)
    backends, _, _ = spied(monkeypatch)
    groups = sample_many(model, processor, pictures(4), prompts, 5, config, batch_size=20)
    longest = max(group[0].counts.prompt_tokens for group in groups)
    cache = backends[0].cache
    # twenty answers side by side; the padding slot is one more
    assert (cache.rows, cache.slots) == (4, longest + 5 * 96)
    assert {tuple(layer.keys.shape[::2]) for layer in cache.layers} == {(4, cache.slots + 1)}


@pytest.fixture(scope="module")
def windowed():
    model, _ = families.llava_mistral(window=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model


@torch.inference_mode()
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_schedule_of_ends_waits_and_arrivals_equals_forked_rows(windowed, copies, draw):
    ids = ordinary_ids(windowed, 40)
    shared, forks = SharedPrefixBackend(windowed, copies, headroom=1), RewindBackend(windowed, headroom=1)
    for _ in range(12):
        first = len(forks.lengths)
        if not first or draw.random() < 0.15:
            start = prefill_text(
                windowed, [[draw.choice(ids) for _ in range(draw.randint(1, 9))] for _ in "ab"]
            )
            further = [draw.randrange(copies) for _ in "ab"]
            for backend in (shared, forks):
                backend.add(start)
                for place in (0, 1):
                    for _ in range(further[place]):
                        backend.fork(first + place)
        tokens = [None if draw.random() < 0.2 else draw.choice(ids) for _ in forks.lengths]
        busy = [i for i, token in enumerate(tokens) if token is not None]
        if busy:
            assert float((shared.decode(tokens)[busy] - forks.decode(tokens)[busy]).abs().max()) < 1e-4
        for row in range(len(forks.lengths) - 1, -1, -1):
            if draw.random() < 0.12:
                shared.remove(row)
                forks.remove(row)
                assert len(forks.lengths) == len(shared.answers)
                live = {id(answer.question) for answer in shared.answers}
                assert live == {id(question) for question in shared.questions}


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.one_of(st.none(), st.integers(1, 8)),
    st.randoms(use_true_random=False),
)
def test_a_copy_sees_its_prompt_and_its_own_tokens(prompts, copies, width, window, draw):
    used = max(prompts) + 5 * copies
    columns = [[draw.randrange(copies) for _ in range(width)] for _ in prompts]
    lengths = [[draw.randint(-1, 4) for _ in range(width)] for _ in prompts]
    mask = visible_to_copies(*map(torch.tensor, (prompts, columns, lengths)), copies, used, window)
    assert mask.shape == (len(prompts), 1, width, used)
    for row, prompt in enumerate(prompts):
        # (copy or None for all, position) in the order of the slots
        slots = [(None, i) for i in range(prompt)]
        slots += [(c, prompt + t) for t in range(used) for c in range(copies)]
        for place in range(width):
            at = prompt + lengths[row][place]
            expected = [
                owner in (None, columns[row][place])
                and position <= at
                and (window is None or at - position < window)
                for owner, position in slots[:used]
            ]
            assert mask[row, 0, place].tolist() == expected


def test_answers_that_share_a_prompt_fork_before_their_first_token():
    model, _ = families.llava()
    ids = ordinary_ids(model, 6)
    with torch.inference_mode():
        backend = choose_backend(model, 2)
        backend.add(prefill_text(model, [ids, ids[:4]]))
        assert backend.fork(0) == 2
        with pytest.raises(ValueError, match="2 of 2 copies"):
            backend.fork(2)
        backend.decode([ids[0], ids[1], None])
        with pytest.raises(ValueError, match="holds 1 tokens"):
            backend.fork(1)


def test_a_row_is_shared_where_the_prompt_is_as_long_as_an_answer_may_become(monkeypatch):
    model, processor = often_ending("llava")
    prompt, short = PROMPTS[:1], SamplingConfig(max_new_tokens=2)
    ((answer,),) = sample_many(model, processor, pictures(1), prompt, 1, short)
    backends, _, _ = spied(monkeypatch)
    for n, more in ((2, 0), (2, 1), (1, 0)):
        config = SamplingConfig(max_new_tokens=answer.counts.prompt_tokens + more, temperature=1.0)
        sample_many(model, processor, pictures(1), prompt, n, config)
    assert [type(backend) for backend in backends] == [SharedPrefixBackend, RewindBackend, RewindBackend]
