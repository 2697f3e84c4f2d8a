"""Servers that misbehave, each a real one on this machine: what comes of their answers, and what never happens."""

import contextlib
import gzip
import json
import re
import socket
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from endpoint_server import EndpointServer, requests
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from vlm_sft_rl import endpoint
from vlm_sft_rl.cli.app import app
from vlm_sft_rl.endpoint import Failure, completions_url, read_answer, retry_after
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.ledger import Ledger
from vlm_sft_rl.self_train import training_keys
from vlm_sft_rl.self_training.config import SelfTrainingConfig
from vlm_sft_rl.teacher import EndpointClient

GOOD = {"choices": [{"message": {"content": "good"}}], "usage": {"prompt_tokens": 10, "completion_tokens": 2}}


def client(server, **options):
    return EndpointClient(server.url, "m", **{"backoff": 0.01, "timeout": 5, "attempts": 3, **options})


def choice(content=None, reason="stop", **message):
    return {"choices": [{"message": {"content": content, **message}, "finish_reason": reason}]}


def ask(answer, count=3, **options):
    """Replies to `count` requests of which the second gets this answer."""

    def reply(body):
        return answer if body["messages"][0]["content"].endswith(" 1") else GOOD

    with EndpointServer(reply) as server:
        teacher = client(server, concurrency=1, **options)
        return list(teacher.complete(requests(count))), teacher, server


@pytest.mark.parametrize(
    ("answer", "reason", "calls"),
    [
        (choice(None, "length"), r"`content` is null \(finish_reason: length\)", 1),
        (choice(5), "`content` is no text but 5", 1),
        (choice({"text": "x"}), "`content` is no text", 1),
        (choice([{"type": "image_url"}]), "parts that are no text", 1),
        (choice([{"type": "text", "text": None}]), "parts that are no text", 1),
        (choice([]), "parts that are no text", 1),
        (choice("half \ud83d"), "half of a character", 1),
        (choice(None, refusal="I must not."), "the model refused: 'I must not.'", 1),
        (choice([{"type": "refusal", "refusal": "No."}]), "the model refused: 'No.'", 1),
        (choice("", "content_filter"), "content filter", 1),
        ({"choices": [{"text": "old"}]}, "without a message", 1),
        ({"choices": ["x"]}, "without a message", 1),
        ({"choices": {"0": 1}}, "no `choices`", 1),
        ({"error": {"message": "odd"}}, "no `choices`.*odd", 1),
        (b"[1]", "no `choices`", 1),
        (b"null", "no `choices`", 1),
        ({"choices": []}, "empty list of `choices`", 3),
        (b"", "no JSON", 3),
        (b"<html><body>Sign in</body></html>", "no JSON.*Sign in", 3),
        (b'{"choices": [{"message": {"content": "\xff"}}]}', "no JSON.*utf-8", 3),
        (b"[" * 100_000, "no JSON", 3),
        (b'{"choices": ' + b"9" * 5000 + b"}", "no JSON", 3),
        (b"data: {}\n\ndata: [DONE]\n", "no JSON", 3),
    ],
)  # fmt: skip
def test_a_bad_reply_is_a_failure_with_its_reason_and_the_run_goes_on(answer, reason, calls):
    replies, teacher, server = ask(answer)
    assert [r.texts for r in replies] == [["good"], [], ["good"]]
    assert re.search(reason, replies[1].error), replies[1].error
    assert replies[1].refused and server.calls == 2 + calls
    assert teacher.usage.failed == 1 == len(teacher.failures) and teacher.usage.answered == 2


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (choice([{"type": "text", "text": "a "}, {"type": "output_text", "text": "b"}, "c"]), "a bc"),
        (choice("x", None), "x"),
        (choice("x", {"odd": 1}), "x"),
        (choice("x", refusal=None), "x"),
        (choice(""), ""),
        (json.dumps(choice("é")).encode("utf-8"), "é"),
        (json.dumps(choice("é"), ensure_ascii=False).encode("utf-8-sig"), "é"),
    ],
)
def test_odd_replies_with_a_text_are_answers(answer, text):
    assert ask(answer)[0][1].texts == [text]


