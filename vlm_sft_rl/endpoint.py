"""A server that speaks OpenAI's `/v1/chat/completions`: its address, one exchange with it, and what its answers say.

Nothing that a server sends is trusted: an answer has a size and an end, and each of its fields is looked at before use.
Standard library alone. The `openai` package builds its replies without looking at a field, waits for an answer as long
as bytes come, and would have to agree with the version that vLLM pins.
"""

import base64
import contextlib
import http.client
import json
import re
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from email.utils import parsedate_to_datetime
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from .errors import UserError, short
from .settings import Checked, setting

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}  # status codes worth another try
MOST_BYTES = 64 << 20  # of an answer
MOST_TOKENS = 10**9  # of an answer; a larger count is a mistake
SHOWN = 300  # characters of a server's words in a message
_SECRET = re.compile(r"key|token|secret|passw|pwd|auth|sig|cred|^code$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class EndpointSettings(Checked):
    """How a model behind an endpoint is asked, and what it may cost: a part of the settings of commands."""

    api_key_env: str | None = setting(
        None, "Environment variable that holds the API key. Default: OPENAI_API_KEY, if it is set."
    )
    concurrency: int = setting(8, "Requests sent at the same time.", least=1)
    input_price: float = setting(
        0.0, "Price of a million prompt tokens, in any currency, to count the cost.", least=0
    )
    output_price: float = setting(0.0, "Price of a million completion tokens.", least=0)
    budget: float | None = setting(
        None,
        "Stop when the cost reaches this; requests under way are still paid. Default: no limit.",
        least=0,
    )

    def client_options(self) -> dict[str, Any]:
        """These settings alone, for `EndpointClient`."""
        return {item.name: getattr(self, item.name) for item in fields(EndpointSettings)}


@dataclass(frozen=True, kw_only=True)
class ClientSettings(EndpointSettings):
    """The options of `EndpointClient`. The key is sent to its address alone and never written or shown."""

    timeout: float = setting(
        120.0, "Seconds without a byte from the server after which a request counts as dropped.", above=0
    )
    # all that is left to do after the first byte is to send
    longest: float | None = setting(
        None,
        "Seconds after which an answer that still comes is given up; default: twice the timeout.",
        above=0,
    )
    attempts: int = setting(6, "Tries for each request, the first included.", least=1)
    backoff: float = setting(
        1.0,
        "Seconds before the second try; doubled each time, with jitter, up to a minute. A `Retry-After` of the server is "
        "kept to, by all requests.",
        least=0,
    )


class Failure(Exception):
    """No answer came of an exchange.

    Attributes:
        again: another try may bring one.
        answered: the server said so itself, so it is there.
        status: of its reply, where that is what is wrong.
        wait: seconds that it asks to wait.
    """

    def __init__(
        self,
        reason: str,
        *,
        again: bool = False,
        answered: bool = True,
        status: int | None = None,
        wait: float = 0.0,
    ):
        super().__init__(reason)
        self.again, self.answered, self.status, self.wait = again, answered, status, wait


# --- Addresses ---


def completions_url(address: str) -> str:
    """The address of `chat/completions` that a base address stands for.

    Raises UserError: it is none, or there is a secret in it (which is not repeated).
    """
    address = address.strip()
    try:
        parts = urlsplit(address)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if not is_address or re.search(r"[\s\x00-\x1f\\]", address):
        shown = "the address of the server" if re.search("[@?#]", address) else repr(address[:SHOWN])
        raise UserError(f"{shown} is not an address. Expected one like http://localhost:8000/v1.")
    names = [name for name, _ in parse_qsl(f"{parts.query}&{parts.fragment}", keep_blank_values=True)]
    if "@" in parts.netloc or any(map(_SECRET.search, names)):
        raise UserError(
            f"The address of the server at {parts.hostname} holds a secret (a user, a password or a key), which would come "
            "into logs and records. Remove it there, and put the key into an environment variable: OPENAI_API_KEY, or one "
            "that you name (`api_key_env`)."
        )
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path, fragment="").geturl()


# --- One exchange ---


