"""Files of answers -> files of tagged rows: with ground truth (`write_synthetic`, `write_on_policy`), or without (`tag`).

`tag` goes over its source in passes that can be interrupted:

1. Phrases of every answer, kept in the work folder as they are found.
2. Counts over the whole set: which nouns go together, which are said of which image.
3. Verdicts of a checker, if there is one, kept as they come.
4. Rows: the positive, and negatives by rule or by a teacher, whose answers are kept in its ledger.
"""

import hashlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, groupby, islice, tee
from pathlib import Path
from posixpath import normpath
from typing import Any

from ...errors import FORMAT, TOO_LONG, RowError, UserError, short
from ...io import (
    append_jsonl,
    make_folder,
    read_jsonl,
    require_file,
    row_progress,
    rows_file,
    write_json,
    writing,
)
from ...locks import sole_use
from ...runs import NO_ANSWER, answer_files
from ...teacher import PROBES, ChatRequest, EndpointClient, user_message
from ..images import image_root_of, image_size, open_image
from ..messages import SUPERVISE
from ..rows import read_raw, read_rows, sft_row
from ..tags import UNCONFIDENT
from .build import (
    Answer,
    Plan,
    RowBuilder,
    answers_of,
    image_key,
    on_policy_rows,
    own_id,
    plain_rows,
    synthetic_rows,
    yes_no_rows,
)
from .config import TagConfig
from .negatives import GENERAL, Corpus, prior_of, read_teacher, teacher_messages
from .phrases import Phrase, SpacyTagger, Tagger, VocabularyTagger
from .verdicts import (
    Checker,
    EndpointChecker,
    ModelChecker,
    Scene,
    nouns_of,
    object_grader,
    read_objects,
    read_vocabulary,
    scene_of,
)

BATCH_ROWS = 200  # rows whose phrases are written at once
CHECK_ROWS = 64  # rows whose phrases are checked at once
TEMPERATURE = 0.7  # of the teacher: several negatives for one answer should differ
MAX_TOKENS = 200
LONGEST_ANSWER = 1_000_000  # characters; spaCy takes no more
UNTRUE = "rows left out: an answer names an object that is not in the image"
UNDESCRIBED = "rows left out: the ground truth has no line for their image"
EMPTY = "rows left out: an answer without text"
UNDECIDED = "phrases on which the checker gave no verdict"


# --- With ground truth ---


def write_synthetic(
    captions: str | Path,
    objects: str | Path,
    target: str | Path,
    *,
    questions: str | Path | None = None,
    vocabulary: str | Path | None = None,
    prior: str = "company",
    negatives: int = 1,
    seed: int = 0,
) -> dict[str, int]:
    """Captions and yes/no questions with ground truth -> tagged rows with synthetic negatives (see `synthetic_rows`).

    Args:
        captions: rows of any known schema with one image each.
        objects: ground truth, see `read_objects`.
        target: JSONL of rows, replaced when all went well.
        questions: rows whose answers begin with yes or no; added as `yes_no_rows`.
        vocabulary: see `read_vocabulary`.
        prior: where absent nouns are drawn from, see `prior_of`.

    Returns:
        Counts: "rows", "negatives", and what was left out and why.

    Raises UserError: a file is missing or has no such lines, a row's image has no ground truth, an unknown prior.
    """
    truth = read_objects(objects)
    nouns = read_vocabulary(vocabulary, truth.values())
    notes: Counter = Counter()
    seen: set[str] = set()
    rows = synthetic_rows(
        plain_rows(read_rows(captions), seen, notes),
        lambda row: scene_of(row["images"], truth, objects, row["source"]),
        nouns,
        prior_of(prior, truth.values(), nouns, objects),
        negatives,
        seed,
        notes=notes,
    )
    answers = ()
    if questions is not None:
        answers = yes_no_rows(plain_rows(read_rows(questions), seen, notes), notes)
    return _write(target, chain(rows, answers), notes)


