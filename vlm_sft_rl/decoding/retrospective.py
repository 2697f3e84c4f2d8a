"""Retrospective resampling as a state machine over one answer: tokens in, actions out. No torch.

Follows REVERSE (arXiv 2504.13169), section 3.3 and Algorithm 1. Where the paper leaves a gap, progress is
guaranteed: a sentence rewind goes to the last sentence end before the current checkpoint, so it always removes at
least one token, never ends inside a span, and when there is nothing left to remove decoding gives up.
"""

from typing import NamedTuple

from ..data.tags import normalized
from .answers import CANNED_ANSWER, FALSE_PREMISE_SENTENCE, Answer, Counts, Grammar, SpanRecord, hint_text
from .config import RetrospectiveConfig
from .machines import CONTINUE, FINISH, Action, Machine, Rewind
from .tried import Tried


class Span(NamedTuple):
    """A verified phrase: ids[start:end] with its tags."""

    start: int
    end: int
    record: SpanRecord


class VerifyingMachine(Machine):
    """What both `rules` share: the hint in the question, and the second stage of false-premise mode."""

    def __init__(self, config: RetrospectiveConfig, grammar: Grammar):
        super().__init__(config, grammar)
        self.threshold = config.threshold
        self.rewrites = config.rewrite_query or config.false_premise
        self.stage = 1
        self._restart()

    def _restart(self) -> None:
        self.ids = []
        self.temperature = self.config.temperature
        self.phrases: list[str] = []
        self.insertion = self._hint(self.stage == 2)
        self.checkpoint = self.committed = self.local_failures = 0
        self.correcting = False

    def _rewrite(self, premise: bool) -> bool:
        """Whether the question changes: it ends with the hint, and with the sentence about false premises if `premise`."""
        text = self._hint(premise)
        if not self.config.rewrite_query or text == self.insertion:
            return False
        self.insertion = text
        self.note("hint", text=text)
        return True

    def _hint(self, premise: bool) -> str:
        """What stands at the end of the question."""
        parts = [hint_text(self.phrases), FALSE_PREMISE_SENTENCE if premise else ""]
        return " ".join(part for part in parts if part)

    def _note_rejection(self, reason: str, text: str, p: float | None, attempt: int) -> None:
        event = {"reason": reason, "text": text, "p_unconfident": p}
        self.note("reject", **event, temperature=self.temperature, attempt=attempt)

    def _raise_temperature(self, step: float) -> None:
        ceiling = self.config.temperature + self.config.temperature_span
        self.temperature = min(self.temperature + step, ceiling)

    def _ask_for_premise(self) -> Rewind:
        self.note("false_premise", text=FALSE_PREMISE_SENTENCE)
        self.stage = 2
        self._restart()
        return Rewind(0, True)


