"""`vlm-sft-rl model …`: checkpoints."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..data.tags import NOT_VERIFIED, VERIFICATION_TOKENS, VERIFIED
from ..errors import printable
from .common import closing, group, show

app = group("Prepare a checkpoint for training, or convert one of LLaVA.")


class Init(StrEnum):
    mean = "mean"
    semantic = "semantic"


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(help="Directory of a Hugging Face vision-language model, or its name on the Hub."),
    ],
    target: Annotated[Path, typer.Argument(help="Directory to write the prepared checkpoint to.")],
    init: Annotated[
        Init,
        typer.Option(
            help="First embeddings of the new tokens: the mean of all (mean), or of words with their meaning (semantic)."
        ),
    ] = Init.mean,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Chat template: vicuna (with LLaVA-1.5's system sentence), llama3, or a Jinja file. Default: "
            "the model's own."
        ),
    ] = None,
) -> None:
    """Add the three verification tokens to a model and save it as an ordinary checkpoint."""
    from ..models.checkpoints import prepare as prepare_model

    ids = prepare_model(source, target, init=init.value, chat_template=chat_template)
    show(
        f"Written to {target}. The tokens {', '.join(VERIFICATION_TOKENS)} have the ids {', '.join(map(str, ids))}."
    )
    closing(
        {
            "tag answers to train on": ("data", "tag", "ANSWERS", "rows.jsonl"),
            "check the rows with it": ("data", "validate", "rows.jsonl", "--model", target),
            "train it": ("train", "RECIPE", "--model_name_or_path", target, "--train_file", "rows.jsonl"),
        }
    )


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="LLaVA directory in its authors' format, or directory of a language model.")
    ],
    target: Annotated[Path, typer.Argument(help="Directory to write the Hugging Face checkpoint to.")],
    vision_tower: Annotated[
        str | None, typer.Option(help="CLIP or SigLIP directory. Default: `mm_vision_tower` of the config.")
    ] = None,
    projector: Annotated[
        Path | None,
        typer.Option(help="mm_projector.bin, if the projector is not among the weights of SOURCE."),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="Chat template: vicuna, llama3 or a Jinja file. Default: chosen by the tokenizer."),
    ] = None,
    pad: Annotated[
        bool | None,
        typer.Option(
            "--pad/--crop", help="Pad images to a square, or crop them. Default: as the config says."
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(help="Number type of the weights: auto (that of the checkpoint), bfloat16 or float32."),
    ] = "auto",
) -> None:
    """Convert a LLaVA-1.5 or LLaVA-MORE checkpoint from its authors' format to that of transformers."""
    from ..models.checkpoints import convert as convert_model

    report = convert_model(
        source,
        target,
        vision_tower=vision_tower,
        projector=projector,
        chat_template=chat_template,
        pad=pad,
        dtype=dtype,
    )
    show(
        f"Written to {report.path}: {report.language_model}, vision tower {report.tower}, projector {report.projector}, "
        f"chat template {report.template}, image token {report.image_token_id}."
    )
    closing({"prepare it for verification": ("model", "prepare", target, f"{target}-verify")})


# `vlm-sft-rl generate`: one question about a picture, on the terminal.
def answer_one(
    model_dir: Path,
    prompt: str,
    images: list[Path],
    decoder: str,
    settings: dict,
    *,
    seed: int,
    engine: str,
    trace: Path | None,
    as_json: bool,
) -> None:
    """Answer `prompt` and print the answer, its phrases with P(</UN>), and what it cost.

    Args:
        settings: fields of the decoder's config.

    Raises UserError: an image cannot be opened, the checkpoint lacks what `decoder` needs, or a setting is out of range or
    has no effect on `decoder`.
    """
    from ..data.images import open_image
    from ..evaluation.decoders import (
        DECODERS,
        check_alone,
        check_engine,
        configure,
        load_model_and_processor,
    )

    config = configure(decoder, model_dir, settings, seed=seed)
    check_alone(decoder, config)
    check_engine(engine, decoder, config)
    pictures = [open_image(path) for path in images]
    loaded = load_model_and_processor(model_dir, engine=engine)
    answer = DECODERS[decoder].generate(*loaded, [pictures or None], [prompt], config)[0]
    if trace is not None:
        from ..decoding.trace import write_trace_html

        write_trace_html(answer, pictures, trace)
    if as_json:
        print(printable(json.dumps(answer.to_json(), ensure_ascii=False, indent=2)))
        return
    console = Console()
    console.print(Text(printable(answer.text)))
    if answer.verdict == NOT_VERIFIED:
        reason = next((event["reason"] for event in answer.trace if event["kind"] == "finish"), "length")
        words = {"length": "the length limit cut a phrase"}.get(reason, "attempts ran out")
        console.print(f"[yellow]{NOT_VERIFIED}: {words}.[/] Verified part:")
        console.print(Text(printable(answer.accepted_text)))
    elif answer.verdict is not None:
        tone = "green" if answer.verdict == VERIFIED else "yellow"
        more = "" if answer.verdict == VERIFIED else ": no phrase of the answer is marked"
        console.print(f"[{tone}]{answer.verdict}{more}[/]")
    elif not answer.ok:
        console.print("[yellow]The length limit cut the answer off.[/]")
    for span in answer.spans:
        line = printable(f"  {span.p_unconfident:6.3f}  {span.text}")
        console.print(Text(line, style="green" if span.accepted else "red"))
    counts = answer.counts
    console.print(
        f"[dim]{counts.tokens_kept} tokens kept, {counts.tokens_forwarded} forwarded, {counts.image_encodes} image "
        f"encoded[/]"
    )
    if trace is not None:
        console.print(Text(printable(f"Written to {trace}: how the answer came about."), style="dim"))
    else:
        closing({"see how it came about": "the same with --trace answer.html"})
