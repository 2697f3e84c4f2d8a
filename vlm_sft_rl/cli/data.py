"""`vlm-sft-rl data …`: training rows."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import ModelDir, Seed, escape, group, show

app = group("Check, look at, convert and build training rows.")
ImageRoot = Annotated[
    Path | None, typer.Option(help="Folder that image paths are relative to; default: the rows file's.")
]
Target = Annotated[Path, typer.Argument(help="JSONL file of rows to write.")]
Vocabulary = Annotated[
    Path | None,
    typer.Option(help="Nouns that phrases are found by, one a line; default: those of the ground truth."),
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
    rows: Annotated[Path, typer.Argument(help="Training rows (JSON or JSONL).")],
    model_dir: Annotated[
        Path | None, typer.Option("--model", help="Check tokens with this processor too.")
    ] = None,
    image_root: ImageRoot = None,
    max_length: Annotated[int | None, typer.Option(help="Longest row allowed, in tokens.", min=1)] = None,
) -> None:
    """Predict what training would trip over; exits with status 1 if anything is wrong."""
    from rich.console import Console

    from ..data.validate import validate as check

    report = check(rows, processor_or_path=model_dir, image_root=image_root, max_length=max_length)
    Console().print(report)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def preview(
    rows: Annotated[Path, typer.Argument(help="Training rows (JSON or JSONL).")],
    model_dir: ModelDir,
    row: Annotated[str, typer.Option(help="Position from 0, or a row's id.")] = "0",
    image_root: ImageRoot = None,
) -> None:
    """Show every token of one row with its role, mask and weight."""
    from ..data.preview import preview_file

    preview_file(rows, model_dir, row=row, image_root=image_root)


@app.command()
def synthetic(
    captions: Annotated[
        Path, typer.Argument(help="True captions: rows of any known format, one image each.")
    ],
    objects: Annotated[
        Path, typer.Argument(help='Ground truth, JSONL: {"image", "objects": [noun, …], "theme"?}.')
    ],
    target: Target,
    questions: Annotated[
        Path | None, typer.Option(help="Rows with yes/no answers, to be tagged as well.")
    ] = None,
    negatives: Annotated[int, typer.Option(help="Negatives a caption, at the most.", min=0)] = 1,
    prior: Annotated[
        Prior, typer.Option(help="Absent nouns as likely as in this company, in this theme, or all alike.")
    ] = Prior.company,
    vocabulary: Vocabulary = None,
    seed: Seed = 0,
) -> None:
    """Tag true captions, and swap one phrase of each for something absent."""
    from ..data.build_rows import write_synthetic

    options = {"questions": questions, "vocabulary": vocabulary, "prior": prior.value}
    show(write_synthetic(captions, objects, target, negatives=negatives, seed=seed, **options))


@app.command("on-policy")
def on_policy(
    samples: Annotated[
        Path, typer.Argument(help="A model's own answers: samples.jsonl of `vlm-sft-rl eval`.")
    ],
    target: Target,
    objects: Annotated[
        Path | None,
        typer.Option(help="Ground truth as for `synthetic`; default: `reference.objects` of the samples."),
    ] = None,
    vocabulary: Vocabulary = None,
    supervise: Annotated[
        Supervise, typer.Option(help="Loss on whole answers, or on the closing tags alone.")
    ] = Supervise.all,
) -> None:
    """Tag a model's own answers up to their first wrong phrase, by ground truth."""
    from ..data.build_rows import write_on_policy

    options = {"objects": objects, "vocabulary": vocabulary, "supervise": supervise.value}
    show(write_on_policy(samples, target, **options))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="File to convert, as its owner publishes it.")],
    target: Annotated[Path, typer.Argument(help="JSONL file of rows to write.")],
    source_format: Annotated[
        str,
        typer.Option(
            "--format",
            help="llava, reverse, llava_cot, trl, tabmwp, chartqa, clevr_math, geoqa, m3cot, coco, objects365, refcoco, "
            "sc_tune, rec, jsonl or hf.",
        ),
    ] = "llava",
    image_prefix: Annotated[str, typer.Option(help="Put before every image path.")] = "",
    annotations: Annotated[Path | None, typer.Option(help="refcoco: instances.json.")] = None,
    mapping: Annotated[
        list[str] | None,
        typer.Option("--map", help="jsonl, hf: OURS=COLUMN, for example question=problem. Repeatable."),
    ] = None,
    box_format: Annotated[str, typer.Option(help="rec, jsonl, hf: xyxy or xywh.")] = "xyxy",
    split: Annotated[str | None, typer.Option(help="hf, refcoco: which split.")] = None,
    images_dir: Annotated[
        Path | None,
        typer.Option(help="hf: folder for images that come inside the file. [images/ beside TARGET]"),
    ] = None,
    min_side: Annotated[float, typer.Option(help="Regions: shortest side, in pixels.", min=0)] = 0,
    min_area: Annotated[
        float, typer.Option(help="Regions: smallest share of the image.", min=0, max=1)
    ] = 0.0,
    max_area: Annotated[float, typer.Option(help="Regions: largest share of the image.", min=0, max=1)] = 1.0,
    max_same_category: Annotated[
        int | None,
        typer.Option(help="Regions: at most so many of one category in an image; 1: unique.", min=1),
    ] = None,
    max_per_image: Annotated[
        int | None, typer.Option(help="Regions: the largest of an image.", min=1)
    ] = None,
) -> None:
    """Convert a source file to rows, streamed; what is left out is counted by reason."""
    from ..data.convert import convert as convert_file
    from ..data.sources.source import RegionFilter

    keep = RegionFilter(min_side, min_area, max_area, max_same_category, max_per_image)
    show(
        convert_file(
            source,
            target,
            format=source_format,
            image_prefix=image_prefix,
            annotations=annotations,
            fields=pairs(mapping or []),
            box_format=box_format,
            split=split,
            images_dir=images_dir,
            keep=None if keep == RegionFilter() else keep,
            progress=True,
        )
    )


