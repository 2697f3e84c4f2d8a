"""The chat templates that `model convert` writes and `model prepare` takes: the conversations LLaVAs were trained with."""

import families
import pytest

from vlm_sft_rl.data.chat import load_processor
from vlm_sft_rl.data.rows import typed_messages
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import TEMPLATES, prepare

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
LLAMA3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
# where a row has the image -> the message as LLaVA's own preprocessing writes it
PLACES = [
    ("<image>\nWhat is it?", "<image>\nWhat is it?"),
    ("What is it?\n<image>", "<image>\nWhat is it?"),
    ("Look at <image> here.", "<image>\nLook at  here."),
    ("What is it?", "<image>\nWhat is it?"),  # no placeholder: in front of the first question
]


@pytest.mark.parametrize("written, shown", PLACES)
@pytest.mark.parametrize("name", ["vicuna", "llama3"])
def test_templates_write_the_released_conversation(name, written, shown):
    """System sentence, image at the head of its message, separators: as LLaVA-1.5's and LLaVA-MORE's conversations."""
    tokenizer = (families.llava if name == "vicuna" else families.llava_more)()[1].tokenizer
    turns = [("user", shown), ("assistant", "A cup."), ("user", "Red?")]
    if name == "vicuna":
        expected = f"{VICUNA} USER: {shown} ASSISTANT: A cup.{tokenizer.eos_token}USER: Red? ASSISTANT:"
    else:
        headers = [
            f"<|start_header_id|>{role}<|end_header_id|>\n\n"
            for role in ("system", *(r for r, _ in turns), "assistant")
        ]
        texts = [f"{text}<|eot_id|>" for text in (LLAMA3, *(text for _, text in turns))]
        expected = (tokenizer.bos_token or "") + "".join(
            h + t for h, t in zip(headers, [*texts, ""], strict=True)
        )

    def render(messages, **options):
        text = (TEMPLATES / f"{name}.jinja").read_text("utf-8").strip()
        return tokenizer.apply_chat_template(messages, chat_template=text, tokenize=False, **options)

    row = {"images": ["a.png"], "messages": [{"role": role, "content": text} for role, text in turns]}
    row["messages"][0]["content"] = written
    assert render(typed_messages(row), add_generation_prompt=True) == expected
    if "<image>" in written:  # content as text, with the placeholder in it
        assert render(row["messages"], add_generation_prompt=True) == expected
    own = render(
        [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *typed_messages(row)]
    )
    assert own.count("Be brief.") == 1 and VICUNA not in own and LLAMA3 not in own


def test_a_checkpoint_is_prepared_with_the_system_sentence(tmp_path):
    source = families.save(*families.llava(), tmp_path / "hf")
    prepare(source, tmp_path / "own")
    prepare(source, tmp_path / "vicuna", chat_template="vicuna")
    user = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    texts = [
        load_processor(tmp_path / name).apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        for name in ("own", "vicuna")
    ]
    assert VICUNA not in texts[0]
    assert texts[1] == f"{VICUNA} USER: <image>\nWhat? ASSISTANT:"
    with pytest.raises(UserError, match="neither a file nor one of llama3, vicuna"):
        prepare(source, tmp_path / "absent", chat_template="absent")
    qwen = families.save(*families.qwen2_vl(), tmp_path / "qwen")
    with pytest.raises(UserError, match="vicuna: it writes <image> for an image, Qwen2VLProcessor needs"):
        prepare(qwen, tmp_path / "other", chat_template="vicuna")
