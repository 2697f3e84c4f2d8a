"""The server through OpenAI's own client: what it answers, streams, refuses and survives."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec

import openai
import psutil
import pytest
from PIL import Image
from served import Served, asked, data_url, scenes

from vlm_sft_rl.decoding import SamplingConfig, generate_plain, generate_retrospective, sample_many
from vlm_sft_rl.decoding.config import engine_version
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import configure
from vlm_sft_rl.serving.config import ServeConfig
from vlm_sft_rl.serving.run import serve
from vlm_sft_rl.serving.verification import verification

IMAGES = scenes(24)
IDLE = {"status": "ok", "rows": 0, "waiting": 0}


def create(client, *images, **options):
    options = {"model": "pocket", "messages": asked(*images), **options}
    return client.chat.completions.create(**options)


def raw(address: str, body: bytes | dict, path: str = "/v1/chat/completions", **headers):
    """Status, headers and parsed body of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.loads(error.read())


def get(address: str, path: str):
    with urllib.request.urlopen(address + path, timeout=60) as reply:
        return json.loads(reply.read())


def expected(verifier, images, **options):
    config = configure("retrospective", VERIFIER, {"max_new_tokens": 256, "commit": "phrase", **options})
    names = ["0"] * len(images)
    return generate_retrospective(
        *verifier, list(images), ["Describe the image."] * len(images), config, ids=names, batch_size=1
    )


