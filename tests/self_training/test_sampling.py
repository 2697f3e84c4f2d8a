"""Stores of N answers to each prompt: complete, resumable, shared out; from a checkpoint and from an endpoint."""

import json

import families
import pytest
from endpoint_server import EndpointServer
from json_lines import read_lines
from PIL import Image

from vlm_sft_rl import io as files
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import EngineOptions
from vlm_sft_rl.self_training.config import SelfTrainingConfig
from vlm_sft_rl.self_training.sampling import (
    CheckpointSampler,
    EndpointSampler,
    read_store,
    refusals,
    run_sampling,
)
from vlm_sft_rl.teacher import EndpointClient

SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "max_new_tokens": 5, "stop": []}


@pytest.fixture
def tasks(tmp_path):
    tasks = []
    for i in range(12):
        Image.new("RGB", (28, 28), (20 * i, 90, 10)).save(tmp_path / f"{i}.png")
        tasks.append({"id": f"q{i}", "images": [f"{i}.png"], "prompt": f"What is {i}?"})
    return tasks


class Counting:
    """A sampler that writes down what it was asked and breaks off after so many prompts."""

    def __init__(self, calls=None, stop_after=99, per_call=3):
        self.open, self.calls, self.stop_after, self.per_call = (
            None,
            [] if calls is None else calls,
            stop_after,
            per_call,
        )

    def tasks_per_call(self, n):
        return self.per_call

    def engine(self, sampling, n, seed):
        def answer(part):
            for t in part:
                if len(self.calls) >= self.stop_after:
                    raise KeyboardInterrupt
                self.calls.append(t["id"])
                yield [line(t, k) for k in range(n)]

        return answer


def line(t, k):
    names = {"id": f"{t['id']}#{k}", "question_id": t["id"], "index": k}
    return names | {"images": t["images"], "prompt": t["prompt"], "answer": f"{t['id']} says {k}"}


def fill(folder, tasks, sampler=None, *, n=2, seed=0):
    return run_sampling(folder, tasks, n, {"seed": seed}, sampler or Counting(), sampling=SAMPLING, seed=seed)


def test_a_store_is_complete_in_order_and_asks_nobody_again(tmp_path, tasks):
    lines = fill(tmp_path / "s", tasks)
    assert lines == [line(t, k) for t in tasks for k in range(2)] == read_store(tmp_path / "s")
    assert fill(tmp_path / "s", tasks, Counting(stop_after=0)) == lines
    with pytest.raises(UserError, match=r"seed: 0 -> 1"):
        fill(tmp_path / "s", tasks, seed=1)


def test_an_interrupted_store_goes_on_where_it_was(tmp_path, tasks):
    calls = []
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "s", tasks, Counting(calls, 4))
    with open(tmp_path / "s" / "samples.jsonl", "a") as handle:
        handle.write('{"id": "q4#0", "answ')  # a line that a killed process left
    assert len(fill(tmp_path / "s", tasks, Counting(calls))) == 24
    assert sorted(calls) == sorted(t["id"] for t in tasks)


def test_answers_to_another_prompt_are_not_taken_for_answers_to_this_one(tmp_path, tasks):
    fill(tmp_path / "s", tasks)
    before = (tmp_path / "s" / "samples.jsonl").read_bytes()
    tasks[5]["prompt"] = "What is five?"
    with pytest.raises(UserError, match=r"answers to 'q5' are to another prompt.*Nothing was changed"):
        fill(tmp_path / "s", tasks)
    assert (tmp_path / "s" / "samples.jsonl").read_bytes() == before
    assert len(fill(tmp_path / "s", tasks[:5])) == 10


def test_a_full_disk_is_a_message_and_nothing_is_lost(tmp_path, tasks, monkeypatch):
    calls, real = [], files.os.fsync

    def full(handle):
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        return real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"the disk is full.*goes on after the last complete line"):
        fill(tmp_path / "s", tasks, Counting(calls, per_call=1))
    monkeypatch.setattr(files.os, "fsync", real)
    assert len(fill(tmp_path / "s", tasks, Counting(calls, per_call=1))) == 24


def test_shards_of_several_processes_make_the_same_store(tmp_path, tasks, monkeypatch):
    shares = {0: [], 1: []}
    whole = fill(tmp_path / "one", tasks)
    fill(tmp_path / "two", [])  # the first process claims the folder
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):  # the first process waits for the second
        monkeypatch.setenv("RANK", str(rank))
        lines = fill(tmp_path / "two", tasks, Counting(shares[rank], per_call=2))
        assert lines == (whole if rank == 0 else [])
    assert [len(shares[rank]) for rank in (0, 1)] == [6, 6] and not set(shares[0]) & set(shares[1])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["run.json", "samples.jsonl"]


def test_the_model_gives_the_same_store_in_any_batching(tmp_path, tasks):
    families.save(*families.llava(), tmp_path / "model")
    stores = []
    for batch in (2, 12):
        sampler = CheckpointSampler(
            tmp_path / "model", tmp_path, EngineOptions(batch_size=batch, device="cpu")
        )
        stores.append(fill(tmp_path / f"b{batch}", tasks[:4], sampler, n=3, seed=7))
    assert [line["answer"] for line in stores[0]] == [line["answer"] for line in stores[1]]
    assert all(line["tokens"] <= 5 and line["prompt_tokens"] > 10 for line in stores[0])


