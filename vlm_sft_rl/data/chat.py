"""A conversation as text and as tokens: rows for training, prompts for decoding, and where the last image ends in them.

No chat template is known here. A row is rendered twice, once with each answer replaced by a unique word; what stands
between those words is what the template writes, and the rest of the true rendering is the answers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import PLACEHOLDER, TEMPLATE, RowError, UserError, first_line
from .messages import IMAGE, typed_messages
from .model_files import (
    LONGEST_SIDE,
    SETTINGS,
    TOKENIZER,
    check_model_files,
    check_tokenizer_file,
    template_fault,
)

# what is asked of a processor to see whether it works
SMALL_QUESTION = "qzx?"
# image processors that have one of these say in `size` how many pixels a picture has, not how long its sides are
AREA_SETTINGS = ("merge_size", "min_pixels", "downsample_factor")
_COPY_TEMPLATE = (
    "Copy chat_template.jinja (or the template of tokenizer_config.json) from the published checkpoint."
)


def load_processor(path: str | Path, **kwargs):
    """The processor of a model folder or Hub name: a tokenizer with a chat template, and an image part.

    Raises UserError: there is none, a package that it needs is missing, it is not one for images and text, or its settings
    or its chat template do not work.
    """
    from transformers import AutoProcessor

    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    check_model_files(path, kwargs.get("revision"))
    try:
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False, **kwargs)
    except ImportError as error:
        raise UserError(
            f"{path}: its processor needs a package that is not installed ({first_line(error)}). Install it; for SmolVLM: "
            "`pip install vlm-sft-rl[smolvlm]`."
        ) from error
    except Exception as error:  # of many types, for what is no folder of a processor
        check_tokenizer_file(path)
        if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in (*SETTINGS, TOKENIZER)):
            raise UserError(
                f"{path}: no loadable processor: no file of a model is in this folder. Give the folder of a model."
            ) from error
        raise UserError(
            f"{path}: no loadable processor ({first_line(error)}). Expected preprocessor and tokenizer files beside "
            "config.json."
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{path}: has a {type(processor).__name__}, not a processor for images and text.")
    check_processor_works(processor, path)
    return processor


def check_processor_works(processor, path: str | Path) -> None:
    """A small picture and a question pass through the processor.

    Raises UserError: settings that it cannot compute with, or a chat template that has no end, fails, or leaves out the
    question.
    """
    area = any(hasattr(processor.image_processor, name) for name in AREA_SETTINGS)
    limit = LONGEST_SIDE**2 if area else LONGEST_SIDE
    for name, length in dict(getattr(processor.image_processor, "size", None) or {}).items():
        # of areas the largest is a limit that no picture has to reach
        if length is not None and length > limit and not (area and name in ("longest_edge", "max_pixels")):
            raise UserError(
                f"{path}: `size` of the image processor has {name} {length}, more than {limit}. Correct it in "
                "processor_config.json or preprocessor_config.json."
            )
    if has_template(processor):
        check_template(processor, path)
        try:
            text = render(processor, SMALL_QUESTION, 1)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        if SMALL_QUESTION not in text:
            raise UserError(f"{path}: the chat template leaves out the question. {_COPY_TEMPLATE}")
    try:
        features = small_inputs(processor)
        broken = [k for k, v in features.items() if not bool(v.isfinite().all())]
    except Exception as error:  # of many types, for settings of many kinds
        raise UserError(
            f"{path}: the processor does not take a picture and a question ({type(error).__name__}: {first_line(error)}). "
            "Its settings (processor_config.json, preprocessor_config.json, tokenizer_config.json) do not fit each other or "
            "the chat template: copy them again from one checkpoint."
        ) from error
    if broken:
        raise UserError(
            f"{path}: the image processor makes {broken[0]} that are not finite. Correct `image_mean`, `image_std` and "
            "`rescale_factor`."
        )


def small_inputs(processor) -> dict[str, Any]:
    """The tensors of a small picture and a question; of the picture alone where there is no chat template."""
    from PIL import Image

    picture = Image.linear_gradient("L").convert("RGB").resize((64, 48))
    if has_template(processor):
        text = render(processor, SMALL_QUESTION, 1)
        features = processor(text=[text], images=[picture], return_tensors="pt")
    else:
        features = processor.image_processor(images=[picture], return_tensors="pt")
    return {name: value for name, value in features.items() if hasattr(value, "isfinite")}


def has_template(processor) -> bool:
    return _template(processor) is not None


def check_template(processor, path: str | Path) -> None:
    """Raises UserError: the chat template has no end, or writes without measure."""
    template = _template(processor)
    for text in template.values() if isinstance(template, dict) else [template]:
        if (fault := template_fault(text)) is not None:
            raise UserError(f"{path}: the chat template {fault}. {_COPY_TEMPLATE}")


def _template(processor) -> str | dict[str, str] | None:
    template = getattr(processor, "chat_template", None)
    return get_tokenizer(processor).chat_template if template is None else template


def get_tokenizer(processor):
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def special_tokens(tokenizer) -> list[str]:
    """Special tokens as text, the longest first, so that none is taken for a shorter one it begins with."""
    tokens = {str(t) for t in tokenizer.all_special_tokens}
    tokens |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    return sorted(tokens, key=len, reverse=True)


# Rows for training.
@dataclass(frozen=True)
class MessageRange:
    """Characters `[start, end)` of one message; those of an answer include its end-of-turn token."""

    start: int
    end: int
    message: dict


@dataclass(frozen=True)
class Rendered:
    text: str
    answers: tuple[MessageRange, ...]
    prompts: tuple[MessageRange, ...]


class ChatRenderer:
    """Rows -> text for one processor.

    Where the template writes no end-of-turn token after the last answer (the published LLaVA-1.5 one does not), the
    tokenizer's end-of-sequence token is put after every answer: a model trained without it would never stop.

    Attributes:
        typed: whether the template takes content as typed parts; else it gets text with image tokens.
        end_of_turn: the token that closes an answer.
        adds_end_of_turn: whether we write it because the template does not.
        has_bos: whether the template writes the beginning-of-sequence token itself.

    Raises UserError: the processor has no usable chat template.
    """

    def __init__(self, processor):
        self.processor = processor
        tokenizer = processor.tokenizer
        word = _word(0, "")
        probe = [_message("user", "Question?"), _message("assistant", word)]
        text, self.typed = "", False
        if has_template(processor):
            text, self.typed = _apply(processor, probe, word)
        if text.count(word) != 1:
            raise UserError(
                "The processor's chat template does not write the assistant's text, or there is none. Set "
                "`processor.chat_template`, or save the model's folder with its chat_template.jinja."
            )
        # what the template puts between the generation prompt and the answer (the blank of "ASSISTANT: x"):
        # the model has to produce it, so it is part of the answer
        plain, prompt = self._write(probe[:1]), self._write(probe[:1], add_generation_prompt=True)
        header, tail = text.split(word)
        self._lead = header[len(prompt) :] if prompt != plain and header.startswith(prompt) else ""
        self.has_bos = starts_with_bos(tokenizer, text)
        written = next((t for t in special_tokens(tokenizer) if tail.lstrip().startswith(t)), None)
        self.adds_end_of_turn = written is None
        self.end_of_turn = written or tokenizer.eos_token
        if not self.end_of_turn:
            raise UserError("The tokenizer has no end-of-sequence token. Set `tokenizer.eos_token`.")

    def render(self, row: dict) -> Rendered:
        """The text of a row and where its answers are.

        Raises RowError: placeholders do not match, or the template refuses or rewrites the conversation.
        """
        messages = typed_messages(row)
        places = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        answers = [row["messages"][i] for i in places]
        contents = "".join(answer["content"] for answer in answers)
        words = [_word(k, contents) for k in range(len(answers))]
        masked = list(messages)
        for i, word in zip(places, words, strict=True):
            masked[i] = _message("assistant", word)
        full, rest = self._write(messages), self._write(masked)
        frame = []  # what the template writes before the first answer, between answers, and behind the last
        for word in words:
            if rest.count(word) != 1:
                raise RowError(
                    TEMPLATE, "the chat template leaves out or repeats an answer of this conversation."
                )
            before, rest = rest.split(word)
            frame.append(before)
        text, ranges = self._locate(full, [*frame, rest], answers)
        self._check_images(text, len(row.get("images") or []))
        return Rendered(text, ranges, self._locate_prompts(text, messages, ranges))

    def prompt(self, question: str, images: int) -> str:
        """A question behind so many images, the assistant's header included; for templates of either form."""
        content = [{"type": "image"}] * images + [{"type": "text", "text": question}]
        return self._write([{"role": "user", "content": content}], add_generation_prompt=True)

    def _locate(
        self, full: str, frame: list[str], answers: list[dict]
    ) -> tuple[str, tuple[MessageRange, ...]]:
        """The text to train on and where the answers are in it, from the true rendering and what stands between answers."""
        if not full.startswith(frame[0]):
            raise _rewritten()
        closing = tuple(filter(None, (self.end_of_turn, self.processor.tokenizer.eos_token)))
        out, ranges, cursor = frame[0], [], len(frame[0])
        for k, (answer, after) in enumerate(zip(answers, frame[1:], strict=True)):
            words = answer["content"]
            # many templates trim the text
            forms = (words, words.strip(), words.rstrip(), words.lstrip())
            form = next((form for form in forms if full.startswith(form + after, cursor)), None)
            if form is None:
                raise _rewritten()
            cursor += len(form) + len(after)
            start = len(out) - (len(self._lead) if out.endswith(self._lead) else 0)
            out += form
            if self.adds_end_of_turn:
                out += self.end_of_turn
                end = len(out)
                if k == len(answers) - 1 and not after.strip():
                    after = ""
            else:
                token = next((t for t in closing if after.lstrip().startswith(t)), None)
                end = len(out) + (after.index(token) + len(token) if token else 0)
            ranges.append(MessageRange(start, end, answer))
            out += after
        if cursor != len(full):
            raise _rewritten()
        return out, tuple(ranges)

    def _locate_prompts(self, text: str, messages: list[dict], answers: tuple) -> tuple[MessageRange, ...]:
        """Where the words and images of the other messages are; needed to show a row, not to train on it."""
        ranges, cursor, ends = [], 0, iter([answer.end for answer in answers])
        token = getattr(self.processor, "image_token", None)
        for message in messages:
            if message["role"] == "assistant":
                cursor = next(ends)
                continue
            edges = []
            for part in message["content"]:
                written = part["text"].strip() if part["type"] == "text" else token
                if written and (at := text.find(written, cursor)) >= 0:
                    cursor = at + len(written)
                    edges += [at, cursor]
            if edges:
                ranges.append(MessageRange(edges[0], edges[-1], message))
        return tuple(ranges)

    def _check_images(self, text: str, count: int) -> None:
        token = getattr(self.processor, "image_token", None)
        written = text.count(token) if token else count
        if written != count:
            raise RowError(
                PLACEHOLDER,
                f"the rendered conversation has {written} times {token!r} for {count} images. Either the text "
                "itself contains that token (remove it), or the chat template does not write images.",
            )

    def _write(self, messages: list[dict], **options) -> str:
        if not self.typed:
            messages = _as_text(self.processor, messages)
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, **options)
        except Exception as error:  # templates raise their own errors, and jinja its own
            raise RowError(TEMPLATE, f"the chat template refuses this conversation ({error}).") from error