@pytest.mark.parametrize(
    ("usage", "tokens", "unmetered"),
    [
        ('{"prompt_tokens": 7, "completion_tokens": 3}', (7, 3), 0),
        ('{"prompt_tokens": 7.0, "completion_tokens": 3}', (7, 3), 0),
        ('{"prompt_tokens": 7}', (7, 0), 1),
        ('{"prompt_tokens": -7, "completion_tokens": -3e9}', (0, 0), 1),
        ('{"prompt_tokens": NaN, "completion_tokens": Infinity}', (0, 0), 1),
        ('{"prompt_tokens": 1e300, "completion_tokens": 99999999999999999999}', (0, 0), 1),
        ('{"prompt_tokens": "7", "completion_tokens": true}', (0, 0), 1),
        ('{"prompt_tokens": {"text": 7}, "completion_tokens": [3]}', (0, 0), 1),
        ("null", (0, 0), 1),
        ('"much"', (0, 0), 1),
        ("[1, 2]", (0, 0), 1),
    ],
)
def test_usage_of_any_shape_is_counted_or_not_and_never_negative(usage, tokens, unmetered):
    content = f'{{"choices": [{{"message": {{"content": "x"}}}}], "usage": {usage}}}'
    replies, teacher, _ = ask(content.encode(), input_price=1.0, output_price=1.0)
    assert replies[1].texts == ["x"]
    assert (replies[1].prompt_tokens, replies[1].completion_tokens) == tokens
    assert teacher.usage.unmetered == unmetered
    assert teacher.usage.cost == pytest.approx((24 + sum(tokens)) / 1e6)


def test_no_reply_gives_back_what_others_spent():
    costly = {**choice("x"), "usage": {"prompt_tokens": -(10**9), "completion_tokens": -(10**9)}}
    with EndpointServer(lambda body: GOOD if "0" in str(body) else costly) as server:
        teacher = client(server, concurrency=1, input_price=1e5, budget=0.9)
        with pytest.raises(UserError, match=r"budget of 0\.9 is used up"):
            list(teacher.complete(requests(9)))
        assert server.calls == 1
    for budget in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"budget = .* expected a number >= 0"):
            EndpointClient("http://h", "m", budget=budget)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda v: (
        st.lists(v, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "message", "content", "text", "type", "usage", "refusal", "finish_reason", "x"]
            ),
            v,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(
    json_values
    | st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"message": json_values}))})
)
def test_any_json_is_texts_or_a_failure(value):
    try:
        answer = read_answer(json.dumps(value).encode())
    except Failure as failure:
        assert str(failure)
    else:
        assert answer.texts and all(text.encode("utf-8") is not None for text in answer.texts)


def test_an_empty_list_of_choices_is_asked_again():
    answers = iter([{"choices": []}, GOOD])
    with EndpointServer(lambda body: next(answers)) as server:
        assert client(server).ask(requests(1)[0]).texts == ["good"]
        assert server.calls == 2


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def drip(*parts):
    def write(handler):
        handler.wfile.write(parts[0])
        while True:
            handler.wfile.write(b"a")
            time.sleep(0.1)

    return write


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(endless, "longer than 1 MiB"), (drip(HEAD + b"\r\n{"), "no end within 1 s"), (drip(HEAD + b"X-A: "), "no end")],
    ids=["endless", "slow content", "slow headers"],
)  # fmt: skip
def test_an_answer_without_end_is_given_up(answer, reason, monkeypatch):
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1 << 20)
    started = time.monotonic()
    replies, _, server = ask(answer, longest=1.0)
    assert re.search(reason, replies[1].error) and replies[2].texts == ["good"]
    assert server.calls == 3 and time.monotonic() - started < 20


