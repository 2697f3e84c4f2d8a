"""`vlm-sft-rl data tag`: a file of plain answers -> a file of tagged rows, in three passes that can be interrupted.

1. Phrases of every answer, kept in the work folder as they are found.
2. Counts over the whole set: which nouns go together, which are said of which image.
3. Rows: the positive, and negatives by rule or by a teacher, whose answers are kept in its ledger.
"""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Collection, Iterator
from itertools import islice, repeat
from pathlib import Path

from ...endpoint import ChatRequest, EndpointClient, Reply
from ...errors import UserError
from ...io import append_jsonl, read_jsonl, row_progress, rows_file, write_json
from ..rows import read_raw, sft_row
from . import teacher
from .balance import to_json
from .build import Answer, RowBuilder, answers_of, image_key, teachable, untrue
from .checking import Checker
from .corpus import Corpus
from .rules import KINDS, Negative
from .taggers import Chunk, Tagger

BATCH_ROWS = 200  # rows whose phrases are written at once
CHECK_ROWS = 64  # rows whose phrases are checked at once
TEMPERATURE = 0.7  # of the teacher: several negatives for one answer should differ
MAX_TOKENS = 200
UNTRUE = "rows left out: an answer names an object that is not in the image"


def work_folder(target: str | Path) -> Path:
    """Where phrases and the teacher's ledger are kept; it may be deleted when the rows are done."""
    return Path(f"{target}.work")


def tag(
    source: str | Path,
    target: str | Path,
    tagger: Tagger,
    *,
    kinds: Collection[str] = KINDS,
    negatives: int = 1,
    seed: int = 0,
    objects: str | Path | None = None,
    checker: Checker | None = None,
    client: EndpointClient | None = None,
    image_root: str | Path | None = None,
    send_images: bool = True,
    progress: bool = False,
) -> dict:
    """Tag the answers of `source` (any schema of `rows.sft_row`) and write the rows to `target`.

    Args:
        kinds: negatives by rule, of `rules.KINDS`.
        negatives: negative rows for each source row, at most.
        objects: JSONL of what is in each image: `{"image", "objects": [noun, …]}`, or region rows with `category`. Rows
            that name one of its nouns where it is not are left out, and no negative names one where it is.
        checker: asked of every phrase that names something whether it is there; a row with a phrase that it denies is
            cut at that phrase, which is a negative found and not made.
        client: a teacher for answers in free text; where it gives nothing of use, rules do.
        image_root: folder of the images that are sent to the teacher.

    Returns:
        The balance report, which is also written beside the target as `TARGET.report.json`.

    Raises:
        UserError: an unknown kind, a file that cannot be read or written, a teacher that cannot be reached. RowError:
            a row of unknown schema, or with tags already.
    """
    if unknown := set(kinds) - set(KINDS):
        raise UserError(
            f"Unknown kinds of negatives: {', '.join(sorted(unknown))}. Known are {', '.join(KINDS)}."
        )
    if negatives < 1:
        raise UserError("negatives must be at least 1.")
    source, target = Path(source), Path(target)
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{source}: source and target are the same file. Choose another target.")
    present, known = ({}, frozenset()) if objects is None else read_objects(objects)
    phrases = _find_phrases(source, work_folder(target), tagger, progress)
    corpus = Corpus()
    with row_progress(progress, "counting") as advance:
        for row, chunks in _lockstep(source, phrases):
            corpus.add(image_key(row), (chunk for found in chunks.values() for chunk in found))
            advance()
    builder = RowBuilder(corpus.finish(), kinds, negatives, seed)
    denied = None if checker is None else _check(source, phrases, checker, progress)
    plans = _plans(source, phrases, denied, builder, present, known)
    if client is None:
        answered: Iterator = ((plan, {}) for plan in plans)
    else:
        answered = _with_teacher(
            plans, client, negatives, seed, image_root if send_images else None, send_images
        )
    with rows_file(target) as write, row_progress(progress, "writing") as advance:
        for (row, answers, here, wrong), proposals in answered:
            if wrong:
                write(builder.found(row, answers, wrong))
            else:
                for made in builder.rows(row, answers, here, proposals):
                    write(made)
            advance()
    report = to_json(builder.counts) | {"source": str(source), "seed": seed, "tagger": tagger.name[:200]}
    if client is not None:
        report["teacher"] = {"model": client.model, **client.usage.to_json()}
    write_json(f"{target}.report.json", report)
    return report