def write_on_policy(
    samples: str | Path,
    target: str | Path,
    *,
    objects: str | Path | None = None,
    vocabulary: str | Path | None = None,
    supervise: str = "all",
) -> dict[str, int]:
    """A model's own answers with ground truth -> tagged rows (see `on_policy_rows`).

    Args:
        samples: JSONL of `{"id", "images", "prompt", "answer"}` as `eval run` and `decode` write it, or their folder, see
            `runs.answer_files`; the nouns of the picture are `reference.objects`, unless `objects` is given.
        objects: ground truth by image, see `read_objects`.
        target, vocabulary: as of `write_synthetic`.
        supervise: "all" or "verdicts".

    Returns:
        Counts: "rows", "negatives", and what was left out and why.

    Raises UserError: as `write_synthetic`; or a sample without ground truth.
    """
    if supervise not in SUPERVISE:
        raise UserError(f"supervise: {supervise!r} is not one of {', '.join(SUPERVISE)}.")
    truth = None if objects is None else read_objects(objects)
    known, scenes = [], []
    seen: set[str] = set()
    notes: Counter = Counter()
    lines = ((f"{path}:{n}", line) for path in answer_files(samples) for n, line in read_jsonl(path))
    for where, sample in lines:
        if "error" in sample:
            notes[NO_ANSWER] += 1
            continue
        for name, kind in (("id", str | int), ("images", list), ("prompt", str), ("answer", str)):
            if not isinstance(value := sample.get(name), kind):
                message = f"field `{name}`: found {short(value)}. Is this a samples file?"
                raise RowError(FORMAT, message, where)
        if truth is None:
            reference = sample.get("reference")
            if not isinstance(reference, dict) or reference.get("objects") is None:
                message = "no `reference.objects`, so its phrases cannot be graded. Give --objects FILE."
                raise RowError(FORMAT, message, where)
            scene = Scene(nouns_of(reference["objects"], where))
        else:
            scene = scene_of(sample["images"], truth, objects, where)
        scenes.append(scene)
        name = own_id(str(sample["id"]), seen, notes)
        known.append({**sample, "id": name, "reference": {"objects": scene.objects}})
    nouns = read_vocabulary(vocabulary, scenes if truth is None else truth.values())
    rows = on_policy_rows(known, object_grader(nouns), nouns, supervise=supervise, notes=notes)
    return _write(target, rows, notes)


def _write(target: str | Path, rows: Iterable[dict], notes: Counter) -> dict[str, int]:
    count = negatives = 0
    with rows_file(target) as write:
        for row in rows:
            # `source` is left out: its place is now the target's line
            write({key: value for key, value in row.items() if key != "source"})
            count += 1
            negatives += any(UNCONFIDENT in message["content"] for message in row["messages"])
        if not count:
            raise UserError(f"{target}: nothing was written, no row could be made ({dict(notes)}).")
    return {"rows": count, "negatives": negatives, **notes}


# --- Without ground truth ---


def work_folder(target: str | Path) -> Path:
    """Where phrases and the ledgers are kept; it may be deleted when the rows are done."""
    return Path(f"{target}.work")


def tag_with(source: str | Path, target: str | Path, config: TagConfig) -> tuple[dict, dict]:
    """`tag` with the tagger, checker and teacher that the settings name, and a progress bar.

    Returns:
        The balance report, and the clients that were paid, by name ("teacher", "checker").
    """
    root, work = image_root_of(source, config.image_root), work_folder(target)
    if config.nouns is not None:
        tagger: Tagger = VocabularyTagger(read_vocabulary(config.nouns), places=config.places)
    else:
        tagger = SpacyTagger(config.spacy_model, config.places, config.processes)
    options, clients = config.client_options(), {}
    if config.teacher is not None:
        ledger = work / "teacher.jsonl"
        clients["teacher"] = EndpointClient(config.teacher, config.teacher_model, ledger=ledger, **options)
    checker: Checker | None = None
    if config.checker is not None:
        with row_progress(True, "looking for images") as advance:
            for row in _rows(Path(source)):
                _require_images(row, root, image_size)
                advance()
    if config.checker is not None and "://" in config.checker:
        ledger = work / "checker.jsonl"
        clients["checker"] = EndpointClient(config.checker, config.checker_model, ledger=ledger, **options)
        checker = EndpointChecker(clients["checker"], config.check_question, root)
    elif config.checker is not None:
        checker = ModelChecker(config.checker, config.check_question, root)
    try:
        teacher = clients.get("teacher")
        return tag(source, target, tagger, config, checker=checker, client=teacher, progress=True), clients
    finally:
        for client in clients.values():
            client.close()


