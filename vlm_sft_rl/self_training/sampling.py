"""Sample stores: N answers to each of many prompts in one JSONL file, shared out over processes and resumable by prompt.

A line is `{"id": "QUESTION#k", "question_id", "index", "images", "prompt", "answer", "tokens", "prompt_tokens"}`. A
killed run loses the prompts of one call; answers depend on (seed, id) alone, so the store is the same in the end.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..data.images import open_image
from ..errors import UserError
from ..evaluation.samples import SAMPLES, collect, cut_broken_end, merge, shard_path
from ..io import append_jsonl, read_jsonl
from ..runs import claim, is_claimed

POLL_SECONDS = 0.5
CALLS_PER_BATCH = 4  # the engine replaces finished rows at once, so a few batches a call keep it full

# tasks (`id`, `images`, `prompt`) -> for each, in order, its lines without ids, or None where there is no answer (yet)
Engine = Callable[[Sequence[dict]], Iterator[list[dict] | None]]


def task(question: dict, prompt: str) -> dict:
    return {"id": question["id"], "images": list(question["images"]), "prompt": prompt}


def run_sampling(
    folder: str | Path,
    tasks: Sequence[dict],
    n: int,
    config: dict,
    make_engine: Callable[[], Engine],
    *,
    per_call: int,
    label: str = "samples",
    console: Console | None = None,
) -> list[dict]:
    """Fill the store of `folder` and return it in the order of `tasks`, `n` lines each.

    Args:
        config: everything the answers depend on; a folder never mixes two of them.
        make_engine: called only if something is missing.
        per_call: tasks given to the engine at once.

    Started under `accelerate launch`, each process answers its share; the first one merges, the others return [].

    Raises:
        UserError: the folder belongs to another configuration or other prompts, the disk is full, or prompts got no answer.
    """
    folder = Path(folder)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    names = [f"{t['id']}#{k}" for t in tasks for k in range(n)]
    config = {**config, "n": n}
    if rank == 0:
        claim(folder, config)
    else:
        _wait(lambda: is_claimed(folder, config))
    path = shard_path(folder, rank, world_size)
    cut_broken_end(path)
    found = collect(folder)
    _check_prompts(folder, tasks, n, found)
    todo = [t for t in tasks[rank::world_size] if any(f"{t['id']}#{k}" not in found for k in range(n))]
    failed = 0
    if todo:
        engine = make_engine()
        for t, lines in _progress(engine, todo, per_call, label, console or Console(quiet=rank > 0)):
            if lines is None:
                failed += 1
                continue
            kept = [line for line in _lines(t, lines) if line["id"] not in found]
            append_jsonl(path, kept)
    if failed:
        raise UserError(
            f"{folder}: {failed} of {len(todo)} prompts got no answer. What was answered is kept: give the same command "
            "again to ask for the rest."
        )
    if rank > 0:
        return []
    complete = _wait(lambda: _complete(folder, names))
    return merge(folder, names, complete)


def _check_prompts(folder: Path, tasks: Sequence[dict], n: int, found: dict[str, dict]) -> None:
    """The settings of a store name its questions by id alone where questions may be added."""
    for t in tasks:
        for k in range(n):
            line = found.get(f"{t['id']}#{k}")
            if line is not None and any(line[key] != t[key] for key in ("images", "prompt")):
                raise UserError(
                    f"{folder}: its answers to {t['id']!r} are to another prompt or image: {line['prompt']!r:.120} and now "
                    f"{t['prompt']!r:.120}. Nothing was changed. Give the changed questions new ids, choose another folder, "
                    "or remove this one."
                )


def _lines(t: dict, lines: Iterable[dict]) -> list[dict]:
    return [
        {"id": f"{t['id']}#{k}", "question_id": t["id"], "index": k, "images": t["images"], "prompt": t["prompt"], **line}
        for k, line in enumerate(lines)
    ]  # fmt: skip


def _progress(
    engine: Engine, todo: Sequence[dict], per_call: int, label: str, console: Console
) -> Iterator[tuple[dict, list[dict] | None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(label, total=len(todo))
        for start in range(0, len(todo), per_call):
            part = todo[start : start + per_call]
            for t, lines in zip(part, engine(part), strict=True):
                yield t, lines
                progress.advance(bar)


def _complete(folder: Path, names: Sequence[str]) -> dict[str, dict] | None:
    found = collect(folder)
    return found if found.keys() >= set(names) else None


def _wait(attempt):
    """Poll until there is a result; the launcher ends all processes when one fails."""
    while (result := attempt()) is None:
        time.sleep(POLL_SECONDS)
    return result


def read_store(folder: str | Path) -> list[dict]:
    """The lines of a finished store."""
    return [row for _, row in read_jsonl(Path(folder) / SAMPLES)]


class HFSampler:
    """Samples from a checkpoint; loads it once, when it is first needed.

    Args:
        model: checkpoint or adapter folder.
        sampling: `temperature`, `top_p`, `top_k`, `max_new_tokens`, `stop`.
        batch_size: answers decoded side by side.
    """

    def __init__(self, model: str | Path, image_root, *, batch_size: int, device: str | None = None):
        self.path, self.image_root, self.batch_size, self.device = model, image_root, batch_size, device
        self._loaded = None

    def engine(self, sampling: dict, n: int, seed: int) -> Engine:
        def answer(tasks: Sequence[dict]) -> Iterator[list[dict]]:
            from ..decoding import SamplingConfig, sample_many
            from ..models.load import load_for_inference

            if self._loaded is None:
                self._loaded = load_for_inference(self.path, self.device)[:2]
            images = [[open_image(name, self.image_root) for name in t["images"]] or None for t in tasks]
            groups = sample_many(
                *self._loaded,
                images,
                [t["prompt"] for t in tasks],
                n,
                SamplingConfig(seed=seed, **{k: v for k, v in sampling.items() if k != "stop"}),
                stop=sampling["stop"],
                ids=[t["id"] for t in tasks],
                batch_size=self.batch_size,
            )
            for group in groups:
                yield [
                    {
                        "answer": a.text,
                        "tokens": a.counts.tokens_kept,
                        "prompt_tokens": a.counts.prompt_tokens,
                    }
                    for a in group
                ]

        return answer

    def tasks_per_call(self, n: int) -> int:
        """Tasks for one call of the engine."""
        return max(1, CALLS_PER_BATCH * self.batch_size // n)


class EndpointSampler:
    """Samples from an OpenAI-compatible endpoint (vLLM, SGLang, `transformers serve`, …).

    Args:
        client: an `EndpointClient`; its ledger keeps answers across restarts too.
    """

    def __init__(self, client, image_root):
        self.client, self.image_root = client, image_root

    def engine(self, sampling: dict, n: int, seed: int) -> Engine:
        def answer(tasks: Sequence[dict]) -> Iterator[list[dict] | None]:
            for reply in self.client.complete(self._request(t, sampling, n, seed) for t in tasks):
                yield None if reply.error else [{"answer": text.strip()} for text in reply.texts]

        return answer

    def tasks_per_call(self, n: int) -> int:
        return max(1, 16 * self.client.concurrency)

    def _request(self, t: dict, sampling: dict, n: int, seed: int):
        from ..endpoint import ChatRequest, user_message

        return ChatRequest(
            t["id"],
            [user_message(t["prompt"], t["images"])],
            max_tokens=sampling["max_new_tokens"],
            temperature=sampling["temperature"],
            top_p=sampling["top_p"],
            n=n,
            stop=sampling["stop"],
            seed=seed,
            extra={} if sampling["top_k"] is None else {"top_k": sampling["top_k"]},
            image_root=self.image_root,
        )