@pytest.mark.parametrize("other", [{"sample_ray": "local"}, {"engine": "vllm"}])
def test_a_server_and_another_way_to_sample_exclude_each_other(other):
    config = SelfTrainingConfig(serve="vllm serve {model} --port {port}", **other)
    with pytest.raises(UserError, match=rf"`serve` and `{next(iter(other))}.*are two ways to sample"):
        config.check_self_training()


def fill_from(server, folder, tasks, **options):
    options = {"ledger": folder / "ledger.jsonl", "timeout": 0.5, "backoff": 0.01} | options
    with EndpointClient(server.url, "policy", **options) as client:
        return fill(folder / "s", tasks, EndpointSampler(client, folder), n=3)


def test_an_endpoint_gets_images_settings_and_n(tmp_path, tasks):
    def answer(body):
        return [f"{body['messages'][0]['content'][1]['text']} {k}" for k in range(3)]

    with EndpointServer(answer) as server:
        lines = fill_from(server, tmp_path, tasks[:3])
        hot, body = server.bodies[0], server.bodies[-1]
    assert (hot["temperature"], hot["n"]) == (1.5, 2), "first it is asked whether samples differ"
    assert [line["answer"] for line in lines[:3]] == ["What is 0? 0", "What is 0? 1", "What is 0? 2"]
    assert body["n"] == 3 and body["temperature"] == 0.9 and body["top_k"] == 50 and body["max_tokens"] == 5
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")


@pytest.mark.parametrize("faults", [{"fail_rate": 0.3, "seed": 2}, {"hang_first": 4}])
def test_an_endpoint_that_fails_or_hangs_for_a_third_of_requests_loses_nothing(tmp_path, tasks, faults):
    with EndpointServer(lambda body: ["x", "y", "z"], **faults) as server:
        lines = fill_from(server, tmp_path, tasks, attempts=8)
        # a busy machine may miss the half second too
        assert server.failures > 0 if "fail_rate" in faults else server.calls >= 16
    assert [line["id"] for line in lines] == [f"q{i}#{k}" for i in range(12) for k in range(3)]


def test_prompts_without_an_answer_are_counted_and_asked_again(tmp_path, tasks):
    with (
        EndpointServer(lambda body: ["x", "y", "z"], fail_rate=0.3, seed=1) as server,
        pytest.raises(UserError, match=r"of 6 prompts got no answer.*What was answered is kept"),
    ):
        fill_from(server, tmp_path, tasks[:6], attempts=1)
    kept = read_lines(tmp_path / "s" / "samples.jsonl")
    assert 0 < len(kept) < 18
    with EndpointServer(lambda body: ["new", "newer", "newest"]) as server:
        lines = fill_from(server, tmp_path, tasks[:6])
    assert len(lines) == 18 and all(line in lines for line in kept)


def test_what_a_server_refuses_is_kept_with_its_reason_and_the_run_goes_on(tmp_path, tasks):
    def answer(body):
        if "What is 2?" in str(body):
            return {"choices": [{"message": {"content": None, "refusal": "I must not."}}]}
        return ["x", "y", "z"]

    with EndpointServer(answer) as server:
        lines = fill_from(server, tmp_path, tasks)
        calls = server.calls
        assert fill_from(server, tmp_path, tasks) == lines and server.calls == calls, "it is not asked again"
    assert len(lines) == 36 and [line["answer"] for line in lines if line["question_id"] == "q2"] == [""] * 3
    assert refusals(lines) == ["request 'q2': the model refused: 'I must not.'"] * 3
    assert read_store(tmp_path / "s") == lines


def test_nothing_is_kept_of_a_server_that_refuses_everything(tmp_path, tasks):
    with (
        EndpointServer(lambda body: {"choices": 5}) as server,
        pytest.raises(UserError, match="no `choices`"),
    ):
        fill_from(server, tmp_path, tasks)
    assert not (tmp_path / "s" / "samples.jsonl").exists()


def test_a_store_is_completed_by_a_server_that_takes_the_same_fields(tmp_path, tasks):
    def answer(body):
        return {"choices": 5} if "What is 2?" in str(body) else ["x", "y", "z"]

    def some(server, part):
        with EndpointClient(server.url, "policy", backoff=0.01) as client:
            return fill(tmp_path / "s", part, EndpointSampler(client, tmp_path), n=3)

    with EndpointServer(answer, refuses={"top_k": 422}) as server:
        assert len(some(server, tasks[:6])) == 18
    assert json.loads((tmp_path / "s" / "server.json").read_text()) == {"left_out": ["top_k"]}
    with EndpointServer(answer) as server:
        with pytest.raises(UserError, match=r"another|left_out.*top_k"):
            some(server, tasks)
        assert len(some(server, tasks[:6])) == 18, "what is complete needs no server"


def test_samples_of_a_server_that_ignores_the_temperature_are_refused(tmp_path, tasks):
    with EndpointServer(lambda body: "always this") as server:
        with pytest.raises(UserError, match=r"ignores `temperature`.*vLLM or SGLang"):
            fill_from(server, tmp_path, tasks)
        assert not (tmp_path / "s" / "samples.jsonl").exists() and server.calls <= 9