@app.command()
def tag(
    source: Annotated[
        Path, typer.Argument(help="Rows with plain answers (JSON or JSONL of any known schema).")
    ],
    target: Annotated[Path, typer.Argument(help="JSONL file of tagged rows to write.")],
    nouns: Annotated[
        Path | None,
        typer.Option(help="Text file of nouns, one a line: find these instead of spaCy's noun phrases."),
    ] = None,
    spacy_model: Annotated[str | None, typer.Option(help="spaCy pipeline. [en_core_web_sm]")] = None,
    objects: Annotated[
        Path | None,
        typer.Option(help="JSONL of what is in each image: image and objects, or region rows with category."),
    ] = None,
    kinds: Annotated[
        str, typer.Option(help="Negatives by rule, comma-separated.")
    ] = "yes_no,choice,count,colour,attribute,relation,object",
    negatives: Annotated[int, typer.Option(help="Negative rows for each row, at most.", min=1)] = 1,
    places: Annotated[
        bool, typer.Option(help="Phrases begin with the preposition of place before them.")
    ] = True,
    processes: Annotated[int, typer.Option(help="Processes that find noun phrases.", min=1)] = 1,
    seed: Seed = 0,
    checker: Annotated[
        str | None,
        typer.Option(help="Checkpoint directory or endpoint that says of each phrase whether it is there."),
    ] = None,
    checker_model: Annotated[str | None, typer.Option(help="The endpoint's name for the checker.")] = None,
    check_question: Annotated[
        str, typer.Option(help="What it is asked; {phrase} is filled in.")
    ] = "Is there {phrase} in the image? Answer yes or no.",
    teacher: Annotated[
        str | None, typer.Option(help="Address of an OpenAI-compatible endpoint that writes negatives.")
    ] = None,
    teacher_model: Annotated[str | None, typer.Option(help="Its name for the model.")] = None,
    teacher_images: Annotated[bool, typer.Option(help="Send the images too.")] = True,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of the images. [the folder of SOURCE]")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="Environment variable with the API key. [OPENAI_API_KEY, if set]")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.", min=1)] = 8,
    input_price: Annotated[float, typer.Option(help="Per million prompt tokens, to count the cost.")] = 0.0,
    output_price: Annotated[float, typer.Option(help="Per million completion tokens.")] = 0.0,
    budget: Annotated[float | None, typer.Option(help="Stop when this much is spent.")] = None,
) -> None:
    """Tag phrases of plain answers and add negatives: a training set for REVERSE."""
    from rich.console import Console

    from ..data.tagging.balance import view
    from ..data.tagging.checking import EndpointChecker, ModelChecker
    from ..data.tagging.pipeline import tag as tag_file
    from ..data.tagging.pipeline import work_folder
    from ..data.tagging.taggers import SpacyTagger, VocabularyTagger
    from ..endpoint import EndpointClient
    from ..errors import UserError
    from ..io import read_text

    if (teacher is None) != (teacher_model is None):
        raise UserError("--teacher and --teacher-model go together: an address, and the model's name there.")
    if nouns is not None:
        listed = [line.strip() for line in read_text(nouns).splitlines() if line.strip()]
        tagger = VocabularyTagger(listed, places=places)
    else:
        tagger = SpacyTagger(spacy_model, places, processes)
    paid = {
        "api_key_env": api_key_env,
        "concurrency": concurrency,
        "input_price": input_price,
        "output_price": output_price,
        "budget": budget,
    }
    root, work = image_root or source.resolve().parent, work_folder(target)
    client = None
    if teacher is not None:
        client = EndpointClient(teacher, teacher_model, ledger=work / "teacher.jsonl", **paid)
    judge: ModelChecker | EndpointChecker | None = None
    if checker is not None and "://" in checker:
        if checker_model is None:
            raise UserError("--checker with an address needs --checker-model, the model's name there.")
        asked = EndpointClient(checker, checker_model, ledger=work / "checker.jsonl", **paid)
        judge = EndpointChecker(asked, check_question, root)
    elif checker is not None:
        judge = ModelChecker(checker, check_question, root)
    report = tag_file(
        source,
        target,
        tagger,
        kinds=[kind.strip() for kind in kinds.split(",") if kind.strip()],
        negatives=negatives,
        seed=seed,
        objects=objects,
        checker=judge,
        client=client,
        image_root=root,
        send_images=teacher_images,
        progress=True,
    )
    console = Console()
    console.print(view(report))
    if client is not None:
        _account(console, "teacher", client)
    if isinstance(judge, EndpointChecker):
        _account(console, "checker", judge.client)