def streamed(client, *images, **options):
    """Text, ending and pieces of a streamed answer."""
    chunks = list(create(client, *images, stream=True, **options))
    pieces = [choice.delta.content for chunk in chunks for choice in chunk.choices if choice.delta.content]
    (ending,) = [choice for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    return "".join(pieces), ending, pieces


def test_answers_are_those_of_the_function_streamed_or_not(served, verifier):
    client = served.client()
    for image, answer in zip(IMAGES[:8], expected(verifier, IMAGES[:8]), strict=True):
        reply = create(client, image)
        (choice,) = reply.choices
        assert choice.message.content == answer.text and choice.finish_reason == "stop"
        assert choice.verification == verification(answer)
        assert reply.usage.completion_tokens == answer.counts.tokens_kept
        assert reply.usage.tokens_forwarded == answer.counts.tokens_forwarded
        text, ending, pieces = streamed(client, image)
        assert text == answer.text and ending.verification == choice.verification
        assert len(pieces) >= len(answer.spans)  # each phrase comes when it has been verified


def test_phrases_carry_their_places_and_attempts(served):
    attempts = []
    for image in IMAGES[:12]:
        (choice,) = create(served.client(), image, extra_body={"trace": True}).choices
        phrases = choice.verification["phrases"]
        assert phrases
        for phrase in phrases:
            assert choice.message.content[phrase["start"] : phrase["end"]] == phrase["text"]
            assert phrase["accepted"] == (phrase["p_unconfident"] < choice.verification["threshold"])
        rejected = sum(event["kind"] == "reject" for event in choice.trace)
        attempts += [phrase["attempts"] for phrase in phrases]
        # the last rejections may belong to the end of the answer
        assert sum(phrase["attempts"] - 1 for phrase in phrases) <= rejected
    assert max(attempts) > 1


def test_no_streamed_word_is_ever_taken_back_and_doubts_can_be_watched(served):
    rewound = 0
    for image in IMAGES[:12]:
        body = {"model": "pocket", "messages": asked(image), "stream": True, "trace": True}
        request = urllib.request.Request(
            served.address + "/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        events, text = [], ""
        with urllib.request.urlopen(request) as reply:
            for block in reply.read().decode().split("\n\n")[:-2]:
                kind, _, data = block.partition("data: ")
                value = json.loads(data)
                if kind:
                    events += value["events"]
                    if any(event["kind"] == "accept" for event in value["events"]):
                        text_at_accept = text
                else:
                    text += value["choices"][0]["delta"].get("content") or ""
                    ending = value["choices"][0]
        assert events == ending["trace"][: len(events)] and text_at_accept
        assert text.startswith(text_at_accept)
        rewound += sum(event["kind"] == "local_rewind" for event in events)
    assert rewound > 0


def test_settings_of_decoders_are_fields_of_the_body(served, verifier):
    client, image = served.client(), IMAGES[2]
    (answer,) = expected(verifier, [image], threshold=0.01, rewrite_query=True, total_attempts=4)
    body = {"threshold": 0.01, "rewrite_query": True, "total_attempts": 4}
    (choice,) = create(client, image, extra_body=body).choices
    assert choice.message.content == answer.text and choice.verification == verification(answer)
    (greedy,) = generate_plain(
        *verifier, [image], ["Describe the image."], SamplingConfig(max_new_tokens=256)
    )
    (choice,) = create(client, image, extra_body={"decoder": "greedy"}).choices
    assert choice.message.content == greedy.text and choice.verification["ok"] is None
    (choice,) = create(client, image, max_tokens=4, extra_body={"decoder": "greedy"}).choices
    assert choice.finish_reason == "length"


def test_several_answers_are_those_of_sampling(served, verifier):
    config = SamplingConfig(max_new_tokens=256, temperature=1.2, top_p=0.9, seed=3)
    ((*answers,),) = sample_many(*verifier, [IMAGES[0]], ["Describe the image."], 3, config, stop=[","])
    options = {"n": 3, "temperature": 1.2, "top_p": 0.9, "seed": 3, "stop": [","]}
    reply = create(served.client(), IMAGES[0], extra_body={"decoder": "sample"}, **options)
    assert [choice.message.content for choice in reply.choices] == [answer.text for answer in answers]


def test_conversations_pictures_and_models(served):
    client = served.client()
    (model,) = client.models.list()
    assert (model.id, model.decoder) == ("pocket", "retrospective")
    assert model.engine == engine_version("hf")
    first = create(client, IMAGES[0]).choices[0].message.content
    turns = [
        {"role": "system", "content": "Be short."},
        *asked(IMAGES[0]),
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Is there a cup?"},
    ]
    assert create(client, messages=turns, extra_body={"decoder": "greedy"}).choices[0].message.content
    assert create(client, IMAGES[0], IMAGES[1]).choices[0].message.content
    assert create(client, messages=[{"role": "user", "content": "Hello"}]).choices[0].message.content
    jpeg = [
        {"type": "image_url", "image_url": {"url": data_url(IMAGES[0], "JPEG")}},
        {"type": "text", "text": "Hi"},
    ]
    assert create(client, messages=[{"role": "user", "content": jpeg}]).choices


GOOD = {"model": "pocket", "messages": asked(IMAGES[0])}


def with_url(url) -> list[dict]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "system, developer, user"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content", "text or a list"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]",
            "image_url",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            None,
            "user's",
        ),
        ({"messages": [{"role": "user", "content": "<SPAN> \ud800"}]}, None, ""),
        ({"messages": with_url("https://example.org/a.png")}, "messages[0].content[0]", "--image-urls"),
        ({"messages": with_url("data:image/png,abc")}, "messages[0].content[0]", "base64"),
        ({"messages": with_url("data:image/png;base64,@@@@")}, "messages[0].content[0]", "broken"),
        (
            {"messages": with_url("data:image/png;base64,aGVsbG8=")},
            "messages[0].content[0]",
            "cannot be read",
        ),
        (
            {"messages": with_url(data_url(Image.new("RGB", (500, 500))))},
            "messages[0].content[0]",
            "200,000 pixels",
        ),
        ({"messages": with_url(None)}, "messages[0].content[0]", "text"),
        ({"decoder": "vcd"}, "decoder", "greedy, sample, retrospective"),
        ({"threshold": 2}, None, "threshold"),
        ({"thresold": 0.1}, "thresold", "threshold"),
        ({"decoder": "greedy", "threshold": 0.1}, "threshold", "no effect"),
        ({"parallel_attempts": 2}, None, "parallel_attempts"),
        ({"max_tokens": 100_000}, "max_tokens", "at most 256"),
        ({"max_tokens": "many"}, None, "max_new_tokens"),
        ({"seed": "x"}, None, "seed"),
        ({"n": 0}, "n", "1 to 16"),
        ({"stop": [7]}, "stop", "texts"),
        ({"stop": ["."]}, "stop", "no effect"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"x": 1}}, "stream_options", "include_usage"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"false_premise": True, "on_exhausted": "finish", "commit": "phrase"}, None, "commit"),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_with_the_reason(served, change, param, words):
    status, _, body = raw(served.address, {**GOOD, **change})
    assert status in (400, 413), body
    assert words in body["error"]["message"] and (param is None or body["error"]["param"] == param)
    assert "Traceback" not in body["error"]["message"] and len(body["error"]["message"]) < 1200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"model": NaN}'])
