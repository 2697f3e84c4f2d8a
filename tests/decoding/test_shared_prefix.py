"""Copies in one cache row against forks in rows of their own, and against full recomputation."""

import functools
import random

import families
import pytest
import test_engine
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.decoding import capabilities, sample_many
from vlm_sft_rl.decoding import generate as hf
from vlm_sft_rl.decoding import generate as many
from vlm_sft_rl.decoding.answers import build_grammar
from vlm_sft_rl.decoding.cache import RecomputeBackend, RewindBackend, prefill
from vlm_sft_rl.decoding.capabilities import (
    _VERDICTS,
    choose_backend,
    ordinary_ids,
    prefill_text,
    rewind_obstacle,
    sharing_obstacle,
)
from vlm_sft_rl.decoding.config import SamplingConfig
from vlm_sft_rl.decoding.engine import Engine, Job
from vlm_sft_rl.decoding.machines import PlainDecoding
from vlm_sft_rl.decoding.sampling import Sampler
from vlm_sft_rl.decoding.shared_prefix import SharedPrefixBackend, visible_to_copies

PROMPTS = test_engine.PROMPTS


def wide_gemma3():
    return families.gemma3(window=512)


@pytest.fixture(autouse=True)
def with_gemma3(monkeypatch):
    monkeypatch.setattr(families, "wide_gemma3", wide_gemma3, raising=False)


def often_ending(family: str):
    """A tiny model with sharp logits whose answers often end early."""
    model, processor = test_engine.sharp(family)
    grammar = build_grammar(model, processor, required=True)
    ends = sorted(grammar.ends)

    def hook(module, args, output):
        output = output.clone()
        rest = output.float().logsumexp(-1, keepdim=True)
        output[..., ends[:1]] = (rest - 3.5).to(output.dtype)
        return output

    model.get_output_embeddings().register_forward_hook(hook)
    return model, processor


def forked(model, copies):
    return RewindBackend(model)


def noted(monkeypatch) -> list[list[int]]:
    """The tokens of every answer: bytes of a random model are hardly text."""
    tokens, answer = [], many.StoppedDecoding.answer
    monkeypatch.setattr(
        many.StoppedDecoding, "answer", lambda self: tokens.append(self.ids[:]) or answer(self)
    )
    return tokens


def spied(monkeypatch):
    """The shared backends that are chosen, and how many answers were live at each admission."""
    chosen, live = [], []
    add = SharedPrefixBackend.add

    def choose(model, copies):
        chosen.append(choose_backend(model, copies))
        return chosen[-1]

    monkeypatch.setattr(capabilities, "choose_backend", choose)
    monkeypatch.setattr(
        SharedPrefixBackend, "add", lambda self, *a: live.append(len(self.answers)) or add(self, *a)
    )
    return chosen, live


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "llava_mistral", "gemma3"])
def test_answers_are_those_of_forked_rows(family, attention, monkeypatch):
    model, processor = often_ending(family)
    model.set_attn_implementation(attention)
    images = test_engine.pictures(len(PROMPTS))
    for n, batch_size in ((2, 64), (3, 7), (5, 12)):
        options = {
            "config": SamplingConfig(max_new_tokens=14, temperature=1.0, top_k=50, top_p=0.95, seed=n),
            "batch_size": batch_size,
        }
        with monkeypatch.context() as patch:
            tokens, (chosen, live) = noted(patch), spied(patch)
            shared = sample_many(model, processor, images, PROMPTS, n, **options)
        assert isinstance(chosen[-1], SharedPrefixBackend) and not chosen[-1].answers
        # new prompts came in while others were being answered
        assert any(live[1:]) == (batch_size < n * len(PROMPTS))
        with monkeypatch.context() as patch:
            patch.setattr(capabilities, "choose_backend", forked)
            others = noted(patch)
            apart = sample_many(model, processor, images, PROMPTS, n, **options)
        assert tokens == others
        assert [[a.counts for a in group] for group in shared] == [[a.counts for a in g] for g in apart]
        lengths = list(map(len, tokens))
        assert len(set(lengths)) > 3 and max(lengths) == 14
        for ours, theirs in zip(shared, apart, strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert one.trace[-1]["log_prob"] == pytest.approx(other.trace[-1]["log_prob"], abs=1e-4)


class NotingSampler(Sampler):
    """Draws letters from each row's own stream and notes every distribution it was given."""

    def __init__(self, letters: list[int]):
        super().__init__()
        self.letters, self.seen = letters, []

    def choose(self, logits, rows):
        for row, own in zip(rows, logits, strict=True):
            prompt = int(row.job.id.split("#")[0])
            self.seen.append((prompt, row.prompt + row.machine.ids, len(row.prompt), own.clone()))
        return [row.rng.choice(self.letters) for row in rows]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*test_engine.FAMILIES, "gemma3", "wide_gemma3"])
