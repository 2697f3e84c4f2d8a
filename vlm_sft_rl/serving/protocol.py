"""Requests of OpenAI's `/v1/chat/completions` as our decoders take them, and replies. No torch."""

import base64
import binascii
import io
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import open_image, open_picture
from ..decoding.answers import Answer
from ..decoding.config import RetrospectiveConfig, SamplingConfig
from ..errors import RowError, UserError, short
from ..evaluation.decoders import DECODERS, configure
from .verification import verification

DECODED_HERE = ("greedy", "sample", "retrospective")
ROLES = ("system", "developer", "user", "assistant")
MOST_CHOICES = 16
# fields of OpenAI's requests that change nothing here while they have one of these values
NEUTRAL: dict[str, tuple] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
}
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
OPENAI = ("model", "messages", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p")
LENGTHS = ("max_completion_tokens", "max_tokens")


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: of HTTP. param: the field at fault.
    """

    def __init__(self, message: str, param: str | None = None, status: int = 400):
        super().__init__(message)
        self.message, self.param, self.status = message, param, status

    def to_json(self) -> dict:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        pixels: of all its pictures together.
        fetch: URL -> the bytes of a picture; None refuses URLs.
    """

    new_tokens: int
    pixels: int
    fetch: Callable[[str], bytes] | None = None


@dataclass(frozen=True)
class ChatBody:
    """A request that was read and checked.

    Attributes:
        messages: with typed parts, as a chat template takes them; images: theirs, in order.
        trace: whether the reply carries every event of decoding.
    """

    model: str
    messages: list[dict]
    images: list[Image.Image]
    decoder: str
    config: SamplingConfig
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    trace: bool


# --- Requests ---


def read_body(data: bytes, folder: Path, default: str, limits: Limits) -> ChatBody:
    """Read a request.

    Args:
        folder: the checkpoint, whose sidecar has the defaults of decoding.
        default: the decoder of requests that name none.

    Raises RequestError: it names the field, what it is, and what is expected.
    """
    body = _parse(data)
    stream, options = _flag(body, "stream"), body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError('`stream_options` takes {"include_usage": true} only.', "stream_options")
    n = 1 if body.get("n") is None else body["n"]
    if type(n) is not int or not 1 <= n <= MOST_CHOICES:
        raise RequestError(f"`n` is {short(n, 100)}, expected an integer from 1 to {MOST_CHOICES}.", "n")
    name, config = read_decoder(body, folder, default, limits)
    stop = read_stop(body.get("stop"), config)
    messages, images = read_messages(body.get("messages"), limits)
    usage_wanted, trace = bool(options.get("include_usage")), _flag(body, "trace")
    model = str(body.get("model"))
    return ChatBody(model, messages, images, name, config, n, stop, stream, usage_wanted, trace)


def _parse(data: bytes) -> dict:
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is no JSON ({short(error, 200)}).") from None
    if not isinstance(body, dict):
        raise RequestError(f"The body is a {type(body).__name__}, expected a JSON object.")
    return body


def _flag(body: dict, name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"`{name}` is {short(value, 100)}, expected true or false.", name)
    return bool(value)


def read_decoder(
    body: Mapping[str, Any], folder: Path, default: str, limits: Limits
) -> tuple[str, SamplingConfig]:
    """The decoder of a request and its settings: every option of the decoder is a field of the body."""
    sampled = body.get("temperature") is not None and default == "greedy"
    name = body.get("decoder") or ("sample" if sampled and body["temperature"] != 0 else default)
    if name not in DECODED_HERE:
        raise RequestError(
            f"`decoder` is {short(name, 100)}; this server decodes with {', '.join(DECODED_HERE)}. The others work in "
            "`vlm-sft-rl generate` and `vlm-sft-rl eval run`.",
            "decoder",
        )
    options = DECODERS[name].options()
    values: dict[str, Any] = {}
    for key, value in body.items():
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                raise RequestError(f"`{key}` is {short(value, 100)}, which is not supported.", key)
        elif key in LENGTHS:
            if value is not None:
                values["max_new_tokens"] = value
        elif key in options:
            if value is not None:
                values[key] = value
        elif key in ("temperature", "top_p") and value in (None, 0 if key == "temperature" else 1):
            pass  # what a greedy decoder does anyway
        elif key not in (*OPENAI, *IGNORED, "decoder", "trace") or key in ("temperature", "top_p"):
            known = ", ".join(sorted({*options, "decoder", "trace"}))
            raise RequestError(
                f"`{short(key, 100)}` has no effect on the decoder {name}. Beside OpenAI's fields it takes {known}.",
                key,
            )
    if values.get("top_p") == 1:
        values["top_p"] = None
    if name == "retrospective" and values.get("rules") != "released" and not values.get("false_premise"):
        values.setdefault("commit", "phrase")  # streamed or not, the answer is the same
    seed = 0 if body.get("seed") is None else body["seed"]
    try:
        if values.get("parallel_attempts", 1) != 1:
            raise UserError("parallel_attempts: expected 1 on a server, whose rows belong to requests.")
        config = configure(name, folder, {"max_new_tokens": limits.new_tokens, **values}, seed=seed)
    except UserError as error:
        raise RequestError(str(error)) from None
    if config.max_new_tokens > limits.new_tokens:
        raise RequestError(
            f"{config.max_new_tokens} new tokens; this server writes at most {limits.new_tokens} an answer.",
            "max_tokens",
        )
    return name, config


def read_stop(stop: Any, config: SamplingConfig) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise RequestError("`stop` must be a text, or a list of texts.", "stop")
    if texts and isinstance(config, RetrospectiveConfig):
        raise RequestError(
            "`stop` has no effect on the decoder retrospective. Leave it out, or choose greedy or sample.",
            "stop",
        )
    return tuple(texts)


def read_messages(messages: Any, limits: Limits) -> tuple[list[dict], list[Image.Image]]:
    """Messages with typed parts, and their pictures in order."""
    if not isinstance(messages, list) or not messages:
        raise RequestError("`messages` must be a list with at least one message.", "messages")
    typed, images, room = [], [], limits.pixels
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"`{place}.role` must be one of {', '.join(ROLES)}.", f"{place}.role")
        role = {"developer": "system"}.get(message["role"], message["role"])
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts:
            raise RequestError(f"`{place}.content` must be a text or a list of parts.", f"{place}.content")
        read = []
        for k, part in enumerate(parts):
            field = f"{place}.content[{k}]"
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                read.append({"type": "text", "text": part["text"]})
            elif kind == "image_url" and role == "user":
                image = read_image(part.get("image_url"), field, room, limits)
                room -= image.width * image.height
                images.append(image)
                read.append({"type": "image"})
            else:
                expected = '{"type": "text", "text": …}'
                if role == "user":
                    expected += ' or {"type": "image_url", "image_url": {"url": …}}'
                raise RequestError(f"`{field}` must be {expected}.", field)
        typed.append({"role": role, "content": read})
    if typed[-1]["role"] != "user":
        raise RequestError("The last message must be the user's.", f"messages[{len(messages) - 1}].role")
    return typed, images


