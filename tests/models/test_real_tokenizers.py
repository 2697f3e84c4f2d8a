"""The published tokenizers and chat templates: ids, what has loss, the assistant header, decoding back."""

import families
import pytest
import torch
from PIL import Image
from real_tokenizers import LLAMA2, LLAMA3, QWEN3, tokenizer

from vlm_sft_rl.data import chat as prompting
from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.decoding import generate_retrospective
from vlm_sft_rl.decoding.config import RetrospectiveConfig
from vlm_sft_rl.models.checkpoints import TEMPLATES
from vlm_sft_rl.models.tokens import add_verification_tokens, resize_if_needed

# family, package, template, ids of the three tokens behind the published vocabulary, end of turn, header
CASES = [
    ("llava", LLAMA2, "vicuna", 32001, "</s>", "ASSISTANT:"),
    (
        "llava_more",
        LLAMA3,
        "llama3",
        128257,
        "<|eot_id|>",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("qwen2_5_vl", QWEN3, None, 151669, "<|im_end|>", "<|im_start|>assistant\n"),
]
ANSWER = "There is <SPAN> a crème brûlée </CN> on <SPAN> 12 plates </CN>, and 日本 <SPAN> a cat </UN>"
VICUNA_START = "A chat between a curious user and an artificial intelligence assistant"
VICUNA_IDS = [1, 319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255]


def with_real_tokenizer(family: str, package: str, template: str | None):
    """A tiny model of the family whose vocabulary is the published one."""
    model, processor = getattr(families, family)()
    real = tokenizer(package)
    if real.pad_token is None:
        names = ("<|finetune_right_pad_id|>", "<unk>", real.eos_token)
        real.pad_token = next(name for name in names if name in real.get_vocab())
    image = processor.image_token
    real.add_special_tokens({"additional_special_tokens": [image]})
    processor.tokenizer, processor.image_token_id = real, real.convert_tokens_to_ids(image)
    if template:
        processor.chat_template = (TEMPLATES / f"{template}.jinja").read_text().strip()
    if package == QWEN3:
        real.image_token, real.image_token_id = image, processor.image_token_id
    model.config.image_token_id = processor.image_token_id
    resize_if_needed(model, len(real))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = (
        real.pad_token_id,
        real.eos_token_id,
    )
    ids = add_verification_tokens(model, processor)
    return model, processor, ids


def test_llama2_is_the_published_one():
    assert tokenizer(LLAMA2)(VICUNA_START)["input_ids"] == VICUNA_IDS
    assert len(tokenizer(LLAMA2)) == 32000


@pytest.mark.slow
@pytest.mark.parametrize("family, package, template, first, end, header", CASES, ids=[c[0] for c in CASES])
def test_train_and_decode(family, package, template, first, end, header):
    model, processor, ids = with_real_tokenizer(family, package, template)
    assert ids == [first, first + 1, first + 2]
    image = Image.linear_gradient("L").convert("RGB").resize((56, 56))
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is there?"}]},
            {"role": "assistant", "content": ANSWER},
        ],
        "images": [image],
    }
    collator = VisionCollator(processor)
    example = collator.encode(row)
    learnt = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    # Llama 2's puts a blank behind every added token, as SentencePiece does at the start of a text
    assert "".join(processor.tokenizer.decode(learnt).split()) == "".join((ANSWER + end).split())
    assert [token for token in learnt if token in ids] == [ids[0], ids[1], ids[0], ids[1], ids[0], ids[2]]
    batch = collator([row, row])
    batch.pop("loss_weights")
    loss = model(**batch).loss
    loss.backward()
    assert torch.isfinite(loss) and model.get_input_embeddings().weight.grad[ids].abs().sum() > 0
    assert header.strip() in processor.tokenizer.decode(prompting.header_ids(processor))
    (answer,) = generate_retrospective(
        model.eval(), processor, [image], ["What is there?"], RetrospectiveConfig(max_new_tokens=8)
    )
    assert answer.counts.image_encodes == 1
