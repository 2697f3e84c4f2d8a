"""What a finished evaluation shows: tables on the terminal, a page with its answers, and its figures in a model card."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

from ..data.images import open_image
from ..data.tags import strip_tags, verification
from ..errors import UserError
from ..io import CARD_BEGIN, CARD_END, as_markdown, read_text, write_text
from ..runs import flatten
from .metrics.chair import Chair
from .metrics.counting import CountMetric
from .report import (
    AnswerView,
    Browser,
    BrowserRow,
    Cell,
    Example,
    Figure,
    Gallery,
    Piece,
    Section,
    Table,
    Text,
    Tile,
    Tiles,
    interval_text,
    render_report,
)
from .results import read_results
from .revisions import split_phrases
from .scoring import phrase_verdicts, references, sample_matrix

SHOWN = 300  # rows of a page; each carries a picture of some kilobytes
ORIGINAL, LOCATED = (20, 150, 70), (215, 60, 30)  # colours of boxes
SHORTEST = 256  # small pictures are enlarged to this before boxes are drawn
_TITLES = {
    "chair": "CHAIR",
    "chair_distinct": "CHAIR, distinct nouns",
    "chair_i": "CHAIR-i",
    "chair_i_distinct": "CHAIR-i, distinct objects",
    "chair_s": "CHAIR-s",
    "cider": "CIDEr",
    "clair": "CLAIR",
    "f1": "F1",
    "acc50": "Accuracy at IoU 0.5",
    "mean_iou": "Mean IoU",
    "meteor": "METEOR",
}


# --- Tables of a summary ---


def metric_label(name: str, lower_is_better: Collection[str]) -> str:
    return f"{name} (lower is better)" if name in lower_is_better else name


def summary_table(summary: dict, lower_is_better: Collection[str] = ()) -> Table:
    """Metrics with intervals, and the cost, for the terminal."""
    tau = f", tau {summary['threshold']:g}" if summary["threshold"] is not None else ""
    units = "" if summary["units"] == summary["n"] else f" in {summary['units']} groups"
    columns, rows = _figures(summary, lower_is_better)
    rows.append([])
    verifier = summary.get("verifier")
    if verifier and verifier["auc"] and verifier["auc"]["low"] is not None:
        rows.append(["ROC area of P(</UN>), own phrases", interval_text(verifier["auc"])])
    rows += _verdict_rows(summary)
    rows += [[name.replace("_", " "), f"{value:.2f}"] for name, value in summary["cost"].items()]
    if judge := summary.get("judge"):
        usage = judge["usage"]
        verdicts = f"{usage['answered']} asked, {usage['cached']} kept, {usage['failed']} failed"
        rows.append([f"verdicts of {judge['model']}", verdicts])
        rows.append(["cost of the judge", f"{usage['cost']:.4g}"])
    return Table(
        f"{summary['spec']}: {summary['model']} ({summary['decoder']}{tau})",
        ["", *columns],
        rows,
        f"n = {summary['n']}{units}, {summary['config']['level']:.0%} bootstrap intervals over questions "
        f"({summary['config']['rounds']} rounds, seed {summary['seed']})",
    )


def _figures(summary: dict, lower_is_better: Collection[str]) -> tuple[list[str], list[list[str | Cell]]]:
    """Columns and rows of the metrics; the mean of the categories stands beside the figure of all questions."""
    columns, groups = ["value [interval]"], [summary["metrics"]]
    if means := summary.get("category_mean"):
        columns.append(f"mean of {len(summary['by_category'])} categories")
        groups.append(means)
    rows = [
        [metric_label(name, lower_is_better), *(interval_text(group[name]) for group in groups)]
        for name in summary["metrics"]
    ]
    return columns, rows


def _verdict_rows(summary: dict) -> list[list[str]]:
    """How many answers were verified; of a decoder that verifies nothing, how many were cut off, if any."""
    counts = {"answers cut off": summary["n_not_ok"]} if summary["n_not_ok"] else {}
    if verdicts := summary.get("verdicts"):
        counts = {
            "answers with every phrase verified": verdicts["verified"],
            "answers not fully verified": verdicts["not_verified"],
            "answers with nothing to verify": verdicts["nothing_to_verify"],
        }
    return [[label, f"{count} of {summary['n']}"] for label, count in counts.items()]


def candidate_tables(summary: dict) -> list[Table]:
    """What the first k candidates of each question are worth, where some were drawn for a vote."""
    if not (figures := summary.get("candidates")):
        return []
    name = next(iter(summary["metrics"]))
    rows = [
        [
            str(row["k"]),
            *(interval_text(row[choice][name]) for choice in ("vote", "best")),
            *(f"{row[what]:.2f}" for what in ("texts", "answers")),
        ]
        for row in figures
    ]
    columns = ["first k", f"vote: {name}", f"best of them: {name}", "different texts", "different answers"]
    return [Table("Candidates", columns, rows)]


def published_tables(summary: dict) -> list[Table]:
    """Figures of others below ours, where the spec quotes some: of the whole benchmark, of one metric by category."""
    ours, measured = summary["metrics"], summary.get("by_category", {})
    tables = []
    whole = [row for row in summary["published"] if set(row["values"]) & set(ours)]
    if whole:
        names = [name for name in ours if any(name in row["values"] for row in whole)]
        groups = [ours, *filter(None, [summary.get("category_mean")])]
        rows = [[figures[name]["value"] for name in names] for figures in groups]
        rows += [[row["values"].get(name) for name in names] for row in whole]
        tables.append(_quoted("As published (quoted, not measured here)", names, whole, rows))
    split = [row for row in summary["published"] if set(row.get("by_category", {})) & set(measured)]
    quoted = {name for row in split for values in row["by_category"].values() for name in values}
    if metric := next((name for name in ours if name in quoted), None):
        names = [name for name in measured if any(name in row["by_category"] for row in split)]
        rows = [[measured[name][metric]["value"] for name in names]]
        rows += [[row["by_category"].get(name, {}).get(metric) for name in names] for row in split]
        title = f"{metric} by category, as published (quoted, not measured here)"
        tables.append(_quoted(title, names, split, rows))
    return tables


def _quoted(
    title: str, columns: Sequence[str], quoted: Sequence[dict], figures: Sequence[Sequence[float | None]]
) -> Table:
    """This run's figures first (one row or two); the note names each source once, with its systems where there are
    several sources."""
    systems: dict[str, list[str]] = {}
    for row in quoted:
        systems.setdefault(row["source"], []).append(row["system"])
    sources = [f"{s} ({'; '.join(names)})" if len(systems) > 1 else s for s, names in systems.items()]
    ours = ["this run", "this run, mean of categories"][: len(figures) - len(quoted)]
    labels = [*ours, *(row["system"] for row in quoted)]
    cells = [
        [label, *("" if value is None else f"{value:.4g}" for value in values)]
        for label, values in zip(labels, figures, strict=True)
    ]
    cells[: len(ours)] = [[Cell(text, "strong") for text in row] for row in cells[: len(ours)]]
    return Table(title, ["system", *columns], cells, f"From: {', '.join(sources)}.")


# --- Answers as they are shown: what the metric marks in them, their pictures, and which of them ---


def mark_plain(text: str, metric: CountMetric, reference: Any) -> list[Piece]:
    """Pieces of an untagged answer: the stretches the metric judges, and the text between them."""
    pieces, cursor = [], 0
    for start, end, right in metric.marks(text, reference):
        pieces += [Piece(text[cursor:start]), Piece(text[start:end], right)]
        cursor = end
    return [piece for piece in (*pieces, Piece(text[cursor:])) if piece.text]


def mark_tagged(tagged: str, spans: Sequence[dict], metric: CountMetric, reference: Any) -> list[Piece]:
    """Pieces of a tagged answer: each closed phrase with its verdict and its truth, the rest as plain text."""
    pieces, verdicts = [], iter(spans)
    for text, is_phrase in split_phrases(tagged):
        if not is_phrase:
            # spaces at the edges separate the phrases from the text and would be lost by stripping
            pieces += mark_plain(strip_tags(text), metric, reference)
            continue
        span, phrase = next(verdicts), strip_tags(text).strip()
        truth = metric.grade(phrase, reference)
        pieces.append(Piece(phrase, truth, span["p_unconfident"], span["accepted"]))
    return [piece for piece in pieces if piece.text]


def answer_view(system: str, sample: dict, metric: CountMetric, *, verifies: bool = False) -> AnswerView:
    """A sample as one system's answer in a gallery; `verifies`: its decoder verifies phrases, so say how that ended."""
    reference = metric.reference_of(sample["reference"])
    closed = sum(is_phrase for _, is_phrase in split_phrases(sample["tagged_answer"]))
    if closed and closed == len(sample["spans"]):
        pieces = mark_tagged(sample["tagged_answer"], sample["spans"], metric, reference)
    else:
        pieces = mark_plain(sample["answer"], metric, reference)
    note = "" if sample["ok"] else "cut off"
    if verifies:
        note = verification(sample["ok"], len(sample["spans"]))
    return AnswerView(system, pieces, note, metric.missed(sample["answer"], reference))


