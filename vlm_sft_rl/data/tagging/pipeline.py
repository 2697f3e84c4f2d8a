"""Files of answers -> files of tagged rows: with ground truth (`write_synthetic`, `write_on_policy`), or without (`tag`).

`tag` goes over its source in passes that can be interrupted:

1. Phrases of every answer, kept in the work folder as they are found.
2. Counts over the whole set: which nouns go together, which are said of which image.
3. Verdicts of a checker, if there is one, kept as they come.
4. Rows: the positive, and negatives by rule or by a teacher, whose answers are kept in its ledger.
"""

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby, islice, tee
from pathlib import Path
from posixpath import normpath
from typing import Any, Protocol

from ...errors import FORMAT, RowError, UserError
from ...io import append_jsonl, read_jsonl, read_text, row_progress, rows_file, write_json
from ...teacher import ChatRequest, EndpointClient, user_message
from ..images import image_root_of, open_image
from ..rows import SUPERVISE, read_raw, read_rows, to_row
from ..tags import UNCONFIDENT
from .build import Answer, RowBuilder, answers_of, image_key, object_grader, on_policy_rows, synthetic_rows
from .build import yes_no_rows as tag_yes_no
from .negatives import (
    GENERAL,
    KINDS,
    Corpus,
    Negative,
    Scene,
    prior_of,
    read_teacher,
    teacher_messages,
)
from .phrases import YES_NO, Phrase, SpacyTagger, Tagger, VocabularyTagger, fix_article, words

BATCH_ROWS = 200  # rows whose phrases are written at once
CHECK_ROWS = 64  # rows whose phrases are checked at once
CHECK_BATCH, CHECK_TOKENS = 32, 4  # of a checker: questions at once, and the length of its answers
TEMPERATURE = 0.7  # of the teacher: several negatives for one answer should differ
MAX_TOKENS = 200
UNTRUE = "rows left out: an answer names an object that is not in the image"


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

    Raises:
        UserError: a file is missing or has no such lines, a row's image has no ground truth, an unknown prior.
    """
    truth = read_objects(objects)
    nouns = read_vocabulary(vocabulary, truth.values())
    notes: Counter = Counter()
    rows = synthetic_rows(
        read_rows(captions),
        lambda row: _scene_of(row["images"], truth, objects, row["source"]),
        nouns,
        prior_of(prior, truth.values(), nouns, objects),
        negatives,
        seed,
        notes=notes,
    )
    answers = tag_yes_no(read_rows(questions), notes) if questions is not None else ()
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
        samples: JSONL of `{"id", "images", "prompt", "answer"}` as `vlm-sft-rl eval` writes it; the nouns of the picture
            are `reference.objects`, unless `objects` is given.
        objects: ground truth by image, see `read_objects`.
        target, vocabulary: as of `write_synthetic`.
        supervise: "all" or "verdicts".

    Returns:
        Counts: "rows", "negatives", and what was left out and why.

    Raises:
        UserError: as `write_synthetic`; or a sample without ground truth.
    """
    if supervise not in SUPERVISE:
        raise UserError(f"supervise: {supervise!r} is not one of {', '.join(SUPERVISE)}.")
    truth = None if objects is None else read_objects(objects)
    known, scenes = [], []
    for number, sample in read_jsonl(samples):
        where = f"{samples}:{number}"
        for name, kind in (("id", str | int), ("images", list), ("prompt", str), ("answer", str)):
            if not isinstance(value := sample.get(name), kind):
                message = f"field `{name}`: found {value!r:.80}. Is this a samples file?"
                raise RowError(FORMAT, message, where)
        if truth is None:
            reference = sample.get("reference")
            if not isinstance(reference, dict) or reference.get("objects") is None:
                message = "no `reference.objects`, so its phrases cannot be graded. Give --objects FILE."
                raise RowError(FORMAT, message, where)
            scene = Scene(_nouns(reference["objects"], where))
        else:
            scene = _scene_of(sample["images"], truth, objects, where)
        scenes.append(scene)
        known.append({**sample, "reference": {"objects": scene.objects}})
    nouns = read_vocabulary(vocabulary, scenes if truth is None else truth.values())
    notes: Counter = Counter()
    rows = on_policy_rows(known, object_grader(nouns), nouns, supervise=supervise, notes=notes)
    return _write(target, rows, notes)


