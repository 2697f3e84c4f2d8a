"""`vlm-sft-rl certify`: do training and decoding of a checkpoint see the same?"""

import json
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..errors import UserError, printable
from ..io import make_folder
from ..parity.options import CertifyOptions
from ..settings import configured
from .common import closing, escape, model_folder, settings_of, show, takes


@takes(settings=settings_of(CertifyOptions))
def certify(
    model: Annotated[
        str, typer.Argument(help="Checkpoint or adapter directory; `pocket` is the one shipped.")
    ],
    rows: Annotated[
        Path | None, typer.Argument(help="SFT rows (JSON or JSONL); default: six that the command draws.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Write certificate.json and certificate.html into this folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON.")] = False,
    settings: dict | None = None,
) -> None:
    """Compare trainer, `generate`, decoding engine and vLLM on one checkpoint: tokens, positions, log-probabilities.

    All are made to say the same answers, alone, in padded batches, packed, and with rewinds. Ends with status 1 where one of
    them differs by more than rounding explains; names the row and the token.
    """
    from ..parity.certificate import certify as run
    from ..parity.certificate import write

    options = configured(CertifyOptions, settings, "certify")
    if rows is None and (given := sorted({"image_root", "limit"} & settings.keys())):
        option = given[0].replace("_", "-")
        raise UserError(
            f"--{option} is about rows of your own. Name their file behind the model, or leave it out."
        )
    if output_dir is not None:
        make_folder(output_dir)
    with Console(stderr=True).status("loading") as status:
        certificate = run(model_folder(model), rows, options, status.update, name=model)
    if output_dir is not None:
        words = [
            "vlm-sft-rl",
            "certify",
            model,
            *([str(rows)] if rows else []),
            "--output-dir",
            str(output_dir),
        ]
        page = write(certificate, output_dir, shlex.join(words))
    if as_json:
        print(printable(json.dumps(certificate.to_json(), ensure_ascii=False)))
    else:
        Console().print(certificate.table().terminal())
        for name, note in certificate.notes().items():
            Console(soft_wrap=True).print(f"[dim]{escape(f'{name}: {note}')}[/]", highlight=False)
        for failure in certificate.failures:
            Console(soft_wrap=True).print(f"[red]{escape(failure)}[/]", highlight=False)
        show("certified" if certificate.certified else "not certified")
    if output_dir is not None:
        closing({"look at every token": f"open {page}"})
    raise typer.Exit(not certificate.certified)
