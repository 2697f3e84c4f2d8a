import json

import families
import pytest
from endpoint_server import EndpointServer
from PIL import Image

from vlm_sft_rl import io as files
from vlm_sft_rl.endpoint import EndpointClient
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.self_training.sampling import EndpointSampler, HFSampler, read_store, run_sampling

SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_new_tokens": 5, "stop": []}


def tasks(folder, count=7):
    found = []
    for i in range(count):
        Image.new("RGB", (28, 28), (30 * i, 90, 10)).save(folder / f"{i}.png")
        found.append({"id": f"q{i}", "images": [f"{i}.png"], "prompt": f"What is {i}?"})
    return found


def counting(calls, stop_after=None):
    """An engine that writes down what it was asked and breaks off after so many prompts."""

    def engine(part):
        for t in part:
            if stop_after is not None and len(calls) >= stop_after:
                raise KeyboardInterrupt
            calls.append(t["id"])
            yield [{"answer": f"{t['id']} says {k}"} for k in range(2)]

    return engine


def test_a_store_is_complete_and_in_order(tmp_path):
    asked = tasks(tmp_path)
    store = run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting([]), per_call=3)
    assert [line["id"] for line in store] == [f"q{i}#{k}" for i in range(7) for k in range(2)]
    assert store == read_store(tmp_path / "s")
    assert store[3] == {
        "id": "q1#1",
        "question_id": "q1",
        "index": 1,
        "images": ["1.png"],
        "prompt": "What is 1?",
        "answer": "q1 says 1",
    }


def test_an_interrupted_store_goes_on_where_it_was(tmp_path):
    asked, calls = tasks(tmp_path), []
    with pytest.raises(KeyboardInterrupt):
        run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting(calls, 4), per_call=3)
    with open(tmp_path / "s" / "samples.jsonl", "a") as handle:
        handle.write('{"id": "q4#0", "answ')  # a line that a killed process left
    store = run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting(calls), per_call=3)
    assert sorted(calls) == sorted({f"q{i}" for i in range(7)})
    assert len(store) == 14 and len({line["id"] for line in store}) == 14


def test_a_finished_store_asks_nobody(tmp_path):
    asked = tasks(tmp_path)
    run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting([]), per_call=3)

    def refuse():
        raise AssertionError("the model was loaded")

    assert len(run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, refuse, per_call=3)) == 14
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        run_sampling(tmp_path / "s", asked, 2, {"seed": 1}, refuse, per_call=3)


def test_answers_to_another_prompt_are_not_taken_for_answers_to_this_one(tmp_path):
    asked = tasks(tmp_path)
    run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting([]), per_call=3)
    before = (tmp_path / "s" / "samples.jsonl").read_bytes()
    asked[5]["prompt"] = "What is five?"
    with pytest.raises(UserError, match=r"answers to 'q5' are to another prompt.*Nothing was changed"):
        run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting([]), per_call=3)
    assert (tmp_path / "s" / "samples.jsonl").read_bytes() == before
    assert (
        len(run_sampling(tmp_path / "s", asked[:5], 2, {"seed": 0}, lambda: counting([]), per_call=3)) == 10
    )


def test_a_full_disk_is_a_message_and_nothing_is_lost(tmp_path, monkeypatch):
    asked, calls, real = tasks(tmp_path), [], files.os.fsync

    def full(handle):
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left.*goes on after the last complete line"):
        run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting(calls), per_call=1)
    monkeypatch.setattr(files.os, "fsync", real)
    store = run_sampling(tmp_path / "s", asked, 2, {"seed": 0}, lambda: counting(calls), per_call=1)
    assert len(store) == 14


def test_shards_of_several_processes_make_the_same_store(tmp_path, monkeypatch):
    asked = tasks(tmp_path)
    whole = run_sampling(tmp_path / "one", asked, 2, {"seed": 0}, lambda: counting([]), per_call=2)
    shares = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        if rank == 0:  # the first process would wait for the second: let it only fill its share
            monkeypatch.setattr("vlm_sft_rl.self_training.sampling._complete", lambda *a: {})
            monkeypatch.setattr("vlm_sft_rl.self_training.sampling.merge", lambda *a: [])
        calls = []
        run_sampling(tmp_path / "two", asked, 2, {"seed": 0}, lambda calls=calls: counting(calls), per_call=2)
        shares.append(calls)
    monkeypatch.undo()
    assert [len(share) for share in shares] == [4, 3] and not set(shares[0]) & set(shares[1])
    assert run_sampling(tmp_path / "two", asked, 2, {"seed": 0}, lambda: counting([]), per_call=2) == whole


def test_the_model_gives_the_same_store_in_any_batching(tmp_path):
    families.save(*families.llava(), tmp_path / "model")
    asked, stores = tasks(tmp_path, 4), []
    for batch in (2, 12):
        sampler = HFSampler(tmp_path / "model", tmp_path, batch_size=batch, device="cpu")
        stores.append(
            run_sampling(
                tmp_path / f"b{batch}",
                asked,
                3,
                {"seed": 7},
                lambda sampler=sampler: sampler.engine(SAMPLING, 3, 7),
                per_call=sampler.tasks_per_call(3),
            )
        )
    assert [line["answer"] for line in stores[0]] == [line["answer"] for line in stores[1]]
    assert all(line["tokens"] <= 5 and line["prompt_tokens"] > 10 for line in stores[0])


def endpoint_store(folder, server, asked, **options):
    client = EndpointClient(
        server.url, "policy", ledger=folder / "ledger.jsonl", timeout=0.5, backoff=0.01, **options
    )
    with client:
        sampler = EndpointSampler(client, folder)
        return run_sampling(
            folder / "s", asked, 3, {"seed": 0}, lambda: sampler.engine(SAMPLING, 3, 0), per_call=4
        )


def test_an_endpoint_gets_images_settings_and_n(tmp_path):
    asked = tasks(tmp_path, 3)
    with EndpointServer(
        lambda body: [f"{body['messages'][0]['content'][1]['text']} {k}" for k in range(3)]
    ) as server:
        store = endpoint_store(tmp_path, server, asked)
        body = server.bodies[0]
    assert [line["answer"] for line in store[:3]] == ["What is 0? 0", "What is 0? 1", "What is 0? 2"]
    assert body["n"] == 3 and body["temperature"] == 0.9 and body["top_k"] == 50 and body["max_tokens"] == 5
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


def test_an_endpoint_that_fails_for_a_third_of_requests_loses_nothing(tmp_path):
    asked = tasks(tmp_path, 12)
    with EndpointServer(lambda body: ["x", "y", "z"], fail_rate=0.3, seed=2) as server:
        store = endpoint_store(tmp_path, server, asked, attempts=8)
        assert server.failures > 0
    assert len(store) == 36


def test_an_endpoint_that_times_out_for_a_third_of_requests_loses_nothing(tmp_path):
    asked = tasks(tmp_path, 12)
    with EndpointServer(lambda body: ["x", "y", "z"], hang_first=4) as server:
        store = endpoint_store(tmp_path, server, asked)
        assert server.calls >= 16  # a busy machine may miss the half second too
    assert [line["id"] for line in store] == [f"q{i}#{k}" for i in range(12) for k in range(3)]


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
        store = endpoint_store(tmp_path, server, asked)
    assert [line for line in store if line["id"] in {k["id"] for k in kept}] == kept
    assert len(store) == 18
