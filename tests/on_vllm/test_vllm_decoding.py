"""Every decoder gives the answers of transformers on vLLM, token for token, in float32: what is drawn is drawn from the same
random streams."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("vllm", reason="`make test-vllm` makes an environment with vLLM")

from decoded import PROMPTS, ROUNDING, equal, pictures, run_scripted
from json_lines import read_lines, write_lines
from transformers import AutoConfig
from worlds import evaluate, write_world

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.decode import DecodeOptions, decode
from vlm_sft_rl.decoding import (
    RetrospectiveConfig,
    SamplingConfig,
    SearchConfig,
    generate_plain,
    sample_distinct,
)
from vlm_sft_rl.decoding.config import engine_version
from vlm_sft_rl.decoding.generate import R3V_SAMPLING
from vlm_sft_rl.decoding.vllm_engine import CPU_BLOCK, VLLMModel, engine_config, load_vllm
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.decoders import DECODERS, ReflectionConfig, check_engine, configure
from vlm_sft_rl.io import read_json
from vlm_sft_rl.models.load import load_for_inference
from vlm_sft_rl.models.sidecar import Sidecar, write_sidecar
from vlm_sft_rl.models.vllm_names import for_vllm
from vlm_sft_rl.parity.readings import by_engine, case_of
from vlm_sft_rl.pocket.render import render
from vlm_sft_rl.pocket.world import draw_scene


def loaded(folder, in_flight: int) -> dict[str, tuple]:
    """Model and processor by engine."""
    return {
        "hf": load_for_inference(folder, "cpu", "float32")[:2],
        "vllm": load_vllm(folder, None, "float32", in_flight),
    }


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl", "qwen3_vl"])
def engines(request, checkpoint):
    return loaded(checkpoint(request.param), in_flight=3)


@pytest.fixture(scope="module")
def pocket(verifier):
    return loaded(verifier, in_flight=32)


def check_equal(answers: dict[str, list], *counted: str) -> list:
    """All that answers have, spans and events included; of their counts, `counted`."""
    shown = {}
    for engine, made in answers.items():
        shown[engine] = [answer.to_json() for answer in made]
        for item in shown[engine]:
            item["counts"] = {name: item["counts"][name] for name in ("tokens_kept", *counted)}
    for ours, other in zip(shown["hf"], shown["vllm"], strict=True):
        assert equal(ours, other), (ours, other)
    return answers["vllm"]


def test_every_distribution_is_that_of_transformers(engines):
    """With rewinds to phrases and sentences, and rewritten questions."""
    config = RetrospectiveConfig(threshold=0.5, local_attempts=3, total_attempts=12, max_new_tokens=60)
    answers, rows = {}, {}
    for name, (model, processor) in engines.items():
        answers[name], kinds, seen = run_scripted(model, processor, config)
        assert {"accept", "reject", "local_rewind", "sentence_rewind", "hint", "finish"} <= kinds
        rows[name] = [[logits for row, _, logits in seen if row == i] for i in range(len(PROMPTS))]
    check_equal(answers, "prompt_tokens")
    for ours, other in zip(rows["hf"], rows["vllm"], strict=True):
        for logits, of_vllm in zip(ours, other, strict=True):
            assert logits.std() > 1
            size = min(len(logits), len(of_vllm))  # one of them has rows behind the vocabulary
            assert (logits[:size] - of_vllm[:size]).abs().max() < ROUNDING * 10


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [
        ("greedy", {}),
        ("sample", {"temperature": 1.0, "top_p": 0.9}),
        ("retrospective", {"temperature": 1.0, "total_attempts": 8}),
        ("retrospective", {"rules": "released", "total_attempts": 8}),
        ("correct", {}),
        ("correct", {"layout": "message"}),
        ("majority", {"candidates": 2}),
        ("majority", {"candidates": 3, "distinct": True}),
        ("self-select", {"candidates": 2}),
        ("self-refine", {}),
        ("best-of-n", {}),
        ("sentence-beam", {}),
        ("stage-beam", {}),
        ("swires", {"max_rounds": 1}),
    ],
)
def test_a_decoder_gives_the_same_answers(engines, decoder, settings):
    limits = {"max_new_tokens": 12} | ({"threshold": 0.02} if decoder == "retrospective" else {})
    entry = DECODERS[decoder]
    config = entry.config(**entry.fixed | limits | settings)
    images = [*pictures(2), None, pictures(2)]  # one picture, none, two
    made = {
        name: entry.generate(*pair, images, PROMPTS[:4], config, ids=list("abcd"), batch_size=3)
        for name, pair in engines.items()
    }
    # a search has its prompts in a cache of its own where there is one, and counts that too
    counted = [] if entry.config in (ReflectionConfig, SearchConfig) else ["prompt_tokens"]
    assert any(len(answer.text) > 1 for answer in check_equal(made, *counted))


def test_a_decoder_without_logits_is_refused():
    assert engine_version("vllm").startswith("vllm 0.32")
    for name, entry in DECODERS.items():
        config = entry.config(**entry.fixed)
        if name in ("vcd", "dola", "opera"):
            with pytest.raises(UserError, match=f"--decoder {name} needs more of the model.*greedy, sample"):
                check_engine("vllm", name, config)
        else:
            assert check_engine("vllm", name, config) == engine_version("vllm")
    with pytest.raises(UserError, match="--parallel-attempts copies cached keys"):
        check_engine("vllm", "retrospective", RetrospectiveConfig(parallel_attempts=2))


def scenes(count: int) -> list:
    rng = random.Random(5)
    return [render(draw_scene(rng, 0.5), number) for number in range(count)]


NOT_DRAWN = {"temperature_step": 0.0, "local_attempts": 1, "total_attempts": 3, "reject_repeats": False}
PUBLISHED = NOT_DRAWN | {"without_replacement": False}


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [
        ({**PUBLISHED, "rewrite_query": False}, {"reject", "local_rewind", "flag"}),
        ({**PUBLISHED, "rewrite_query": True}, {"reject", "sentence_rewind", "hint"}),
        ({**NOT_DRAWN, "rewrite_query": True, "local_attempts": 3}, {"reject", "local_rewind", "accept"}),
        ({**NOT_DRAWN, "commit": "phrase"}, {"reject", "accept"}),
        ({"total_attempts": 9}, {"reject", "local_rewind", "accept"}),  # what the checkpoint says: drawn
    ],
    ids=["rewinds", "rewriting", "without-replacement", "committed", "drawn"],
)
def test_a_model_that_verifies_itself_takes_back_the_same_phrases(pocket, verifier, settings, kinds):
    config = configure("retrospective", verifier, {"max_new_tokens": 96, **settings})
    images = scenes(24)
    ask = DECODERS["retrospective"].generate
    made = {
        name: ask(*pair, images, ["Describe the image."] * len(images), config, batch_size=16)
        for name, pair in pocket.items()
    }
    answers = check_equal(made, "prompt_tokens")
    assert kinds <= {event["kind"] for answer in answers for event in answer.trace}
    assert sum(len(answer.spans) for answer in answers) > 2 * len(images)


def test_a_rewind_computes_its_last_block_and_no_picture(pocket, verifier):
    model, processor = pocket["vllm"]
    config = configure("retrospective", verifier, {"max_new_tokens": 96, **PUBLISHED})
    before = model.traffic.copy()
    images = [image.rotate(90) for image in scenes(12)]  # not seen before
    asked = ["Describe the image. " * 24] * len(images)
    answers = DECODERS["retrospective"].generate(model, processor, images, asked, config, batch_size=12)
    traffic = model.traffic - before
    rewinds = traffic["requests"] - len(images)
    assert rewinds > 4
    counts = [answer.counts for answer in answers]
    first = sum(count.prompt_tokens for count in counts)
    assert first > 100 * len(images)
    assert traffic["prompt_tokens"] > first + 100 * rewinds
    # a block that is not full is not in the cache, nor is the last token
    assert traffic["prompt_tokens"] - traffic["cached"] <= first + 2 * CPU_BLOCK * rewinds
    assert [count.image_encodes for count in counts] == [1] * len(images)
    assert sum(count.forwards for count in counts) == traffic["drawn"]


def test_parts_of_prompts_and_answers_that_made_room_for_others_change_nothing(checkpoint):
    """Behind a part of a prompt vLLM draws, too; where blocks of keys run out it computes a row again."""
    folder = checkpoint("llava")
    model, processor = load_for_inference(folder, "cpu", "float32")[:2]
    few = {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 24, "max_model_len": 320}
    images, prompts = pictures(4) * 2, [f"{text} {text} {text}" for text in PROMPTS[:4]] * 2
    config = replace(R3V_SAMPLING, max_new_tokens=60, seed=3)
    made = {}
    for name, asked in {"hf": model, "vllm": VLLMModel(for_vllm(folder), "float32", 8, **few)}.items():
        groups = sample_distinct(asked, processor, images, prompts, 2, config, batch_size=8)
        made[name] = [answer for group in groups for answer in group]
    assert sum(len(answer.text) > 20 for answer in check_equal(made)) > 8


def test_what_vllm_cannot_do_is_refused_by_name(checkpoint, tmp_path):
    folder = checkpoint("llava")
    with pytest.raises(UserError, match="leave out the device 'cpu'"):
        load_vllm(folder, "cpu", "auto", 4)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"this is an adapter\. Merge it first"):
        load_vllm(tmp_path / "adapter", None, "auto", 4)


def test_keys_take_what_all_answers_need(verifier, monkeypatch):
    """On a CPU, unless the user has set it: 70 % of the free memory would be gone for any model."""

    def cache(**options):
        return engine_config(for_vllm(verifier), "float32", 16, **options).cache_config

    assert cache().kv_cache_memory_bytes == int(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    config = AutoConfig.from_pretrained(verifier).get_text_config()
    # both of keys and values, 4 bytes
    token = config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2 * 4
    needed = 16 * config.max_position_embeddings * token
    assert needed < cache().kv_cache_memory_bytes < 1.3 * needed
    assert cache(kv_cache_memory_bytes=2**27).kv_cache_memory_bytes == 2**27
    # where that does not fit vLLM takes its share
    assert cache(gpu_memory_utilization=0.001).kv_cache_memory_bytes is None
    assert "VLLM_CPU_KVCACHE_SPACE" not in os.environ
    model, processor = load_vllm(verifier, None, "float32", 4, mm_processor_cache_gb=0.25)
    assert model.longest == config.max_position_embeddings
    settings = model.engine.vllm_config
    assert settings.model_config.multimodal_config.mm_processor_cache_gb == 0.25
    (answer,) = generate_plain(model, processor, scenes(1), ["What?"], SamplingConfig(max_new_tokens=4))
    assert answer.text


def test_prompts_and_answers_that_are_too_long_are_refused(checkpoint):
    model = VLLMModel(checkpoint("qwen2_5_vl"), "float32", 4, max_model_len=160)
    processor = load_for_inference(checkpoint("qwen2_5_vl"), "cpu", "float32")[1]

    def ask(prompt: str, length: int):
        config = SamplingConfig(max_new_tokens=length)
        return generate_plain(model, processor, pictures(1), [prompt], config, ids=["long"])

    with pytest.raises(UserError, match=r"'long'.*vLLM refuses \d+ tokens and 1 images"):
        ask("What is it? " * 30, 4)
    with pytest.raises(UserError, match=r"'long'.*longer than the 160 tokens.*--max-new-tokens"):
        ask("What?", 200)
    assert len(ask("What?", 4)) == 1  # and the next one is answered


def test_pictures_that_vllm_expands_in_its_own_way_are_refused(checkpoint):
    model, processor = load_vllm(checkpoint("qwen3_vl"), None, "float32", 4)
    processor.image_processor.size = {"shortest_edge": 32 * 32 * 16, "longest_edge": 32 * 32 * 16}
    with pytest.raises(UserError, match=r"vLLM makes \d+ tokens of the prompt .* transformers \d+"):
        generate_plain(model, processor, pictures(1), ["What?"], SamplingConfig(max_new_tokens=2))
    # the certificate reads on, and shows what differs
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cup."}]}
    case = case_of(VisionCollator(processor), row | {"images": pictures(1)})
    (reading,) = by_engine(model, processor, [case], detours=False, batch_size=1)
    assert reading.ids != case.ids and reading.ids[reading.start :] == case.answer


def test_the_engine_and_its_version_stand_in_the_run(checkpoint, tmp_path):
    folder = checkpoint("llava")
    write_sidecar(folder, Sidecar(threshold=0.02))
    spec = write_world(tmp_path)
    runs = {}
    for engine in ("hf", "vllm"):
        runs[engine] = evaluate(
            spec, folder, tmp_path / engine, tmp_path / "data", decoder="retrospective", engine=engine
        )
        assert json.loads((tmp_path / engine / "run.json").read_text())["engine"] == engine_version(engine)
        assert runs[engine]["config"]["engine"] == engine_version(engine)
    texts = [
        [line["tagged_answer"] for line in read_lines(tmp_path / engine / "samples.jsonl")] for engine in runs
    ]
    assert texts[0] == texts[1] and any(texts[0])
    with pytest.raises(UserError, match=r"engine.*transformers"):
        evaluate(spec, folder, tmp_path / "hf", tmp_path / "data", decoder="retrospective", engine="vllm")


def test_many_rows_are_answered_alike_and_a_run_that_was_killed_goes_on(verifier, tmp_path):
    for number, scene in enumerate(scenes(10)):
        scene.save(tmp_path / f"{number}.png")
    rows = [{"id": f"s{i}", "images": [f"{i}.png"], "question": "Describe the image."} for i in range(10)]
    write_lines(tmp_path / "rows.jsonl", rows)

    def answers(engine: str) -> tuple[list[dict], int]:
        options = DecodeOptions(engine=engine, batch_size=4, shard_rows=8, dtype="float32")
        report = decode(tmp_path / "rows.jsonl", tmp_path / engine, verifier, options=options)
        shards = sorted((tmp_path / engine).glob("shard-?????.jsonl"))
        return [line for path in shards for line in read_lines(path)], report.answered

    expected, _ = answers("hf")
    made, count = answers("vllm")
    assert count == len(made) == 10 and sum(len(line["spans"]) for line in made) > 20
    for ours, other in zip(expected, made, strict=True):
        assert equal(ours | {"counts": None}, other | {"counts": None})
    shard = tmp_path / "vllm/shard-00000.jsonl"
    write_lines(tmp_path / "vllm/shard-00000.part.jsonl", read_lines(shard)[:3])
    shard.unlink()
    again, count = answers("vllm")
    assert count == 5 and [line["row"] for line in again] == list(range(10))
    assert [line["tagged_answer"] for line in again] == [line["tagged_answer"] for line in made]
    assert read_json(tmp_path / "vllm/run.json")["engine"] == engine_version("vllm")


def test_the_command_line_answers_on_vllm(verifier, tmp_path):
    scenes(1)[0].save(tmp_path / "scene.png")
    command = [sys.executable, "-m", "vlm_sft_rl.cli", "generate", "--model", str(verifier), "--engine"]
    asked = ["--image", str(tmp_path / "scene.png"), "--prompt", "Describe the image.", "--json"]
    both = [
        subprocess.run([*command, engine, *asked], check=True, capture_output=True, text=True).stdout
        for engine in ("hf", "vllm")
    ]
    first, second = (json.loads(text) for text in both)
    assert first["tagged_text"] == second["tagged_text"] != ""