def tag(
    source: str | Path,
    target: str | Path,
    tagger: Tagger,
    config: TagConfig | None = None,
    *,
    checker: Checker | None = None,
    client: EndpointClient | None = None,
    progress: bool = False,
) -> dict:
    """Tag the answers of `source` (rows of any known schema) and write the rows to `target`.

    Args:
        config: kinds and number of negatives, seed, images, and `objects`: rows that name one of its nouns where it is
            not are left out, and no negative names one where it is.
        checker: asked of every phrase that names something whether it is there; a row with a phrase that it denies is
            cut at that phrase, which is a negative found and not made.
        client: a teacher for answers in free text; where it gives nothing of use, rules do.

    Returns:
        The balance report, which is also written beside the target as `TARGET.report.json`.

    Raises UserError: an unknown kind, a file that cannot be read or written, a teacher that cannot be reached. RowError: a
    row of unknown schema, or with tags already.
    """
    config = config or TagConfig()
    source, target = Path(source), Path(target)
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{source}: source and target are the same file. Choose another target.")
    truth = {} if config.objects is None else read_objects(config.objects)
    with sole_use(target, is_file=True):
        phrases = _find_phrases(source, work_folder(target), tagger, progress)
        corpus = Corpus()
        with row_progress(progress, "counting") as advance:
            for row, by_turn in _rows_with_phrases(source, phrases):
                corpus.add(image_key(row), chain.from_iterable(by_turn.values()))
                advance()
        builder = RowBuilder(corpus.finish(), config.kind_list, config.negatives, config.seed)
        denied = None if checker is None else _check(source, phrases, checker, progress)
        plans: Iterable[Plan] = _plans(source, phrases, denied, truth, builder.counts.notes)
        if client is not None:
            plans = _with_teacher(plans, client, config, image_root_of(source, config.image_root))
        with rows_file(target) as write, row_progress(progress, "writing") as advance:
            written = 0
            for plan in plans:
                for row in builder.rows(plan):
                    write(row)
                    written += 1
                advance()
            if not written:
                reasons = ", ".join(
                    f"{note}: {count}" for note, count in builder.counts.notes.items() if count
                )
                raise UserError(f"{source}: no row to tag ({reasons or 'the file has none'}).")
        report = builder.counts.to_json() | {
            "source": str(source),
            "seed": config.seed,
            "tagger": tagger.name[:200],
        }
        clients = {"teacher": client, "checker": getattr(checker, "client", None)}
        report |= {
            name: {"model": c.model, **c.spent().to_json()} for name, c in clients.items() if c is not None
        }
        write_json(f"{target}.report.json", report)
    return report


def _rows(source: Path, notes: Counter | None = None) -> Iterator[dict]:
    rows = (sft_row(raw, f"{source}:{number}", notes) for number, raw in read_raw(source))
    return plain_rows(rows, set(), notes)


def _find_phrases(source: Path, folder: Path, tagger: Tagger, progress: bool) -> Path:
    """The file of phrases: one line a row, written as they are found; a run that was killed goes on behind them."""
    require_file(source)
    state = source.stat()
    identity = f"{source.resolve()} {state.st_size} {state.st_mtime_ns} {tagger.name}"
    path = folder / f"phrases-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
    if (done := path.with_suffix(".done")).exists() and path.exists():
        return path
    finished = total = _complete_lines(path)

    def answers() -> Iterator[tuple[int, int, str]]:
        nonlocal total
        for number, row in enumerate(islice(_rows(source), finished, None), finished):
            total = number + 1
            for turn, message in enumerate(row["messages"]):
                if message["role"] == "assistant":
                    if len(message["content"]) > LONGEST_ANSWER:
                        reason = f"message {turn + 1} is longer than {LONGEST_ANSWER:,} characters."
                        raise RowError(TOO_LONG, reason, row["source"])
                    yield number, turn, message["content"]

    # the tagger reads ahead of what it gives
    ahead, places = tee(answers())
    tagged = zip(places, tagger.tag(text for _, _, text in ahead), strict=True)
    lines: list[dict] = []
    with row_progress(progress, "finding phrases") as advance:
        for number, group in groupby(tagged, key=lambda pair: pair[0][0]):
            by_turn = {turn: [p.to_json() for p in phrases] for (_, turn, _), phrases in group}
            lines += [{"phrases": {}}] * (number - finished - len(lines))  # rows without an answer
            lines.append({"phrases": by_turn})
            if len(lines) >= BATCH_ROWS:
                append_jsonl(path, lines)
                finished, lines = finished + len(lines), []
            advance()
    append_jsonl(path, [*lines, *([{"phrases": {}}] * (total - finished - len(lines)))])
    make_folder(folder)
    with writing(done):
        done.touch()
    return path