def read_objects(path: str | Path) -> dict[str, Scene]:
    """Ground truth by image path.

    Lines are `{"image": path, "objects": [noun or {"noun": noun}], "theme": text?}`, one an image, or region rows with
    `image` and `category`, of which an image may have many.

    Raises:
        UserError: a line without these fields, or an image whose `objects` come twice.
    """
    scenes: dict[str, Scene] = {}
    for number, line in read_jsonl(path):
        where, image = f"{path}:{number}", line.get("image")
        if not isinstance(image, str) or not image:
            message = f"field `image`: expected the path of a picture, found {image!r:.80}."
            raise RowError(FORMAT, message, where)
        before = scenes.get(normpath(image))
        if line.get("objects") is None and line.get("category"):
            nouns = _nouns([line["category"]], where) + list(before.objects if before else ())
        else:
            nouns = _nouns(line.get("objects"), where)
            if before is not None:
                message = f"the image {image!r} was described before. Keep one line for it."
                raise RowError(FORMAT, message, where)
        scenes[normpath(image)] = Scene(list(dict.fromkeys(nouns)), line.get("theme"))
    if not scenes:
        raise UserError(f"{path}: no pictures in it.")
    return scenes


def _nouns(objects: object, where: str) -> list[str]:
    items = objects if isinstance(objects, list) else [None]
    nouns = [item.get("noun", item.get("category")) if isinstance(item, dict) else item for item in items]
    if not all(isinstance(noun, str) and noun.strip() for noun in nouns):
        message = f'field `objects`: expected a list of nouns or of {{"noun": …}}, found {objects!r:.80}.'
        raise RowError(FORMAT, message, where)
    return [noun.strip().lower() for noun in nouns]


def read_vocabulary(path: str | Path | None, scenes: Iterable[Scene] = ()) -> list[str]:
    """The nouns that phrases are found by: one a line of the file, or all nouns of the ground truth.

    Raises:
        UserError: there is none.
    """
    if path is None:
        nouns = {noun for scene in scenes for noun in scene.objects}
    else:
        nouns = {line.strip().lower() for line in read_text(path).splitlines() if line.strip()}
    if not nouns:
        raise UserError(
            f"{path or 'the ground truth'}: no nouns. List those that answers may name, one a line."
        )
    return sorted(nouns)


def _scene_of(images: list, truth: Mapping[str, Scene], objects: str | Path | None, where: str) -> Scene:
    if len(images) != 1 or not isinstance(images[0], str):
        raise RowError(FORMAT, f"expected the path of one image, found {images!r:.80}.", where)
    scene = truth.get(normpath(images[0]))
    if scene is None:
        message = f"the image {images[0]!r} is not in {objects}. Write its path there as it is in the row."
        raise RowError(FORMAT, message, where)
    return scene


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


# --- Without: who finds phrases, who checks them, who writes negatives ---


