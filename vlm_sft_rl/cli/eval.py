"""`vlm-sft-rl eval`: measure a model on a benchmark, or compare two runs."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UserError
from .common import Decoder, Seed


def evaluate(
    context: typer.Context,
    what: Annotated[
        list[str],
        typer.Argument(
            help="A spec's name or path, or: compare RUN_A RUN_B, or: card RUN ….",
            metavar="SPEC | compare A B | card RUN…",
        ),
    ],
    model_dir: Annotated[
        Path | None, typer.Option("--model", help="Checkpoint or adapter directory.")
    ] = None,
    data_dir: Annotated[Path, typer.Option(help="Folder that the spec's files are in.")] = Path("."),
    decoder: Annotated[Decoder, typer.Option(help="How answers are made.")] = Decoder.greedy,
    threshold: Annotated[
        float | None, typer.Option(help="τ on `P(</UN>)`; default: the spec's or checkpoint's.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Default: runs/eval/SPEC-MODEL-DECODER.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first questions.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    temperature: Annotated[
        float | None,
        typer.Option(help="Of sample and of candidates, or the start of retrospective.", min=0),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Bootstrap rounds (compare: 1000).", min=10)] = 100,
    seed: Seed = 0,
    corrections: Annotated[
        int | None, typer.Option(help="For correct: the most correction turns (default 1).", min=0)
    ] = None,
    correction_prompt: Annotated[
        str | None,
        typer.Option(help="For correct: what the user asks; default: as the checkpoint was trained."),
    ] = None,
    self_stop: Annotated[
        bool, typer.Option("--self-stop", help="For correct: stop when a correction repeats the conclusion.")
    ] = False,
    candidates: Annotated[
        int | None,
        typer.Option(
            help="For majority and self-select: answers to choose from (default 3); for searches: at every step (2).",
            min=1,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="For majority, self-select, self-refine: ask as self-training on a data set does, DATASET[/STYLE]. "
            "Default: the spec's prompt."
        ),
    ] = None,
    fallback: Annotated[
        str | None,
        typer.Option(
            help="For self-select: none (as released), or majority where the selection is no candidate's answer."
        ),
    ] = None,
    decoder_option: Annotated[
        list[str] | None,
        typer.Option(
            help="KEY=VALUE: of SearchConfig for searches, e.g. rules=released; of OperaConfig for opera, e.g. beams=3."
        ),
    ] = None,
    greedy_run: Annotated[
        Path | None, typer.Option(help="For drop and stop: derive from this finished greedy run.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="For compare: write the page of the comparison.")] = None,
    readme: Annotated[Path | None, typer.Option(help="For card: the model card to write into.")] = None,
    metric_option: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE over the spec's metric_options, e.g. rules=released."),
    ] = None,
    category: Annotated[
        list[str] | None,
        typer.Option(
            help="Only these categories or question files of the spec, e.g. refcoco_val. Repeatable."
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint of the judge, for specs that have one.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's name there.")] = None,
    judge_key_env: Annotated[str | None, typer.Option(help="Environment variable with its API key.")] = None,
    judge_prompt: Annotated[Path | None, typer.Option(help="Prompt that replaces the spec's.")] = None,
    judge_ledger: Annotated[
        Path | None, typer.Option(help="File of paid verdicts. Default: in the output folder.")
    ] = None,
    judge_prices: Annotated[
        tuple[float, float] | None, typer.Option(help="Prices of a million tokens, in and out.")
    ] = None,
    judge_budget: Annotated[float | None, typer.Option(help="Stop when the judge has cost so much.")] = None,
    answers_only: Annotated[
        bool, typer.Option(help="Make the answers now; judge them by the same command without this, later.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option(help="Throw away what another configuration left there.")
    ] = False,
) -> None:
    """Measure a model on a benchmark, or compare two finished runs question by question."""
    given = [name for name in context.params if context.get_parameter_source(name).name == "COMMANDLINE"]
    if what[0] in ("compare", "card"):
        takes = {"compare": ("rounds", "seed", "html"), "card": ("readme",)}[what[0]]
        if stray := [name for name in given if name not in ("what", *takes)]:
            known = " and ".join((", ".join(map(option, takes[:-1])), option(takes[-1]))).removeprefix(
                " and "
            )
            raise UserError(f"eval {what[0]} takes {known} only, not {', '.join(map(option, stray))}.")
        if what[0] == "compare":
            _compare(what[1:], seed, rounds if "rounds" in given else None, html)
        else:
            _card(what[1:], readme)
        return
    if stray := [name for name in given if name in ("html", "readme")]:
        owner = {"html": "compare", "readme": "card"}[stray[0]]
        raise UserError(
            f"{option(stray[0])} belongs to eval {owner}; a run writes report.html into its folder."
        )
    if len(what) != 1:
        raise UserError(f"eval takes one spec, found {len(what)}: {' '.join(what)}.")
    if model_dir is None:
        raise UserError("eval needs --model DIR (a checkpoint or adapter directory).")
    from ..evaluation.candidates import SEARCHING
    from ..evaluation.judge import JudgeSettings
    from ..evaluation.runner import evaluate_spec
    from ..evaluation.specs import load_spec, read_pairs, with_categories, with_metric_options

    if (judge_url is None) != (judge_model is None):
        raise UserError(
            "--judge-url and --judge-model go together: the endpoint, and the model's name there."
        )
    judge = None
    if judge_url is not None:
        prices = dict(zip(("input_price", "output_price"), judge_prices or (), strict=False))
        judge = JudgeSettings(
            judge_url,
            judge_model,
            key_env=judge_key_env,
            prompt_file=judge_prompt,
            ledger=judge_ledger,
            budget=judge_budget,
            **prices,
        )
    further = read_pairs("--decoder-option", decoder_option or [], "beams=3")
    taking = (*SEARCHING, Decoder.opera.value)
    if further and decoder.value not in taking:
        raise UserError(
            f"--decoder-option has no effect on --decoder {decoder.value}; it belongs to {', '.join(taking)}."
        )
    default = Path("runs/eval") / f"{Path(what[0]).stem}-{model_dir.resolve().name}-{decoder.value}"
    evaluate_spec(
        with_categories(with_metric_options(load_spec(what[0]), metric_option or []), category or []),
        model_dir,
        decoder=decoder.value,
        output_dir=output_dir or default,
        data_dir=data_dir,
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        threshold=threshold,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        correction={
            **({} if corrections is None else {"corrections": corrections}),
            **({} if correction_prompt is None else {"prompt": correction_prompt}),
            **({"stop": "same"} if self_stop else {}),
        },
        candidates={
            **({} if candidates is None else {"candidates": candidates}),
            **({} if prompts is None else {"prompts": prompts}),
            **({} if fallback is None else {"fallback": fallback}),
            **({} if not further or decoder is Decoder.opera else {"search": further}),
        },
        opera=further if decoder is Decoder.opera else None,
        rounds=rounds,
        greedy_run=greedy_run,
        judge=judge,
        answers_only=answers_only,
        overwrite=overwrite,
    )


def _compare(runs: list[str], seed: int, rounds: int | None, html: Path | None) -> None:
    if len(runs) != 2:
        raise UserError("eval compare needs two run folders: vlm-sft-rl eval compare RUN_A RUN_B")
    from rich.console import Console

    from ..evaluation.compare import comparison_table, pair_runs

    found = pair_runs(*runs, seed=seed, **({} if rounds is None else {"rounds": rounds}))
    Console().print(comparison_table(found.result).terminal())
    if html is not None:
        from ..evaluation.compare import write_comparison

        Console().print(f"Written to {write_comparison(html, found)}", highlight=False)


def _card(runs: list[str], readme: Path | None) -> None:
    if not runs or readme is None:
        raise UserError(
            "eval card needs runs and a card: vlm-sft-rl eval card RUN … --readme MODEL_DIR/README.md"
        )
    from rich.console import Console

    from ..evaluation.pages import update_card

    Console().print(f"Written to {update_card(readme, runs)}", highlight=False)


def option(name: str) -> str:
    """The command-line option of a parameter."""
    return "--model" if name == "model_dir" else f"--{name.replace('_', '-')}"
