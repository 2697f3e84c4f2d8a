"""The client against a real server on this machine: answers, ledger, failures."""

import base64
import io
import json
import time

import pytest
from endpoint_server import EndpointServer, requests
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm_sft_rl.errors import RowError, UserError
from vlm_sft_rl.teacher import (
    ChatRequest,
    EndpointClient,
    Ledger,
    completions_url,
    encode_image,
    retry_after,
    user_message,
)


def echo(body):
    content = body["messages"][-1]["content"]
    text = content if isinstance(content, str) else content[-1]["text"]
    return f"you said {text}"


def client(server, **options):
    return EndpointClient(server.url, "m", **{"backoff": 0.01, "timeout": 5, **options})


def test_answers_in_order_with_settings_and_cost():
    with EndpointServer(echo, delay=0.02) as server:
        teacher = client(server, concurrency=4, input_price=2.0, output_price=10.0)
        replies = list(
            teacher.complete(requests(20, temperature=0.7, top_p=0.9, stop=["\n"], seed=5, max_tokens=9))
        )
    assert [r.texts for r in replies] == [[f"you said number {i}"] for i in range(20)]
    assert [r.id for r in replies] == [f"r{i}" for i in range(20)]
    body = server.bodies[0]
    assert {k: body[k] for k in ("temperature", "top_p", "stop", "seed", "max_tokens", "model")} == {
        "temperature": 0.7, "top_p": 0.9, "stop": ["\n"], "seed": 5, "max_tokens": 9, "model": "m"
    }  # fmt: skip
    assert 2 <= server.most_at_once <= 4
    usage = teacher.usage
    assert (usage.answered, usage.prompt_tokens, usage.completion_tokens) == (20, 2000, 80)
    assert teacher.usage.cost == pytest.approx((2000 * 2 + 80 * 10) / 1e6)


def test_images_arrive_as_they_are(tmp_path):
    picture = Image.effect_noise((9, 7), 60).convert("RGB")
    picture.save(tmp_path / "a.jpg")
    turned = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    message = user_message("look", ["a.jpg", picture, "turned.jpg"])
    with EndpointServer(echo) as server:
        client(server).ask(ChatRequest("x", [message], image_root=tmp_path))
    urls = [part["image_url"]["url"] for part in server.bodies[0]["messages"][0]["content"][:3]]
    data = [base64.b64decode(url.split(",")[1]) for url in urls]
    assert [url.split(";")[0] for url in urls] == ["data:image/jpeg", "data:image/png", "data:image/png"]
    assert data[0] == (tmp_path / "a.jpg").read_bytes()
    assert Image.open(io.BytesIO(data[1])).tobytes() == picture.tobytes()
    assert Image.open(io.BytesIO(data[2])).size == (2, 4)
    assert encode_image(picture)[2] == encode_image(picture.copy())[2] != encode_image(turned)[2]


def test_nothing_is_paid_twice(tmp_path):
    ledger = tmp_path / "deep" / "ledger.jsonl"
    with EndpointServer(echo) as server:
        with client(server, ledger=ledger) as first:
            list(first.complete(requests(6)))
        with client(server, ledger=ledger) as second:
            replies = list(second.complete(requests(9)))
        assert server.calls == 9
        assert [r.cached for r in replies] == [True] * 6 + [False] * 3
        assert (second.usage.cached, second.usage.answered, second.usage.prompt_tokens) == (6, 3, 300)
        with client(server, ledger=ledger) as third:
            again = third.ask(requests(1, temperature=0.1)[0])
        assert not again.cached, "other sampling settings are another request"


def test_equal_requests_under_way_are_sent_once(tmp_path):
    with EndpointServer(echo, delay=0.1) as server:
        twins = [ChatRequest(f"t{i}", [user_message("same")]) for i in range(8)]
        replies = list(client(server, ledger=tmp_path / "l.jsonl").complete(twins))
    assert server.calls == 1
    assert [r.id for r in replies] == [f"t{i}" for i in range(8)]
    assert {tuple(r.texts) for r in replies} == {("you said same",)}


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with EndpointServer(echo, delay=0.01) as server:
        with client(server, ledger=path, concurrency=2) as first:
            stream = first.complete(requests(50))
            for _ in range(5):
                next(stream)
            stream.close()
            time.sleep(0.2)
        paid = server.calls
        assert 5 <= paid < 50
        path.write_bytes(path.read_bytes() + b'{"key": "torn')
        with client(server, ledger=path) as second:
            replies = list(second.complete(requests(50)))
        assert server.calls == 50 and second.usage.cached == paid
    assert [r.texts for r in replies] == [[f"you said number {i}"] for i in range(50)]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_server_that_fails_every_third_time():
    with EndpointServer(echo, fail_rate=0.3, seed=1) as server:
        teacher = client(server, attempts=10, timeout=2)
        replies = list(teacher.complete(requests(60)))
    assert [r.texts for r in replies] == [[f"you said number {i}"] for i in range(60)]
    assert teacher.usage.retries == server.calls - 60 > 8 and teacher.failures == []


def test_a_hanging_server_is_asked_again():
    with EndpointServer(echo, hang_first=2) as server:
        teacher = client(server, timeout=0.3)
        assert [r.error for r in teacher.complete(requests(4))] == [None] * 4
    assert teacher.usage.retries == 2


def test_retry_after_makes_everybody_wait():
    with EndpointServer(echo, limit_first=1, retry_after="0.5") as server:
        teacher = client(server, concurrency=1)
        list(teacher.complete(requests(3)))
    assert server.times[1] - server.times[0] >= 0.5
    with EndpointServer(echo, limit_first=1, retry_after="7200") as server:
        replies = list(client(server, concurrency=1).complete(requests(2)))
    assert "7200 s" in replies[0].error and replies[1].error is None


