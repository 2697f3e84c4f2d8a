"""Run as a script, in a process that may be ended from outside: does the chat template on standard input come to an end?

It is rendered as transformers does, whose import would take seconds. What the template says of an error is no concern here.
"""

import contextlib
import json
import sys

from jinja2 import nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS, MEMORY, CHARACTERS = 2, 2**30, 1_000_000
TOO_LONG, TOO_LARGE = 3, 4


class Generation(Extension):
    """The marks around what an assistant says; what is between them is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as in jinja2

    def parse(self, parser):
        number = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=number)


def main() -> int:
    """0: it ends; TOO_LONG or TOO_LARGE otherwise. A process that used up its time is ended by the system."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # there is no such module on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    source = sys.stdin.buffer.read().decode(errors="replace")
    try:
        for typed in (True, False):
            with contextlib.suppress(TemplateError, TypeError, ValueError, ArithmeticError, LookupError):
                template = environment.from_string(source)
                length = 0
                for piece in template.generate(messages=conversation(typed), add_generation_prompt=True):
                    length += len(piece)
                    if length > CHARACTERS:
                        return TOO_LONG
    except (MemoryError, RecursionError):
        return TOO_LARGE
    return 0


def refuse(message: str):
    raise TemplateError(message)


def conversation(typed: bool) -> list[dict]:
    """A question, an answer and another question."""

    def content(text: str):
        return [{"type": "image"}, {"type": "text", "text": text}] if typed else text

    return [{"role": role, "content": content(role)} for role in ("user", "assistant", "user")]


if __name__ == "__main__":
    sys.exit(main())