def _option(default: Any, help: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True)
class TagConfig:
    """Settings of `tag`; each is an option of `vlm-sft-rl data tag`."""

    nouns: Path | None = _option(
        None, "Text file of nouns, one a line: find these instead of spaCy's noun phrases."
    )
    spacy_model: str | None = _option(None, "spaCy pipeline. [en_core_web_sm]")
    objects: Path | None = _option(
        None, "JSONL of what is in each image: image and objects, or region rows with category."
    )
    kinds: str = _option(",".join(KINDS), "Negatives by rule, comma-separated.")
    negatives: int = _option(1, "Negative rows for each row, at most.", min=1)
    places: bool = _option(True, "Phrases begin with the preposition of place before them.")
    processes: int = _option(1, "Processes that find noun phrases.", min=1)
    seed: int = _option(0, "Seed of everything that is drawn.")
    checker: str | None = _option(
        None, "Checkpoint directory or endpoint that says of each phrase whether it is there."
    )
    checker_model: str | None = _option(None, "The endpoint's name for the checker.")
    check_question: str = _option(
        "Is there {phrase} in the image? Answer yes or no.", "What it is asked; {phrase} is filled in."
    )
    teacher: str | None = _option(None, "Address of an OpenAI-compatible endpoint that writes negatives.")
    teacher_model: str | None = _option(None, "Its name for the model.")
    teacher_images: bool = _option(True, "Send the images too.")
    image_root: Path | None = _option(None, "Folder of the images. [the folder of SOURCE]")
    api_key_env: str | None = _option(
        None, "Environment variable with the API key. [OPENAI_API_KEY, if set]"
    )
    concurrency: int = _option(8, "Requests in flight.", min=1)
    input_price: float = _option(0.0, "Per million prompt tokens, to count the cost.")
    output_price: float = _option(0.0, "Per million completion tokens.")
    budget: float | None = _option(None, "Stop when this much is spent.")

    def check(self) -> None:
        """Raises UserError: settings that do not exist or do not go together."""
        if unknown := set(self.kind_list) - set(KINDS):
            raise UserError(
                f"Unknown kinds of negatives: {', '.join(sorted(unknown))}. Known are {', '.join(KINDS)}."
            )
        if self.negatives < 1:
            raise UserError("negatives must be at least 1.")
        if (self.teacher is None) != (self.teacher_model is None):
            raise UserError(
                "--teacher and --teacher-model go together: an address, and the model's name there."
            )
        if self.checker is not None and "://" in self.checker and self.checker_model is None:
            raise UserError("--checker with an address needs --checker-model, the model's name there.")
        if "{phrase}" not in self.check_question:
            raise UserError(f"The check question {self.check_question!r} has no {{phrase}} in it.")

    @property
    def kind_list(self) -> list[str]:
        return [kind.strip() for kind in self.kinds.split(",") if kind.strip()]

    def client(self, url: str, model: str, ledger: Path) -> EndpointClient:
        return EndpointClient(
            url,
            model,
            ledger=ledger,
            api_key_env=self.api_key_env,
            concurrency=self.concurrency,
            input_price=self.input_price,
            output_price=self.output_price,
            budget=self.budget,
        )


class Checker(Protocol):
    """Asked whether what a phrase names is in the image: the quality control of positives.

    Captions name what is typical and not there; a verifier that learns from them learns to trust just these phrases.
    Many models answer "is there a moon?" far better than they caption (POPE against CHAIR), often the very model to be
    trained.
    """

    name: str  # of the model and the question: the same name gives the same verdicts

    def there(self, claims: Sequence[tuple[Sequence[Any], Phrase]]) -> list[bool | None]:
        """For each (images, phrase) whether it is there; None where the answer is neither yes nor no."""


class ModelChecker:
    """A checkpoint on this machine, decoded greedily. Raises UserError: no checkpoint there."""

    def __init__(self, model_dir: str | Path, question: str, image_root: str | Path | None = None):
        from ...models.load import load_for_inference

        self.question, self.image_root = question, image_root
        self.name = f"{Path(model_dir).resolve()} {question}"
        self._model, self._processor, _ = load_for_inference(model_dir)

    def there(self, claims: Sequence[tuple[Sequence[Any], Phrase]]) -> list[bool | None]:
        from ...decoding import generate_plain

        answers = generate_plain(
            self._model,
            self._processor,
            [[open_image(image, self.image_root) for image in images] for images, _ in claims],
            [question_about(phrase, self.question) for _, phrase in claims],
            max_new_tokens=CHECK_TOKENS,
            batch_size=CHECK_BATCH,
        )
        return [read_verdict(answer.text) for answer in answers]


class EndpointChecker:
    """A model behind an OpenAI-compatible endpoint; a request that fails is no verdict."""

    def __init__(self, client: EndpointClient, question: str, image_root: str | Path | None = None):
        self.client, self.question, self.image_root = client, question, image_root
        self.name = f"{client.model} {question}"

    def there(self, claims: Sequence[tuple[Sequence[Any], Phrase]]) -> list[bool | None]:
        requests = (
            ChatRequest(
                id=f"{'|'.join(map(str, images))}: {phrase.text}",
                messages=[user_message(question_about(phrase, self.question), images)],
                max_tokens=CHECK_TOKENS,
                image_root=self.image_root,
            )
            for images, phrase in claims
        )
        replies = self.client.complete(requests)
        return [read_verdict(reply.texts[0]) if reply.texts else None for reply in replies]


