"""The server on vLLM through OpenAI's own client: its answers are those of transformers where nothing is drawn."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

import openai
from decoded import equal
from served import Served, asked, scenes

from vlm_sft_rl.decoding import SamplingConfig, generate_plain, generate_retrospective
from vlm_sft_rl.decoding.config import engine_version
from vlm_sft_rl.decoding.sampling import Sampler, not_finite
from vlm_sft_rl.decoding.vllm_engine import VLLMModel
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import configure
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.models.vllm_names import for_vllm
from vlm_sft_rl.serving.config import ServeConfig
from vlm_sft_rl.serving.run import serve
from vlm_sft_rl.serving.verification import verification

IMAGES = scenes(8)
QUESTION = "Describe the image."
NOT_DRAWN = {"temperature_step": 0.0, "local_attempts": 1, "total_attempts": 3, "rewrite_query": True}
PUBLISHED = NOT_DRAWN | {"without_replacement": False}
GREEDY = {"decoder": "greedy"}
LONGEST = 160
LONG = {"max_tokens": 256, "temperature": 100.0, "extra_body": {"decoder": "sample"}, "stream": True}


@pytest.fixture(scope="module")
def reference(verifier):
    return load_for_inference(verifier, "cpu", "float32")[:2]


@pytest.fixture(scope="module")
def engine(verifier, reference):
    return VLLMModel(for_vllm(verifier), "float32", 16, max_model_len=LONGEST), reference[1]


@pytest.fixture(scope="module")
def served(engine):
    server = Served(*engine, engine="vllm", megabytes=0.5, pixels=200_000, new_tokens=256)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def expected(verifier, reference):
    """The answers of transformers, by decoder."""
    data = (list(IMAGES), [QUESTION] * len(IMAGES))
    answers = {"greedy": generate_plain(*reference, *data, SamplingConfig(max_new_tokens=128))}
    for name, body in {"retrospective": NOT_DRAWN, "published": PUBLISHED}.items():
        config = configure("retrospective", verifier, {"max_new_tokens": 128, "commit": "phrase", **body})
        answers[name] = generate_retrospective(*reference, *data, config)
    return answers


def create(served, image, body=NOT_DRAWN, **options):
    options = {"messages": asked(image, text=QUESTION), "extra_body": body, **options}
    return served.client().chat.completions.create(model="pocket", **options)


def idle(served) -> bool:
    """Whether the batch and vLLM come to have nothing to do."""
    for _ in range(200):
        if served.batch.counts() == (0, 0) and not served.batch.engine.rows:
            return not served.batch.engine.model.engine.has_unfinished_requests()
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(("decoder", "body"), [("retrospective", NOT_DRAWN), ("greedy", GREEDY)])
def test_answers_are_those_of_transformers_streamed_or_not(served, expected, decoder, body):
    rejected = 0
    for image, answer in zip(IMAGES[:4], expected[decoder], strict=False):
        reply = create(served, image, {**body, "trace": True})
        (choice,) = reply.choices
        assert choice.message.content == answer.text and choice.finish_reason == "stop"
        assert equal(choice.verification, verification(answer))
        assert reply.usage.prompt_tokens == answer.counts.prompt_tokens
        assert reply.usage.completion_tokens == answer.counts.tokens_kept
        rejected += sum(event["kind"] == "reject" for event in choice.trace)
        chunks = [choice for chunk in create(served, image, body, stream=True) for choice in chunk.choices]
        pieces = [chunk.delta.content for chunk in chunks if chunk.delta.content]
        assert "".join(pieces) == answer.text and equal(chunks[-1].verification, choice.verification)
        assert len(pieces) >= len(answer.spans)  # each phrase comes when it has been verified
    assert rejected > 0 or decoder == "greedy"


def test_clients_at_once_get_the_answers_of_one_at_a_time(served, expected):
    """Settings of many kinds in one batch, among them cuts of the distribution."""
    bodies = [
        ("retrospective", NOT_DRAWN),
        ("greedy", GREEDY),
        ("published", {**PUBLISHED, "top_k": 5}),
        ("published", {**PUBLISHED, "top_p": 0.9}),
    ]
    asks = [(number, *bodies[number // 2 % 4]) for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda each: create(served, IMAGES[each[0] % 8], each[2]), asks))
    texts = [reply.choices[0].message.content for reply in replies]
    assert texts == [expected[decoder][number % 8].text for number, decoder, _ in asks]


def test_several_answers_and_what_the_server_says_of_itself(served):
    first, second = (
        create(served, IMAGES[0], {"decoder": "sample"}, n=3, temperature=1.0, seed=3).choices for _ in "ab"
    )
    texts = [choice.message.content for choice in first]
    assert len(set(texts)) > 1 and texts == [choice.message.content for choice in second]
    (model,) = served.client().models.list()
    assert model.engine == engine_version("vllm") and model.decoder == "retrospective"


def test_a_client_that_goes_away_frees_its_request(served, expected):
    stream = create(served, IMAGES[0], **LONG)
    next(stream)
    while not served.batch.engine.rows:
        time.sleep(0.01)
    reply = create(served, IMAGES[1])  # joins
    stream.close()
    assert reply.choices[0].message.content == expected["retrospective"][1].text
    assert idle(served)


def test_what_does_not_fit_is_refused_and_the_others_go_on(served, expected):
    for options in ({}, {"stream": True}):
        with pytest.raises(openai.BadRequestError, match=f"this model takes {LONGEST} with the answer"):
            create(served, IMAGES[0], messages=asked(IMAGES[0], text="What? " * LONGEST), **options)
    with pytest.raises(openai.BadRequestError, match="greedy, sample, retrospective"):
        create(served, IMAGES[0], {"decoder": "vcd"})
    text, room = QUESTION, LONGEST
    while room > 14:
        text = f"{text} {QUESTION}"
        typed = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        room = LONGEST - len(served.batch.encode(typed, [IMAGES[0]]).ids)
    # an answer that ends where there is no more room, and a question that outgrows it once it is rewritten
    reply = create(served, IMAGES[0], GREEDY, messages=asked(IMAGES[0], text=text))
    assert reply.usage.completion_tokens == room and reply.choices[0].finish_reason == "length"
    doubting = {**NOT_DRAWN, "local_attempts": 3, "total_attempts": 9, "threshold": 1e-30}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(create, served, IMAGES[1])
        with pytest.raises(openai.BadRequestError, match="Shorten the prompt or --max-new-tokens"):
            create(served, IMAGES[0], doubting, messages=asked(IMAGES[0], text=text))
        assert other.result().choices[0].message.content == expected["retrospective"][1].text
    assert idle(served)


class Broken(Sampler):
    def choose(self, logits, rows):
        raise not_finite(rows[0].place)


def test_a_step_that_fails_is_answered_and_the_next_request_too(served, expected, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(served.batch, "_sampler", lambda top_k, top_p: Broken())
        with pytest.raises(openai.InternalServerError, match="NaN or infinite"):
            create(served, IMAGES[0])
    assert idle(served)
    assert create(served, IMAGES[0]).choices[0].message.content == expected["retrospective"][0].text


def test_a_server_that_is_told_to_stop_ends_its_answers_first(engine):
    served = Served(*engine, engine="vllm", new_tokens=256)
    stream = create(served, IMAGES[0], **LONG)
    next(stream)
    served.server.should_exit = True
    endings = [choice.finish_reason for chunk in stream for choice in chunk.choices]
    assert endings[-1] in ("stop", "length")
    served.stop()


def test_what_cannot_be_served_is_said_before_anything_is_loaded(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"this is an adapter\. Merge it first"):
        serve(tmp_path, ServeConfig(engine="vllm"), "adapter")
