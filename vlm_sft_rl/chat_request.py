"""What a chat model is asked: messages with images, sampling settings, and how both are sent."""

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import ExifTags

from .data.images import locate, open_image, open_picture

MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


@dataclass(frozen=True)
class ChatRequest:
    """One request of a chat model.

    Args:
        id: the caller's name for it; not part of what is sent.
        messages: `{"role", "content"}`; content is text, or a list of `{"type": "text", "text"}` and
            `{"type": "image", "image": path, PIL image or datasets.Image value}`.
        max_tokens: None leaves the limit to the server.
        n: answers wanted.
        stop: strings that end an answer.
        extra: further fields of the body, such as vLLM's `top_k` or `guided_json`.
        image_root: folder that image paths are relative to and must not leave.
    """

    id: str
    messages: Sequence[dict]
    max_tokens: int | None = 512
    temperature: float = 0.0
    top_p: float | None = None
    n: int = 1
    stop: Sequence[str] = ()
    seed: int | None = None
    extra: dict = field(default_factory=dict)
    image_root: str | Path | None = None

    def settings(self) -> dict:
        """The sampling fields of the request's body."""
        names = ("max_tokens", "temperature", "top_p", "n", "seed")
        fields = {name: getattr(self, name) for name in names}
        fields |= {"stop": list(self.stop) or None, **self.extra}
        return {name: value for name, value in fields.items() if value is not None}


def user_message(text: str, images: Sequence[Any] = ()) -> dict:
    """A user's message: the images, then the text."""
    if not images:
        return {"role": "user", "content": text}
    parts: list[dict] = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def wire_messages(request: ChatRequest) -> tuple[list[dict], list[dict]]:
    """The messages as they are sent (images as data URLs), and the same with each image's hash in its place.

    Raises RowError: an image is missing, damaged or outside of `image_root`.
    """
    sent, hashed = [], []
    for message in request.messages:
        role, content = message["role"], message["content"]
        parts = digests = content
        if not isinstance(content, str):
            parts, digests = [], []
            for part in content:
                if part["type"] == "image":
                    mime, data, digest = encode_image(part["image"], request.image_root)
                    url = f"data:{mime};base64,{base64.b64encode(data).decode('ascii')}"
                    parts.append({"type": "image_url", "image_url": {"url": url}})
                    digests.append({"image": digest})
                else:
                    parts.append({"type": "text", "text": part["text"]})
                    digests.append(parts[-1])
        sent.append({"role": role, "content": parts})
        hashed.append({"role": role, "content": digests})
    return sent, hashed


def encode_image(item: Any, image_root: str | Path | None = None) -> tuple[str, bytes, str]:
    """An image as `(mime type, bytes, SHA-256 of its content)`.

    A JPEG, PNG or WebP file that is upright is sent as it is; everything else as PNG, upright and RGB. Raises
    RowError as `open_image` does.
    """
    if isinstance(item, dict) and item.get("bytes") is None:
        item = item.get("path")
    image = open_image(item, image_root)  # refuses what is damaged before anybody pays for it
    data = None
    if isinstance(item, str | Path):
        data = locate(item, image_root).read_bytes()
    elif isinstance(item, dict):
        data = item["bytes"]
    if data is not None:
        with open_picture(io.BytesIO(data)) as original:
            mime = MIME.get(original.format)
            upright = original.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if mime and upright:
            return mime, data, hashlib.sha256(data).hexdigest()
    # the pixels and not the encoded bytes are hashed: encoders change from version to version
    digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "image/png", stream.getvalue(), digest