def question_about(phrase: Phrase, template: str) -> str:
    """`the red kettle` -> `Is there a red kettle …?`; plural phrases are asked for as they are, with "Are there"."""
    text = phrase.text
    first = next(iter(words(text)), "")
    if text[1:2].islower() or first == "a":
        text = text[0].lower() + text[1:]
    if first in ("the", "this", "that", "these", "those"):
        text = text[len(first) :].lstrip()
        text = text if phrase.plural else fix_article(f"a {text}")
    if phrase.plural and first != "a":
        template = re.sub(r"^Is there\b", "Are there", template)
    return template.replace("{phrase}", text)


def read_verdict(answer: str) -> bool | None:
    """The yes or no that an answer begins with."""
    verdict = YES_NO.match(answer)
    return None if verdict is None else verdict.group(1).lower() == "yes"


def work_folder(target: str | Path) -> Path:
    """Where phrases and the ledgers are kept; it may be deleted when the rows are done."""
    return Path(f"{target}.work")


def tag_with(source: str | Path, target: str | Path, config: TagConfig) -> tuple[dict, dict]:
    """`tag` with the tagger, checker and teacher that the settings name, and a progress bar.

    Returns:
        The balance report, and the clients that were paid, by name ("teacher", "checker").
    """
    config.check()
    clients: dict[str, EndpointClient] = {}
    root, work = image_root_of(source, config.image_root), work_folder(target)
    if config.nouns is not None:
        tagger: Tagger = VocabularyTagger(read_vocabulary(config.nouns), places=config.places)
    else:
        tagger = SpacyTagger(config.spacy_model, config.places, config.processes)
    if config.teacher is not None:
        clients["teacher"] = config.client(config.teacher, config.teacher_model, work / "teacher.jsonl")
    checker: Checker | None = None
    if config.checker is not None and "://" in config.checker:
        clients["checker"] = config.client(config.checker, config.checker_model, work / "checker.jsonl")
        checker = EndpointChecker(clients["checker"], config.check_question, root)
    elif config.checker is not None:
        checker = ModelChecker(config.checker, config.check_question, root)
    report = tag(
        source, target, tagger, config, checker=checker, client=clients.get("teacher"), progress=True
    )
    return report, clients