class Retrospective(VerifyingMachine):
    """`rules: ours`."""

    def _restart(self) -> None:
        super()._restart()
        config = self.config
        if config.without_replacement:
            # the verdict belongs to the phrase: it was tried whichever tag closes it, as an answer whichever token ends it
            same = (self.grammar.closes, self.grammar.ends)
            self.tried = Tried(same, config.untried_floor)
        self.law_temperature = config.temperature + config.temperature_span or 1.0
        self.total_failures = self.group_failures = 0
        self.spans: list[Span] = []
        self._open: int | None = None
        self._verified: tuple[list[int], list[Span]] = ([], [])
        self._best: tuple[int, float, list[int], list[Span]] = (-1, 0.0, [], [])
        self._outcome: str | None = None
        self._unverified = self._complete = False

    def observe(self, token: int, probability: float | None = None) -> Action:
        grammar, ids = self.grammar, self.ids
        if self._unverified:
            return self._observe_unverified(token, probability)
        if token in grammar.ends:
            if self._open is None:
                return self._finish("end")
            return self._reject(token, None, None, "unclosed")
        ids.append(token)
        if token == grammar.open:
            if self._open is not None:
                return self._reject(token, None, None, "malformed")
            self._open = len(ids) - 1
        elif token in grammar.closes:
            if self._open is None:
                return self._reject(token, None, None, "malformed")
            phrase = grammar.phrase(ids[self._open + 1 : -1])
            if probability >= self.threshold:
                return self._reject(token, phrase, probability, "unconfident")
            if self.config.reject_repeats and self._is_repeat(phrase):
                return self._reject(token, phrase, probability, "repeat")
            self._accept(phrase, probability)
        if self.tried is not None:
            self.tried.step(token)
        if len(ids) >= self.config.max_new_tokens:
            return self._finish("length")
        return CONTINUE

    def _observe_unverified(self, token: int, probability: float | None) -> Action:
        """Attempts ran out and the answer goes on: phrases get their verdicts, nothing is rewound."""
        grammar, ids = self.grammar, self.ids
        if token in grammar.ends:
            self._complete = self._open is None
            return self._finish(self._outcome)
        ids.append(token)
        if token == grammar.open:
            self._open = len(ids) - 1
        elif token in grammar.closes and self._open is not None:
            phrase, accepted = grammar.phrase(ids[self._open + 1 : -1]), probability < self.threshold
            ids[-1] = grammar.confident  # after </UN> a trained model ends its answer
            self.spans.append(Span(self._open, len(ids), SpanRecord(phrase, probability, accepted)))
            self._open = None
            kind = "accept" if accepted else "flag"
            self.note(kind, text=phrase, p_unconfident=probability, tokens=len(ids))
        return self._finish(self._outcome) if len(ids) >= self.config.max_new_tokens else CONTINUE

    def _accept(self, phrase: str, p: float) -> None:
        # The verdict is tau's, not the sampled tag's: what follows must see a confident close.
        self.ids[-1] = self.grammar.confident
        self.spans.append(Span(self._open, len(self.ids), SpanRecord(phrase, p, True)))
        self._open = None
        self.checkpoint = len(self.ids)
        self._commit()
        self.temperature = self.config.temperature
        self.local_failures = self.group_failures = 0
        self.correcting = False
        if self.checkpoint > len(self._verified[0]):
            self._verified = (self.ids[:], self.spans[:])
        self.note("accept", text=phrase, p_unconfident=p, tokens=self.checkpoint)

    def _commit(self) -> None:
        if self.config.commit == "phrase":
            self.committed = self.checkpoint
        elif self.config.commit == "sentence":
            ends = self.grammar.sentence_ends(self.ids)
            self.committed = max(self.committed, *(n for n in ends if n < self.checkpoint), 0)

    def _is_repeat(self, phrase: str) -> bool:
        normal = normalized(phrase)
        return bool(normal) and any(normalized(span.record.text) == normal for span in self.spans)

    def _reject(self, token: int, phrase: str | None, p: float | None, reason: str) -> Action:
        config = self.config
        if self.tried is not None:
            self.tried.reject(token, self._complete_places(phrase))
        text = phrase if phrase is not None else self.grammar.phrase(self.ids[self.checkpoint :])
        self._note_rejection(reason, text, p, self.local_failures + self.correcting)
        # a repeat is no doubtful phrase, and nothing to warn of
        if phrase is not None and reason != "repeat":
            self._remember_best(phrase, p)
            if phrase.lower() in self.phrases:
                self.phrases.remove(phrase.lower())
            if phrase:
                self.phrases.append(phrase.lower())
        exhausted, resampled = self._exhausted(self.checkpoint), self.correcting
        self.correcting = True
        if resampled:
            self.local_failures += 1
            self.group_failures += 1
        # a first rejection that leaves nothing to be resampled here counts, too: else N would bound nothing
        self.total_failures += resampled or exhausted
        if self.total_failures >= config.total_attempts:
            return self._give_up("attempts")
        if self.local_failures >= config.local_attempts or exhausted:
            return self._rewind_sentence()
        same_group = resampled and self.group_failures < config.parallel_attempts
        return self._rewind("local_rewind", self.checkpoint, escalate=not same_group)

    def _complete_places(self, phrase: str | None) -> int:
        """At how many places, the last one included, does the phrase that was just closed stand with all its words?"""
        if not phrase:
            return 0
        words, decode = self.ids[:-1], self.grammar.phrase
        count = 1
        while decode(words[self._open + 1 : -count]) == phrase:
            count += 1
        return count

    def _exhausted(self, length: int) -> bool:
        """Is nothing left to be tried behind so many tokens?"""
        return self.tried is not None and self.tried.exhausted(length)

    def _rewind_sentence(self) -> Action:
        ends = self.grammar.sentence_ends(self.ids[: self.checkpoint])
        places = (n for n in (0, *ends) if self.committed <= n < self.checkpoint and not self._exhausted(n))
        target = max(places, default=None)
        if target is None:
            return self._give_up("nothing_left")
        self.spans = [span for span in self.spans if span.end <= target]
        self.checkpoint = target
        self.local_failures = 0
        return self._rewind("sentence_rewind", target, escalate=True)

    def _rewind(self, kind: str, length: int, *, escalate: bool) -> Rewind:
        # cut from the text: tokens alone may lose the blank before the first of them
        removed = self.grammar.decode(self.ids)[len(self.grammar.decode(self.ids[:length])) :]
        self.note(kind, to=length, removed=removed)
        del self.ids[length:]
        if self.tried is not None:
            self.tried.back(length)
        self._open = None
        rewrite = False
        if escalate:
            self.group_failures = 0
            self._raise_temperature(self.config.temperature_step)
            rewrite = self._rewrite(premise=self.stage == 2)
        return Rewind(length, rewrite)

    def _remember_best(self, phrase: str, p: float) -> None:
        # Only the end of the verified text counts as a place: a longer prefix beats a smaller probability.
        if (self.checkpoint, -p) > (self._best[0], -self._best[1]):
            span = Span(self._open, len(self.ids), SpanRecord(phrase, p, False))
            self._best = (self.checkpoint, p, self.ids[:], [*self.spans, span])

    def _finish(self, outcome: str) -> Action:
        self._outcome, self.tried = outcome, None
        self.note("finish", reason=outcome, ok=self.ok)
        return FINISH

    def _give_up(self, reason: str) -> Action:
        self._outcome = reason
        if self.config.false_premise and self.stage == 1 and not self._verified_text():
            return self._ask_for_premise()
        if self.config.on_exhausted == "continue":
            self._unverified, self.correcting, self.tried = True, False, None
            self.group_failures, self.temperature = 0, self.config.temperature
            return self._rewind("resume", self.checkpoint, escalate=False)
        return self._finish(reason)

    @property
    def ok(self) -> bool:
        """Has every phrase of a complete answer been verified?"""
        if self._unverified:
            return self._complete and all(span.record.accepted for span in self.spans)
        return self._outcome == "end" or (self._outcome == "length" and self._open is None)

    def _verified_text(self) -> str:
        ids = self._verified[0]
        if self.config.false_premise:  # half a sentence answers no question
            ids = ids[: max(self.grammar.sentence_ends(ids), default=0)]
        return self.grammar.plain(ids)

    def answer(self) -> Answer:
        plain = self.grammar.plain
        ids, spans = self.ids[:], self.spans
        if self.ok:
            accepted = plain(ids)
        elif self._outcome == "length":
            # The cut phrase has no verdict: everything before its open tag stands.
            accepted = plain(ids[: self._open])
        elif self._unverified:
            flagged = [span for span in spans if not span.record.accepted]
            for span in flagged:
                ids[span.end - 1] = self.grammar.unconfident
            accepted = plain(ids[: flagged[0].start if flagged else self._open])
        else:
            accepted = self._verified_text()
            _, _, ids, spans = self._best
            if len(self._verified[0]) > self._best[0]:
                ids, spans = self._verified
        text, tagged = plain(ids), self.grammar.decode(ids)
        if self.config.false_premise and self.stage == 2 and not accepted and not self.ok:
            text, tagged, spans = CANNED_ANSWER, CANNED_ANSWER, []
        records, counts = [span.record for span in spans], Counts(tokens_kept=len(ids))
        return Answer(text, tagged, self.ok, accepted, text, records, self.trace, counts)
