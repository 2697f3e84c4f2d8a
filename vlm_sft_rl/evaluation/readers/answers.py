"""Benchmarks whose answers are known: yes or no, a letter, a word, what people answered, or what a judge compares with.

`split` says which files of a folder are read, for ScienceQA which questions.
"""

import ast
import csv
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ...data.rows import LETTERS
from ...data.sources import questions
from ...data.sources.source import Record, Source, members, objects
from ...errors import UserError, short
from ...shapes import read_object
from .records import array, maybe, row, stored, table, whole_number, written_picture

CIRCLE = 1_000_000  # rotations of question i have the indices i + k * CIRCLE
_LARGEST_FIELD = 1 << 30


def pope(source: Source) -> Iterator[dict]:
    """POPE `coco_pope_*.json`: `{"question_id", "image", "text", "label"}`, an object a line."""
    for r in objects(source):
        yield row(r.text("question_id"), r.picture("image"), r.text("text"), answer=r.yes_no("label"))


def amber(source: Source, annotations: Path) -> Iterator[dict]:
    """AMBER `query_*.json`: `[{"id", "image", "query"}]`, or REVERSE's JSONL with `question_id` and `text`.

    Args:
        annotations: `annotations.json`; its entry number `id` has `truth`, `hallu` (descriptions) and `type`.
    """
    truths = read_object(annotations, [dict], "Fetch it again from AMBER's owners.")
    truth_source = replace(source, path=annotations)
    for r in objects(source):
        column = "id" if "id" in r.raw else "question_id"
        number = whole_number(r, column)
        if not 1 <= number <= len(truths):
            raise r.wrong(f"id {number} has no entry in {annotations} ({len(truths)}).")
        truth = Record(truth_source, number, truths[number - 1])
        kind = truth.text("type")
        if kind == "generative":
            fields = {"truth": truth.take("truth", list), "hallu": maybe(truth, "hallu", list) or []}
        else:
            fields = {"answer": truth.yes_no("truth"), "category": kind.removeprefix("discriminative-")}
        yield row(str(number), r.picture("image"), r.text("query" if "query" in r.raw else "text"), **fields)


def mme(source: Source, categories: list[str] | None = None, split: str | None = None) -> Iterator[dict]:
    """MME as parquet: `question_id`, `image`, `question`, `answer`, `category`; two rows a picture.

    Args:
        categories: only these.
        split: which files of a folder.
    """
    numbers: Counter = Counter()
    for r in stored(source, split):
        category, pair = r.text("category"), r.text("question_id")
        if categories and category not in categories:
            continue
        numbers[category, pair] += 1
        identity = f"{category}/{pair}#{numbers[category, pair]}"
        fields = {"answer": r.yes_no("answer"), "category": category, "pair": pair}
        yield row(identity, [r.text("image")], r.text("question"), **fields)


def hallusion_bench(source: Source) -> Iterator[dict]:
    """HallusionBench.json: `category`, `subcategory`, `set_id`, `figure_id`, `question_id`, `question`, `gt_answer` "0" or
    "1", `filename` (null where the question comes without its figure)."""
    for r in objects(source):
        group = "/".join(r.text(name) for name in ("category", "subcategory", "set_id"))
        figure, question_key, name = r.text("figure_id"), r.text("question_id"), maybe(r, "filename", str)
        answer = {"1": "yes", "0": "no"}.get(r.text("gt_answer"))
        if answer is None:
            raise r.wrong(f'`gt_answer`: expected "0" or "1", found {r.raw["gt_answer"]!r}.')
        fields = {
            "set": group,
            "figure": figure,
            "question_key": question_key,
            "category": r.text("category"),
        }
        images = [source.image(name.removeprefix("./"))] if name else []
        yield row(f"{group}/{figure}/{question_key}", images, r.text("question"), answer=answer, **fields)


def mmstar(source: Source, split: str | None = None) -> Iterator[dict]:
    """`index`, `question` (with its options: `… Options: A: …, B: …`), `image`, `answer` (letter), `category`."""
    for r in stored(source, split):
        question, choices = split_options(r)
        fields = {"choices": choices, "answer": r.letter(choices), "category": r.text("category")}
        yield row(r.text("index"), [r.text("image")], question, **fields)


def split_options(record: Record) -> tuple[str, list[str]]:
    """Question and options of a question that ends in `Options: A: one, B: two`. Raises RowError where it does not."""
    text = record.text("question")
    question, mark, rest = text.rpartition("Options:")
    rest = f" {rest}"
    # only the letters that follow one another from A are labels; "A." inside an option is not
    labels: list[re.Match] = []
    for match in re.finditer(r"(?:^|[\s,])([A-J])[:.]\s*", rest):
        if match[1] == LETTERS[len(labels)]:
            labels.append(match)
    if not mark or len(labels) < 2:
        raise record.wrong(
            f"`question`: expected `Options: A: …, B: …` at its end, found {short(text, 120)}."
        )
    ends = [label.start() for label in labels[1:]] + [len(rest)]
    options = [rest[label.end() : end] for label, end in zip(labels, ends, strict=True)]
    return question.strip(), [option.strip().rstrip(",").strip() for option in options]


