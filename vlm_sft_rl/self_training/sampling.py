"""Sample stores: N answers to each of many prompts in one folder of `runs`, from a checkpoint or an endpoint.

A line is `{"id": "QUESTION#k", "question_id", "index", "images", "prompt", "answer", "tokens", "prompt_tokens"}`. Where a
server refused to answer, `answer` is empty and `error` has its reason.
Answers depend on (seed, id) alone, so a store that was interrupted is the same in the end.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from ..data.images import open_image
from ..errors import UserError, short
from ..evaluation.decoders import EngineOptions
from ..runs import BATCHES_PER_CALL, SAMPLES, Run, answer_all, claim, keep_manifest
from ..shapes import COUNT, read_lines
from ..workers import Engine, Workers

SERVER = "server.json"  # what a server did without while a store was filled
LINE = {
    "id": str,
    "question_id": str,
    "index": COUNT,
    "images": [str],
    "prompt": str,
    "answer": str,
    "tokens?": COUNT,
    "prompt_tokens?": COUNT,
    "error?": str,
}


class Sampler(Protocol):
    """What draws the answers to tasks (`id`, `images`, `prompt`), after it has opened each."""

    open: Callable[[dict], dict] | None

    def engine(self, sampling: dict, n: int, seed: int) -> Engine: ...

    def tasks_per_call(self, n: int) -> int: ...


def task(question: dict, prompt: str) -> dict:
    return {"id": question["id"], "images": list(question["images"]), "prompt": prompt}


def run_sampling(
    folder: str | Path,
    tasks: Sequence[dict],
    n: int,
    config: dict,
    sampler: Sampler,
    *,
    sampling: dict,
    seed: int,
    label: str = "samples",
    workers: Workers | None = None,
    console: Console | None = None,
) -> list[dict]:
    """Fill the store of `folder` and return it in the order of `tasks`, `n` lines each.

    Args:
        config: everything the answers depend on; a folder never mixes two of them.
        sampler: loads its model only if something is missing.
        sampling: `temperature`, `top_p`, `top_k`, `max_new_tokens`, `stop`.
        workers: those of a Ray cluster that hold the sampler's model, in place of this process.

    Started under `accelerate launch`, each process answers its share; the first one merges, the others return [].

    Raises UserError: the folder belongs to another configuration or other prompts, the disk is full, or prompts got no
    answer.
    """
    run = claim(folder, {**config, "n": n}, LINE)
    _check_prompts(run, tasks, n)

    def load() -> Engine:
        if isinstance(sampler, EndpointSampler) and n > 1 and sampling["temperature"] > 0:
            keep_manifest(
                Path(folder) / SERVER,
                sampler.probe(tasks, sampling, n, seed),
                "holds answers of a server that took other settings",
                "Serve the model as before, choose another folder, or remove this one.",
            )
        return sampler.engine(sampling, n, seed)

    lines = answer_all(
        run,
        tasks,
        load,
        per_call=sampler.tasks_per_call(n),
        open=sampler.open,
        workers=workers,
        ids=lambda t: _ids(t, n),
        label=label,
        console=console,
    ).lines
    if errors := refusals(lines):
        (console or Console()).print(
            f"{label}: {len(errors)} of {len(lines)} have no answer, which counts as unreadable; the first: {errors[0]}",
            markup=False,
            highlight=False,
        )
    return lines


def refusals(lines: Iterable[dict]) -> list[str]:
    """Why a server did not answer, for each line of a store without an answer."""
    return [line["error"] for line in lines if "error" in line]


def _check_prompts(run: Run, tasks: Sequence[dict], n: int) -> None:
    """The settings of a store name its questions by id alone where questions may be added."""
    for t in tasks:
        for k, name in enumerate(_ids(t, n)):
            line = run.answers.get(name)
            if line is None:
                continue
            if any(line[key] != t[key] for key in ("images", "prompt")):
                raise UserError(
                    f"{run.folder}: its answers to {t['id']!r} are to another prompt or image: {short(line['prompt'], 120)} "
                    f"and now {short(t['prompt'], 120)}. Nothing was changed. Give the changed questions new ids, choose "
                    "another folder, or remove this one."
                )
            if (line["question_id"], line["index"]) != (t["id"], k):
                raise UserError(
                    f"{run.folder}: the line {name!r} says that it is answer {line['index']} to {line['question_id']!r}. It "
                    "was edited: remove it, the rest is kept."
                )


def _ids(t: dict, n: int) -> list[str]:
    return [f"{t['id']}#{k}" for k in range(n)]


def _lines(t: dict, answers: Iterable[dict]) -> list[dict]:
    return [
        {"id": f"{t['id']}#{k}", "question_id": t["id"], "index": k, "images": t["images"], "prompt": t["prompt"]}
        | answer
        for k, answer in enumerate(answers)
    ]  # fmt: skip


def read_store(folder: str | Path) -> list[dict]:
    """The lines of a finished store. Raises UserError: a line is not one of a store, or an id comes twice."""
    cure = "Remove this line and the stage.json beside it, and give the same command again."
    return list(read_lines(Path(folder) / SAMPLES, LINE, cure, "id"))


class CheckpointSampler:
    """Samples from a checkpoint; loads it once, when it is first needed.

    Args:
        model: checkpoint or adapter folder (on vLLM a whole one), or a name on the Hub.
        options: what computes, and how many answers side by side.
    """

    def __init__(self, model: str | Path, image_root, options: EngineOptions):
        self.path, self.image_root, self.options = model, image_root, options
        self._loaded = None

    def open(self, t: dict) -> dict:
        return t | {"pictures": [open_image(name, self.image_root) for name in t["images"]] or None}

    def engine(self, sampling: dict, n: int, seed: int) -> Engine:
        def answer(tasks: Sequence[dict]) -> Iterator[list[dict]]:
            from ..decoding import SamplingConfig, sample_many

            if self._loaded is None:
                self._loaded = self.options.load(self.path)
            groups = sample_many(
                *self._loaded,
                [t["pictures"] for t in tasks],
                [t["prompt"] for t in tasks],
                n,
                SamplingConfig(seed=seed, **{k: v for k, v in sampling.items() if k != "stop"}),
                stop=sampling["stop"],
                ids=[t["id"] for t in tasks],
                batch_size=self.options.side_by_side,
            )
            lines = []
            for t, group in zip(tasks, groups, strict=True):
                lines += _lines(
                    t,
                    [
                        {
                            "answer": a.text,
                            "tokens": a.counts.tokens_kept,
                            "prompt_tokens": a.counts.prompt_tokens,
                        }
                        for a in group
                    ],
                )
            yield lines

        return answer

    def tasks_per_call(self, n: int) -> int:
        """Tasks for one call of the engine."""
        return max(1, BATCHES_PER_CALL * self.options.side_by_side // n)

    def close(self) -> None:
        """Give the model's memory back."""
        from ..decoding.vllm_engine import VLLMModel

        model, self._loaded = self._loaded and self._loaded[0], None
        if isinstance(model, VLLMModel):  # it shares parts with others of its process
            model.close()


