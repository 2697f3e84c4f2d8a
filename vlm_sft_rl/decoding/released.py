"""The decisions of the program released with REVERSE, token by token, defects included. No torch.

That program wraps `generate` in an outer loop and looks at complete answers only. Where its decision depends on the
complete answer (outside correction) this machine waits for it too; inside correction the program keeps nothing
after the first close tag, so stopping there changes no decision. Known differences from the paper that are kept:
strict `>` at the threshold, temperature step 0.05, total_attempts counts every pass (successful ones too), a
sentence ends at the single token "." only, the phrases of the hint are never forgotten, the literal "format error"
and removed sentence fragments become hint phrases, a second sentence rewind removes nothing.
"""

from .answers import (
    CANNED_ANSWER,
    FALSE_PREMISE_SENTENCE,
    Answer,
    Grammar,
    SpanRecord,
    hint_text,
)
from .config import RetrospectiveConfig
from .retrospective import CONTINUE, FINISH, Action, Rewind, kept

TEMPERATURE_STEP = 0.05


class ReleasedRetrospective:
    """Same interface as `retrospective.Retrospective`; `max_new_tokens` limits one pass, as in the program."""

    def __init__(self, config: RetrospectiveConfig, grammar: Grammar):
        self.config, self.grammar = config, grammar
        self.trace: list[dict] = []
        self.stage = 1
        self._restart()

    def _restart(self) -> None:
        self.ids: list[int] = []
        self.temperature = self.config.temperature
        self.insertion = FALSE_PREMISE_SENTENCE if self.stage == 2 else ""
        self.phrases: list[str] = []
        self.correcting = False
        self.local_failures = self.passes = 0
        self.checkpoint = 0  # the accepted prefix: ids[:checkpoint]
        self.spans: list[tuple[int, SpanRecord]] = []  # (end, record) of ids
        self._out_spans: list[
            tuple[int, float]
        ] = []  # (index of the close tag in ids, P(</UN>)) of this pass
        self._ok = False

    @property
    def ok(self) -> bool:
        return self._ok

    def observe(self, token: int, p_unconfident: float | None = None) -> Action:
        if token in self.grammar.ends:
            return self._end_pass(drop=0, ended=True)
        self.ids.append(token)
        if token in self.grammar.closes:
            self._out_spans.append((len(self.ids) - 1, p_unconfident))
            if self.correcting:
                return self._end_pass(drop=0)
        if len(self.ids) - self.checkpoint >= self.config.max_new_tokens:
            return self._end_pass(drop=1)
        return CONTINUE

    def _inspect(self) -> tuple[str | None, float | None, int]:
        """The first rejected phrase of this pass (or None), its P(</UN>), and the length to keep."""
        grammar, ids = self.grammar, self.ids
        opens = [i for i, t in enumerate(ids) if t == grammar.open]
        closes = [i for i, t in enumerate(ids) if t in grammar.closes]
        if not opens:
            return None, None, len(ids)
        if len(opens) != len(closes) or any(c < o for o, c in zip(opens, closes, strict=True)):
            return "Format Error", None, self.checkpoint
        keep = self.checkpoint
        own_opens = [i for i in opens if i >= self.checkpoint]
        for start, (end, p) in zip(own_opens, self._out_spans, strict=False):
            text = grammar.phrase(ids[start + 1 : end])
            if p > self.config.threshold:
                return text, p, keep
            keep = end + 1
        return None, None, len(ids)

    def _end_pass(self, *, drop: int, ended: bool = False) -> Action:
        self.passes += 1
        phrase, p, keep = self._inspect()
        if phrase is None:
            return self._pass_accepted(drop, ended)
        self.correcting = True
        self.local_failures += 1
        self.trace.append(
            {
                "kind": "reject",
                "reason": "malformed" if p is None else "unconfident",
                "text": phrase,
                "p_unconfident": p,
                "temperature": self.temperature,
                "attempt": self.local_failures - 1,
            }
        )
        ceiling = self.config.temperature + self.config.temperature_span
        self.temperature = min(self.temperature + TEMPERATURE_STEP, ceiling)
        if phrase.lower() not in self.phrases:
            self.phrases.append(phrase.lower())
        if self.local_failures == self.config.local_attempts:
            return self._rewind_sentence()
        self._record_spans(keep)
        return self._next_pass("local_rewind", keep)

    def _pass_accepted(self, drop: int, ended: bool) -> Action:
        if not self.correcting:
            self._record_spans(len(self.ids))
            self._ok = True
            return self._end("end")
        keep = len(self.ids) - drop
        self._record_spans(keep)
        self.correcting = False
        self.local_failures = 0
        self.temperature = self.config.temperature
        action = self._next_pass(None, keep)
        # after an end token the next pass starts from the last kept token, which has been consumed already
        return Rewind(keep, False) if ended and action == CONTINUE else action

    def _rewind_sentence(self) -> Action:
        accepted = self.ids[: self.checkpoint]
        if not accepted:
            out = self.ids
            first = next((i for i, t in enumerate(out) if t == self.grammar.open), len(out))
            junk, keep = out[:first], 0
        else:
            dots = [i for i, t in enumerate(accepted) if self.grammar.piece(t) == "."]
            keep = dots[-1] + 1 if dots else 0
            junk = accepted[keep:]
        text = self.grammar.plain(junk)
        if text:
            self.phrases.append(text)
        self.local_failures = 0
        self.spans = [s for s in self.spans if s[0] <= keep]
        return self._next_pass("sentence_rewind", keep)

    def _record_spans(self, keep: int) -> None:
        opens = [i for i, t in enumerate(self.ids) if t == self.grammar.open and i >= self.checkpoint]
        for start, (end, p) in zip(opens, self._out_spans, strict=False):
            if end < keep:
                record = SpanRecord(self.grammar.phrase(self.ids[start + 1 : end]), p, True)
                self.spans.append((end + 1, record))
                self.trace.append(
                    {"kind": "accept", "text": record.text, "p_unconfident": p, "tokens": end + 1}
                )

    def _next_pass(self, kind: str | None, keep: int) -> Action:
        removed = self.ids[keep:]
        if kind is not None:
            self.trace.append({"kind": kind, "to": keep, "removed": self.grammar.decode(removed)})
        del self.ids[keep:]
        self.checkpoint = keep
        self._out_spans = []
        if self.passes >= self.config.total_attempts:
            return self._end("attempts")
        rewrite = self._rewrite()
        return Rewind(keep, rewrite) if removed or rewrite or kind else CONTINUE

    def _rewrite(self) -> bool:
        if not self.config.rewrite_query:
            return False
        premise = self.stage == 2 or (self.config.premise_sentence_in_every_hint and self.phrases)
        parts = [hint_text(self.phrases), FALSE_PREMISE_SENTENCE if premise else ""]
        text = " ".join(part for part in parts if part)
        if text == self.insertion:
            return False
        self.insertion = text
        self.trace.append({"kind": "hint", "text": text})
        return True

    def _end(self, reason: str) -> Action:
        if self.config.false_premise and self.stage == 1 and not self._text():
            self.trace.append({"kind": "false_premise", "text": FALSE_PREMISE_SENTENCE})
            self.stage = 2
            self._restart()
            return Rewind(0, True)
        self.trace.append({"kind": "finish", "reason": reason, "ok": self._ok})
        return FINISH

    def _text(self) -> str:
        text = self.grammar.plain(self.ids)
        if self._ok or not self.config.false_premise:
            return text
        return text[: text.rfind(".") + 1]

    def answer(self) -> Answer:
        """The result; meaningful after FINISH. A failed answer is its accepted prefix, as in the program."""
        text, tagged = self._text(), self.grammar.decode(self.ids)
        records = [record for _, record in self.spans]
        accepted = text
        if self.config.false_premise and self.stage == 2 and not text:
            text, tagged, records = CANNED_ANSWER, CANNED_ANSWER, []
        return Answer(text, tagged, self._ok, accepted, text, records, self.trace, kept(self.ids))