def test_bodies_that_are_no_request(served, body):
    assert raw(served.address, body)[0] in (400, 404)


def test_limits_and_addresses(served):
    status, _, body = raw(served.address, b"x" * 600_000)
    assert status == 413 and "0.5 MB" in body["error"]["message"]
    with pytest.raises(openai.NotFoundError, match="'pocket'"):
        create(served.client(), IMAGES[0], model="gpt-4o")
    status, _, body = raw(served.address, {}, path="/v1/completions")
    assert status == 404 and "/v1/chat/completions" in body["error"]["message"]


def test_a_key_and_a_full_house(verifier):
    served = Served(*verifier, rows=1, waiting=1, new_tokens=1500, key="secret")
    try:
        for key in ("wrong", "secrét", ""):
            status, _, body = raw(
                served.address, GOOD, Authorization=f"Bearer {key}".encode().decode("latin-1")
            )
            assert status == 401 and "Bearer KEY" in body["error"]["message"]
        client = served.client("secret")
        long = {"max_tokens": 1500, "extra_body": {"decoder": "sample"}, "temperature": 100.0, "stream": True}
        streams = [create(client, IMAGES[0], **long)]
        next(streams[0])
        while served.batch.counts() != (1, 0):
            time.sleep(0.01)
        with ThreadPoolExecutor(2) as pool:
            second = pool.submit(create, client, IMAGES[1])
            while served.batch.counts() != (1, 1):
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError) as refused:
                create(client, IMAGES[2])
            assert refused.value.response.headers["retry-after"] == "1"
            # a client that goes away makes room
            streams[0].close()
            assert second.result(60).choices[0].message.content
    finally:
        served.stop()


def test_many_clients_at_once_get_the_answers_of_one_at_a_time(served, verifier):
    images = [IMAGES[i % len(IMAGES)] for i in range(64)]
    answers = [answer.text for answer in expected(verifier, IMAGES)]
    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda image: create(served.client(), image), images))
    assert [reply.choices[0].message.content for reply in replies] == [answers[i % 24] for i in range(64)]


def test_metrics_count_what_was_done(served):
    create(served.client(), IMAGES[0])
    with urllib.request.urlopen(served.address + "/metrics") as reply:
        lines = dict(line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if line[0] != "#")
    assert float(lines['vlm_sft_rl_requests_total{status="200"}']) >= 1
    assert (
        float(lines["vlm_sft_rl_tokens_forwarded_total"]) > float(lines["vlm_sft_rl_tokens_kept_total"]) > 0
    )
    assert float(lines["vlm_sft_rl_rows"]) == 0
    assert get(served.address, "/health") == IDLE