def _as_text(processor, messages: list[dict]) -> list[dict]:
    """The messages with their typed parts as one text, for templates that take no others."""
    token = getattr(processor, "image_token", IMAGE)
    return [
        {
            **message,
            "content": "".join(
                f"{token}\n" if part["type"] == "image" else part["text"] for part in message["content"]
            ),
        }
        for message in messages
    ]


def _is_dumped(text: str, messages: list[dict]) -> bool:
    """Whether a template wrote typed parts out as data, not as text."""
    parts = [part for message in messages for part in message["content"]]
    return any(form(part) in text for part in parts for form in (str, json.dumps))


def _message(role: str, text: str) -> dict:
    return {"role": role, "content": [{"type": "text", "text": text}]}


def _word(k: int, texts: str) -> str:
    """A word that stands for answer `k` and does not occur in `texts`."""
    mark = "qzx"
    while mark in texts:
        mark += "qzx"
    return f"{mark}{k}{mark[::-1]}"


def _rewritten() -> RowError:
    return RowError(
        TEMPLATE,
        "the chat template rewrites the text of an answer, so the tokens to be learnt cannot be told apart. "
        "Use a template that writes answers as they are.",
    )


# Prompts for decoding.
def render(processor, prompt: str, images: int) -> str:
    """The prompt through the chat template, assistant header included.

    Raises UserError: the processor has no chat template, or the `<image>` marks do not match the images.
    """
    if not has_template(processor):
        raise UserError("The processor has no chat template: save one with it (processor.chat_template).")
    parts = prompt.split(IMAGE)
    content: list[dict[str, str]] = []
    if len(parts) == 1:
        content = [{"type": "image"}] * images + [{"type": "text", "text": prompt}]
    elif len(parts) - 1 != images:
        raise UserError(f"The prompt has {len(parts) - 1} {IMAGE} marks and {images} images: {prompt!r}.")
    else:
        for i, part in enumerate(parts):
            text = part.strip("\n") if images else part
            content += [{"type": "image"}] if i else []
            content += [{"type": "text", "text": text}] if text else []
    message: Any = content if hasattr(processor, "tokenizer") else prompt
    return _apply(processor, [{"role": "user", "content": message}], add_generation_prompt=True)[0]