def test_content_that_was_compressed(monkeypatch):
    def packed(content, encoding="gzip"):
        def write(handler):
            data = gzip.compress(content)
            handler.send_response(200)
            handler.send_header("Content-Encoding", encoding)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)

        return write

    assert ask(packed(json.dumps(choice("packed")).encode()))[0][1].texts == ["packed"]
    assert "encoding 'br'" in ask(packed(b"x", "br"))[0][1].error
    monkeypatch.setattr(endpoint, "MOST_BYTES", 1 << 20)
    assert "longer than 1 MiB" in ask(packed(b" " * (4 << 20)))[0][1].error


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("-5", 0.0), ("1e400", float("inf")), ("nan", None), ("Sat, 21 Nov 2020 10:00:00 GMT", 0.0), ("", None),
     ("Sat, 99 Nov 99999 10:00:00 GMT", None), ("٣", 3.0)],
)  # fmt: skip
def test_pauses_of_any_value(header, seconds):
    assert retry_after({"Retry-After": header}, now=lambda: 1795255200.0) == seconds


def test_what_fails_later_is_one_failure_and_not_the_end(tmp_path):
    """A 404 of a gateway ends a run that begins with it, not one that is half done."""
    for status in (401, 404, 302, 413):

        def refuse(handler, status=status):
            handler.send_response(status)
            handler.send_header("Location", "http://user:secret@elsewhere/?token=secret")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        replies, _, _ = ask(refuse)
        assert f"HTTP {status}" in replies[1].error and replies[1].refused and replies[2].texts == ["good"]
        assert "token" not in replies[1].error


def test_a_key_that_expires_on_the_way_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)

    def lock_out(handler):
        handler.send_response(401)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    first = requests(3)
    with EndpointServer(lambda body: GOOD if "number 0" in str(body) else lock_out) as server:
        with client(server, ledger=tmp_path / "l.jsonl", concurrency=1) as teacher:
            with pytest.raises(UserError, match=r"32 requests failed, the last.*HTTP 401"):
                list(teacher.complete(requests(99)))
            assert server.calls == 33
        again = client(server, ledger=tmp_path / "l.jsonl", concurrency=1)
        with again, pytest.raises(UserError, match="wants an API key"):
            list(again.complete(first))
        assert server.calls == 34


def test_a_server_s_words_are_shown_short_and_without_escape_codes():
    with EndpointServer(
        lambda body: GOOD, status=400, detail="\x1b[31mred\x07 \u202e text " + "x" * 999
    ) as server:
        error = client(server).ask(requests(1)[0]).error
    assert error.isprintable() and "red" in error and len(error) < 500

    def page(handler):
        data = b"<html><head><title>Bad\ngateway</title></head><body>long</body></html>"
        handler.send_response(502)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    assert "HTTP 502 (a web page: Bad gateway)" in ask(page)[0][1].error


# --- Addresses and secrets ---


@pytest.mark.parametrize(
    "address",
    ["http://user:s3cret@h:8000/v1", "https://s3cret@h/v1", "https://h/v1?api_key=s3cret", "https://h/v1?key=s3cret",
     "https://h/v1?x=1&Access-Token=s3cret", "https://h/v1?sig=s3cret", "https://h/v1#key=s3cret", "user:s3cret@h:8000",
     "http://user:s3cret@[::1/v1", "http://h:99999/v1?key=s3cret", "http://h/v1?key=s3cret\n"],
)  # fmt: skip
def test_a_secret_in_the_address_is_refused_and_not_repeated(address):
    with pytest.raises(UserError) as caught:
        completions_url(address)
    assert "s3cret" not in str(caught.value)


def test_the_cure_of_a_secret_is_named():
    with pytest.raises(UserError, match=r"environment variable: OPENAI_API_KEY.*api_key_env"):
        completions_url("https://h/v1?key=x")
    assert completions_url("https://h/v1?api-version=7#top") == "https://h/v1/chat/completions?api-version=7"
    assert completions_url("http://[::1]:80/v1") == "http://[::1]:80/v1/chat/completions"


