"""A slow, plain re-telling of the released REVERSE loop: full answers, no cache, batch 1. Used as a test oracle.

`generate(hint, accepted, temperature)` stands for one pass of the model: it returns the new ids (with the end token,
unless the length limit was hit) and for every new id P(</UN>) of the distribution it was drawn from.
"""

from dataclasses import dataclass, field

OPEN, CN, UN, END, DOT = 1, 2, 3, 0, 4
SENTENCE = (
    "For this question, please point out the false premises or note what information is missing, "
    "rather than answering it directly."
)


@dataclass
class Outcome:
    ok: bool = False
    ids: list[int] = field(default_factory=list)
    history: list[str | None] = field(default_factory=list)
    calls: list[tuple[str, tuple[int, ...], float]] = field(default_factory=list)


def released_loop(generate, decode, plain, *, tau, attempts, local, t0, premise_always=False):
    """One call of the program's retrospective function; `decode`/`plain`: ids -> text with/without tags."""
    accepted, phrases, correcting, failures, temperature = [], [], False, 0, t0
    outcome = Outcome()
    for _ in range(attempts):
        if not correcting:
            temperature = t0
        hint = ""
        if phrases:
            hint = "(Hint: potential incorrect phrases -> " + ", ".join(phrases[-5:]) + ")"
        if premise_always and phrases:
            hint = (hint + " " + SENTENCE).strip()
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
        else:
            dots = [i for i, t in enumerate(accepted) if t == DOT]
            cut = dots[-1] + 1 if dots else 0
            accepted, junk = accepted[:cut], accepted[cut:]
        text = plain([t for t in junk if t != END])
        if text:
            phrases.append(text)
        failures = 0
    outcome.ids = accepted
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