class Server:
    """Where requests are sent. A proxy of the environment (`HTTPS_PROXY`, …) is used; a redirect is not followed,
    since it would carry the key to another host.

    Args:
        address: see `completions_url`.
        key: sent as a bearer token, and taken out of everything that a message quotes.
        timeout: seconds without a byte after which the connection counts as dropped.
        longest: seconds that a whole answer may take.

    Raises UserError: no address, a key that cannot be sent, or a proxy of another kind than HTTP.
    """

    def __init__(self, address: str, key: str = "", timeout: float = 120.0, longest: float = 240.0):
        self.url, self.key, self.timeout, self.longest = completions_url(address), key, timeout, longest
        if not (key.isascii() and (key.isprintable() and " " not in key)):
            raise UserError("The API key has characters that no key has (blanks, accents). Set it again.")
        self._parts = urlsplit(self.url)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._proxy = _proxy_of(self._parts)

    def post(self, body: bytes) -> bytes:
        """The content of the answer to `body`. Raises Failure: there is none, or its status is not 200."""
        over = threading.Event()
        try:
            status, headers, content = self._exchange(body, over)
        except (OSError, http.client.HTTPException, ValueError, zlib.error) as error:
            raise self._late(over) or Failure(
                self.clean(f"{type(error).__name__}: {error}"), again=True, answered=False
            ) from error
        if over.is_set():
            raise self._late(over)
        if status // 100 == 2:
            return content
        raise Failure(
            f"HTTP {status} {self._detail(status, headers, content)}",
            again=status in PASSING,
            # a gateway speaks for a server that is not there
            answered=status not in PASSING or status == 500,
            status=status,
            wait=retry_after(headers) or 0.0,
        )

    def _exchange(self, body: bytes, over: threading.Event) -> tuple[int, Mapping[str, str], bytes]:
        connection, target, headers = self._connection()
        sockets: list[Any] = []
        clock = threading.Timer(self.longest, _end, (connection, sockets, over))
        clock.daemon = True
        clock.start()
        try:
            connection.connect()  # here a proxy may answer a byte at a time
            sockets.append(connection.sock)  # which the connection forgets when an answer begins
            if over.is_set():
                raise TimeoutError
            connection.request("POST", target, body, headers)
            with connection.getresponse() as response:
                content = response.read(MOST_BYTES + 1)
                if len(content) <= MOST_BYTES and response.length:
                    raise http.client.IncompleteRead(content, response.length)
                content = _decoded(content, response.headers.get("Content-Encoding"))
                if len(content) > MOST_BYTES:
                    raise Failure(f"its answer is longer than {MOST_BYTES >> 20} MiB")
                return response.status, response.headers, content
        finally:
            clock.cancel()
            connection.close()

    def _connection(self) -> tuple[http.client.HTTPConnection, str, dict[str, str]]:
        parts, headers = self._parts, dict(self._headers)
        make = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        target = parts._replace(scheme="", netloc="").geturl()
        if self._proxy is None:
            return make(parts.hostname, parts.port, timeout=self.timeout), target, headers
        connection = make(self._proxy.hostname, self._proxy.port or 80, timeout=self.timeout)
        login = {}
        if self._proxy.username is not None:
            words = f"{unquote(self._proxy.username)}:{unquote(self._proxy.password or '')}"
            login = {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}
        if parts.scheme == "https":
            connection.set_tunnel(parts.hostname, parts.port, login)
            return connection, target, headers
        return connection, self.url, headers | login

    def _late(self, over: threading.Event) -> Failure | None:
        return Failure(f"its answer had no end within {self.longest:g} s") if over.is_set() else None

    def _detail(self, status: int, headers: Mapping[str, str], content: bytes) -> str:
        if 300 <= status < 400:
            # an address that somebody redirects to may carry a secret behind its path
            return f"(to {self.clean(headers.get('Location') or 'nowhere').partition('?')[0]})"
        text = content[:4096].decode("utf-8", "replace")
        if title := re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL):
            text = f"a web page: {title[1]}"
        try:
            value = json.loads(text)
            value = value.get("error", value.get("detail", value.get("message", value)))
            text = value.get("message", value) if isinstance(value, dict) else value
        except (ValueError, AttributeError, RecursionError):
            pass  # not JSON, or not an object: shown as it is
        return f"({self.clean(text)})"

    def without_key(self, text: str) -> str:
        """The text without the key, which some servers quote."""
        return text.replace(self.key, "***") if self.key else text

    def clean(self, value: Any) -> str:
        """A server's words for a message: short, in one line, and without the key."""
        text = self.without_key(str(value))
        return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:SHOWN]


def _end(connection: http.client.HTTPConnection, sockets: list[Any], over: threading.Event) -> None:
    over.set()
    for socket in sockets or [connection.sock]:
        with contextlib.suppress(OSError, AttributeError):  # there may be none yet
            socket.shutdown(SHUT_RDWR)  # wakes the thread that reads