def read_objects(path: str | Path) -> tuple[dict[str, set[str]], frozenset[str]]:
    """`({image: nouns in it}, all nouns of the file)`, lower case.

    Raises:
        UserError: a line without `image`, or without `objects` or `category`.
    """
    present: dict[str, set[str]] = {}
    for number, row in read_jsonl(path):
        items = row.get("objects", [row["category"]] if row.get("category") else None)
        if not isinstance(row.get("image"), str) or not isinstance(items, list):
            raise UserError(
                f"{path}, line {number}: expected `image` and `objects` (a list of nouns) or `category`, found "
                f"{sorted(row)}."
            )
        nouns = [item.get("noun", item.get("category")) if isinstance(item, dict) else item for item in items]
        if not all(isinstance(noun, str) for noun in nouns):
            raise UserError(f"{path}, line {number}: field `objects`: expected nouns, found {items!r:.80}.")
        present.setdefault(row["image"], set()).update(noun.lower() for noun in nouns)
    return present, frozenset(noun for nouns in present.values() for noun in nouns)


def _rows(source: Path, notes: Counter | None = None) -> Iterator[dict]:
    for number, raw in read_raw(source):
        yield sft_row(raw, f"{source}:{number}", notes)


def _find_phrases(source: Path, folder: Path, tagger: Tagger, progress: bool) -> Path:
    """The file of phrases: one line a row, written as they are found; a run that was killed goes on behind them."""
    state = source.stat() if source.is_file() else None
    if state is None:
        raise UserError(f"{source}: no such file. Check the path.")
    told = f"{source.resolve()} {state.st_size} {state.st_mtime_ns} {tagger.name}"
    path = folder / f"phrases-{hashlib.sha256(told.encode()).hexdigest()[:12]}.jsonl"
    if (done := path.with_suffix(".done")).exists():
        return path
    finished = _complete_lines(path)
    waiting: deque = deque()

    def texts() -> Iterator[str]:
        for row in islice(_rows(source), finished, None):
            turns = [i for i, m in enumerate(row["messages"]) if m["role"] == "assistant"]
            waiting.append(turns)
            for turn in turns:
                yield row["messages"][turn]["content"]

    with row_progress(progress, "finding phrases") as advance:
        found, lines = {}, []
        for chunks in tagger.tag(texts()):
            while not waiting[0]:
                lines.append(_line({}, waiting))
            found[waiting[0][len(found)]] = [chunk.to_json() for chunk in chunks]
            if len(found) == len(waiting[0]):
                lines.append(_line(found, waiting))
                found = {}
                advance()
            if len(lines) >= BATCH_ROWS:
                append_jsonl(path, lines)
                lines = []
        lines += [{"phrases": {}} for _ in waiting]
        append_jsonl(path, lines)
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()
    return path


def _line(found: dict, waiting: deque) -> dict:
    waiting.popleft()
    return {"phrases": found}


def _complete_lines(path: Path) -> int:
    """Number of whole lines; a last one that was cut off is removed."""
    if not path.exists():
        return 0
    count = end = 0
    with open(path, "rb") as handle:
        for line in handle:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
    os.truncate(path, end)
    return count


def _lockstep(source: Path, phrases: Path, notes: Counter | None = None) -> Iterator[tuple[dict, dict]]:
    """Each row with its phrases, by the number of the message."""
    # a set without any answer has no file of phrases
    lines = (
        ({"phrases": {}} for _ in iter(int, 1))
        if not phrases.exists()
        else (line for _, line in read_jsonl(phrases))
    )
    for row, line in zip(_rows(source, notes), lines, strict=False):
        texts = {int(turn): row["messages"][int(turn)]["content"] for turn in line["phrases"]}
        yield (
            row,
            {
                int(turn): [Chunk.from_json(value, texts[int(turn)]) for value in values]
                for turn, values in line["phrases"].items()
            },
        )