# --- Without: the passes ---


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

    Raises:
        UserError: an unknown kind, a file that cannot be read or written, a teacher that cannot be reached. RowError:
            a row of unknown schema, or with tags already.
    """
    config = config or TagConfig()
    config.check()
    source, target = Path(source), Path(target)
    if target.exists() and source.resolve() == target.resolve():
        raise UserError(f"{source}: source and target are the same file. Choose another target.")
    truth = {} if config.objects is None else read_objects(config.objects)
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
        for plan in plans:
            for row in builder.rows(plan.row, plan.answers, plan.present, plan.proposals, plan.denied):
                write(row)
            advance()
    report = builder.counts.to_json() | {
        "source": str(source),
        "seed": config.seed,
        "tagger": tagger.name[:200],
    }
    if client is not None:
        report["teacher"] = {"model": client.model, **client.usage.to_json()}
    write_json(f"{target}.report.json", report)
    return report


@dataclass
class Plan:
    """A row to be built: its answers, nouns known to be in its images, what a checker denied, what a teacher proposed."""

    row: dict
    answers: list[Answer]
    present: set[str]
    denied: dict[int, int]
    proposals: dict[tuple[int, int], Negative | None] = field(default_factory=dict)


def _rows(source: Path, notes: Counter | None = None) -> Iterator[dict]:
    for number, raw in read_raw(source):
        yield to_row(raw, f"{source}:{number}", notes)


def _find_phrases(source: Path, folder: Path, tagger: Tagger, progress: bool) -> Path:
    """The file of phrases: one line a row, written as they are found; a run that was killed goes on behind them."""
    if not source.is_file():
        raise UserError(f"{source}: no such file. Check the path.")
    state = source.stat()
    identity = f"{source.resolve()} {state.st_size} {state.st_mtime_ns} {tagger.name}"
    path = folder / f"phrases-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.jsonl"
    if (done := path.with_suffix(".done")).exists():
        return path
    finished = _complete_lines(path)

    def answers() -> Iterator[tuple[int, int, str]]:
        for number, row in enumerate(islice(_rows(source), finished, None), finished):
            for turn, message in enumerate(row["messages"]):
                if message["role"] == "assistant":
                    yield number, turn, message["content"]

    # the tagger reads ahead of what it gives
    ahead, places = tee(answers())
    tagged = zip(places, tagger.tag(text for _, _, text in ahead), strict=True)
    lines: list[dict] = []
    with row_progress(progress, "finding phrases") as advance:
        for number, group in groupby(tagged, key=lambda pair: pair[0][0]):
            by_turn = {turn: [p.to_json() for p in found] for (_, turn, _), found in group}
            lines += [{"phrases": {}}] * (number - finished - len(lines))  # rows without an answer
            lines.append({"phrases": by_turn})
            if len(lines) >= BATCH_ROWS:
                append_jsonl(path, lines)
                finished, lines = finished + len(lines), []
            advance()
    append_jsonl(path, lines)
    done.parent.mkdir(parents=True, exist_ok=True)
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
            verdicts = checker.there([(batch[number][0]["images"], phrase) for number, _, _, phrase in claims])
            lines: list[dict] = [{"denied": {}} for _ in batch]
            for (number, turn, k, _), is_there in zip(claims, verdicts, strict=True):
                if is_there is False:
                    lines[number]["denied"].setdefault(str(turn), k)
            append_jsonl(path, lines)
            for _ in batch:
                advance()
    return path


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


def _lines(path: Path | None, name: str) -> Iterator[dict]:
    """One field of each line, with whole numbers as keys; empty behind the end, or where there is no file."""
    for _, line in read_jsonl(path) if path is not None and path.exists() else ():
        yield {int(key): value for key, value in line[name].items()}
    while True:
        yield {}


def _rows_with_phrases(
    source: Path, phrases: Path, notes: Counter | None = None
) -> Iterator[tuple[dict, dict[int, list[Phrase]]]]:
    """Each row with its phrases, by the number of the message."""
    for row, line in zip(_rows(source, notes), _lines(phrases, "phrases"), strict=False):
        texts = {turn: row["messages"][turn]["content"] for turn in line}
        yield row, {turn: [Phrase.from_json(v, texts[turn]) for v in values] for turn, values in line.items()}


def _plans(
    source: Path, phrases: Path, denied: Path | None, truth: Mapping[str, Scene], notes: Counter
) -> Iterator[Plan]:
    known = {noun for scene in truth.values() for noun in scene.objects}
    rows = _rows_with_phrases(source, phrases, notes)
    for (row, by_turn), check in zip(rows, _lines(denied, "denied"), strict=False):
        answers = answers_of(row, by_turn)
        scenes = (truth.get(normpath(image)) for image in row["images"] if isinstance(image, str))
        present = {noun for scene in scenes if scene is not None for noun in scene.objects}
        heads = {phrase.head for answer in answers for phrase in answer.phrases}
        if (heads & known) - present:
            notes[UNTRUE] += 1
            continue
        yield Plan({name: row[name] for name in ("id", "images", "messages")}, answers, present, check)


def _with_teacher(
    plans: Iterable[Plan], client: EndpointClient, config: TagConfig, root: Path
) -> Iterator[Plan]:
    """The plans with the teacher's proposals; they are read ahead only as far as requests are in flight."""

    def questions(plan: Plan) -> list[tuple[Answer, int]]:
        # free text with phrases: rules do the rest without a mistake
        taught = [a for a in plan.answers if a.kind == GENERAL and a.phrases and not plan.denied]
        return [(answer, number) for answer in taught for number in range(config.negatives)]

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
    replies = client.complete(requests())
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
    for name, justify in (
        ("answer type", "left"),
        ("answers", "right"),
        ("negatives", "right"),
        ("of these", "left"),
    ):
        table.add_column(name, justify=justify, overflow="fold")
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
    return Group(*parts)