def test_every_distribution_equals_a_full_recompute(family, attention):
    model, processor = test_engine.sharp(family)
    model.set_attn_implementation(attention)
    assert rewind_obstacle(model) is None
    grammar = build_grammar(model, processor, required=True)
    images, copies = test_engine.pictures(len(PROMPTS)), 3
    texts = [prompting.render(processor, text, 1) for text in PROMPTS]

    def load(indices):
        inputs = hf.encode_batch(
            model, processor, [texts[i] for i in indices], [[images[i]] for i in indices]
        )
        return prefill(model, inputs)

    # longer than the window of 12, so that it has left the prompt behind
    limits = [17, 4, 9, 2, 2, 2, 20, 1, 6, 3, 18, 7, 5, 5, 12]
    jobs = [
        Job(PlainDecoding(SamplingConfig(max_new_tokens=limit), grammar), f"{i // copies}#{i % copies}")
        for i, limit in enumerate(limits)
    ]
    sampler = NotingSampler(processor.tokenizer.encode("a brown fox", add_special_tokens=False))
    backend = SharedPrefixBackend(model, copies, headroom=2)
    Engine(backend, grammar, sampler, load, batch_size=7, answers=copies).run(jobs, [range(5)])
    assert len(sampler.seen) == sum(limits) and not backend.answers and not backend.questions
    difference, scale = test_engine.worst_difference(model, processor, sampler.seen, most=45)
    assert scale > 2
    assert difference < 1e-4


def test_the_cache_holds_each_prompt_once(monkeypatch):
    model, processor = families.llava()
    images, prompts = test_engine.pictures(4), ["What?", "How many?", "Which?", "Well?"]
    chosen, _ = spied(monkeypatch)
    sample_many(model, processor, images, prompts, 5, SamplingConfig(max_new_tokens=4), batch_size=20)
    longest = max(len(p) for p in prompt_ids(model, processor, images, prompts))
    cache = chosen[0].cache
    # twenty answers side by side; the padding slot is one more
    assert (cache.rows, cache.slots) == (4, longest + 5 * 96)
    assert {tuple(layer.keys.shape[::2]) for layer in cache.layers} == {(4, cache.slots + 1)}


def prompt_ids(model, processor, images, prompts):
    texts = [prompting.render(processor, text, 1) for text in prompts]
    return prefill(model, hf.encode_batch(model, processor, texts, [[i] for i in images])).prompts


class Twins:
    """The same answers in shared and in forked rows; every step's logits must agree."""

    def __init__(self, model, copies: int):
        self.model, self.copies = model, copies
        self.shared = SharedPrefixBackend(model, copies, headroom=1)
        self.forks = RewindBackend(model, headroom=1)

    @property
    def rows(self) -> int:
        return len(self.forks.lengths)

    def add(self, prompts: list[list[int]], forks: list[int]) -> None:
        first, start = self.rows, prefill_text(self.model, prompts)
        for backend in (self.shared, self.forks):
            backend.add(start)
            for place, count in enumerate(forks):
                for _ in range(count):
                    backend.fork(first + place)

    def decode(self, tokens: list[int | None]) -> None:
        one, other = self.shared.decode(tokens), self.forks.decode(tokens)
        busy = [i for i, token in enumerate(tokens) if token is not None]
        assert float((one[busy] - other[busy]).abs().max()) < 1e-4

    def remove(self, row: int) -> None:
        self.shared.remove(row)
        self.forks.remove(row)
        assert self.rows == len(self.shared.answers)
        live = {id(answer.question) for answer in self.shared.answers}
        assert live == {id(question) for question in self.shared.questions}