def _account(console, name: str, client) -> None:
    usage = client.usage
    console.print(
        f"{name}: {usage.answered} answers ({usage.cached} more from the ledger), {usage.failed} failed, "
        f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, cost {usage.cost:.4f}"
    )
    for _, reason in client.failures[:5]:
        console.print(escape(f"  {reason}"))
    if len(client.failures) > 5:
        console.print(f"  and {len(client.failures) - 5} more")


def pairs(words: list[str]) -> dict[str, str]:
    """`["a=b"]` -> `{"a": "b"}`. Raises UserError where there is no `=`."""
    from ..errors import UserError

    found = {}
    for word in words:
        ours, equals, theirs = word.partition("=")
        if not (ours and equals and theirs):
            raise UserError(f"--map {word}: expected OURS=COLUMN, for example question=problem.")
        found[ours] = theirs
    return found


@app.command()
def correct(
    questions: Annotated[Path, typer.Argument(help="Questions with `answer` (JSON or JSONL).")],
    output_dir: Annotated[Path, typer.Argument(help="rows.jsonl and what led to it; run again to go on.")],
    mode: Annotated[
        str, typer.Option(help="repair: a model's own attempts; refine: right answers made better.")
    ] = "repair",
    model: Annotated[str | None, typer.Option(help="repair: the model whose attempts are corrected.")] = None,
    teacher: Annotated[
        str,
        typer.Option(help="gold (field `staged`), own (repair), a model folder, or an endpoint's address."),
    ] = "gold",
    teacher_model: Annotated[str | None, typer.Option(help="The endpoint's name of the model.")] = None,
    gold_field: Annotated[
        str, typer.Option(help="The field that the teacher `gold` answers with.")
    ] = "staged",
    keep: Annotated[
        str, typer.Option(help="repair: after a right attempt repeat it, or let the teacher look again.")
    ] = "repeat",
    grader: Annotated[
        str, typer.Option(help="Who judges conclusions: choice, chartqa, pocket, …")
    ] = "choice",
    image_root: ImageRoot = None,
    samples: Annotated[int, typer.Option(help="Attempts per question.", min=1)] = 4,
    temperature: Annotated[float, typer.Option(help="Of the attempts.")] = 0.8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    wrong_share: Annotated[
        float, typer.Option(help="Share of rows whose attempt is wrong.", min=0, max=1)
    ] = 0.5,
    per_question: Annotated[
        int, typer.Option(help="Most right and most wrong attempts of a question.", min=1)
    ] = 1,
    limit: Annotated[int | None, typer.Option(help="At most this many rows.", min=1)] = None,
    tries: Annotated[
        int, typer.Option(help="Answers of the teacher; the first valid one is taken.", min=1)
    ] = 2,
    prompt: Annotated[str | None, typer.Option(help="What the user asks before a correction.")] = None,
    ask: Annotated[str, typer.Option(help="How a question is put to the model.")] = "{question}",
    input_price: Annotated[float, typer.Option(help="Endpoint: per million tokens.")] = 0.0,
    output_price: Annotated[float, typer.Option(help="Endpoint: per million tokens.")] = 0.0,
    budget: Annotated[float | None, typer.Option(help="Endpoint: stop when so much is spent.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    seed: Seed = 0,
) -> None:
    """Build rows for self-correction: attempts, graded, and corrections of them by a teacher."""
    from ..correction.builder import BuildConfig, build_corrections
    from ..data.corrections import CHECK_PROMPT

    config = BuildConfig(
        mode=mode,
        teacher=teacher,
        teacher_model=teacher_model,
        gold_field=gold_field,
        keep=keep,
        model=model,
        grader=grader,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        wrong_share=wrong_share,
        per_question=per_question,
        limit=limit,
        tries=tries,
        prompt=prompt or CHECK_PROMPT,
        ask=ask,
        input_price=input_price,
        output_price=output_price,
        budget=budget,
        batch_size=batch_size,
        seed=seed,
    )
    summary = build_corrections(questions, output_dir, config, image_root=image_root)
    show({key: summary[key] for key in ("mode", "counts", "rejected", "cost")})
