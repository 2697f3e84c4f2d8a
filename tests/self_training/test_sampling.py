import json

import families
import pytest
from endpoint_server import EndpointServer
from PIL import Image

from vlm_sft_rl import io as files
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_training.sampling import EndpointSampler, HFSampler, read_store, run_sampling
from vlm_sft_rl.teacher import EndpointClient

SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_new_tokens": 5, "stop": []}


def tasks(folder, count=7):
    found = []
    for i in range(count):
        Image.new("RGB", (28, 28), (30 * i, 90, 10)).save(folder / f"{i}.png")
        found.append({"id": f"q{i}", "images": [f"{i}.png"], "prompt": f"What is {i}?"})
    return found


class Counting:
    """A sampler that writes down what it was asked and breaks off after so many prompts."""

    def __init__(self, calls, stop_after=None, per_call=3):
        self.calls, self.stop_after, self.per_call = calls, stop_after, per_call

    def tasks_per_call(self, n):
        return self.per_call

    def engine(self, sampling, n, seed):
        def answer(part):
            for t in part:
                if self.stop_after is not None and len(self.calls) >= self.stop_after:
                    raise KeyboardInterrupt
                self.calls.append(t["id"])
                yield [line(t, k, f"{t['id']} says {k}") for k in range(n)]

        return answer


def line(t, k, answer):
    names = {"id": f"{t['id']}#{k}", "question_id": t["id"], "index": k}
    return names | {"images": t["images"], "prompt": t["prompt"], "answer": answer}


def store(folder, asked, sampler=None, *, n=2, seed=0, **options):
    sampler = sampler or Counting([])
    return run_sampling(folder, asked, n, {"seed": seed}, sampler, sampling=SAMPLING, seed=seed, **options)


def test_a_store_is_complete_and_in_order(tmp_path):
    asked = tasks(tmp_path)
    lines = store(tmp_path / "s", asked)
    assert [line["id"] for line in lines] == [f"q{i}#{k}" for i in range(7) for k in range(2)]
    assert lines == read_store(tmp_path / "s")
    assert lines[3] == line(asked[1], 1, "q1 says 1")


def test_an_interrupted_store_goes_on_where_it_was(tmp_path):
    asked, calls = tasks(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        store(tmp_path / "s", asked, Counting(calls, 4))
    with open(tmp_path / "s" / "samples.jsonl", "a") as handle:
        handle.write('{"id": "q4#0", "answ')  # a line that a killed process left
    lines = store(tmp_path / "s", asked, Counting(calls))
    assert sorted(calls) == sorted({f"q{i}" for i in range(7)})
    assert len(lines) == 14 and len({line["id"] for line in lines}) == 14


def test_a_finished_store_asks_nobody(tmp_path):
    asked = tasks(tmp_path)
    store(tmp_path / "s", asked)
    assert len(store(tmp_path / "s", asked, Counting([], 0))) == 14
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        store(tmp_path / "s", asked, Counting([], 0), seed=1)


def test_answers_to_another_prompt_are_not_taken_for_answers_to_this_one(tmp_path):
    asked = tasks(tmp_path)
    store(tmp_path / "s", asked)
    before = (tmp_path / "s" / "samples.jsonl").read_bytes()
    asked[5]["prompt"] = "What is five?"
    with pytest.raises(UserError, match=r"answers to 'q5' are to another prompt.*Nothing was changed"):
        store(tmp_path / "s", asked)
    assert (tmp_path / "s" / "samples.jsonl").read_bytes() == before
    assert len(store(tmp_path / "s", asked[:5])) == 10


def test_a_full_disk_is_a_message_and_nothing_is_lost(tmp_path, monkeypatch):
    asked, calls, real = tasks(tmp_path), [], files.os.fsync

    def full(handle):
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full.*goes on after the last complete line"):
        store(tmp_path / "s", asked, Counting(calls, per_call=1))
    monkeypatch.setattr(files.os, "fsync", real)
    assert len(store(tmp_path / "s", asked, Counting(calls, per_call=1))) == 14


def test_shards_of_several_processes_make_the_same_store(tmp_path, monkeypatch):
    asked, shares = tasks(tmp_path), {0: [], 1: []}
    whole = store(tmp_path / "one", asked)
    store(tmp_path / "two", [])  # the first process claims the folder
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):  # the first process waits for the second
        monkeypatch.setenv("RANK", str(rank))
        lines = store(tmp_path / "two", asked, Counting(shares[rank], per_call=2))
        assert lines == (whole if rank == 0 else [])
    assert [len(shares[rank]) for rank in (0, 1)] == [4, 3] and not set(shares[0]) & set(shares[1])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["run.json", "samples.jsonl"]


