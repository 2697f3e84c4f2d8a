"""Yes/no benchmarks: POPE, AMBER, MME, HallusionBench."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...data.rows import read_raw
from ...data.sources.conversations import read_records
from ...data.sources.source import Source, take, take_text
from ...errors import FORMAT, RowError
from ...io import read_json


def pope(source: Source) -> Iterator[dict]:
    """POPE `coco_pope_*.json`: `{"question_id", "image", "text", "label"}`, an object a line."""
    for number, raw in read_raw(source.path):
        where = source.at(number)
        yield {
            "id": take_text(raw, "question_id", where),
            "images": [source.image(take_text(raw, "image", where))],
            "question": take_text(raw, "text", where),
            "answer": _yes_no(take_text(raw, "label", where), where),
        }


def amber(source: Source, annotations: Path) -> Iterator[dict]:
    """AMBER `query_*.json`: `[{"id", "image", "query"}]`, or REVERSE's JSONL with `question_id` and `text`.

    Args:
        annotations: `annotations.json`; its entry number `id` has `truth`, `hallu` (descriptions) and `type`.
    """
    truths = read_json(annotations)
    for number, raw in read_raw(source.path):
        where = source.at(number)
        identity = int(take_text(raw, "id" if "id" in raw else "question_id", where))
        if not 1 <= identity <= len(truths):
            raise RowError(FORMAT, f"id {identity} has no entry in {annotations} ({len(truths)}).", where)
        truth, at = truths[identity - 1], f"{annotations}:{identity}"
        row = {
            "id": str(identity),
            "images": [source.image(take_text(raw, "image", where))],
            "question": take_text(raw, "query" if "query" in raw else "text", where),
        }
        kind = take_text(truth, "type", at)
        if kind == "generative":
            yield row | {"truth": take(truth, "truth", list, at), "hallu": truth.get("hallu") or []}
        else:
            answer = _yes_no(take_text(truth, "truth", at), at)
            yield row | {"answer": answer, "category": kind.removeprefix("discriminative-")}


def mme(source: Source, categories: list[str] | None = None, split: str | None = None) -> Iterator[dict]:
    """MME as parquet: `question_id`, `image`, `question`, `answer`, `category`; two rows a picture.

    Args:
        categories: only these.
        split: which files of a folder.
    """
    seen: Counter = Counter()
    for number, raw in read_records(replace(source, split=split)):
        where = source.at(number)
        category, pair = take_text(raw, "category", where), take_text(raw, "question_id", where)
        if categories and category not in categories:
            continue
        seen[category, pair] += 1
        yield {
            "id": f"{category}/{pair}#{seen[category, pair]}",
            "images": [take_text(raw, "image", where)],
            "question": take_text(raw, "question", where),
            "answer": _yes_no(take_text(raw, "answer", where), where),
            "category": category,
            "pair": pair,
        }


def hallusion_bench(source: Source) -> Iterator[dict]:
    """HallusionBench.json: `category`, `subcategory`, `set_id`, `figure_id`, `question_id`, `question`, `gt_answer` "0" or
    "1", `filename` (null where the question comes without its figure)."""
    for number, raw in read_raw(source.path):
        where = source.at(number)
        names = (take_text(raw, name, where) for name in ("category", "subcategory", "set_id"))
        group = "/".join(names)
        figure, question = take_text(raw, "figure_id", where), take_text(raw, "question_id", where)
        answer = {"1": "yes", "0": "no"}.get(take_text(raw, "gt_answer", where))
        if answer is None:
            raise RowError(FORMAT, f'`gt_answer`: expected "0" or "1", found {raw["gt_answer"]!r}.', where)
        name = raw.get("filename")
        yield {
            "id": f"{group}/{figure}/{question}",
            "images": [source.image(name.removeprefix("./"))] if name else [],
            "question": take_text(raw, "question", where),
            "answer": answer,
            "set": group,
            "figure": figure,
            "question_key": question,
            "category": raw["category"],
        }


def _yes_no(text: str, where: str) -> str:
    answer = text.lower().rstrip(".")
    if answer not in ("yes", "no"):
        raise RowError(FORMAT, f"expected yes or no as the truth, found {text!r:.80}.", where)
    return answer