def _check(source: Path, phrases: Path, checker: Checker, progress: bool) -> Path:
    """The file of what the checker denied, one line a row; a run that was killed goes on behind its last line."""
    name = hashlib.sha256(f"{phrases.name} {checker.name}".encode()).hexdigest()[:12]
    path = phrases.with_name(f"checks-{name}.jsonl")
    rows = islice(_lockstep(source, phrases), _complete_lines(path), None)
    with row_progress(progress, "checking phrases") as advance:
        while batch := list(islice(rows, CHECK_ROWS)):
            asked = [
                (number, turn, k, chunk)
                for number, (_, chunks) in enumerate(batch)
                for turn, found in chunks.items()
                for k, chunk in enumerate(found)
                if chunk.head and not chunk.place and batch[number][0]["images"]
            ]
            verdicts = checker.there([(batch[number][0]["images"], chunk) for number, _, _, chunk in asked])
            lines: list[dict] = [{"denied": {}} for _ in batch]
            for (number, turn, k, _), there in zip(asked, verdicts, strict=True):
                if there is False:
                    lines[number]["denied"].setdefault(str(turn), k)
            append_jsonl(path, lines)
            for _ in batch:
                advance()
    return path


def _plans(
    source: Path,
    phrases: Path,
    denied: Path | None,
    builder: RowBuilder,
    present: dict[str, set[str]],
    known: frozenset[str],
) -> Iterator[tuple[dict, list[Answer], set[str], dict[int, int]]]:
    """Rows to be built: their answers, what is known to be in their images, and what a checker denied."""
    checks = repeat({"denied": {}}) if denied is None else (line for _, line in read_jsonl(denied))
    for (row, chunks), check in zip(_lockstep(source, phrases, builder.counts.notes), checks, strict=False):
        answers = answers_of(row, chunks)
        here: set[str] = set().union(*(present.get(str(image), ()) for image in row["images"]))
        if known and untrue(answers, here, known) is not None:
            builder.counts.notes[UNTRUE] += 1
            continue
        yield row, answers, here, {int(turn): k for turn, k in check["denied"].items()}


def _with_teacher(
    plans: Iterator[tuple], client: EndpointClient, negatives: int, seed: int, image_root, send_images: bool
) -> Iterator[tuple[tuple, dict]]:
    """Each plan with the teacher's proposals; plans are read ahead only as far as requests are in flight."""
    waiting: deque = deque()

    def requests() -> Iterator[ChatRequest]:
        for plan in plans:
            row, answers, _, wrong = plan
            taught = [] if wrong else [answer for answer in answers if teachable(answer)]
            asked = [(answer, n) for answer in taught for n in range(negatives)]
            waiting.append((plan, asked, {}))
            for answer, number in asked:
                yield _request(row, answer, number, seed, image_root, send_images)

    def finished() -> Iterator[tuple[tuple, dict]]:
        while waiting and len(waiting[0][1]) == len(waiting[0][2]):
            plan, _, proposals = waiting.popleft()
            yield plan, proposals

    for reply in client.complete(requests()):
        yield from finished()
        _, asked, proposals = waiting[0]
        answer, number = asked[len(proposals)]
        proposals[answer.turn, number] = _proposal(reply, answer)
        yield from finished()
    yield from finished()


def _request(row: dict, answer: Answer, number: int, seed: int, image_root, send_images: bool) -> ChatRequest:
    chat = teacher.messages(answer.question, answer.text, answer.chunks)
    if send_images and row["images"]:
        pictures = [{"type": "image", "image": image} for image in row["images"]]
        chat[-1] = {"role": "user", "content": [*pictures, {"type": "text", "text": chat[-1]["content"]}]}
    return ChatRequest(
        id=f"{row['id']}/{answer.turn}/{number}",
        messages=chat,
        max_tokens=MAX_TOKENS,
        temperature=TEMPERATURE,
        seed=seed + number,
        image_root=image_root,
    )


def _proposal(reply: Reply, answer: Answer) -> Negative | None:
    if reply.error is not None:
        return None
    return teacher.read_reply(reply.texts[0], answer.question, answer.chunks)