def _check(source: Path, phrases: Path, checker: Checker, progress: bool) -> Path:
    """The file of what the checker denied, one line a row; a run that was killed goes on behind its last line."""
    identity = f"{phrases.name} {checker.name}"
    path = phrases.with_name(f"checks-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl")
    rows = islice(_rows_with_phrases(source, phrases), _complete_lines(path), None)
    with row_progress(progress, "checking phrases") as advance:
        while batch := list(islice(rows, CHECK_ROWS)):
            claims = [
                (number, turn, k, phrase)
                for number, (row, by_turn) in enumerate(batch)
                for turn, listed in by_turn.items()
                for k, phrase in enumerate(listed)
                if phrase.head and not phrase.place and row["images"]
            ]
            try:
                verdicts = checker.verdicts(
                    [(batch[number][0]["images"], phrase) for number, _, _, phrase in claims]
                )
            except RowError:  # of an image; the checker knows no rows
                for row, _ in batch:
                    _require_images(row, checker.image_root, open_image)
                raise
            lines: list[dict] = [{"denied": {}} for _ in batch]
            for (number, turn, k, _), is_there in zip(claims, verdicts, strict=True):
                if is_there is None:
                    lines[number]["undecided"] = lines[number].get("undecided", 0) + 1
                elif not is_there:
                    lines[number]["denied"].setdefault(str(turn), k)
            append_jsonl(path, lines)
            for _ in batch:
                advance()
    return path


def _require_images(row: dict, root: str | Path | None, read: Callable) -> None:
    """Raises RowError, with the row's place: an image that `read` cannot read."""
    try:
        for image in row["images"]:
            read(image, root)
    except RowError as error:
        raise RowError(
            error.kind, f"{error.reason} `vlm-sft-rl data validate` lists all such rows.", row["source"]
        ) from error


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


def _beside(rows: Iterable[dict], path: Path, name: str) -> Iterator[tuple[dict, dict, dict]]:
    """Each row with its line in a file of the work folder, and what the line has under `name`, by number of the message."""
    lines = read_jsonl(path) if path.exists() else iter(())
    for row in rows:
        _, line = next(lines, (0, {}))
        values = line.get(name)
        if not isinstance(values, dict) or not all(key.isdecimal() for key in values):
            raise _damaged(path)
        yield row, {int(key): value for key, value in values.items()}, line


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: ends too soon, or has lines that do not fit the rows. Remove this file: it is made anew."
    )


def _rows_with_phrases(
    source: Path, phrases: Path, notes: Counter | None = None
) -> Iterator[tuple[dict, dict[int, list[Phrase]]]]:
    """Each row with its phrases, by the number of the message."""
    for row, values, _ in _beside(_rows(source, notes), phrases, "phrases"):
        try:
            texts = {turn: row["messages"][turn]["content"] for turn in values}
            by_turn = {turn: [Phrase.from_json(v, texts[turn]) for v in values[turn]] for turn in values}
        except (LookupError, TypeError, ValueError) as error:
            raise _damaged(phrases) from error
        yield row, by_turn