def ai2d(source: Source, split: str | None = None) -> Iterator[dict]:
    """`question`, `options` (four texts), `answer` (index of the right one, as text), `image`."""
    for r in stored(source, split):
        choices = r.texts("options")
        fields = {"choices": choices, "answer": r.letter_at_index(choices)}
        yield row(f"ai2d-{r.key}", [r.text("image")], r.text("question"), **fields)


def mmmu(source: Source, split: str | None = None) -> Iterator[dict]:
    """`id`, `question`, `options` (a Python list as text; empty for open questions), `answer`, `image_1` … `image_7`,
    `question_type`; the subject is the middle of the id (validation_Accounting_1)."""
    for r in stored(source, split):
        options = r.raw.get("options")
        if isinstance(options, str):
            try:
                options = ast.literal_eval(options)
            except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
                raise r.wrong(f"`options`: expected a list as text, found {short(options)}.") from error
        if not isinstance(options, list):
            raise r.wrong(f"`options`: expected a list, found {short(options)}.")
        choices = [str(option) for option in options]
        answer = r.letter(choices) if choices else r.text("answer")
        pictures = (r.raw.get(f"image_{i}") for i in range(1, 8))
        subject = "_".join(r.text("id").split("_")[1:-1])
        fields = {"choices": choices or None, "answer": answer, "category": subject}
        yield row(r.text("id"), [path for path in pictures if path], r.text("question"), **fields)


def mathvista(source: Source, split: str | None = None) -> Iterator[dict]:
    """`pid`, `question`, `decoded_image`, `choices`, `answer` (of a choice its text), `question_type`, `answer_type`,
    `precision`, `unit`, `metadata.task`."""
    for r in stored(source, split):
        choices = r.texts("choices") if r.raw.get("choices") is not None else []
        answer, choices = r.text("answer"), [choice.strip() for choice in choices]
        if not choices:
            facts = {name: r.raw.get(name) for name in ("precision", "unit", "answer_type")}
            fields = {"answer": answer, **{k: str(v) for k, v in facts.items() if v is not None}}
        elif answer in choices:
            fields = {"choices": choices, "answer": LETTERS[choices.index(answer)]}
        else:
            raise r.wrong(f"`answer`: {short(answer)} is none of the choices {choices}.")
        task = (maybe(r, "metadata", dict) or {}).get("task")
        yield row(r.text("pid"), [r.text("decoded_image")], r.text("question"), category=task, **fields)


def scienceqa(source: Source, split: str = "test") -> Iterator[dict]:
    """ScienceQA `problems.json`: id -> `question`, `choices`, `answer` (index), `hint`, `image`, `subject`, `split`;
    pictures in `SPLIT/ID/`. Questions without a picture are left out."""
    for r in members(source):
        if r.text("split") != split or not r.raw.get("image"):
            continue
        choices, hint = r.texts("choices"), str(r.raw.get("hint") or "").strip()
        question = f"{hint}\n{r.text('question')}" if hint else r.text("question")
        fields = {"choices": choices, "answer": r.letter_at_index(choices), "category": r.text("subject")}
        yield row(r.key, [source.image(split, r.key, r.text("image"))], question, **fields)


def tsv(source: Source, circular: bool = False, split: str | None = None) -> Iterator[dict]:
    """The TSV files of MMBench and VLMEvalKit: `index`, `question`, `hint`?, `A`, `B`, …, `answer`, `category`?, `image`
    (base64, or the index of the row that has it), `split`?.

    Args:
        circular: rows are rotations of questions; `circle` is filled with the question's index.
        split: only rows of this split.
    """
    csv.field_size_limit(_LARGEST_FIELD)
    pictures: dict[str, str] = {}
    for r in table(source, ("index", "question", "answer", "image"), "a TSV like MMBench's", "\t"):
        index, image = r.text("index"), r.text("image")
        pictures[index] = (
            pictures[image] if image in pictures else written_picture(image, r, " nor an index before it")
        )
        if split is not None and r.raw.get("split") != split:
            continue
        options = [(r.raw.get(letter) or "").strip() for letter in LETTERS[:10]]
        hint = (r.raw.get("hint") or "").strip()
        yield row(
            index,
            [pictures[index]],
            r.text("question") if hint in ("", "nan") else f"{hint}\n{r.raw['question']}",
            answer=r.text("answer"),
            choices=[option for option in options if option not in ("", "nan")] or None,
            category=r.raw.get("category"),
            circle=str(whole_number(r, "index") % CIRCLE) if circular else None,
        )


