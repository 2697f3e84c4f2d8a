"""A language model as judge: one request an answer, cached by content, so that nothing is asked or paid for twice."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from ..errors import UserError
from ..io import read_text, write_jsonl
from ..shapes import read_lines
from ..teacher import ChatRequest, EndpointClient, user_message
from .metrics.counting import CountMetric
from .specs import EvalSpec, JudgeSettings, check_judge_prompt

LEDGER = "judge.jsonl"
JUDGEMENTS = "judgements.jsonl"
JUDGEMENT = {"id": str, "judgement": str, "error?": (str, None)}
_PLACE = re.compile(r"\{(\w+)\}")


def fill_prompt(template: str, sample: dict) -> str:
    """The judge's prompt about one answer.

    `{question}`, `{response}` and the fields of the sample's reference are filled in, lists as one item a line. In one
    pass: text of an answer is never taken for a placeholder. Braces around anything else stay.

    Raises UserError: the prompt names a field that the sample does not have.
    """
    values: dict[str, Any] = {
        **sample["reference"],
        "question": sample["question"],
        "response": sample["answer"],
    }

    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise UserError(
                f"the judge's prompt names {match.group()}, which sample {sample['id']!r} does not have. It has: "
                f"{', '.join(sorted(values))}."
            )
        text = values[match[1]]
        return "\n".join(f"- {item}" for item in text) if isinstance(text, list) else str(text)

    return _PLACE.sub(value, template)


def judge_samples(
    samples: Sequence[dict],
    spec: EvalSpec,
    metric: CountMetric,
    settings: JudgeSettings,
    output: Path,
    console: Console,
) -> dict:
    """Ask the judge about every answer that the metric needs it for; fills each sample's `judgement` and writes
    `judgements.jsonl`.

    Returns:
        What made the verdicts and what they cost, for summary.json.

    Raises UserError: the endpoint cannot be used, or the budget is spent; what was answered is kept in the ledger.
    """
    template = spec.judge.prompt
    if settings.prompt_file is not None:
        template = read_text(settings.prompt_file)
        check_judge_prompt(template, str(settings.prompt_file))
    asked, requests = [sample for sample in samples if metric.asks_judge(sample["answer"])], []
    for sample in asked:
        prompt = user_message(fill_prompt(template, sample))
        requests.append(ChatRequest(sample["id"], [prompt], max_tokens=spec.judge.max_tokens))
    ledger = settings.ledger or output / LEDGER
    client = EndpointClient(settings.url, settings.model, ledger=ledger, **settings.client_options())
    replies = {}
    with client, Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"judged by {settings.model}", total=len(asked))
        for reply in client.complete(requests):
            replies[reply.id] = {"judgement": reply.texts[0] if reply.texts else "", "error": reply.error}
            progress.advance(task)
    rows = []
    for sample in samples:
        row = {"id": sample["id"], **replies.get(sample["id"], {"judgement": "", "error": None})}
        sample["judgement"] = row["judgement"]
        rows.append(row)
    write_jsonl(output / JUDGEMENTS, rows)
    usage = client.usage
    if usage.failed:
        console.print(
            f"{usage.failed} answers got no verdict and are shown as unjudged; the same command asks again. The "
            f"last: {client.failures[-1][1]}",
            highlight=False,
        )
    return {
        "model": settings.model,
        "url": client.url,
        "prompt": template,
        "prompt_sha256": hashlib.sha256(template.encode()).hexdigest()[:16],
        "temperature": 0.0,
        "published": spec.judge.published,
        "usage": usage.to_json(),
    }


def read_judgements(folder: Path) -> Iterator[tuple[str, str]]:
    """`(id, judgement)` of a judged run.

    Raises UserError: the run was not judged, or a line is no judgement.
    """
    path = folder / JUDGEMENTS
    if not path.is_file():
        raise UserError(f"{folder}: its answers were not judged. Run the evaluation again with --judge-url.")
    for row in read_lines(path, JUDGEMENT, "Run the evaluation again with its judge to write it anew.", "id"):
        yield row["id"], row["judgement"]