def _plans(
    source: Path, phrases: Path, denied: Path | None, truth: Mapping[str, Scene], notes: Counter
) -> Iterator[Plan]:
    known = {noun for scene in truth.values() for noun in scene.objects}
    rows = _rows_with_phrases(source, phrases, notes)
    checks = ((pair, {}, {}) for pair in rows) if denied is None else _beside(rows, denied, "denied")
    for (row, by_turn), check, line in checks:
        answers = answers_of(row, by_turn)
        if not all(k in range(len(by_turn.get(turn, ()))) for turn, k in check.items()):
            raise _damaged(denied)
        notes[UNDECIDED] += line.get("undecided", 0)
        scenes = [truth.get(normpath(image)) for image in row["images"] if isinstance(image, str)]
        present = {noun for scene in scenes if scene is not None for noun in scene.objects}
        heads = {phrase.head for answer in answers for phrase in answer.phrases}
        if not all(answer.text.strip() for answer in answers):
            notes[EMPTY] += 1
        elif truth and None in scenes:
            notes[UNDESCRIBED] += 1
        elif (heads & known) - present:
            notes[UNTRUE] += 1
        else:
            kept = {name: row[name] for name in ("id", "images", "messages")}
            yield Plan(kept, answers, present, check)


def _with_teacher(
    plans: Iterable[Plan], client: EndpointClient, config: TagConfig, root: Path
) -> Iterator[Plan]:
    """The plans with the teacher's proposals; they are read ahead only as far as requests are in flight."""

    def questions(plan: Plan) -> list[tuple[Answer, int]]:
        # free text with phrases: rules do the rest without a mistake
        free = [a for a in plan.answers if a.kind == GENERAL and a.phrases and not plan.denied]
        return [(answer, number) for answer in free for number in range(config.negatives)]

    def requests() -> Iterator[ChatRequest]:
        for plan in ahead:
            for answer, number in questions(plan):
                chat = teacher_messages(answer.question, answer.text, answer.phrases)
                if config.teacher_images:
                    chat[-1] = user_message(chat[-1]["content"], plan.row["images"])
                yield ChatRequest(
                    id=f"{plan.row['id']}/{answer.turn}/{number}",
                    messages=chat,
                    max_tokens=MAX_TOKENS,
                    temperature=TEMPERATURE,
                    seed=config.seed + number,
                    image_root=root if config.teacher_images else None,
                )

    ahead, behind = tee(plans)
    waiting = requests()
    first = list(islice(waiting, PROBES if config.negatives > 1 else 0))
    if first:
        client.probe(first)  # equal answers would be one negative, not several
    replies = client.complete(chain(first, waiting))
    for plan in behind:
        for answer, number in questions(plan):
            reply = next(replies)
            if reply.error is None:
                proposal = read_teacher(reply.texts[0], answer.question, answer.phrases)
                plan.proposals[answer.turn, number] = proposal
        yield plan
    deque(replies, maxlen=0)  # complains at its end if nothing at all was answered


def view(report: dict) -> Any:
    """A rich renderable of the balance report: what the verifier will have seen."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    rows, phrases = report["rows"], report["phrases"]
    head = Text(
        f"{rows.get('positive', 0)} positive and {rows.get('negative', 0)} negative rows; {phrases.get('confident', 0)} "
        f"confident phrases in positives, {phrases.get('unconfident', 0)} unconfident "
        f"({100 * report['unconfident_share']:.1f} % of both)"
    )
    table = Table(title="Negatives by answer type", title_justify="left", box=None, pad_edge=False)
    for name in ("answer type", "answers", "negatives", "of these"):
        table.add_column(
            name, justify="right" if name in ("answers", "negatives") else "left", overflow="fold"
        )
    for name, counts in report["answer_types"].items():
        kinds = sorted(counts["by_kind"].items(), key=lambda kind: -kind[1])
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        table.add_row(name, str(counts["answers"]), str(counts["negatives"]), listed)
    parts: list[Any] = [head, table]
    if report["not_used"]:
        rejected = Table(title="Candidates not used", title_justify="left", box=None, show_header=False)
        for reason, count in sorted(report["not_used"].items(), key=lambda item: -item[1]):
            rejected.add_row(str(count), reason)
        parts.append(rejected)
    parts += [Text(f"note: {count} {note}", "yellow") for note, count in report["notes"].items()]
    if not rows.get("positive"):
        parts.append(
            Text(
                "warning: no row is positive, so nothing teaches the model when an answer is right: every row has a phrase "
                "that the checker or --objects denies. Look at some of them with their pictures, or take another checker.",
                "yellow",
            )
        )
    return Group(*parts)