def render_messages(processor, messages: list[dict]) -> str:
    """A conversation whose messages have typed parts, with the header of the next answer.

    Raises UserError: the processor has no chat template, or it refuses the conversation.
    """
    if not has_template(processor):
        raise UserError("The processor has no chat template: save one with it (processor.chat_template).")
    return _apply(processor, messages, add_generation_prompt=True)[0]


def _render_turns(processor, *turns: tuple[str, str], **options) -> str:
    """Turns of `(role, text)` through the chat template of a processor, or of a tokenizer alone."""
    messages = [_message(*turn) for turn in turns]
    if not hasattr(processor, "tokenizer"):
        messages = [{"role": role, "content": text} for role, text in turns]
    return _apply(processor, messages, **options)[0]


def _apply(processor, messages: list[dict], word: str = "", **options) -> tuple[str, bool]:
    """Messages through the chat template, as text where it does not take typed parts, and whether it took them.

    Args:
        word: what it must write once to have taken them.

    Raises UserError: the template fails.
    """
    forms, reason = [messages], None
    if hasattr(processor, "tokenizer"):
        forms.append(_as_text(processor, messages))
    for form in forms:
        try:
            text = processor.apply_chat_template(form, tokenize=False, **options)
        except Exception as error:  # templates raise their own errors, and jinja its own
            reason = reason or error
            continue
        if form is forms[-1] or (not _is_dumped(text, form) and (not word or text.count(word) == 1)):
            return text, form is messages
    raise UserError(f"The chat template fails ({first_line(reason)}). {_COPY_TEMPLATE}") from reason


