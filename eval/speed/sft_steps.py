"""One training step, timed and weighed: what the SFT benchmarks share."""

import json
import tempfile
import time
from pathlib import Path

import torch

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}USER: {% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} {% else %}ASSISTANT: "
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def step(trainer, batch: dict, *, weighted: bool = True, ones: bool = False) -> float:
    """Forward, loss and backward; returns the loss. Gradients are dropped."""
    inputs = {k: v for k, v in batch.items() if weighted or k != "loss_weights"}
    if ones:
        inputs["loss_weights"] = torch.ones_like(batch["loss_weights"])
    count = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.training_step(trainer.model, inputs, count)
    trainer.model.zero_grad(set_to_none=True)
    return loss.item()


def timed(trainer, batch: dict, weighted: bool) -> tuple[float, float]:
    """Seconds of wall clock and of processor time."""
    start = time.perf_counter(), time.process_time()
    step(trainer, batch, weighted=weighted)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def measure_pair(
    ours, theirs, batch: dict, their_batch: dict, theirs_first: bool
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Times of (ours, TRL's), each on its batch of the same rows."""
    if theirs_first:
        second = timed(theirs, their_batch, False)
        return timed(ours, batch, True), second
    return timed(ours, batch, True), timed(theirs, their_batch, False)


def peak_memory(trainer, batch: dict, weighted: bool) -> int:
    """Most bytes allocated during a step above what was allocated before it."""
    if torch.cuda.is_available() and trainer.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(trainer, batch, weighted=weighted)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step(trainer, batch, weighted=weighted)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])