@pytest.mark.parametrize(
    ("header", "seconds"), [("1.5", 1.5), ("Sat, 21 Nov 2026 10:00:30 GMT", 30), ("soon", None)]
)
def test_retry_after_forms(header, seconds):
    assert retry_after({"Retry-After": header}, now=lambda: 1795255200.0) == seconds
    assert retry_after({}) is None


def test_n_samples_from_servers_with_and_without_n(tmp_path):
    with EndpointServer(lambda body: ["a", "b", "c"]) as server:
        assert client(server).ask(requests(1, n=3)[0]).texts == ["a", "b", "c"]
        assert server.calls == 1
    with EndpointServer(lambda body: f"seed {body['seed']}", with_n=False) as server:
        teacher = client(server, ledger=tmp_path / "l.jsonl")
        assert teacher.ask(requests(1, n=3, seed=7)[0]).texts == ["seed 7", "seed 8", "seed 9"]
        assert teacher.ask(requests(1, n=3, seed=7)[0]).cached and teacher.usage.prompt_tokens == 300


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "wants an API key"), (403, "OPENAI_API_KEY"), (404, "knows the model 'm'"), (302, "redirects")],
)
def test_errors_that_end_the_run(status, message, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with EndpointServer(echo, status=status) as server, pytest.raises(UserError, match=message):
        list(client(server).complete(requests(50)))
    assert server.calls <= 9


def test_a_server_that_refuses_everything_ends_the_run():
    with EndpointServer(echo, status=400, detail="no images please") as server:
        with pytest.raises(UserError, match=r"HTTP 400 \(no images please\)"):
            list(client(server).complete(requests(50)))
        with pytest.raises(UserError, match="no request was answered"):
            list(client(server).complete(requests(1)))
    with pytest.raises(UserError, match="refused"):
        list(EndpointClient("http://127.0.0.1:9", "m", attempts=2, backoff=0.01).complete(requests(50)))


def test_one_refused_request_does_not_end_the_run(tmp_path):
    def answer(body):
        return {"error": {"message": "odd"}} if echo(body).endswith(" 3") else echo(body)

    with EndpointServer(answer) as server, client(server, ledger=tmp_path / "l.jsonl") as teacher:
        replies = list(teacher.complete(requests(8)))
        assert [r.id for r in replies if r.error] == ["r3"] == [identity for identity, _ in teacher.failures]
        assert teacher.usage.failed == 1 and teacher.usage.answered == 7
        assert "`choices`" in teacher.failures[0][1]
        list(teacher.complete(requests(8)))
        assert server.calls == 9, "a failure is not kept: it is tried again"


def test_the_key_is_sent_and_stays_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sk-secret\n")
    with EndpointServer(echo, key="sk-secret") as server:
        with client(server, api_key_env="MY_KEY", ledger=tmp_path / "l.jsonl") as teacher:
            assert teacher.ask(requests(1)[0]).texts
        monkeypatch.setenv("MY_KEY", "sk-wrong")
        with pytest.raises(UserError, match=r"bad key Bearer \*\*\*.*MY_KEY was not accepted"):
            client(server, api_key_env="MY_KEY").ask(requests(1)[0])
    assert "sk-" not in (tmp_path / "l.jsonl").read_text()
    with pytest.raises(UserError, match="OTHER_KEY is not set"):
        EndpointClient(server.url, "m", api_key_env="OTHER_KEY")


def test_budget():
    with EndpointServer(echo) as server:
        teacher = client(server, input_price=10_000, budget=3.0, concurrency=1)
        replies = []
        with pytest.raises(UserError, match="budget of 3"):
            replies.extend(teacher.complete(requests(10)))
    assert server.calls == 3


def test_bad_image_is_named_before_anything_is_sent(tmp_path):
    with EndpointServer(echo) as server, pytest.raises(RowError, match=r"gone\.png.*does not exist"):
        client(server).ask(ChatRequest("x", [user_message("q", ["gone.png"])], image_root=tmp_path))
    assert server.calls == 0


def test_a_ledger_is_used_by_one_process(tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl")
    with pytest.raises(UserError, match="another process"):
        Ledger(tmp_path / "l.jsonl")
    ledger.close()
    (tmp_path / "l.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="line 1"):
        Ledger(tmp_path / "l.jsonl")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcde"), st.text(max_size=30)), max_size=12))
def test_ledger_equals_a_dict(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("ledger") / "l.jsonl"
    ledger, expected = Ledger(path), {}
    for key, text in items:
        if ledger.get(key) is None:
            ledger.add(key, {"texts": [text]})
            expected[key] = {"key": key, "texts": [text]}
    ledger.close()
    again = Ledger(path)
    assert {key: again.get(key) for key in "abcde"} == {key: expected.get(key) for key in "abcde"}
    again.close()


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("http://h:8000", "http://h:8000/v1/chat/completions"),
        ("http://h:8000/v1/", "http://h:8000/v1/chat/completions"),
        ("https://h/v1beta/openai", "https://h/v1beta/openai/chat/completions"),
        ("https://h/v1/chat/completions", "https://h/v1/chat/completions"),
    ],
)
def test_addresses(base, expected):
    assert completions_url(base) == expected


@pytest.mark.parametrize("base", ["localhost:8000", "ftp://h", "http://", ""])
def test_no_address(base):
    with pytest.raises(UserError, match="not an address"):
        completions_url(base)
