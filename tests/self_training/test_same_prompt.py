"""What a model is asked when it samples and reflects is, token by token, what it was asked in training."""

import families
import pools
import pytest
from PIL import Image

from vlm_sft_rl.data.chat import render
from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.marks import IGNORE
from vlm_sft_rl.decoding.generate import encode_batch
from vlm_sft_rl.graders.prompts import DATASETS, STYLES, load_prompts
from vlm_sft_rl.self_training.builders import BuildSettings, build_mixture, row_kind

FAMILIES = {"llava": families.llava, "qwen2_vl": families.qwen2_vl, "qwen2_5_vl": families.qwen2_5_vl}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_before_an_answer_are_the_same(tmp_path, family):
    model, processor = FAMILIES[family]()
    picture = Image.new("RGB", (56, 28), (30, 90, 10))
    picture.save(tmp_path / "a.png")
    collator = VisionCollator(processor, tmp_path)
    question = pools.QUESTION | {"question": " How many?\n", "choices": ["7", "GOLD"], "unit": "cm"}
    samples = pools.candidates("RRWF")
    for dataset in DATASETS:
        for style in STYLES:
            prompts = load_prompts(dataset, style)
            # the newest first, as a round's rows have them; test time shows all in the order they were drawn
            right, wrong = samples[1], samples[3]
            asked = {
                "direct": prompts.ask_directly(question),
                "cot": prompts.ask(question),
                "refine": prompts.ask_to_refine(question, wrong.text),
            }
            rows = build_mixture([question], {"q1": samples}, [], prompts, BuildSettings()).rows
            found = {row_kind(row): row for row in rows}
            assert found.keys() == {"direct", "cot", "refine", "select"}
            shown = sorted((c.text for c in samples), key=found["select"]["messages"][0]["content"].find)
            shown = [text for text in shown if text in found["select"]["messages"][0]["content"]]
            asked["select"] = prompts.ask_to_select(question, shown)
            for kind, row in found.items():
                example = collator.encode(row)
                start = next(i for i, label in enumerate(example.labels) if label != IGNORE)
                inputs = encode_batch(model, processor, [render(processor, asked[kind], 1)], [[picture]])
                assert example.input_ids[:start] == inputs["input_ids"][0].tolist(), (dataset, style, kind)
            assert found["cot"]["messages"][1]["content"] == right.text