@pytest.mark.parametrize(
    "words",
    [
        ("data", "tag", "Q", "OUT/t.jsonl", "--teacher", "URL", "--teacher-model", "m"),
        ("data", "tag", "Q", "OUT/t.jsonl", "--checker", "URL", "--checker-model", "m"),
        ("data", "correct", "Q", "OUT", "--mode", "refine", "--teacher", "URL", "--teacher-model", "m"),
        ("distill", "Q", "OUT/w.jsonl", "--endpoint", "URL", "--model", "m", "--dataset", "choice"),
        ("eval", "run", "mmhal_bench", "--model", "M", "--data-dir", "D", "--output-dir", "OUT", "--judge-url", "URL",
         "--judge-model", "m"),
    ],
)  # fmt: skip
def test_every_command_refuses_a_secret_before_it_writes_anything(tmp_path, words):
    (tmp_path / "q.jsonl").write_text(
        '{"id": "a", "images": [], "question": "q", "answer": "A", "choices": ["x", "y"]}\n'
    )
    places = {"Q": str(tmp_path / "q.jsonl"), "URL": "https://u:s3cret@h/v1", "OUT": str(tmp_path / "out")}
    done = CliRunner().invoke(app, [places.get(w, w.replace("OUT", places["OUT"])) for w in words])
    assert isinstance(done.exception, UserError) and "holds a secret" in str(done.exception)
    assert "s3cret" not in str(done.exception) + done.output
    assert not any("s3cret" in p.read_text() for p in tmp_path.rglob("*") if p.is_file())


def test_a_secret_in_a_recipe_of_self_training_is_refused():
    config = SelfTrainingConfig(
        train_questions="a",
        test_questions="b",
        serve="vllm serve {model} --api-key s3cret --max-num-batched-tokens 9",
    )
    with pytest.raises(UserError, match=r"`--api-key`.*VLLM_API_KEY") as caught:
        config.check_self_training()
    assert "s3cret" not in str(caught.value)
    config.serve = "vllm serve {model} --port {port} --max-num-batched-tokens 9 --tokenizer x"
    config.check_self_training()
    with pytest.raises(UserError, match=r"`hub_token`.*HF_TOKEN"):
        training_keys({"hub_token": "s3cret"}, config, "recipe.yaml")


def test_a_key_that_a_server_quotes_is_never_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-s3cret")
    for answer in (
        {"error": "bad key sk-s3cret"},
        choice(None, refusal="sk-s3cret"),
        b"sk-s3cret",
        choice(["sk-s3cret", 5]),
    ):
        replies, teacher, _ = ask(answer)
        assert "s3cret" not in replies[1].error + str(teacher.failures) and "***" in replies[1].error


def test_answers_without_a_count_are_told_where_they_cost(caplog):
    for price, said in ((0.0, 0), (1.0, 1)):
        caplog.clear()
        ask({**GOOD, "usage": "much"}, input_price=price)[1].close()
        assert caplog.text.count("1 answers came without a usable count of tokens") == said


def test_a_key_that_cannot_be_sent_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk–s3cret")
    with pytest.raises(UserError, match="characters that no key has") as caught:
        EndpointClient("http://h", "m")
    assert "s3cret" not in str(caught.value)


def test_ipv6():
    with EndpointServer(lambda body: GOOD, host="::1") as server:
        assert client(server).ask(requests(1)[0]).texts == ["good"]


class Proxy(BaseHTTPRequestHandler):
    seen: list

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["Host"], self.headers["Proxy-Authorization"]))
        data = json.dumps(GOOD).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


def test_a_proxy_of_the_environment(monkeypatch):
    Proxy.seen = []
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    Thread(target=proxy.serve_forever, args=(0.02,), daemon=True).start()
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://user:pw@127.0.0.1:{proxy.server_port}")
    assert EndpointClient("http://far.example:81", "m").ask(requests(1)[0]).texts == ["good"]
    assert Proxy.seen == [
        ("http://far.example:81/v1/chat/completions", "far.example:81", "Basic dXNlcjpwdw==")
    ]
    proxy.shutdown()
    for place in ("127.0.0.1:9", "[::1", "127.0.0.1:http", "127.0.0.1:99999"):
        scheme = "socks5" if place == "127.0.0.1:9" else "http"
        monkeypatch.setenv("http_proxy", f"{scheme}://user:pw@{place}")
        with pytest.raises(UserError, match="no http proxy") as caught:
            EndpointClient("http://far.example:81", "m")
        assert "pw" not in str(caught.value)