def _proxy_of(parts: SplitResult) -> SplitResult | None:
    address = getproxies().get(parts.scheme)
    if not address or proxy_bypass(parts.hostname):
        return None
    try:
        proxy = urlsplit(address if "://" in address else f"http://{address}")
        is_proxy = proxy.scheme == "http" and bool(proxy.hostname) and proxy.port != 0
    except ValueError:
        is_proxy = False
    if not is_proxy:
        raise UserError(
            f"The proxy of the environment for {parts.scheme} is no http proxy. Name one, or set NO_PROXY="
            f"{parts.hostname}."
        )
    return proxy


def _decoded(content: bytes, encoding: str | None) -> bytes:
    """Content that was compressed although nobody asked for it; no longer than MOST_BYTES and one."""
    if encoding in (None, "", "identity"):
        return content
    if encoding.lower() not in ("gzip", "x-gzip", "deflate"):
        raise ValueError(f"content in the encoding {encoding!r}, which was not asked for")
    return zlib.decompressobj(wbits=47).decompress(content, MOST_BYTES + 1)


def retry_after(headers: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a server asks to wait (`Retry-After` in seconds or as a date), or None."""
    value = headers.get("Retry-After")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - now()
        except (TypeError, ValueError, OverflowError, OSError):
            return None
    return max(0.0, seconds) if seconds == seconds else None


# --- Answers ---


@dataclass(frozen=True)
class Answer:
    """What one exchange brought: at least one text of so many choices. A count of tokens is None where there is none of
    use."""

    choices: int
    texts: list[str]
    finish_reasons: list[str]
    prompt_tokens: int | None
    completion_tokens: int | None


def read_answer(content: bytes) -> Answer:
    """Read the body of an answer.

    Raises Failure: it is no JSON, has no choices, or none of them has a text; the reason says what it has instead.
    """
    try:
        value = json.loads(content.decode("utf-8-sig"))  # not `parse_json`: a NaN in `usage` spoils no answer
    except (ValueError, RecursionError) as error:
        start = content[:80].decode("utf-8", "replace")
        raise Failure(f"no JSON ({error!s:.80}) but {start!r}", again=True) from error
    choices = value.get("choices") if isinstance(value, dict) else None
    if not isinstance(choices, list):
        raise Failure(f"the answer has no `choices`: {short(value, SHOWN)}")
    if not choices:
        raise Failure("the answer has an empty list of `choices`", again=True)
    texts, reasons, failure = [], [], None
    for choice in choices:
        try:
            texts.append(_text_of(choice))
            reasons.append(_reason_of(choice))
        except Failure as error:
            failure = failure or error
    if failure and not texts:
        raise failure
    usage = value.get("usage")
    counts = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
    return Answer(len(choices), texts, reasons, *counts)


def _text_of(choice: Any) -> str:
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise Failure(f"the answer has `choices` without a message: {short(choice, SHOWN)}")
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    refusals = [part.get("refusal") for part in parts if isinstance(part, dict)]
    if refusal := next(filter(None, [message.get("refusal"), *refusals]), None):
        raise Failure(f"the model refused: {short(refusal, SHOWN)}")
    if _reason_of(choice) == "content_filter":
        raise Failure("the server's content filter held the answer back (finish_reason `content_filter`)")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
        kinds = [part.get("type", "text") if isinstance(part, dict) else "text" for part in parts]
        known = all(kind in ("text", "output_text") for kind in kinds)
        if not parts or not known or not all(isinstance(text, str) for text in texts):
            raise Failure(f"`content` is a list with parts that are no text: {short(content, SHOWN)}")
        content = "".join(texts)
    if content is None:
        reason = _reason_of(choice) or "none given"
        raise Failure(f"the answer has no text: `content` is null (finish_reason: {reason})")
    if not isinstance(content, str):
        raise Failure(f"`content` is no text but {short(content, SHOWN)}")
    if not content.isascii() and re.search("[\ud800-\udfff]", content):
        raise Failure(f"the text holds half of a character: {short(content, SHOWN)}")
    return content


def _reason_of(choice: Mapping) -> str:
    reason = choice.get("finish_reason")
    return reason if isinstance(reason, str) and reason.isprintable() else ""


def _count(usage: Any, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST_TOKENS:
        return None
    return int(value) if value == int(value) else None
