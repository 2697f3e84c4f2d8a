"""`vlm-sft-rl data …`: training rows."""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..correction.config import BuildConfig
from ..data.sources.source import RegionFilter, Source
from ..data.tagging.config import PairConfig, TagConfig
from .common import ModelDir, Seed, closing, escape, group, settings_of, show, takes

app = group("Make training rows, convert them, check them, look at them.")
ImageRoot = Annotated[
    Path | None, typer.Option(help="Folder that image paths start from. Default: the folder of the rows.")
]
Target = Annotated[Path, typer.Argument(help="JSONL file to write the rows to.")]
Vocabulary = Annotated[
    Path | None,
    typer.Option(
        help="Text file of the nouns to look for, one a line. Default: all nouns of the ground truth."
    ),
]


class Prior(StrEnum):
    company = "company"
    theme = "theme"
    uniform = "uniform"


class Supervise(StrEnum):
    all = "all"
    verdicts = "verdicts"


@app.command()
def validate(
    rows: Annotated[Path, typer.Argument(help="File of rows of any kind (JSON or JSONL).")],
    model_dir: Annotated[
        Path | None,
        typer.Option("--model", help="Checkpoint directory; with it, token counts and tags are checked too."),
    ] = None,
    image_root: ImageRoot = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row allowed, in tokens.", min=1)] = None,
) -> None:
    """Check rows and their images for everything that would stop a training. Exits with status 1 if anything is wrong."""
    from rich.console import Console

    from ..data.validate import validate as check

    report = check(rows, processor_or_path=model_dir, image_root=image_root, max_length=max_length)
    Console().print(report)
    if report.ok:
        preview = ("data", "preview", rows, "--model", model_dir or "MODEL_DIR", *_root_option(image_root))
        closing({"see a row as the model does": preview, "find a recipe for them": ("recipes", "ls")})
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def preview(
    rows: Annotated[Path, typer.Argument(help="File of rows of any kind (JSON or JSONL).")],
    model_dir: ModelDir,
    row: Annotated[str, typer.Option(help="Number of the row, from 0, or its id.")] = "0",
    image_root: ImageRoot = None,
) -> None:
    """Show one row as the model sees it: each token with its role, its mask and its weight in the loss.

    Of a preference pair both answers are shown, of a region both questions.
    """
    from ..data.preview import preview_file
    from ..models.regions import region_views

    preview_file(rows, model_dir, row=row, image_root=image_root, regions=region_views)


@app.command()
def synthetic(
    captions: Annotated[
        Path,
        typer.Argument(
            help="Rows with captions that are known to be true (any known format), one image each."
        ),
    ],
    objects: Annotated[
        Path,
        typer.Argument(
            help='Ground truth (JSONL), one {"image": …, "objects": [noun, …]} per image; a "theme" may be added.'
        ),
    ],
    target: Target,
    questions: Annotated[
        Path | None, typer.Option(help="Rows with yes/no answers that are tagged as well.")
    ] = None,
    negatives: Annotated[int, typer.Option(help="Most negative rows made from one caption.", min=0)] = 1,
    prior: Annotated[
        Prior,
        typer.Option(
            help="How absent nouns are drawn: as often as they occur beside the caption's objects (company), in "
            "its theme, or all alike (uniform)."
        ),
    ] = Prior.company,
    vocabulary: Vocabulary = None,
    seed: Seed = 0,
) -> None:
    """Make tagged rows for REVERSE from true captions: as they are, and with one phrase replaced by an absent object."""
    from ..data.tagging.pipeline import write_synthetic

    options = {"questions": questions, "vocabulary": vocabulary, "prior": prior.value}
    counts = write_synthetic(captions, objects, target, negatives=negatives, seed=seed, **options)
    written(target, counts)


@app.command()
def injected(
    rows: Annotated[Path, typer.Argument(help="Tagged rows of `data synthetic` or `data tag`.")],
    target: Target,
    question: Annotated[
        str | None,
        typer.Option(help="What is asked; {text} is filled in. [which phrase of the text is not true]"),
    ] = None,
) -> None:
    """Ask for the wrong phrase of each negative, in the text of its positive: questions for GRPO with `grader: exact`.

    A negative gives one question: of a conversation, about the first answer with a wrong phrase and another phrase."""
    from ..data.tagging.injected import QUESTION, write_injected

    written(target, write_injected(rows, target, QUESTION if question is None else question))


@app.command("on-policy")
def on_policy(
    samples: Annotated[
        Path,
        typer.Argument(
            help="Answers of the model: the output folder of `eval run` or `decode`, or a JSONL file of them."
        ),
    ],
    target: Target,
    objects: Annotated[
        Path | None,
        typer.Option(
            help="Ground truth as for `data synthetic`. Default: `reference.objects` of the samples."
        ),
    ] = None,
    vocabulary: Vocabulary = None,
    supervise: Annotated[
        Supervise,
        typer.Option(
            help="What gets a loss: all tokens of the answers, or only the closing tags (verdicts)."
        ),
    ] = Supervise.all,
) -> None:
    """Make tagged rows for REVERSE from a model's answers, each up to its first phrase that the ground truth contradicts."""
    from ..data.tagging.pipeline import write_on_policy

    options = {"objects": objects, "vocabulary": vocabulary, "supervise": supervise.value}
    written(target, write_on_policy(samples, target, **options))