def test_a_proxy_that_does_not_come_to_an_end(monkeypatch):
    def serve():
        connection, _ = listener.accept()
        with contextlib.suppress(OSError):
            connection.sendall(HEAD + b"X-A: ")
            while True:
                connection.sendall(b"a")
                time.sleep(0.1)

    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=serve, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        server, started = endpoint.Server("https://far.example", longest=1.0), time.monotonic()
        with pytest.raises(Failure, match="no end within 1 s"):
            server.post(b"{}")
    assert time.monotonic() - started < 10


# --- What a server can do ---


def say(body):
    """An honest server: its answers differ with the seed where there is a temperature."""
    return [f"{body['temperature'] and body.get('seed', 0) + k} say x" for k in range(body.get("n", 1))]


@pytest.mark.parametrize(
    "refuses", [{}, {"top_k": 422}, {"stop": 500}, {"seed": 400}, {"n": 422, "top_k": 400, "stop": 500}]
)
def test_fields_that_are_refused_are_done_without(refuses, tmp_path, caplog):
    settings = {"temperature": 0.9, "n": 3, "seed": 5, "stop": ["say"], "extra": {"top_k": 50}}
    with EndpointServer(say, refuses=refuses) as server:
        with client(server, ledger=tmp_path / "l.jsonl", concurrency=4) as teacher:
            asked = requests(5, **settings)
            assert teacher.probe(asked[:3]) == {"left_out": sorted(refuses)}
            replies = list(teacher.complete(asked))
        assert [len(r.texts) for r in replies] == [3] * 5 and not teacher.failures
        assert all(re.fullmatch(r"[\d.]+ ", text) for r in replies for text in r.texts), "cut at the stop"
        assert sorted(re.findall("take `(.*)`", caplog.text)) == sorted(refuses), "each is said once"
        calls = server.calls
        with client(server, ledger=tmp_path / "l.jsonl") as again:
            assert again.probe(asked[:3]) == {"left_out": sorted(refuses)} and again.left_out == set(refuses)
            assert [r.texts for r in again.complete(asked)] == [r.texts for r in replies]
        assert server.calls == calls, "what was found out is kept"


def test_a_bad_request_is_not_taken_for_a_refused_field():
    with EndpointServer(lambda body: GOOD, status=400, detail="too long") as server:
        teacher = client(server)
        assert "too long" in teacher.ask(requests(1, stop=["x"], seed=1)[0]).error
        assert teacher.left_out == set()


def test_a_server_that_ignores_the_temperature_is_refused_for_samples():
    with EndpointServer(lambda body: "always this") as server:
        teacher = client(server)
        with pytest.raises(UserError, match=r"ignores `temperature`.*vLLM"):
            teacher.probe(requests(3, temperature=0.9, n=3))
        assert server.calls <= 6


def test_a_server_that_takes_no_temperature_above_one_is_asked_at_the_run_s():
    def answer(body):
        if body["temperature"] > 1:
            return lambda handler: (handler.send_response(400), handler.send_header("Content-Length", "0"),
                                    handler.end_headers())  # fmt: skip
        return say(body)

    with EndpointServer(answer) as server:
        assert client(server).probe(requests(1, temperature=0.9, n=2)) == {"left_out": []}


# --- Ledgers ---


@pytest.mark.parametrize(
    "content",
    [b'{"name": "mine"}', b"precious", b'[{"key": 1}]\n', b'{"key": 5}\n', b'{"key": "k", "texts": "x"}\n',
     b'{"key": "k", "texts": [1]}\n', b'{"key": "k", "texts": ["x"], "prompt_tokens": -1}\n', b"\xff\xfe\n",
     b'{"key": "k", "server": {}}\n', b"[" * 9999 + b"\n"],
)  # fmt: skip
def test_a_file_that_is_no_ledger_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "l.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="line 1: not a record of a ledger"):
        Ledger(path)
    assert path.read_bytes() == content


def test_a_ledger_where_none_can_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file" / "l.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot write"):
            Ledger(path)
