"""From images and questions to token ids: chat template, assistant header, hint, and the tokenizer's grammar."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from ..data.tags import VERIFICATION_TOKENS, strip_tags
from ..errors import UserError
from .grammar import Grammar

IMAGE_MARK = "<image>"


def tokenizer_of(processor):
    return getattr(processor, "tokenizer", processor)


def build_grammar(model, processor, *, required: bool) -> Grammar:
    """Raises UserError: `required` and the tokenizer lacks a verification token."""
    tokenizer = tokenizer_of(processor)
    ids = [_token_id(tokenizer, token) for token in VERIFICATION_TOKENS]
    if None in ids:
        if required:
            missing = ", ".join(t for t, i in zip(VERIFICATION_TOKENS, ids, strict=True) if i is None)
            raise UserError(
                f"The tokenizer has no {missing}: this model was not trained to verify its phrases. Add the tokens "
                "with `vlm-sft-rl model prepare`, train on tagged rows, then decode; or decode without verification."
            )
        ids = [None, None, None]
    tags = {i for i in ids if i is not None}
    hidden = set(tokenizer.all_special_ids) - tags
    anchor = tokenizer.encode("x", add_special_tokens=False)
    prefix = len(tokenizer.decode(anchor))

    def decode(tokens: Sequence[int]) -> str:
        shown = [t for t in tokens if t not in hidden]
        return tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @lru_cache(maxsize=4096)
    def piece(token: int) -> str:
        # behind an anchor, because SentencePiece drops the leading space of a text's first token
        text = tokenizer.decode(
            [*anchor, token], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return text[prefix:]

    def plain(tokens: Sequence[int]) -> str:
        return strip_tags(decode(tokens)).strip()

    return Grammar(*ids, end_ids(model, tokenizer), decode, piece, plain)


def _token_id(tokenizer, token: str) -> int | None:
    number = tokenizer.convert_tokens_to_ids(token)
    return None if number is None or number == tokenizer.unk_token_id else number


def end_ids(model, tokenizer) -> frozenset[int]:
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    return frozenset(i for i in ends if i is not None)


def suppressed_ids(model, tokenizer, ends: frozenset[int]) -> set[int]:
    """Image placeholders (without features they would be read as text), padding, ids the tokenizer cannot decode."""
    config = model.config
    names = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id")
    ids = {getattr(config, name, None) for name in names} | {tokenizer.pad_token_id}
    size = config.get_text_config(decoder=True).vocab_size
    ids |= set(range(len(tokenizer), size))
    return {i for i in ids if i is not None and i < size} - ends


def render(processor, prompt: str, images: int) -> str:
    """The prompt through the chat template, assistant header included.

    Raises:
        UserError: the processor has no chat template, or the `<image>` marks do not match the images.
    """
    if getattr(processor, "chat_template", None) is None and tokenizer_of(processor).chat_template is None:
        raise UserError("The processor has no chat template: save one with it (processor.chat_template).")
    parts = prompt.split(IMAGE_MARK)
    content: list[dict[str, str]] = []
    if len(parts) == 1:
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    elif len(parts) - 1 != images:
        raise UserError(
            f"The prompt has {len(parts) - 1} {IMAGE_MARK} marks and {images} images: {prompt!r}."
        )
    else:
        for i, part in enumerate(parts):
            text = part.strip("\n") if images else part
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": text}] if text else []
    message: Any = content if hasattr(processor, "tokenizer") else prompt
    return processor.apply_chat_template(
        [{"role": "user", "content": message}], add_generation_prompt=True, tokenize=False
    )


def header_ids(processor) -> list[int]:
    """Ids of everything that follows the user's text in a prompt: end of the turn and assistant header.

    Found as the common end of two rendered prompts that differ in their text, so it holds for any template.
    """
    one, two = (encode_text(processor, render(processor, text, 0)) for text in ("x", "7"))
    count = 0
    while count < min(len(one), len(two)) and one[-1 - count] == two[-1 - count]:
        count += 1
    return one[len(one) - count :]


def encode_text(processor, text: str) -> list[int]:
    tokenizer = tokenizer_of(processor)
    return tokenizer.encode(text, add_special_tokens=not starts_with_bos(tokenizer, text))


def starts_with_bos(tokenizer, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def insertion_encoder(processor) -> Callable[[str], list[int]]:
    """Text -> ids as they stand behind the user's text: a space, then the text."""
    tokenizer = tokenizer_of(processor)
    before = tokenizer.encode("x", add_special_tokens=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(f"x {text}", add_special_tokens=False)[len(before) :]

    return encode


def follow_up_ids(processor, text: str) -> list[int]:
    """Ids between an answer and the next one: end of turn, the user's `text`, assistant header, as training has them.

    Where the template writes no end-of-turn token, the end-of-sequence token stands there, as in training.

    Raises:
        UserError: the template leaves the answer out, or there is no end-of-sequence token.
    """
    tokenizer = tokenizer_of(processor)
    word = "qzx0xzq"

    def part(words: str) -> Any:
        return [{"type": "text", "text": words}] if hasattr(processor, "tokenizer") else words

    talk = [
        {"role": "user", "content": part("x")},
        {"role": "assistant", "content": part(word)},
        {"role": "user", "content": part(text)},
    ]
    rendered = processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
    if rendered.count(word) != 1 or not tokenizer.eos_token:
        raise UserError(
            "The chat template cannot hold a second question (it leaves out the first answer, or there is no "
            "end-of-sequence token). Use a template of several turns, or `layout: message`."
        )
    tail = rendered.split(word)[1]
    specials = {str(t) for t in tokenizer.all_special_tokens}
    specials |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    written = next((t for t in sorted(specials, key=len, reverse=True) if tail.lstrip().startswith(t)), None)
    tail = tail if written is None else tail.lstrip()[len(written) :]
    return tokenizer.encode((written or tokenizer.eos_token) + tail, add_special_tokens=False)


def answer_lead(processor) -> str:
    """What the template puts between the assistant header of a prompt and the answer (the blank of "ASSISTANT: x")."""
    word = "qzx0xzq"
    typed = hasattr(processor, "tokenizer")

    def message(role: str, text: str) -> dict:
        return {"role": role, "content": [{"type": "text", "text": text}] if typed else text}

    asked = processor.apply_chat_template([message("user", "x")], add_generation_prompt=True, tokenize=False)
    told = processor.apply_chat_template([message("user", "x"), message("assistant", word)], tokenize=False)
    header = told.split(word)[0]
    return header[len(asked) :] if header.startswith(asked) else ""