@contextmanager
def server_process(*words: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """`vlm-sft-rl serve pocket` and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vlm_sft_rl.cli", "serve", "pocket", "--port", "0", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        line = process.stdout.readline()
        assert line.startswith("pocket answers at http://127.0.0.1:"), line
        yield process, line.split()[3].removesuffix("/v1")
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_nothing_is_lost_among_broken_requests(verifier):
    """2,000 requests, a third of them malformed, too large or broken off: all others get their own answers."""
    answers = {i: answer.text for i, answer in enumerate(expected(verifier, IMAGES))}
    rng, memory, wrong, kinds = random.Random(0), [], [], []
    bad = [
        b"{",
        b"x" * 600_000,
        json.dumps({**GOOD, "n": 99}).encode(),
        json.dumps({**GOOD, "stop": 3}).encode(),
    ]
    words = [
        "--rows",
        "64",
        "--waiting",
        "64",
        "--megabytes",
        "0.5",
        "--pixels",
        "200000",
        "--new-tokens",
        "256",
    ]
    with server_process(*words) as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

        def ask(number: int) -> str:
            kind = rng.random()
            if kind < 0.22:
                return f"refused {raw(address, rng.choice(bad))[0]}"
            image = number % len(IMAGES)
            if kind < 0.34:
                stream = create(client, IMAGES[image], stream=True)
                next(stream)
                stream.close()
                return "broken off"
            text = create(client, IMAGES[image]).choices[0].message.content
            if text != answers[image]:
                wrong.append((image, text))
            return "answered"

        with ThreadPoolExecutor(24) as pool:
            for start in range(0, 2000, 250):
                kinds += pool.map(ask, range(start, start + 250))
                memory.append(psutil.Process(process.pid).memory_info().rss)
        deadline = time.monotonic() + 10
        while (health := get(address, "/health")) != IDLE and time.monotonic() < deadline:
            time.sleep(0.05)
        assert health == IDLE
    assert not wrong and len(kinds) == 2000 and 1100 < kinds.count("answered") < 1500
    assert {kind for kind in kinds if kind.startswith("refused")} == {"refused 400", "refused 413"}
    # what it holds on to for the first thousands of requests levels off; a lost picture for each would be 200 MB
    assert memory[-1] - memory[2] < 150e6, memory


def test_a_server_that_is_told_to_stop_ends_its_answers_first():
    with server_process() as (process, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        options = {
            "max_tokens": 400,
            "temperature": 100.0,
            "extra_body": {"decoder": "sample"},
            "stream": True,
        }
        stream = create(client, IMAGES[0], **options)
        next(stream)
        process.send_signal(signal.SIGTERM)
        endings = [choice.finish_reason for chunk in stream for choice in chunk.choices]
        assert endings[-1] in ("stop", "length")
        assert process.wait(30) in (0, -signal.SIGTERM)


def test_what_serving_needs_is_said():
    code = (
        "import sys; sys.modules['fastapi'] = None\n"
        "from vlm_sft_rl.cli.app import main\n"
        "sys.argv = ['vlm-sft-rl', 'serve', 'pocket']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (
        done.returncode == 2
        and "pip install 'vlm-sft-rl[serve]'" in done.stderr
        and "Traceback" not in done.stderr
    )


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_is_not_installed_is_said():
    with pytest.raises(UserError, match=r"vLLM is not installed.*vlm-sft-rl\[vllm\]"):
        serve(VERIFIER, ServeConfig(engine="vllm"), "pocket")


def test_threads_end_with_the_server(verifier):
    before = threading.active_count()
    Served(*verifier).stop()
    assert threading.active_count() <= before + 1


def broken(*given):
    raise RuntimeError("the device is gone")


def test_a_failed_step_is_answered_and_the_next_request_is_served(verifier, monkeypatch):
    server = Served(*verifier)
    with monkeypatch.context() as patch:
        patch.setattr(server.batch.engine, "step", broken)
        with pytest.raises(openai.InternalServerError, match="the device is gone"):
            create(server.client(), IMAGES[0])
    (answer,) = expected(verifier, IMAGES[:1])
    assert create(server.client(), IMAGES[0]).choices[0].message.content == answer.text
    server.stop()


def test_nobody_waits_for_an_engine_that_is_gone(verifier, monkeypatch):
    server = Served(*verifier, rows=1)
    monkeypatch.setattr(server.batch.engine, "step", broken)
    monkeypatch.setattr(server.batch.engine, "clear", broken)
    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(create, server.client(timeout=30), IMAGES[0]) for _ in range(3)]
        assert all(isinstance(each.exception(), openai.InternalServerError) for each in asking)
    status, _, reply = raw(server.address, GOOD)
    assert status == 503 and "Start the server again" in reply["error"]["message"]
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(server.address, "/health")
    server.stop()
