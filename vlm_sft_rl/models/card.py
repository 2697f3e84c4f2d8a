"""A checkpoint for others: its card (how to use it with our decoding, what it was made of; no local paths), and the Hub."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from ..data.model_files import HUB_NAME
from ..errors import UserError, first_line
from ..io import CARD_BEGIN, CARD_END, as_markdown, read_text, write_text
from .sidecar import Sidecar

FILE_NAME = "README.md"
# what a method teaches, and its paper: title and arXiv number
METHODS = {
    "reverse": (
        "to close each phrase with `</CN>` (grounded) or `</UN>` (hallucinated), so that decoding can take back what is "
        "doubtful",
        "Generate, but Verify: Reducing Hallucination in Vision-Language Models with Retrospective Resampling",
        "2504.13169",
    ),
    "r3v": (
        "from its own right and wrong rationales",
        "Vision-Language Models Can Self-Improve Reasoning via Reflection",
        "2411.00855",
    ),
    "sco": (
        "to answer in stages and to correct its answers in further turns",
        "LLaVA-CoT: Let Vision Language Models Reason Step-by-Step",
        "2411.10440",
    ),
    "sc_tune": (
        "to describe a region so that it finds it again",
        "SC-Tune: Unleashing Self-Consistent Referential Comprehension in Large Vision Language Models",
        "2403.13263",
    ),
    "grpo": (
        "by group-relative rewards of its own answers",
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "2402.03300",
    ),
    "sft": ("by supervised fine-tuning", None, None),
}
METHODS["rewind"] = ("from its own answers, without what it took back in them", *METHODS["reverse"][1:])
METHODS["reflection_dpo"] = ("to prefer right rationales to wrong ones of its own", *METHODS["r3v"][1:])
# settings that name places of the machine that trained, or that say nothing of the result
_LEFT_OUT = {
    "output_dir",
    "logging_dir",
    "index_dir",
    "rejects_file",
    "hub_token",
    "hub_model_id",
    "push_to_hub",
    "report_to",
}
_PLACES = ("_file", "_root", "_dir", "_path", "_name", "_questions", "_checkpoint")


def write_card(
    folder: str | Path,
    sidecar: Sidecar,
    *,
    name: str,
    method: str = "",
    tags: Sequence[str] = (),
    figures: Mapping[str, float] | None = None,
    former: str | Path | None = None,
) -> Path:
    """Write the card of a checkpoint; figures that `eval card` wrote stay.

    Args:
        folder: of the checkpoint, an adapter or a whole model.
        name: of the model, on the Hub `OWNER/NAME`.
        method: where the sidecar's recipe names none.
        figures: what was measured in training, by name.
        former: the folder whose card holds figures of an evaluation; None: this one's.
    """
    folder = Path(folder)
    path = folder / FILE_NAME
    before = path if former is None else Path(former) / FILE_NAME
    metadata, evaluation = _measured(before) if before.is_file() else ({}, "")
    adapter = (folder / "adapter_config.json").is_file()
    recipe = public_recipe(sidecar)
    method = str(recipe.get("method", method))
    named = recipe.get("dataset_name")
    data = ModelCardData(
        base_model=sidecar.base,
        base_model_relation=("adapter" if adapter else "finetune") if sidecar.base else None,
        datasets=[named] if isinstance(named, str) and "/" in named else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=sorted({*tags, *([method.replace("_", "-")] if method else [])}),
        model_name=as_markdown(name.rpartition("/")[2]),
        **metadata,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {as_markdown(name.rpartition('/')[2])}",
        _introduction(sidecar, method, adapter),
        "## Use\n\n" + _usage(sidecar, name, method, adapter),
        _training(recipe, sidecar, figures or {}),
        evaluation,
    ]
    return write_text(path, "\n\n".join(part for part in parts if part) + "\n")


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a checkpoint to the Hub; returns its address there.

    Args:
        repository: `OWNER/NAME`; made where it does not exist.
        private: of a repository that is made.

    Raises UserError: no such name, or the Hub does not take it.
    """
    from huggingface_hub import HfApi

    if not HUB_NAME.fullmatch(repository) or "/" not in repository:
        raise UserError(f"{repository}: no name of a repository on the Hub. Write OWNER/NAME.")
    try:
        api = HfApi()
        address = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Model of vlm_sft_rl")
    except (OSError, ValueError) as error:  # HTTP errors are OSErrors
        raise UserError(
            f"{folder} is not on the Hub as {repository} ({first_line(error)}). Check the name, the connection and the "
            f"token (`hf auth login`, or HF_TOKEN); then `hf upload {repository} {folder}`."
        ) from error
    return str(address)


