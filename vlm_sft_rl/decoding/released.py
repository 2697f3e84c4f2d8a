"""The decisions of the program released with REVERSE, token by token, defects included. No torch.

That program wraps `generate` in an outer loop and looks at complete answers only. Where its decision depends on the
complete answer (outside correction) this machine waits for it too; inside correction the program keeps nothing
after the first close tag, so stopping there changes no decision. Known differences from the paper that are kept:
strict `>` at the threshold, temperature step 0.05, total_attempts counts every pass (successful ones too), a
sentence ends at the single token "." only, the phrases of the hint are never forgotten, the literal "format error"
and removed sentence fragments become hint phrases, a second sentence rewind removes nothing. An answer without <SPAN> is
cut at its first </UN>; blanks before punctuation go; a failed answer in two stages loses what follows its last dot, and
a blank comes behind every other one.
"""

import re
import string

from ..data.tags import CONFIDENT, UNCONFIDENT, VERIFICATION_TOKENS
from .answers import CANNED_ANSWER, FALSE_PREMISE_SENTENCE, Answer, Counts, SpanRecord, hint_text
from .machines import CONTINUE, FINISH, Action, Rewind
from .retrospective import VerifyingMachine

TEMPERATURE_STEP = 0.05
_BLANK_BEFORE_PUNCTUATION = re.compile(rf"\s([{re.escape(string.punctuation)}])")


class ReleasedRetrospective(VerifyingMachine):
    """`rules: released`; `max_new_tokens` limits one pass, as in the program."""

    def _restart(self) -> None:
        super()._restart()
        self.passes = 0
        self.spans: list[tuple[int, SpanRecord]] = []  # (end, record) of the accepted prefix ids[:checkpoint]
        self._closes: list[tuple[int, float]] = []  # (place of the tag in ids, P(</UN>)) of this pass
        self.ok = False

    def observe(self, token: int, probability: float | None = None) -> Action:
        if token in self.grammar.ends:
            return self._end_pass(drop=0, ended=True)
        self.ids.append(token)
        if token in self.grammar.closes:
            self._closes.append((len(self.ids) - 1, probability))
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
        new_opens = [i for i in opens if i >= self.checkpoint]
        for start, (end, p) in zip(new_opens, self._closes, strict=False):
            text = grammar.phrase(ids[start + 1 : end])
            if p > self.threshold:
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
        reason = "malformed" if p is None else "unconfident"
        self._note_rejection(reason, phrase, p, self.local_failures - 1)
        self._raise_temperature(TEMPERATURE_STEP)
        if phrase.lower() not in self.phrases:
            self.phrases.append(phrase.lower())
        if self.local_failures == self.config.local_attempts:
            return self._rewind_sentence()
        self._record_spans(keep)
        return self._next_pass("local_rewind", keep)

    def _pass_accepted(self, drop: int, ended: bool) -> Action:
        if not self.correcting:
            self._record_spans(len(self.ids))
            self.ok = True
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
            text, keep = self.grammar.phrase(out[:first]).lower(), 0  # tags stay in it
        else:
            dots = [i for i, t in enumerate(accepted) if self.grammar.piece(t) == "."]
            keep = dots[-1] + 1 if dots else 0
            text = self.grammar.decode(accepted[keep:])
            for tag in VERIFICATION_TOKENS:  # the blanks around them stay
                text = text.replace(tag, "")
            text = text.strip()
        if text:
            self.phrases.append(text)
        self.local_failures = 0
        self.spans = [s for s in self.spans if s[0] <= keep]
        return self._next_pass("sentence_rewind", keep)

    def _record_spans(self, keep: int) -> None:
        opens = [i for i, t in enumerate(self.ids) if t == self.grammar.open and i >= self.checkpoint]
        for start, (end, p) in zip(opens, self._closes, strict=False):
            if end < keep:
                record = SpanRecord(self.grammar.phrase(self.ids[start + 1 : end]), p, True)
                self.spans.append((end + 1, record))
                self.note("accept", text=record.text, p_unconfident=p, tokens=end + 1)

    def _next_pass(self, kind: str | None, keep: int) -> Action:
        removed = self.ids[keep:]
        if kind is not None:
            self.note(kind, to=keep, removed=self.grammar.decode(removed))
        del self.ids[keep:]
        self.checkpoint = keep
        self._closes = []
        if self.passes >= self.config.total_attempts:
            return self._end("attempts")
        rewrite = self._rewrite(premise=self.stage == 2)
        return Rewind(keep, rewrite) if removed or rewrite or kind else CONTINUE

    def _hint(self, premise: bool) -> str:
        """In the LLaVA branches the sentence about false premises stands in every hint; in Qwen's the first token of the
        text is lost: a blank, or with the sentence its first word."""
        hint, branch = hint_text(self.phrases), self.config.released_branch
        if branch == "qwen":
            parts = [FALSE_PREMISE_SENTENCE.partition(" ")[2] if premise else "", hint]
            return " ".join(part for part in parts if part)
        if branch == "llama_3" and hint:
            hint = f" {hint} "
        return FALSE_PREMISE_SENTENCE + hint if premise or hint else ""

    def _end(self, reason: str) -> Action:
        if self.config.false_premise and self.stage == 1 and not self._text():
            return self._ask_for_premise()
        self.note("finish", reason=reason, ok=self.ok)
        return FINISH

    def _text(self) -> str:
        grammar = self.grammar
        if self.ok and grammar.open not in self.ids:
            return grammar.phrase(self.ids).partition(UNCONFIDENT)[0].replace(CONFIDENT, "").strip()
        tags = {grammar.open, *grammar.closes}
        text = grammar.phrase([token for token in self.ids if token not in tags])
        text = _BLANK_BEFORE_PUNCTUATION.sub(r"\1", text)
        if self.ok or not self.config.false_premise:
            return text
        *sentences, _ = text.split(".")
        return ". ".join(sentences) + "." if sentences else ""

    def answer(self) -> Answer:
        """A failed answer is its accepted prefix, as in the program."""
        accepted = text = self._text()
        tagged, records = self.grammar.decode(self.ids), [record for _, record in self.spans]
        if self.ok and self.grammar.open not in self.ids:
            tagged = tagged.partition(UNCONFIDENT)[0]
        if self.config.false_premise and self.stage == 2 and not text:
            text, tagged, records = CANNED_ANSWER, CANNED_ANSWER, []
        return Answer(
            text, tagged, self.ok, accepted, text, records, self.trace, Counts(tokens_kept=len(self.ids))
        )
