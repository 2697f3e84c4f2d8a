"""Many questions put to a model, by this process or by the workers of a Ray cluster: the same answers either way.

On Ray an actor a GPU (or CPU core) holds the model, tasks beside it read the questions and open their images ahead of it,
and what a lost worker was doing is done again by others: all of that is Ray Data's. Answers come to the process that asked,
which alone writes, so none is written twice.
"""

import importlib.util
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeVar

from .errors import UserError, first_line
from .settings import Checked, setting

LOCAL = "local"
MOST_BLOCKS = 1000  # of a list of parts; Ray plans every one of them before the first begins
T = TypeVar("T")

# questions -> finished answers with their ids: those of one question or of many at a time, as they come; a question
# whose answers are left out has none (yet)
Engine = Callable[[Sequence[dict]], Iterable[list[dict]]]


def process_share() -> tuple[int, int]:
    """(rank, world size) that the launcher gave to this process."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@dataclass(frozen=True)
class Workers(Checked):
    """Where a model is asked, other than in this process."""

    ray: str = setting(
        help="Run on a Ray cluster at this address (auto, HOST:6379, ray://HOST:10001). local starts one on this machine."
    )
    workers: int | None = setting(
        None, "With --ray: most workers that hold the model. Default: one for each GPU; without GPUs all cores "
            "but one.", least=1
    )  # fmt: skip

    def __post_init__(self):
        """Raises UserError: no positive number of workers, a process of a launcher, or Ray is not installed."""
        super().__post_init__()
        if process_share()[1] > 1:
            raise UserError(
                "--ray: one process asks, and the workers of the cluster answer. Start it without a launcher."
            )
        if importlib.util.find_spec("ray") is None:
            raise UserError("--ray: Ray is not installed. Call pip install 'vlm-sft-rl[ray]'.")


def workers_of(options: dict) -> Workers | None:
    """The workers that the options `ray` and `workers` of a command line mean; None: this process.

    Raises UserError: `workers` without `ray`, or as `Workers`.
    """
    if "ray" not in options and options:
        raise UserError("--workers counts those of a Ray cluster: give --ray local, or a cluster's address.")
    return Workers(**options) if options else None


@dataclass(frozen=True)
class Work:
    """How questions are read and answered. Workers get it pickled.

    Attributes:
        load: makes the engine (loads a model); called once by each process that answers, when there is something to answer.
        per_call: questions given to the engine at once.
        read: part -> its questions. It must give the same whenever it is called: a part that got lost is read again.
        open: what the engine is given in place of a question: the same with its images opened, ahead of the engine.
    """

    load: Callable[[], Engine]
    per_call: int
    read: Callable[[Any], Iterable[dict]]
    open: Callable[[dict], dict] | None = None


def answers_of(work: Work, parts: Sequence[Any], workers: Workers | None = None) -> Iterator[list[dict]]:
    """The answers to the questions of all parts, as they come; in any order where others make them.

    Raises UserError: what `work` raises, or the cluster cannot be used.
    """
    if workers is not None:
        yield from _by_ray(work, parts, workers)
        return
    engine = work.load()
    questions = chain.from_iterable(map(work.read, parts))
    opened = questions if work.open is None else map(work.open, questions)
    for batch in _ahead(iter(lambda: list(islice(opened, work.per_call)), [])):
        yield from engine(batch)


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; a thread makes the next one while the present one is used."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


# --- Ray ---


# an error of the user's is an item like any other: Ray would end all work for one that is raised, and wrap it


class _Worker:
    """The actor that holds a model."""

    def __init__(self, work: Work):
        try:
            self.engine: Engine | UserError = work.load()
        except UserError as error:
            self.engine = error

    def __call__(self, batch) -> Iterator[dict[str, list[bytes]]]:
        for lines in self._answers(list(map(pickle.loads, batch["item"].to_pylist()))):
            yield {"lines": [pickle.dumps(lines)]}

    def _answers(self, items: list[dict | UserError]) -> Iterator[list[dict] | UserError]:
        if isinstance(self.engine, UserError):
            yield self.engine
            return
        try:
            if questions := [item for item in items if not isinstance(item, UserError)]:
                yield from self.engine(questions)
        except UserError as error:
            yield error
        yield from (item for item in items if isinstance(item, UserError))


def _by_ray(work: Work, parts: Sequence[Any], workers: Workers) -> Iterator[list[dict]]:
    import ray

    def read(row: dict) -> Iterator[dict]:
        try:
            for question in work.read(pickle.loads(row["item"])):
                yield {"item": pickle.dumps(question)}
        except UserError as error:
            yield {"item": pickle.dumps(error)}

    def open(row: dict) -> dict:
        item = pickle.loads(row["item"])
        try:
            item = item if isinstance(item, UserError) else work.open(item)
        except UserError as error:
            item = error
        return {"item": pickle.dumps(item)}

    with _cluster(workers) as (count, gpus):
        items = ray.data.from_items(
            [{"item": pickle.dumps(part)} for part in parts],
            override_num_blocks=min(len(parts), MOST_BLOCKS),
        )
        # blocks of one call each: they are what is shared out, and what is done again
        items = items.flat_map(read).repartition(target_num_rows_per_block=work.per_call)
        if work.open is not None:
            # half a core: what needs as much as the workers would be done by them, and not ahead of them
            items = items.map(open, num_cpus=0.5)
        answers = items.map_batches(
            _Worker,
            fn_constructor_args=(work,),
            batch_size=work.per_call,
            batch_format="pyarrow",
            # it begins with the first worker that has its model; those that join the cluster later get one, too
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, initial_size=count),
            num_gpus=gpus,
            num_cpus=1,
        )
        for row in answers.iter_rows():
            lines = pickle.loads(row["lines"])
            if isinstance(lines, UserError):
                raise lines
            yield lines


def _check_port(address: str) -> None:
    """Ray tries for minutes to reach an address where nothing answers. Raises OSError: nothing does."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()