def sample_views(
    sample: dict, metric: CountMetric, system: str, *, verifies: bool = False
) -> list[AnswerView]:
    """The answer as the metric marks it, and the judge's reply where there is one."""
    views = [answer_view(system, sample, metric, verifies=verifies)]
    if sample.get("judgement"):
        views.append(AnswerView("judge", [Piece(sample["judgement"])]))
    return views


def draw_boxes(image: Image.Image, box, located) -> Image.Image:
    """The picture with the region (green) and the located box (red, inside of it where they agree).

    Args:
        box, located: (x0, y0, x1, y1) in pixels of the picture, or None.
    """
    scale = max(1, -(-SHORTEST // min(image.size)))
    picture = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    pen, width = ImageDraw.Draw(picture), max(2, min(picture.size) // 100)
    for corners, colour, inset in ((box, ORIGINAL, 0), (located, LOCATED, 2 * width)):
        if corners is not None:
            x0, y0, x1, y1 = (value * scale for value in corners)
            inner = (x0 + inset, y0 + inset, max(x0 + inset, x1 - inset - 1), max(y0 + inset, y1 - inset - 1))
            pen.rectangle(inner, outline=colour, width=width)
    return picture


def sample_picture(sample: dict, image_root: Path, *, located: bool = True) -> Image.Image | None:
    """The first picture of a sample, with its box and, if asked for, the one that was located; None without a picture."""
    if not sample["images"]:
        return None
    picture = open_image(sample["images"][0], image_root)
    box = sample["reference"].get("box")
    return picture if box is None else draw_boxes(picture, box, sample.get("located") if located else None)


def choose(badness: Sequence[tuple[float, ...]], shown: int = SHOWN) -> list[int]:
    """Indices of the samples to show, in their order: all, or half of the room for the worst and the rest spread evenly.

    Args:
        badness: of every sample.
    """
    if len(badness) <= shown:
        return list(range(len(badness)))
    worst = sorted(range(len(badness)), key=lambda i: (badness[i], -i), reverse=True)[: shown // 2]
    others = sorted(set(range(len(badness))) - set(worst))
    spread = np.linspace(0, len(others) - 1, shown - len(worst)).round().astype(int)
    return sorted({*worst, *(others[i] for i in spread)})


def ranks(badness: Sequence[tuple[float, ...]]) -> list[int]:
    """0 for the best; equal ones share a rank."""
    place = {value: index for index, value in enumerate(sorted(set(badness)))}
    return [place[value] for value in badness]


def categories(sample: dict) -> list[str]:
    names = sample["reference"].get("category")
    return [] if names is None else [str(name) for name in (names if isinstance(names, list) else [names])]


# --- The page of one evaluation ---


def write_eval_page(
    path: str | Path,
    summary: dict,
    samples: Sequence[dict],
    metric: CountMetric,
    image_root: str | Path,
    *,
    examples: int = 6,
    shown: int = SHOWN,
    link: Callable[[int, dict], str] = lambda index, sample: "",
) -> Path:
    """Write the page of one run: figures, how they were made, what they cost, and answers to look at.

    Args:
        summary: as in summary.json.
        samples: all of the run's samples.
        examples: how many of the worst and of the best answers to show before the table of all.
        shown: how many rows the table of answers has at most.
        link: (index, sample) -> page about that answer beside this one, or an empty text; called for the rows that are
            shown.
    """
    root = Path(image_root)
    tau = f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else ""
    system = summary["decoder"] + tau
    views = partial(sample_views, metric=metric, system=system, verifies=summary.get("verdicts") is not None)
    counts = sample_matrix(samples, metric)
    badness = [metric.badness(row) for row in counts]
    boxes = ""
    if any(sample["reference"].get("box") for sample in samples):
        boxes = "Green: the true box"
        boxes += ", red: the located one." if any(sample.get("located") for sample in samples) else "."
    names = list(summary["metrics"])
    sections: list[Section] = [
        Tiles("", [_tile(name, summary["metrics"][name], metric) for name in names]),
        _metrics_section(summary, metric),
        *candidate_tables(summary),
        *published_tables(summary),
    ]
    if groups := summary.get("by_category"):
        rows = [
            [group, str(values[names[0]]["n"]), *(interval_text(values[name], 2) for name in names)]
            for group, values in groups.items()
        ]
        sections.append(Table("By category", ["category", "n", *names], rows))
    sections += _verifier_sections(summary, samples, metric)

    order = sorted(range(len(samples)), key=lambda i: (badness[i], i))
    best = order[:examples]
    worst = [i for i in order[::-1][:examples] if i not in best]
    for name, chosen in (("worst", worst), ("best", best)):
        if chosen:
            shown_examples = [_example(samples[i], metric, root, views) for i in chosen]
            note = f"By the metric, {name} first. {boxes}".strip()
            words = (
                ("in the picture", "not in the picture") if isinstance(metric, Chair) else ("right", "wrong")
            )
            sections.append(Gallery(f"{name.capitalize()} answers", shown_examples, note, legend_words=words))

    truths, places, chosen = references(samples, metric), ranks(badness), choose(badness, shown)
    rows = [
        BrowserRow(
            id=samples[i]["id"],
            image=sample_picture(samples[i], root),
            question=samples[i]["prompt"],
            truth=metric.truth_text(truths[i]),
            answers=views(samples[i]),
            verdict=metric.verdict(counts[i]),
            badness=places[i],
            categories=categories(samples[i]),
            link=link(i, samples[i]),
        )
        for i in chosen
    ]
    note = boxes
    if len(chosen) < len(samples):
        note = (
            f"{boxes} {len(chosen)} of {len(samples)} answers: the {shown // 2} worst by the metric, and others spread "
            "evenly over the rest. All of them are in samples.jsonl."
        ).strip()
    sections += [Browser("Answers", rows, note), *_facts(summary)]
    subtitle = f"{summary['description']}. {summary['model']}, {system}, n = {summary['n']}"
    return render_report(f"{summary['spec']}: {summary['decoder']}", sections, path, subtitle=subtitle)


def _example(sample: dict, metric: CountMetric, root: Path, views: Callable) -> Example:
    truth = metric.truth_text(metric.reference_of(sample["reference"]))
    question = f"{sample['prompt']}  (truth: {truth})"
    return Example(sample_picture(sample, root), question, views(sample), f"id {sample['id']}")


def _facts(summary: dict) -> list[Section]:
    """Who judged, what the answers cost, and how they were made."""
    judge = summary.get("judge")
    cost = [[name.replace("_", " "), f"{value:.3g}"] for name, value in summary["cost"].items()]
    cost += _verdict_rows(summary)
    note = "Counts of work, which do not depend on the machine."
    settings = [[key, str(value)] for key, value in flatten(summary["config"]).items()]
    versions = [[name, version] for name, version in summary["versions"].items()]
    return [
        *([_judge_section(judge)] if judge else []),
        Table("Cost", ["", "per answer or ratio"], cost, note),
        Table("Configuration", [], settings, numeric=False, folded=True),
        Table("Versions", [], versions, numeric=False, folded=True),
    ]


def _tile(name: str, interval: dict, metric: CountMetric) -> Tile:
    title = _TITLES.get(name, name.replace("_", " ").capitalize())
    digits = ".4g" if name in metric.not_fractions else ".3f"
    value, low, high = (f"{interval[key]:{digits}}" for key in ("value", "low", "high"))
    return Tile(title, value, f"{low} to {high}" + (" words" if name == "length" else ""))


def _metrics_section(summary: dict, metric: CountMetric) -> Table:
    columns, rows = _figures(summary, metric.lower_is_better)
    rows = [[label, Cell(value, "strong"), *means] for label, value, *means in rows]
    units = ""
    if summary["units"] != summary["n"]:
        units = f" in {summary['units']} groups, which are resampled whole"
    note = (
        f"n = {summary['n']} questions{units}; {summary['config']['level']:.0%} percentile bootstrap, "
        f"{summary['config']['rounds']} rounds, seed {summary['seed']}."
    )
    return Table("Metrics", ["metric", *columns], rows, note)


def _verifier_sections(summary: dict, samples: Sequence[dict], metric: CountMetric) -> list[Section]:
    facts = summary["verifier"]
    if not facts:
        return []
    lines = (
        f"{facts['phrases']} phrases of these answers are judged by the metric; {facts['wrong_phrases']} of them are "
        "wrong."
    )
    if not facts["auc"]:
        return [Text("Verifier", lines + " Without both right and wrong phrases no ROC curve can be drawn.")]
    lines += (
        f" Mean P(</UN>) is {facts['mean_p_unconfident_wrong']:.3f} on the wrong ones and "
        f"{facts['mean_p_unconfident_right']:.3f} on the right ones."
    )
    if facts["auc"]["low"] is not None:
        lines += f" Area under the curve: {interval_text(facts['auc'])}, resampled by answer."
    from .plots import verifier_roc

    rows = np.concatenate(phrase_verdicts(samples, metric))
    draw = partial(verifier_roc, {summary["decoder"]: (rows[:, 0], rows[:, 1] > 0.5)})
    caption = "P(</UN>) as a detector of wrong phrases among those of the returned answers."
    return [Text("Verifier", lines), Figure("", draw, caption)]


def _judge_section(judge: dict) -> Table:
    usage = judge["usage"]
    verdicts = f"{usage['answered']}, {usage['cached']}, {usage['failed']}"
    rows = [
        ["model", judge["model"]],
        ["endpoint", judge["url"]],
        ["judge behind the published figures", judge["published"] or "not said"],
        ["prompt (digest)", judge["prompt_sha256"]],
        ["prompt", judge["prompt"]],
        ["verdicts asked for, from the ledger, failed", verdicts],
        ["tokens in, out", f"{usage['prompt_tokens']}, {usage['completion_tokens']}"],
        ["cost", f"{usage['cost']:.4g}"],
    ]
    return Table("Judge", [], rows, numeric=False)


# --- Figures in a model card: the Hub's `model-index`, and a table that a reader sees ---


def update_card(readme: str | Path, runs: Sequence[str | Path], model_name: str | None = None) -> Path:
    """Write the results of `runs` into a model card; what an earlier call wrote is replaced, the rest stays.

    Args:
        readme: the card (README.md of the model's folder); made if it is not there.
        runs: output folders of `vlm-sft-rl eval`.
        model_name: name in the card's metadata; default the folder's.

    Raises UserError: a run is not finished, or the card's metadata cannot be read.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    path = Path(readme)
    if not runs:
        raise UserError(
            "eval card needs at least one run: vlm-sft-rl eval card RUN … --readme MODEL_DIR/README.md"
        )
    summaries = [read_results(run) for run in runs]
    try:
        text = (
            read_text(path)
            if path.is_file()
            else f"---\n{{}}\n---\n\n# {as_markdown(path.resolve().parent.name)}\n"
        )
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its metadata (between the lines ---) cannot be read: {error}") from error
    results, lines = (
        [],
        ["| benchmark | metric | value | interval | n | decoding |", "|---|---|---|---|---|---|"],
    )
    for summary in summaries:
        decoding = summary["decoder"]
        decoding += f", τ = {summary['threshold']:g}" if summary["threshold"] is not None else ""
        decoding += f", judged by {summary['judge']['model']}" if summary.get("judge") else ""
        for name, interval in summary["metrics"].items():
            result = EvalResult(
                task_type="image-text-to-text",
                dataset_type=summary["spec"],
                dataset_name=summary["description"],
                dataset_args={"n": summary["n"], "decoding": decoding, "seed": summary["seed"]},
                metric_type=name,
                metric_name=name,
                metric_value=round(interval["value"], 6),
                metric_args={"low": round(interval["low"], 6), "high": round(interval["high"], 6)},
            )
            results.append(result)
            ends = f"{interval['low']:.4g} to {interval['high']:.4g}"
            cells = (summary["spec"], name, f"{interval['value']:.4g}", ends, summary["n"], decoding)
            lines.append("| " + " | ".join(as_markdown(str(cell)) for cell in cells) + " |")
    config = summaries[0]["config"]
    note = f"Intervals: {config['level']:.0%} percentile bootstrap over questions, {config['rounds']} rounds."
    verified = [
        as_markdown(
            f"{summary['spec']} ({summary['decoder']}): {', '.join(f'{label} {count}' for label, count in rows)}."
        )
        for summary in summaries
        if (rows := _verdict_rows({"n_not_ok": 0, **summary}))
    ]
    block = "\n".join([CARD_BEGIN, "## Evaluation", "", *lines, "", " ".join([note, *verified]), CARD_END])

    metadata = card.data.to_dict()
    metadata.pop("model-index", None)
    name = model_name or card.data.model_name or path.resolve().parent.name
    data = ModelCardData(**(metadata | {"model_name": name, "eval_results": results}))
    body = card.text
    if CARD_BEGIN in body and CARD_END in body:
        before, rest = body.split(CARD_BEGIN, 1)
        body = before + block + rest.split(CARD_END, 1)[1]
    else:
        body = body.rstrip() + f"\n\n{block}\n"
    return write_text(path, f"---\n{data.to_yaml()}\n---\n{body}")