@pytest.fixture(scope="module")
def windowed():
    model, _ = families.llava_mistral(window=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(5.0)
    return model


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_any_schedule_of_ends_waits_and_arrivals_equals_forked_rows(windowed, copies, draw):
    ids = ordinary_ids(windowed, 40)
    with torch.inference_mode():
        twins = Twins(windowed, copies)
        for _ in range(12):
            if not twins.rows or draw.random() < 0.15:
                prompts = [[draw.choice(ids) for _ in range(draw.randint(1, 9))] for _ in range(2)]
                twins.add(prompts, [draw.randrange(copies) for _ in prompts])
            tokens = [None if draw.random() < 0.2 else draw.choice(ids) for _ in range(twins.rows)]
            if any(token is not None for token in tokens):
                twins.decode(tokens)
            for row in range(twins.rows - 1, -1, -1):
                if draw.random() < 0.12:
                    twins.remove(row)


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
    taken = [[draw.randint(-1, 4) for _ in range(width)] for _ in prompts]
    found = visible_to_copies(
        torch.tensor(prompts), torch.tensor(columns), torch.tensor(taken), copies, used, window
    )
    assert found.shape == (len(prompts), 1, width, used)
    for row, length in enumerate(prompts):
        # (copy or None for all, position) in the order of the slots
        slots = [(None, i) for i in range(length)]
        slots += [(c, length + t) for t in range(used) for c in range(copies)]
        for place in range(width):
            at = length + taken[row][place]
            own = (None, columns[row][place])
            expected = [
                owner in own and position <= at and (window is None or at - position < window)
                for owner, position in slots[:used]
            ]
            assert found[row, 0, place].tolist() == expected


def test_what_a_shared_row_cannot_do_is_refused():
    model, _ = families.llava()
    with torch.inference_mode():
        backend = choose_backend(model, 2)
        ids = ordinary_ids(model, 6)
        backend.add(prefill_text(model, [ids, ids[:4]]))
        assert backend.fork(0) == 2
        with pytest.raises(ValueError, match="2 of 2 copies"):
            backend.fork(2)
        backend.decode([ids[0], ids[1], None])
        with pytest.raises(ValueError, match="holds 1 tokens"):
            backend.fork(1)


def test_who_shares_rows():
    model, _ = families.llava()
    assert isinstance(choose_backend(model, 2), SharedPrefixBackend)
    assert isinstance(choose_backend(model, 1), RewindBackend)
    assert isinstance(choose_backend(families.paligemma()[0], 2), RecomputeBackend)


def test_the_self_test_sees_attention_that_fills_the_holes_of_a_mask():
    model, _ = test_engine.sharp("llava")
    assert sharing_obstacle(model) is None
    original = model.forward

    @functools.wraps(original)  # `generate` reads the signature
    def filling(*args, attention_mask=None, **options):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = attention_mask.flip(-1).cummax(-1).values.flip(-1)
        return original(*args, attention_mask=attention_mask, **options)

    model.forward = filling
    _VERDICTS.pop(model)
    # rewinding does without such masks
    assert rewind_obstacle(model) is None and "logits differ" in sharing_obstacle(model)
    assert isinstance(choose_backend(model, 2), RewindBackend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [7, 1000, 32064])
def test_probabilities_of_many_rows_are_those_of_each_alone(dtype, vocabulary):
    logits = (torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0)) * 6).to(dtype)
    tokens = [random.Random(i).randrange(vocabulary) for i in range(9)]
    together = Sampler().probabilities(logits, tokens)
    assert together == [Sampler().p_unconfident(row, None, t) for row, t in zip(logits, tokens, strict=True)]
    exact = logits.double().softmax(-1)[range(9), tokens].tolist()
    assert together == pytest.approx(exact, rel=1e-4)


def test_a_row_is_shared_where_the_prompt_is_as_long_as_an_answer_may_become(monkeypatch):
    model, processor = often_ending("llava")
    image = test_engine.pictures(1)
    tokens = sample_many(model, processor, image, PROMPTS[:1], 1, SamplingConfig(max_new_tokens=2))[0][
        0
    ].counts.prompt_tokens
    chosen, _ = spied(monkeypatch)
    for longest in (tokens, tokens + 1):
        sample_many(
            model, processor, image, PROMPTS[:1], 2, SamplingConfig(max_new_tokens=longest, temperature=1.0)
        )
    sample_many(model, processor, image, PROMPTS[:1], 1, SamplingConfig(max_new_tokens=2))
    assert [type(backend) for backend in chosen] == [SharedPrefixBackend, RewindBackend, RewindBackend]
