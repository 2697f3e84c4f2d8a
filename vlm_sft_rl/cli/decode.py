"""`vlm-sft-rl decode`: many rows to answers, on one machine or many."""

from pathlib import Path
from typing import Annotated

import typer

from ..decode import DecodeOptions
from ..workers import Workers, workers_of
from .common import ALONE, DecoderName, ModelDir, Seed, alone_settings, closing, settings_of, show, takes


@takes(
    options=settings_of(DecodeOptions, skip=("device", "dtype")),
    cluster=settings_of(Workers),
    settings=alone_settings(),
)
def decode(
    rows: Annotated[
        str,
        typer.Argument(
            help="Questions, conversations or images: a JSONL or parquet file, a folder of parquet files, or a "
            "data set's name on the Hub."
        ),
    ],
    output_dir: Annotated[
        Path,
        typer.Argument(
            help="Folder for the files of answers (shards). Give the same command again to resume."
        ),
    ],
    model_dir: ModelDir,
    decoder: Annotated[
        DecoderName,
        typer.Option(help="How answers are decoded; `eval ls` describes each way.", metavar="|".join(ALONE)),
    ] = DecoderName.retrospective,
    seed: Seed = 0,
    options: dict | None = None,
    cluster: dict | None = None,
    settings: dict | None = None,
) -> None:
    """Answer all rows of a file of any size, and check each phrase while it is written.

    The command may be stopped at any moment; given again, it goes on after the last answer. `--ray` spreads the work over
    the GPUs of a cluster, `--part` over machines without Ray; the answers are the same.
    """
    from ..decode import decode as run

    report = run(
        rows,
        output_dir,
        model_dir,
        decoder.value,
        settings=settings,
        seed=seed,
        options=DecodeOptions(**options),
        workers=workers_of(cluster),
    )
    show(f"{report}\nWritten to {output_dir}/shard-?????.jsonl")
    whole = f"cat {output_dir}/shard-?????.jsonl > answers.jsonl"
    closing(
        {"make one file of all, in the order of the rows": whole}
        if report.finished == report.rows
        else {"do the rest": "the same command with the other values of --part"}
    )