def starts_with_bos(tokenizer, text: str) -> bool:
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)


def encode_text(processor, text: str) -> list[int]:
    """The tokens of rendered text; images are one token each."""
    tokenizer = get_tokenizer(processor)
    return tokenizer.encode(text, add_special_tokens=not starts_with_bos(tokenizer, text))


def image_end(processor, prompt: str | list[int]) -> int | None:
    """Where the last image ends in rendered text (characters) or in its tokens (places).

    None where the processor names no image token, or the prompt has no image.
    """
    mark = getattr(processor, "image_token", None)
    if mark is None:
        return None
    if isinstance(prompt, str):
        at = prompt.rfind(mark)
        return None if at < 0 else at + len(mark)
    token = get_tokenizer(processor).convert_tokens_to_ids(mark)
    return len(prompt) - prompt[::-1].index(token) if token in prompt else None


def tail_ids(processor, rendered: str) -> list[int]:
    """The tokens of a rendered prompt that follow its last image.

    Raises UserError: the processor does not say what its image token is, or the prompt has none.
    """
    ids = encode_text(processor, rendered)
    end = image_end(processor, ids)
    if end is None:
        raise UserError(
            f"{type(processor).__name__}: no image token found in the prompt, so it cannot be told where the question "
            "begins. Use a family that marks the image by a token (LLaVA, Qwen-VL, Idefics3)."
        )
    return ids[end:]


def header_ids(processor) -> list[int]:
    """Ids of everything that follows the user's text in a prompt: end of the turn and assistant header.

    Found as the common end of two rendered prompts that differ in their text, so it holds for any template.
    """
    first, second = (encode_text(processor, render(processor, text, 0)) for text in ("x", "7"))
    count = 0
    while count < min(len(first), len(second)) and first[-1 - count] == second[-1 - count]:
        count += 1
    return first[len(first) - count :]


def insertion_encoder(processor) -> Callable[[str], list[int]]:
    """Text -> ids as they stand behind the user's text: a space, then the text."""
    tokenizer = get_tokenizer(processor)
    before = tokenizer.encode("x", add_special_tokens=False)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(f"x {text}", add_special_tokens=False)[len(before) :]

    return encode


def follow_up_ids(processor, text: str) -> list[int]:
    """Ids between an answer and the next one: end of turn, the user's `text`, assistant header, as training has them.

    Where the template writes no end-of-turn token, the end-of-sequence token stands there, as in training.

    Raises UserError: the template leaves the answer out, or there is no end-of-sequence token.
    """
    tokenizer, word = get_tokenizer(processor), _word(0, "")
    turns = ("user", "x"), ("assistant", word), ("user", text)
    rendered = _render_turns(processor, *turns, add_generation_prompt=True)
    if rendered.count(word) != 1 or not tokenizer.eos_token:
        raise UserError(
            "The chat template cannot hold a second question (it leaves out the first answer, or there is no "
            "end-of-sequence token). Use a template of several turns, or `layout: message`."
        )
    tail = rendered.split(word)[1]
    written = next((t for t in special_tokens(tokenizer) if tail.lstrip().startswith(t)), None)
    if written is not None:
        tail = tail.lstrip()[len(written) :]
    return tokenizer.encode((written or tokenizer.eos_token) + tail, add_special_tokens=False)


def answer_lead(processor) -> str:
    """What the template puts between the assistant header of a prompt and the answer (the blank of "ASSISTANT: x")."""
    word = _word(0, "")
    prompt = _render_turns(processor, ("user", "x"), add_generation_prompt=True)
    header = _render_turns(processor, ("user", "x"), ("assistant", word)).split(word)[0]
    return header[len(prompt) :] if header.startswith(prompt) else ""


def end_ids(model, tokenizer) -> frozenset[int]:
    """Ids that end an answer: those of the model's generation config and the tokenizer's."""
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
