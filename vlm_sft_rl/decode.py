"""Any number of rows -> answers with spans and flags, in shards: `vlm-sft-rl decode`.

A shard is a range of rows. `OUT/shard-00012.part.jsonl` grows as answers come, in any order; when the last answer of the
shard is there it becomes `OUT/shard-00012.jsonl`, in the order of the rows. What the memory holds are the shards that are
being worked on. A line is that of an evaluation's `samples.jsonl` and has also the number of its row; or it has, with
`--on-bad-row skip`, no answer but `error`.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from .errors import DUPLICATE_ID, RowError, UserError
from .evaluation.decoders import (
    DECODERS,
    DecoderConfig,
    EngineOptions,
    answer_batch,
    check_alone,
    check_engine,
    check_model_folder,
    configure,
    recorded,
)
from .io import append_jsonl, make_folder, write_jsonl
from .locks import Lock
from .runs import (
    BATCHES_PER_CALL,
    RUN_FILE,
    answer_progress,
    decoded_shard,
    keep_manifest,
    mend_end,
    model_digest,
    whole_lines,
)
from .settings import setting
from .shapes import COUNT
from .workers import Engine, Work, Workers, answers_of, process_share

if TYPE_CHECKING:
    from .data.numbered import NumberedRows

LINE = {"row": COUNT, "id": str}


@dataclass(frozen=True)
class DecodeOptions(EngineOptions):
    """What is asked, and how the work is cut."""

    prompt: str | None = setting(None, "Prompt for every row, in place of the row's own.")
    image_root: str | Path | None = setting(
        None, "Folder that image paths start from. Default: the folder of ROWS."
    )
    split: str | None = setting(None, "Split, where the folder or data set has several.")
    shard_rows: int = setting(
        10_000, "Rows for each file of answers (shard). A shard is held in memory while it is made.", least=1
    )
    part: str | None = setting(
        None,
        "K/N: make only every Nth shard, from shard K on (K from 0), on one of N machines without Ray. In a SLURM array: "
        "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT.",
    )
    traces: bool = setting(
        False, "Also write how each answer came about: what was rejected, drawn and asked."
    )
    on_bad_row: str = setting(
        "error",
        "If a row or an image cannot be used: error stops the run, skip writes a line with `error` and no answer.",
        choices=("error", "skip"),
    )

    def share(self) -> tuple[int, int]:
        """K and N of `part`; without it, this process among those that a launcher started.

        Raises UserError: it is not K/N with K below N, or is given to a process of a launcher.
        """
        launched = process_share()
        if self.part is None:
            return launched
        if launched[1] > 1:
            raise UserError("--part: these processes share the shards by themselves. Leave it out.")
        k, slash, n = self.part.partition("/")
        if not (slash and k.isdecimal() and n.isdecimal() and int(k) < int(n)):
            raise UserError(f"--part {self.part}: expected K/N with K from 0 to N - 1, such as 0/4.")
        return int(k), int(n)


@dataclass(frozen=True)
class Report:
    """What a call did.

    Attributes:
        rows: of the whole file.
        finished: of these, those in finished shards, whoever finished them.
        answered: by this call.
        flagged: of these, with `ok` false: a phrase stayed unverified, or the length limit cut it off.
        bad: of these, rows that could not be used.
    """

    rows: int
    finished: int
    answered: int
    flagged: int
    bad: int

    def __str__(self) -> str:
        text = f"{self.answered:,} rows answered now, {self.finished:,} of {self.rows:,} in finished shards."
        if self.flagged:
            text += f" {self.flagged:,} of those answered now are flagged: their `ok` is false."
        if self.bad:
            text += f" {self.bad:,} could not be used: their lines have `error`."
        return text


def decode(
    rows: str | Path,
    output: str | Path,
    model: str | Path,
    decoder: str = "retrospective",
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    options: DecodeOptions | None = None,
    workers: Workers | None = None,
    console: Console | None = None,
) -> Report:
    """Answer every row. Killed at any moment, the same call goes on after the last answer that was written.

    An answer depends on the checkpoint, the settings, the seed and the row with its id: not on its shard, its batch, or who
    made it.

    Args:
        rows: JSONL or parquet, a folder of parquet or of `save_to_disk`, or a data set's name, see `open_rows`.
        output: folder of the shards.
        decoder: a name of `DECODERS`.
        settings: fields of its config, over those of the checkpoint.
        workers: those of a Ray cluster that answer, in place of this process.

    Raises UserError: rows, checkpoint or a setting cannot be used, `output` has answers of others, or another process is
    writing the same shard.
    """
    from .data.images import image_root_of
    from .data.numbered import open_rows

    options = options or DecodeOptions()
    first, step = options.share()
    console = console or Console(quiet=first > 0 and options.part is None)
    folder, output = check_model_folder(model), Path(output)
    config = configure(decoder, folder, settings or {}, seed=seed)
    check_alone(decoder, config)
    engine = check_engine(options.engine, decoder, config)
    table = open_rows(str(rows), options.split, progress=not console.quiet)
    root = image_root_of(rows, options.image_root) if Path(rows).is_file() or options.image_root else None
    job = _Job(table, root, folder.resolve(), decoder, config, options)
    if not (output / RUN_FILE).is_file() and any(output.glob("shard-*.jsonl")):
        raise UserError(
            f"{output}: holds answers but no {RUN_FILE}, so it cannot be told what made them. Choose another folder for "
            "these answers, or remove this one."
        )
    keep_manifest(
        make_folder(output) / RUN_FILE,
        {
            "rows": table.digest,
            "row_count": len(table),
            "prompt": options.prompt,
            "shard_rows": options.shard_rows,
            "traces": options.traces,
            "model": str(job.model),
            "model_digest": model_digest(folder),
            "decoding": recorded(decoder, config, seed),
            "engine": engine,
        },
        "holds answers to other rows or by other settings",
        "Choose another folder for these answers, or remove this one.",
    )
    shards = [Shard(output, number, job.rows_of(number)) for number in range(first, job.shards, step)]
    open_shards = {shard.number: shard for shard in shards if not shard.path.exists()}
    parts = [(number, shard.answered()) for number, shard in open_shards.items()]
    missing = sum(
        len(shard.rows) - len(done) for shard, (_, done) in zip(open_shards.values(), parts, strict=True)
    )
    counts: Counter = Counter()
    work = Work(job.load, BATCHES_PER_CALL * options.side_by_side, job.read, job.open)
    if missing:
        with answer_progress("answers", missing, console) as advance:
            for lines in answers_of(work, parts, workers):
                for number, group in job.by_shard(lines).items():
                    shard = open_shards[number]
                    written = shard.add(group)
                    counts.update(_kind(line) for line in written)
                    advance(len(written))
    left = [shard for shard in open_shards.values() if not shard.path.exists()]
    for shard in left:
        shard.add([])  # its last answer may have been written by a call that was killed then
    if left := [shard for shard in left if not shard.path.exists()]:
        raise UserError(
            f"{output}: {len(left)} shards have rows without an answer, the first is {left[0].part.name}. What was answered "
            "is kept: give the same command again."
        )
    finished = sum(
        len(job.rows_of(number)) for number in range(job.shards) if Shard(output, number).path.exists()
    )
    return Report(len(table), finished, counts.total(), counts["flagged"], counts["bad"])


def _kind(line: dict) -> str:
    if "error" in line:
        return "bad"
    return "ok" if line["ok"] else "flagged"


@dataclass(frozen=True)
class _Job:
    """Rows, and the checkpoint that answers them; workers get it pickled."""

    table: "NumberedRows"
    image_root: Path | None
    model: Path
    decoder: str
    config: DecoderConfig
    options: DecodeOptions

    @property
    def shards(self) -> int:
        return -(-len(self.table) // self.options.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The numbers of a shard's rows."""
        size = self.options.shard_rows
        return range(shard * size, min((shard + 1) * size, len(self.table)))

    def by_shard(self, lines: list[dict]) -> dict[int, list[dict]]:
        groups: dict[int, list[dict]] = {}
        for line in lines:
            groups.setdefault(line["row"] // self.options.shard_rows, []).append(line)
        return groups

    def read(self, part: tuple[int, frozenset[int]]) -> Iterator[dict]:
        """The rows of a shard that have no answer; one that cannot be used has its `error`.

        Raises RowError: such a row, where those are not skipped; or an id that the shard has twice.
        """
        from .data.numbered import asked_row

        shard, done = part
        numbers, places = self.rows_of(shard), {}
        for number, (where, raw) in zip(numbers, self.table.read(numbers.start, numbers.stop), strict=True):
            try:
                row = asked_row(raw, where, self.options.prompt)
                if (other := places.setdefault(row["id"], where)) != where:
                    raise RowError(
                        DUPLICATE_ID,
                        f"the id {row['id']!r} is already that of {other}. Ids must differ.",
                        where,
                    )
            except RowError as error:
                if self.options.on_bad_row == "error":
                    raise
                row = {"id": where, "error": str(error)}
            if number not in done:
                yield {"row": number, "asked": row, "where": where}

    def open(self, item: dict) -> dict:
        """Raises RowError: an image cannot be read, where such rows are not skipped."""
        from .data.images import open_image

        asked = item["asked"]
        if "error" in asked:
            return item
        try:
            pictures = [open_image(image, self.image_root) for image in asked["images"]]
        except RowError as error:
            if self.options.on_bad_row == "error":
                raise error.at(item["where"]) from error
            return item | {"asked": {"id": asked["id"], "error": str(error.at(item["where"]))}}
        names = [_name(image) for image in asked["images"]]
        return item | {"asked": asked | {"images": names}, "pictures": pictures or None}

    def load(self) -> Engine:
        from .evaluation.questions import to_sample

        options = self.options
        loaded, decoder = options.load(self.model), DECODERS[self.decoder]
        answer = partial(answer_batch, loaded, decoder, self.config, batch_size=options.side_by_side)

        def engine(items: Sequence[dict]) -> Iterator[list[dict]]:
            usable = [item for item in items if "error" not in item["asked"]]
            texts = [item["asked"]["question"] for item in usable]
            names = [item["asked"]["id"] for item in usable]
            answers = answer([item["pictures"] for item in usable], texts, names) if usable else []
            lines = [
                {"row": item["row"]} | to_sample(item["asked"], text, made)
                for item, text, made in zip(usable, texts, answers, strict=True)
            ]
            if not options.traces:
                lines = [line | {"trace": []} for line in lines]
            yield lines + [{"row": i["row"]} | i["asked"] for i in items if "error" in i["asked"]]

        return engine


def _name(image: Any) -> str:
    """An image as a line names it: its path, or a digest of what comes inside the rows without one."""
    from .data.images import image_content

    content = image_content(image)
    if isinstance(content, bytes):
        path = image.get("path") if isinstance(image, dict) else None
        return path or hashlib.sha256(content).hexdigest()[:20]
    return content


@dataclass
class Shard:
    """A file of answers while it is filled and afterwards.

    Attributes:
        rows: the numbers of its rows.
    """

    output: Path
    number: int
    rows: range = range(0)
    _lines: dict[int, dict] | None = field(default=None, repr=False)
    _lock: Lock | None = field(default=None, repr=False)

    @property
    def path(self) -> Path:
        return decoded_shard(self.output, self.number)

    @property
    def part(self) -> Path:
        return self.path.with_suffix(".part.jsonl")

    def answered(self) -> frozenset[int]:
        """Numbers of the rows that have an answer so far. Nothing is changed: another process may be writing.

        Raises UserError: a line is none of this shard.
        """
        return frozenset(self._read())

    def _read(self) -> dict[int, dict]:
        """The lines so far, by row; without a last one that is not finished."""
        lines: dict[int, dict] = {}
        with suppress(FileNotFoundError):  # there is none yet, or another process has just finished the shard
            for number, line in whole_lines(self.part, LINE):
                if line["row"] not in self.rows or line["row"] in lines:
                    raise UserError(
                        f"{self.part}, line {number}: row {line['row']} is not of this shard, or comes twice. Remove this "
                        "line; the rest is kept."
                    )
                lines[line["row"]] = line
        return lines

    def add(self, lines: list[dict]) -> list[dict]:
        """Write the lines of rows that have none yet, and return them. With its last line the shard is finished.

        Raises UserError: another process is writing it, or the disk is full.
        """
        if self._lines is None:
            self._lock = Lock(self.path, is_file=True, alone=True)
            if self.path.exists():  # finished by another process
                self._lock.release()
                return []
            mend_end(self.part)  # of a call that was killed
            self._lines = self._read()
        new = [line for line in lines if line["row"] not in self._lines]
        append_jsonl(self.part, new)
        self._lines |= {line["row"]: line for line in new}
        if len(self._lines) == len(self.rows):
            write_jsonl(self.path, (self._lines[row] for row in self.rows))
            self.part.unlink(missing_ok=True)
            self._lines = None
            self._lock.release()
        return new
