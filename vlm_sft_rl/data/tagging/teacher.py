"""Asking a stronger model for a hard negative: the prompt, and reading what it answers. Pure text.

After REVERSE (arXiv 2504.13169, appendix B): the teacher picks one tagged phrase and exchanges it for something of the
same category that looks or means something else; it gives its reason first.
"""

import json
import re
from collections.abc import Sequence

from .lexicon import words
from .rules import Negative
from .taggers import Chunk

TEACHER = "teacher"
SYSTEM = """\
You make a training set harder to cheat on. You get a question about an image and a correct answer in which the phrases \
that can be checked against the image are numbered, like [2: a red kettle].

Choose ONE numbered phrase and write a replacement that makes the answer wrong for this image:
- same category and grammar as the phrase: a vessel for a vessel, a colour for a colour, singular for singular, with the \
same article or number where there is one;
- something that could well be in such an image, but clearly another thing: no synonym, no broader or narrower word;
- nothing that the question or the rest of the answer mentions;
- if the phrase begins with a word that the question uses already, keep that word.

Reply with JSON alone: {"reason": "one short sentence", "phrase": NUMBER, "replacement": "TEXT"}"""
EXAMPLES = (
    (
        "Question: What is the man holding?\nAnswer: The man is holding [1: a paper cup].",
        {"reason": "Another thing one drinks from.", "phrase": 1, "replacement": "a glass bottle"},
    ),
    (
        "Question: Describe the image.\nAnswer: [1: A grey cat] sleeps [2: on a wooden chair] next to [3: two books].",
        {
            "reason": "Another piece of furniture cats sleep on.",
            "phrase": 2,
            "replacement": "on a wooden shelf",
        },
    ),
    (
        "Question: What is this person's job?\nAnswer: [1: The woman] seems to be [2: a nurse].",
        {"reason": "A job with similar clothes.", "phrase": 2, "replacement": "a cook"},
    ),
    (
        "Question: From where is the bus seen?\nAnswer: It is [1: the back view] of the bus.",
        {"reason": "The opposite side.", "phrase": 1, "replacement": "the front view"},
    ),
)


def messages(question: str, answer: str, chunks: Sequence[Chunk]) -> list[dict]:
    """The chat that asks for one negative; the image, if it is sent too, is put into the last message by the caller."""
    chat = [{"role": "system", "content": SYSTEM}]
    for asked, replied in EXAMPLES:
        chat.append({"role": "user", "content": asked})
        chat.append({"role": "assistant", "content": json.dumps(replied)})
    return [
        *chat,
        {"role": "user", "content": f"Question: {question.strip()}\nAnswer: {numbered(answer, chunks)}"},
    ]


def numbered(answer: str, chunks: Sequence[Chunk]) -> str:
    """`There is a cat.` -> `There is [1: a cat].`"""
    out, cursor = [], 0
    for number, chunk in enumerate(chunks, 1):
        out += [answer[cursor : chunk.start], f"[{number}: {chunk.text}]"]
        cursor = chunk.end
    return "".join(out) + answer[cursor:]


def read_reply(text: str, question: str, chunks: Sequence[Chunk]) -> Negative | None:
    """The negative that a reply proposes; None where it is not of the form asked for.

    Takes JSON inside a code fence or after other words.
    """
    for found in re.finditer(r"\{", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, found.start())
        except json.JSONDecodeError:
            continue
        number, replacement = value.get("phrase"), value.get("replacement")
        if not isinstance(number, int) or not 1 <= number <= len(chunks) or not isinstance(replacement, str):
            return None
        chunk = chunks[number - 1]
        replacement = re.sub(rf"^\[?{number}:\s*|\]$", "", replacement.strip())
        first = words(chunk.text)[:1]
        if first and first[0] in words(question) and words(replacement)[:1] != first:
            return None
        return Negative(chunk, replacement, TEACHER)
    return None