def public_recipe(sidecar: Sidecar) -> dict[str, Any]:
    """The settings of a run as others may read them: without places of this machine, files by their names."""
    settings = {}
    # as the sidecar's file has them: transformers' choices become text
    for key, value in json.loads(json.dumps(sidecar.recipe or {})).items():
        if key in _LEFT_OUT or value is None:
            continue
        if key == "model_name_or_path":
            value = sidecar.base or Path(str(value)).name
        elif isinstance(value, str) and key.endswith(_PLACES) and not _is_of_the_hub(key, value):
            value = Path(value).name
        settings[key] = _without_places(value)
    return settings


def _is_of_the_hub(key: str, value: str) -> bool:
    return key.endswith("_name") and HUB_NAME.fullmatch(value) is not None and not Path(value).exists()


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _measured(path: Path) -> tuple[dict[str, Any], str]:
    """What `eval card` wrote into a card: its metadata, and its section."""
    text = read_text(path)
    if CARD_BEGIN not in text or CARD_END not in text:
        return {}, ""
    section = CARD_BEGIN + text.split(CARD_BEGIN, 1)[1].split(CARD_END, 1)[0] + CARD_END
    head = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else {}
    return {key: value for key, value in (head or {}).items() if key == "model-index"}, section


def _introduction(sidecar: Sidecar, method: str, adapter: bool) -> str:
    kind = "A LoRA adapter" if adapter else "A vision-language model"
    base = sidecar.base and f"[{sidecar.base}](https://huggingface.co/{sidecar.base})"
    origin = f" {'for' if adapter else 'made of'} {base}" if base else ""
    what, title, number = METHODS.get(method, ("", None, None))
    taught = f", trained {what}" if what else ""
    paper = f" Method: [{title}](https://arxiv.org/abs/{number})." if title else ""
    return (
        f"{kind}{origin}{taught}.{paper} Made with vlm_sft_rl, on [TRL](https://github.com/huggingface/trl)."
    )


def _usage(sidecar: Sidecar, name: str, method: str, adapter: bool) -> str:
    repository = name if HUB_NAME.fullmatch(name) and "/" in name else "OWNER/NAME"
    verified = method == "reverse"
    source = sidecar.base or "THE_BASE_MODEL"
    base = f', base="{"prepared" if verified else source}"' if adapter else ""
    imported = "RetrospectiveConfig, generate_retrospective" if verified else "SamplingConfig, generate_plain"
    lines = [
        "from huggingface_hub import snapshot_download",
        "from PIL import Image",
        f"from vlm_sft_rl import {imported}, load_for_inference",
        "",
        f'folder = snapshot_download("{repository}")',
        f"model, processor, sidecar = load_for_inference(folder{base})",
        'images, prompts = [[Image.open("photo.jpg")]], ["Describe the image."]',
    ]
    if verified:
        lines += [
            'config = RetrospectiveConfig(**{**sidecar.decoding, "threshold": sidecar.threshold})',
            "answer = generate_retrospective(model, processor, images, prompts, config)[0]",
            'print(answer.text, answer.verdict, *answer.spans, sep="\\n")',
        ]
    else:
        lines += [
            "config = SamplingConfig(max_new_tokens=512)",
            "answer = generate_plain(model, processor, images, prompts, config)[0]",
            "print(answer.text)",
        ]
    code = "```python\n" + "\n".join(lines) + "\n```"
    if adapter and verified:
        code = (
            "The adapter belongs to its base with the verification tokens added:\n\n"
            f"```bash\nvlm-sft-rl model prepare {source} prepared\n```\n\n{code}"
        )
    if verified:
        code += (
            f"\n\nA phrase whose P(`</UN>`) reaches the threshold ({sidecar.threshold:g}) is taken back and written anew. "
            "Plain `generate` of transformers works as well, and shows the tags."
        )
    return code


def _training(recipe: dict[str, Any], sidecar: Sidecar, figures: Mapping[str, float]) -> str:
    lines = ["## Training"] if recipe or figures else []
    if rows := recipe.get("train_file") or recipe.get("dataset_name"):
        lines.append(f"Rows: {as_markdown(str(rows))}.")
    if figures:
        head = "| at the last logged step | |\n|---|---|\n"
        lines.append(head + "\n".join(f"| {as_markdown(k)} | {v:.4g} |" for k, v in figures.items()))
    if recipe:
        text = (
            yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100)
            .rstrip()
            .replace("```", "'''")
        )
        lines.append(f"<details><summary>The recipe</summary>\n\n```yaml\n{text}\n```\n\n</details>")
    return "\n\n".join(lines)