def test_the_model_gives_the_same_store_in_any_batching(tmp_path):
    families.save(*families.llava(), tmp_path / "model")
    asked, stores = tasks(tmp_path, 4), []
    for batch in (2, 12):
        sampler = HFSampler(tmp_path / "model", tmp_path, batch_size=batch, device="cpu")
        stores.append(store(tmp_path / f"b{batch}", asked, sampler, n=3, seed=7))
    assert [line["answer"] for line in stores[0]] == [line["answer"] for line in stores[1]]
    assert all(line["tokens"] <= 5 and line["prompt_tokens"] > 10 for line in stores[0])


def endpoint_store(folder, server, asked, **options):
    client = EndpointClient(
        server.url, "policy", ledger=folder / "ledger.jsonl", timeout=0.5, backoff=0.01, **options
    )
    with client:
        return store(folder / "s", asked, EndpointSampler(client, folder), n=3)


def test_an_endpoint_gets_images_settings_and_n(tmp_path):
    asked = tasks(tmp_path, 3)
    with EndpointServer(
        lambda body: [f"{body['messages'][0]['content'][1]['text']} {k}" for k in range(3)]
    ) as server:
        lines = endpoint_store(tmp_path, server, asked)
        body = server.bodies[0]
    assert [line["answer"] for line in lines[:3]] == ["What is 0? 0", "What is 0? 1", "What is 0? 2"]
    assert body["n"] == 3 and body["temperature"] == 0.9 and body["top_k"] == 50 and body["max_tokens"] == 5
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_an_endpoint_that_fails_for_a_third_of_requests_loses_nothing(tmp_path):
    asked = tasks(tmp_path, 12)
    with EndpointServer(lambda body: ["x", "y", "z"], fail_rate=0.3, seed=2) as server:
        lines = endpoint_store(tmp_path, server, asked, attempts=8)
        assert server.failures > 0
    assert len(lines) == 36


def test_an_endpoint_that_times_out_for_a_third_of_requests_loses_nothing(tmp_path):
    asked = tasks(tmp_path, 12)
    with EndpointServer(lambda body: ["x", "y", "z"], hang_first=4) as server:
        lines = endpoint_store(tmp_path, server, asked)
        assert server.calls >= 16  # a busy machine may miss the half second too
    assert [line["id"] for line in lines] == [f"q{i}#{k}" for i in range(12) for k in range(3)]


def test_prompts_without_an_answer_are_counted_and_asked_again(tmp_path):
    asked = tasks(tmp_path, 6)
    with (
        EndpointServer(lambda body: ["x", "y", "z"], fail_rate=0.3, seed=1) as server,
        pytest.raises(UserError, match=r"of 6 prompts got no answer.*What was answered is kept"),
    ):
        endpoint_store(tmp_path, server, asked, attempts=1)
    kept = [json.loads(line) for line in (tmp_path / "s" / "samples.jsonl").read_text().splitlines()]
    assert 0 < len(kept) < 18
    with EndpointServer(lambda body: ["new", "new", "new"]) as server:
        lines = endpoint_store(tmp_path, server, asked)
    assert [line for line in lines if line["id"] in {k["id"] for k in kept}] == kept
    assert len(lines) == 18