def gqa(source: Source) -> Iterator[dict]:
    """`testdev_balanced_questions.json`: id -> `question`, `imageId`, `answer`, `types.structural`."""
    for r in members(source):
        images = [source.image(f"{r.text('imageId')}.jpg")]
        kind = (maybe(r, "types", dict) or {}).get("structural")
        yield row(r.key, images, r.text("question"), answer=r.text("answer"), category=kind)


def tabmwp(source: Source) -> Iterator[dict]:
    """TabMWP `problems_test.json`, as training reads it."""
    return _with_category(questions.tabmwp(source), "answer_type")


def m3cot(source: Source) -> Iterator[dict]:
    """M3CoT test questions, as training reads them."""
    return _with_category(questions.m3cot(source), "domain")


def easy_vqa(source: Source) -> Iterator[dict]:
    """easy-vqa's test questions, as training reads them."""
    return _with_category(questions.easy_vqa(source), "answer_type")


def _with_category(rows: Iterator[dict], field: str) -> Iterator[dict]:
    for question in rows:
        category = question.get("category") or question.get(field)
        yield question | ({"category": category} if category else {})


def vqa(
    source: Source, annotations: Path, answer: str = "answer", image: str = "COCO_val2014_{:012d}.jpg"
) -> Iterator[dict]:
    """VQAv2's and OK-VQA's question file: `questions` (`question_id`, `image_id`, `question`).

    Args:
        annotations: the file with `annotations`: `question_id`, `answers` (`answer`), `answer_type`.
        answer: the field of an answer that is compared with; OK-VQA has stems in `answer` and words in `raw_answer`.
        image: a picture's file name by its id.
    """
    try:
        image.format(0)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"reader 'vqa': reader_options: image is {image!r}, expected a name with one place for the number, such as "
            "COCO_val2014_{:012d}.jpg."
        ) from error
    people: dict[str, dict] = {}
    for r in array(replace(source, path=annotations), "annotations"):
        fields = {"answers": r.people_answers(answer), "category": r.raw.get("answer_type")}
        if people.setdefault(r.text("question_id"), fields) is not fields:
            raise r.wrong(f"a second entry for question {r.text('question_id')}.")
    for r in array(source, "questions"):
        identity = r.text("question_id")
        if identity not in people:
            raise r.wrong(f"question {identity} has no answers in {annotations}: another split?")
        images = [source.image(image.format(r.take("image_id", int)))]
        yield row(identity, images, r.text("question"), **people[identity])


def vizwiz(source: Source) -> Iterator[dict]:
    """VizWiz `val.json`: `[{"image", "question", "answers": [{"answer"}], "answer_type"}]`."""
    for r in objects(source):
        fields = {"answers": r.people_answers(), "category": r.raw.get("answer_type")}
        yield row(r.text("image").rsplit(".", 1)[0], r.picture("image"), r.text("question"), **fields)


def mmhal(source: Source) -> Iterator[dict]:
    """MMHal-Bench `response_template.json`: `question_type`, `image_id`, `image_src`, `image_content`, `question`,
    `gt_answer`; pictures in `images/` under the last part of `image_src`."""
    for r in objects(source):
        fields = {"answer": r.text("gt_answer"), "image_content": r.take("image_content", list)}
        images = [source.image("images", PurePosixPath(r.text("image_src")).name)]
        identity = f"{r.key}-{r.text('image_id')}"
        yield row(identity, images, r.text("question"), category=r.text("question_type"), **fields)


def haloquest(source: Source) -> Iterator[dict]:
    """`haloquest-eval.csv`: `image_name`, `url`, `hallucination type`, `question`, `groundtruth responses` (separated by
    `;`), `split`; pictures in `images/`. Rows of another split than "eval" are left out: the owners also publish all in
    one file."""
    columns = ("image_name", "hallucination type", "question", "groundtruth responses")
    for r in table(source, columns, "haloquest-eval.csv"):
        if (r.raw.get("split") or "eval").strip() == "eval":
            fields = {"answer": r.text("groundtruth responses"), "category": r.text("hallucination type")}
            yield row(f"haloquest-{r.key}", r.picture("image_name", "images"), r.text("question"), **fields)


def mm_vet(source: Source) -> Iterator[dict]:
    """`mm-vet.json`: id -> `imagename`, `question`, `answer` (with `<AND>`, `<OR>`), `capability` (several)."""
    for r in members(source):
        fields = {"answer": r.text("answer"), "category": sorted(r.texts("capability"))}
        yield row(r.key, r.picture("imagename", "images"), r.text("question"), **fields)
