"""What the benchmarks share: how one is run and held against its targets, and the random model that they time.

    python eval/speed/NAME.py [--json FILE]

`NAME.yaml` beside the script says with what arguments it runs and which figures it must reach.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.io import write_json
from vlm_sft_rl.recipes import read_yaml

WORDS = 960
TEMPLATE = (
    "{% for m in messages %}USER: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_llava(
    *,
    hidden: int = 192,
    layers: int = 6,
    image_side: int = 12,
    vision_hidden: int = 64,
    vision_layers: int = 3,
    seed: int = 0,
    heads: int = 4,
    vision_heads: int = 4,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
):
    """Returns `(model, processor)`; the model's rows for tags, image and end tokens are zero, so it never says them."""
    specials = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<SPAN>", "</CN>", "</UN>"]
    words = [
        "USER:",
        "ASSISTANT:",
        "x",
        "7",
        ".",
        "(Hint:",
        "potential",
        "incorrect",
        "phrases",
        "->",
        ",",
        ")",
    ]
    words += [f"w{i}" for i in range(WORDS)]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(specials + words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(",", "isolated"),
            pre_tokenizers.Split(")", "isolated"),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["<SPAN>", "</CN>", "</UN>"])
    tokenizer.padding_side = "left"
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    side = 14 * image_side
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=vision_hidden * 2,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=side,
            patch_size=14,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=image_id,
        image_seq_length=image_side**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    with torch.device(device):  # billions of weights are drawn where they are used
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.lm_head.weight[: len(specials)] = 0
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    return model, processor


def random_images(count: int, side: int = 168, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def main(script: str, run: Callable[..., dict]) -> None:
    """The command of a benchmark: run it as its YAML file says, print the figures, and write them with `--json`."""
    from rich.console import Console

    path = Path(script).with_suffix(".yaml")
    spec = read_yaml(path)
    command = argparse.ArgumentParser(
        description=f"{spec['description']}: ratios measured side by side in one run."
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    json_file = command.parse_args().json
    figures = run(**spec.get("arguments", {}))
    result = {"benchmark": spec["name"], **figures, "targets": check(figures, spec.get("targets", {}), path)}
    if json_file is not None:
        write_json(json_file, result)
    Console().print(result)


def check(figures: dict, targets: dict[str, dict[str, float]], path: str | Path) -> dict[str, dict]:
    """Hold the figures against targets `dotted.key -> {at_least | at_most: number}`.

    Raises UserError: a target names a figure that the benchmark does not give.
    """
    checked = {}
    for key, limits in targets.items():
        value = figures
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                raise UserError(f"{path}: the target {key!r} names no figure of this benchmark.")
            value = value[part]
        met = value >= limits.get("at_least", value) and value <= limits.get("at_most", value)
        checked[key] = {"value": value, "wanted": limits, "met": met}
    return checked