@app.command("pairs")
@takes(config=settings_of(PairConfig))
def preference_pairs(
    traces: Annotated[
        Path,
        typer.Argument(
            help="Answers: the folder of `vlm-sft-rl decode --traces`, finished, or a JSONL file of them."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="JSONL file of preference rows to write.")],
    finished: Annotated[
        Path | None, typer.Option(help="Write the fully verified answers there, too, as SFT rows.")
    ] = None,
    config: dict | None = None,
) -> None:
    """Preference pairs from rewinds, without labels: the accepted phrase against the doubtful one at the same place."""
    from ..data.tagging.pairs import write_pairs

    counts = write_pairs(traces, target, PairConfig(**config), finished, progress=True)
    show(counts)
    show(f"Written to {target}")
    closing({"check them": ("data", "validate", target), "find a recipe for them": ("recipes", "ls")})


@app.command()
@takes(
    options=settings_of(Source, skip=("path", "fields", "images_base", "notes")),
    limits=settings_of(RegionFilter),
)
def convert(
    source: Annotated[Path, typer.Argument(help="File to convert, in the format of its publisher.")],
    target: Annotated[Path, typer.Argument(help="JSONL file to write the rows to.")],
    source_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="Format of SOURCE: llava, reverse, llava_cot, trl, tabmwp, chartqa, clevr_math, geoqa, easy_vqa, "
            "m3cot, coco, objects365, refcoco, sc_tune, rec, jsonl or hf.",
        ),
    ] = "llava",
    mapping: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            help="With --format jsonl or hf: OURS=COLUMN, for example question=problem. Repeat the option for several.",
        ),
    ] = None,
    options: dict | None = None,
    limits: dict | None = None,
) -> None:
    """Convert a data file to rows. Entries that are left out are counted by reason.

    For example, a JSONL file with columns of your own: `vlm-sft-rl data convert captions.jsonl rows.jsonl --format jsonl
    --map question=text --map answer=caption --map images=file`.
    """
    from ..data.convert import convert as convert_file

    fields, keep = pairs(mapping or []), RegionFilter(**limits) if limits else None
    counts = convert_file(
        source, target, format=source_format, keep=keep, progress=True, fields=fields, **options
    )
    written(target, counts)


@app.command()
@takes(config=settings_of(TagConfig))
def tag(
    source: Annotated[
        Path, typer.Argument(help="Rows with plain answers (JSON or JSONL, any known format).")
    ],
    target: Annotated[Path, typer.Argument(help="JSONL file to write the tagged rows to.")],
    config: dict | None = None,
) -> None:
    """Make tagged rows for REVERSE from plain answers: phrases are tagged, and rows with wrong phrases are added."""
    from rich.console import Console

    from ..data.tagging.pipeline import tag_with, view

    report, clients = tag_with(source, target, TagConfig(**config))
    console = Console()
    console.print(view(report))
    for name, client in clients.items():
        usage = client.usage
        console.print(
            f"{name}: {usage.answered} answers ({usage.cached} more from the ledger), {usage.failed} failed, "
            f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, cost {usage.cost:.4f}"
        )
        for _, reason in client.failures[:5]:
            console.print(escape(f"  {reason}"))
        if len(client.failures) > 5:
            console.print(f"  and {len(client.failures) - 5} more")
    written(target, image_root=config.get("image_root"))


def written(target: Path, counts: Mapping | None = None, image_root: str | Path | None = None) -> None:
    """Say where rows are, how many and what was left out, and how to check them."""
    show(counts)
    show(f"Written to {target}")
    closing({"check them": ("data", "validate", target, "--model", "MODEL_DIR", *_root_option(image_root))})


def _root_option(image_root: str | Path | None) -> tuple:
    return () if image_root is None else ("--image-root", image_root)


def pairs(words: list[str]) -> dict[str, str]:
    """`["a=b"]` -> `{"a": "b"}`. Raises UserError where there is no `=`."""
    from ..errors import UserError

    columns = {}
    for word in words:
        name, equals, column = word.partition("=")
        if not (name and equals and column):
            raise UserError(f"--map {word}: expected OURS=COLUMN, for example question=problem.")
        columns[name] = column
    return columns


@app.command()
@takes(config=settings_of(BuildConfig))
def correct(
    questions: Annotated[Path, typer.Argument(help="Question rows with `answer` (JSON or JSONL).")],
    output_dir: Annotated[
        Path,
        typer.Argument(
            help="Folder for rows.jsonl and what led to it. Give the same command again to resume."
        ),
    ],
    image_root: ImageRoot = None,
    config: dict | None = None,
) -> None:
    """Make rows for self-correction: attempts of a model, graded, and a teacher's corrections of them."""
    from ..correction.builder import build_corrections

    summary = build_corrections(questions, output_dir, BuildConfig(**config), image_root=image_root)
    counts = {key: summary[key] for key in ("mode", "counts", "rejected", "cost")}
    written(output_dir / "rows.jsonl", counts, image_root)