def read_image(source: Any, field: str, room: int, limits: Limits) -> Image.Image:
    """A picture of a request.

    Args:
        room: pixels that it may have.
    """
    url = source.get("url") if isinstance(source, dict) else source
    if not isinstance(url, str):
        raise RequestError(f"`{field}.image_url.url` must be a text.", field)
    if url.startswith("data:"):
        head, _, text = url.partition(",")
        if not head.endswith(";base64"):
            raise RequestError(f"`{field}`: a data URL must be base64: data:image/png;base64,…", field)
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RequestError(f"`{field}`: the picture's base64 is broken ({error}).", field) from None
    elif limits.fetch is None:
        raise RequestError(
            f"`{field}`: this server fetches no pictures. Send it as a data URL (data:image/png;base64,…), or start the "
            "server with --image-urls.",
            field,
        )
    else:
        data = limits.fetch(url)
    try:
        with open_picture(io.BytesIO(data), "of the request") as header:
            pixels = header.width * header.height
        if pixels > room:
            raise RequestError(
                f"`{field}`: with this picture of {header.width}x{header.height} the request has more than "
                f"{limits.pixels:,} pixels. Send smaller pictures.",
                field,
                413,
            )
        return open_image(data)
    except RowError as error:
        raise RequestError(f"`{field}`: {error}", field) from None


# --- Replies ---


class Reply:
    """The frame of one request's reply; `model` is the name that the server goes by."""

    def __init__(self, model: str, trace: bool):
        self.model, self.trace = model, trace
        self.id, self.created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    def whole(self, answers: list[Answer], reasons: list[str]) -> dict:
        """The reply in one piece."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": None,
                **self._ending(answer, reason),
            }
            for number, (answer, reason) in enumerate(zip(answers, reasons, strict=True))
        ]
        return {**self._frame("chat.completion"), "choices": choices, "usage": usage(answers)}

    def piece(self, number: int, delta: dict) -> dict:
        """A part of an answer as it is streamed."""
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        return {**self._frame("chat.completion.chunk"), "choices": [choice]}

    def last_piece(self, number: int, answer: Answer, reason: str) -> dict:
        choice = {"index": number, "delta": {}, "logprobs": None, **self._ending(answer, reason)}
        return {**self._frame("chat.completion.chunk"), "choices": [choice]}

    def usage_piece(self, answers: list[Answer]) -> dict:
        return {**self._frame("chat.completion.chunk"), "choices": [], "usage": usage(answers)}

    def _ending(self, answer: Answer, reason: str) -> dict:
        ending = {"finish_reason": reason, "verification": verification(answer)}
        return {**ending, "trace": answer.trace} if self.trace else ending

    def _frame(self, kind: str) -> dict:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(answers: list[Answer]) -> dict:
    """Tokens of a reply; `tokens_forwarded` is what the language model read for it, prompt and rewinds included."""
    counts = [answer.counts for answer in answers]
    prompt, kept = counts[0].prompt_tokens, sum(count.tokens_kept for count in counts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": kept,
        "total_tokens": prompt + kept,
        "tokens_forwarded": sum(count.tokens_forwarded for count in counts),
    }