class EndpointSampler:
    """Samples from an OpenAI-compatible endpoint (vLLM, SGLang, …).

    Args:
        client: an `EndpointClient`; its ledger keeps answers across restarts too.
    """

    open = None

    def __init__(self, client, image_root):
        self.client, self.image_root = client, image_root
        self._refused: list[
            list[dict]
        ] = []  # not written while nothing was answered: then the settings are wrong

    def probe(self, tasks: Sequence[dict], sampling: dict, n: int, seed: int) -> dict:
        """See `EndpointClient.probe`."""
        from ..teacher import PROBES

        return self.client.probe([self._request(t, sampling, n, seed) for t in tasks[:PROBES]])

    def engine(self, sampling: dict, n: int, seed: int) -> Engine:
        def answer(tasks: Sequence[dict]) -> Iterator[list[dict]]:
            replies = self.client.complete(self._request(t, sampling, n, seed) for t in tasks)
            for t, reply in zip(tasks, replies, strict=True):
                if reply.error is None:
                    yield _lines(t, ({"answer": text.strip()} for text in reply.texts))
                elif reply.refused:
                    self._refused.append(_lines(t, [{"answer": "", "error": reply.error}] * n))
                if self.client.usage.answered or self.client.usage.cached:
                    yield from self._refused
                    self._refused = []

        return answer

    def tasks_per_call(self, n: int) -> int:
        return max(1, 16 * self.client.settings.concurrency)

    def _request(self, t: dict, sampling: dict, n: int, seed: int):
        from ..teacher import ChatRequest, user_message

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