@contextmanager
def _cluster(workers: Workers) -> Iterator[tuple[int, int]]:
    """Join or start the cluster; yields the number of workers and the GPUs of each.

    Raises UserError: there is none at the address, or it has too few cores.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # of this process alone, or of a cluster that it starts; it reports as errors what Ray Data does on purpose
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    is_ours = not ray.is_initialized()
    if is_ours and workers.ray == LOCAL:
        # a core more than workers: somebody must read and open images
        cores = None if workers.workers is None else max(workers.workers + 1, os.cpu_count() or 1)
        try:
            ray.init(address=LOCAL, num_cpus=cores, include_dashboard=False, **quiet)
        except Exception as error:  # a plain one, where a part of Ray needs over 30 seconds to start
            raise UserError(
                f"--ray local: Ray did not start on this machine ({first_line(error)}). If it is busy, give the same "
                "command again; otherwise leave --ray out."
            ) from error
    elif is_ours:
        try:
            _check_port(workers.ray)
            ray.init(address=workers.ray, **quiet)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"--ray {workers.ray}: no cluster can be reached there ({first_line(error)}). Start one with `ray start "
                "--head`, or give --ray local. If one runs there, it may ask for a token (Ray 2.60 does): set "
                "RAY_AUTH_MODE=token here, and copy the first node's ~/.ray/auth_token."
            ) from error
    try:
        has = ray.cluster_resources()
        gpus, cores = int(has.get("GPU", 0)), int(has.get("CPU", 0))
        count = workers.workers or gpus or max(1, cores - 1)
        if cores < 2 or (not gpus and count >= cores):
            raise UserError(
                f"--ray {workers.ray}: {count} workers without GPUs need {count + 1} cores, as images are read beside them. "
                f"The cluster has {cores}: give fewer --workers."
            )
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        yield count, int(gpus > 0)
    finally:
        if is_ours:
            ray.shutdown()
