"""What the runs of every engine read: rows of each method, tiny checkpoints, and an accelerate config for CPUs."""

import shutil
from pathlib import Path

import families
import torch
import yaml
from engine_cases import COUNT
from image_rows import tagged_rows
from json_lines import write_lines
from regions import region_rows
from training import tagged

from vlm_sft_rl.data.corrections import Draft, correction_row
from vlm_sft_rl.data.stages import Staged, format_staged
from vlm_sft_rl.demos.frame import VERIFIER
from vlm_sft_rl.pocket.language import CAPTION_PROMPT
from vlm_sft_rl.pocket.world import NOUNS
from vlm_sft_rl.recipes import find


def write_rows(folder: Path) -> None:
    """A file of each kind of rows, with their pictures."""
    folder.mkdir()
    regions = region_rows(COUNT, expressions=True)
    tagged = tagged_rows(pictures=COUNT // 4, each=4)
    for number, region in enumerate(regions):
        region["image"].save(folder / f"{number}.png")
    for number, row in enumerate(tagged[::4]):
        row["images"][0].save(folder / f"tagged-{number}.png")
    rows = {
        "tagged": [row | {"images": [f"tagged-{i // 4}.png"]} for i, row in enumerate(tagged)],
        "doubted": [_doubted(row) | {"images": [f"tagged-{i // 4}.png"]} for i, row in enumerate(tagged)],
        "regions": [row | {"image": f"{i}.png"} for i, row in enumerate(regions)],
        "questions": [
            {"id": f"q{i}", "images": [f"{i}.png"], "question": f"How many, {i}?", "answer": str(i)}
            for i in range(COUNT)
        ],
        "captions": [
            {
                "id": f"c{i}",
                "images": [f"{i}.png"],
                "question": CAPTION_PROMPT,
                "objects": list(NOUNS)[i : i + 9],
            }
            for i in range(COUNT)
        ],
        "pairs": [_pair(i) for i in range(COUNT)],
        "corrections": [_corrected(i) for i in range(COUNT)],
    }
    for name, lines in rows.items():
        write_lines(folder / f"{name}.jsonl", lines)


def _doubted(row: dict) -> dict:
    question, answer = row["messages"]
    return row | {"messages": [question, answer | {"doubts": [0.3] * answer["content"].count("<SPAN>")}]}


def _pair(i: int) -> dict:
    return {
        "id": f"p{i}",
        "images": [f"{i}.png"],
        "prompt": [{"role": "user", "content": "How many things?"}],
        "chosen": [
            {"role": "assistant", "content": "It is <SPAN> one </CN>" + " and <SPAN> more </CN>" * (i % 3)}
        ],
        "rejected": [{"role": "assistant", "content": "It is <SPAN> two </CN>, or <SPAN> three </UN>"}],
        "pair_kind": ("cot", "refine")[i % 2],
        "pair_weight": 0.5 + i % 3,
    }


def _corrected(i: int) -> dict:
    first, last = (format_staged(Staged("count", f"{n} cats", f"so {n}", str(n))) for n in (i + i % 2, i))
    drafts = [Draft(first, i % 2 == 0), Draft(last, True)]
    return correction_row(f"c{i}", [f"{i}.png"], "How many cats?", drafts, "check")


def write_models(folder: Path, names) -> None:
    """Checkpoints with verification tokens, and beside each one the same without its weights (`FAMILY-hollow`)."""
    for name in names:
        if name == "pocket":
            shutil.copytree(VERIFIER, folder / name)
            continue
        options = {"window": 128} if name == "llava_mistral" else {}
        pair = tagged(name, **options)
        with (
            torch.no_grad()
        ):  # of a random model's answers few have more than one word, and their length is the reward
            pair[0].get_output_embeddings().weight[pair[1].tokenizer.convert_tokens_to_ids("Ġ")] *= 40
        families.save(*pair, folder / name)
        families.save(*pair, folder / f"{name}-hollow")
        (folder / f"{name}-hollow" / "model.safetensors").unlink()


def write_config(engine: str, folder: Path) -> Path:
    """The shipped config of an engine, for two processes on a CPU in float32."""
    config = yaml.safe_load(find("accelerate_configs", engine).read_text())
    config |= {"mixed_precision": "no", "num_processes": 2, "main_process_port": 0}
    if engine == "ddp":
        config["use_cpu"] = True
    path = folder / f"{engine}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
