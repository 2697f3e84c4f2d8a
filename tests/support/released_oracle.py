"""A slow, plain re-telling of the released REVERSE loop: full answers, no cache, batch 1. Used as a test oracle.

`generate(hint, accepted, temperature)` stands for one pass of the model: it returns the new ids (with the end token,
unless the length limit was hit) and for every new id P(</UN>) of the distribution it was drawn from.
"""

import re
import string
from dataclasses import dataclass, field

OPEN, CN, UN, END, DOT = 1, 2, 3, 0, 4
SENTENCE = (
    "For this question, please point out the false premises or note what information is missing, "
    "rather than answering it directly."
)


@dataclass
class Outcome:
    ok: bool = False
    text: str = ""
    ids: list[int] = field(default_factory=list)
    history: list[str | None] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...], float]] = field(default_factory=list)


def hint_string(branch, phrases, second_stage):
    """What the program writes behind the question; the Qwen branch then drops the first token of it."""
    if not phrases and not second_stage:
        return ""
    hint = "(Hint: potential incorrect phrases -> " + ", ".join(phrases[-5:]) + ")" if phrases else ""
    if branch == "llava":
        return SENTENCE + hint
    if branch == "llama_3":
        return SENTENCE + (f" {hint} " if hint else "")
    words = f"{SENTENCE} {hint}".split(" ")[1:] if second_stage else hint.split(" ")
    return " ".join(words).rstrip()


def readable(ids, decode, cut_sentence=False):
    text = decode([t for t in ids if t not in (OPEN, CN, UN, END)]).strip()
    for mark in string.punctuation:
        text = re.sub(r"\s" + re.escape(mark), lambda match, mark=mark: mark, text)
    if cut_sentence:
        parts = text.split(".")
        text = ". ".join(parts[:-1]) + "." if len(parts) > 1 else ""
    return text


def released_loop(
    generate, decode, *, tau, attempts, local, t0, branch, open_ended=False, second_stage=False
):
    """One call of the program's retrospective function; `decode`: ids -> text with tags."""
    accepted, phrases, correcting, failures, temperature = [], [], False, 0, t0
    outcome = Outcome()
    for _ in range(attempts):
        if not correcting:
            temperature = t0
        hint = hint_string(branch, phrases, second_stage)
        outcome.calls.append((hint, tuple(accepted), round(temperature, 6)))
        out, ps = generate(hint, list(accepted), temperature)
        if correcting:
            first = next((i for i, t in enumerate(out) if t in (CN, UN)), None)
            if first is not None:
                out, ps = [*out[: first + 1], END], [*ps[: first + 1], 0.0]
        phrase, keep = find_bad_phrase(accepted, out, ps, tau, decode)
        outcome.history.append(phrase)
        if phrase is None:
            if not correcting:
                outcome.ok, outcome.ids = True, [t for t in accepted + out if t != END]
                outcome.text = readable(outcome.ids, decode)
                if OPEN not in outcome.ids:
                    outcome.text = decode(outcome.ids).strip().split("</UN>")[0].replace("</CN>", "").strip()
                return outcome
            accepted, correcting, failures = accepted + out[:-1], False, 0
            continue
        correcting = True
        failures += 1
        temperature = min(temperature + 0.05, t0 + 0.5)
        if phrase.lower() not in phrases:
            phrases.append(phrase.lower())
        if failures < local:
            accepted = accepted + out[:keep]
            continue
        if not accepted:
            junk = out[: out.index(OPEN) if OPEN in out else len(out)]
            text = decode([t for t in junk if t != END]).strip().lower()
        else:
            dots = [i for i, t in enumerate(accepted) if t == DOT]
            cut = dots[-1] + 1 if dots else 0
            accepted, junk = accepted[:cut], accepted[cut:]
            text = re.sub("</?(UN|CN|SPAN)>", "", decode([t for t in junk if t != END])).strip()
        if text:
            phrases.append(text)
        failures = 0
    outcome.ids, outcome.text = accepted, readable(accepted, decode, open_ended)
    return outcome


def find_bad_phrase(accepted, out, ps, tau, decode):
    everything = accepted + out
    opens = [i for i, t in enumerate(everything) if t == OPEN]
    closes = [i for i, t in enumerate(everything) if t in (CN, UN)]
    if not opens:
        return None, 0
    if len(opens) != len(closes) or any(b < a for a, b in zip(opens, closes, strict=True)):
        return "Format Error", 0
    out_opens = [i for i, t in enumerate(out) if t == OPEN]
    out_closes = [i for i, t in enumerate(out) if t in (CN, UN)]
    keep = 0
    for a, b in zip(out_opens, out_closes, strict=False):
        if ps[b] > tau:
            return decode(out[a + 1 : b]).strip(), keep
        keep = b + 1
    return None, 0
