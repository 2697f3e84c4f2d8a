"""One POST to a chat endpoint: again while there is hope, and a clear word where there is none."""

import http.client
import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from ..errors import UserError

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_BACKOFF = 60.0  # seconds
LONGEST_WAIT = 600.0  # seconds; a server that asks for more is not worth waiting for


class Refused(Exception):
    """This request gets no answer, now or later; `answered` tells whether the server said so itself."""

    def __init__(self, message: str, answered: bool = False):
        super().__init__(message)
        self.answered = answered


class Transport:
    """Sends bodies to one address; safe between threads, which share what `Retry-After` says.

    Attributes:
        retries: tries beyond the first, of all bodies.
    """

    def __init__(self, url: str, model: str, key_env: str, timeout: float, attempts: int, backoff: float):
        self.url, self.model, self.key_env = url, model, key_env
        self.timeout, self.attempts, self.backoff = timeout, attempts, backoff
        self.retries = 0
        self._key = os.environ.get(key_env, "").strip()
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._lock = threading.Lock()
        self._not_before = 0.0

    def send(self, body: bytes, stop: threading.Event) -> dict:
        """POST until there is an answer. Raises Refused, or UserError where no request can succeed."""
        problem = ""
        for attempt in range(self.attempts):
            pause = self._not_before - time.monotonic()
            if attempt:
                with self._lock:
                    self.retries += 1
                pause = max(
                    pause, min(LONGEST_BACKOFF, self.backoff * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
                )
            if pause > 0 and stop.wait(pause):
                raise Refused("the run was stopped.")
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    problem = f"HTTP {error.code} {self._detail(error)}"
                if error.code not in RETRIED:
                    self._give_up(error.code, problem)
                self._hold(error.headers)
            except (OSError, http.client.HTTPException, ValueError) as error:
                problem = f"{type(error).__name__}: {getattr(error, 'reason', None) or error}"
        raise Refused(f"{self.attempts} attempts failed, the last with {self.clean(problem)}")

    def _post(self, body: bytes) -> dict:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, body, headers, method="POST")
        with self._opener.open(request, timeout=self.timeout) as response:
            answer = json.loads(response.read())
        if not isinstance(answer, dict):
            raise ValueError(f"expected a JSON object, found {type(answer).__name__}")
        return answer

    def _give_up(self, code: int, problem: str) -> None:
        if code in (401, 403):
            cure = (
                f"The key in {self.key_env} was not accepted."
                if self._key
                else f"The server wants an API key: put it into the environment variable {self.key_env}."
            )
        elif code == 404:
            cure = f"Check the address, and that the server knows the model {self.model!r}."
        elif 300 <= code < 400:
            cure = "The server redirects, which is not followed: give the final address."
        else:
            raise Refused(f"{self.url} refused it with {problem}", answered=True)
        raise UserError(f"{self.url}: {problem}. {cure}")

    def _hold(self, headers: Any) -> None:
        wait = retry_after(headers)
        if wait is None:
            return
        if wait > LONGEST_WAIT:
            raise Refused(f"the server asks to come back in {wait:.0f} s. Run again then.")
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + wait)

    def _detail(self, error: urllib.error.HTTPError) -> str:
        if 300 <= error.code < 400:
            return f"(to {error.headers.get('Location')})"
        try:
            text = error.read(4096).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        try:
            found = json.loads(text)
            found = found.get("error", found.get("detail", found.get("message", found)))
            text = found.get("message", found) if isinstance(found, dict) else found
        except (ValueError, AttributeError):
            pass
        return f"({self.clean(text)!s:.400})"

    def clean(self, value: Any) -> str:
        """The text without the API key, which some servers quote in their errors."""
        return str(value).replace(self._key, "***") if self._key else str(value)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    # a redirect would carry the API key to another host
    def redirect_request(self, *args, **kwargs):
        return None


def completions_url(base_url: str) -> str:
    """The address of `chat/completions` that a base address stands for. Raises UserError where it is none."""
    parts = urlsplit(base_url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"{base_url!r} is not an address. Expected one like http://localhost:8000/v1.")
    path = parts.path.rstrip("/") or "/v1"
    if not path.endswith("/chat/completions"):
        path += "/chat/completions"
    return parts._replace(path=path).geturl()


def retry_after(headers: Any, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a server asks to wait (`Retry-After` in seconds or as a date), or None."""
    value = headers.get("Retry-After") if headers is not None else None
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - now())
    except (TypeError, ValueError):
        return None
