"""One answer under construction, as a state machine: tokens in, actions out. Here plain decoding; no torch."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from .answers import Answer, Counts, Grammar, SpanRecord
from .config import SamplingConfig
from .tried import Tried

STOP_WINDOW = 24  # tokens decoded behind the last one to look for a stop string


class Rewind(NamedTuple):
    """Forget the answer beyond `length` tokens and go on from there; `rewrite`: the question changed as well."""

    length: int
    rewrite: bool


class Feed(NamedTuple):
    """Feed these tokens, then go on: the sampled token (or what stands in its place) and text that nobody sampled."""

    tokens: tuple[int, ...]


CONTINUE = "continue"
FINISH = "finish"
Action = Rewind | Feed | str


class Machine:
    """What an engine reads of a machine between its calls of `observe`.

    Attributes:
        ids: the live answer.
        temperature: for the next token.
        insertion: text that stands at the end of the question.
        checkpoint: the length that a local rewind goes back to.
        committed: the length that no rewind goes back behind.
        correcting: the next tokens are another attempt at a rejected phrase; `group_failures`: failed attempts since
            temperature and hint last changed.
        rewrites: the question may change.
        every_probability: `observe` is told the probability of every token, not only P(</UN>) at close tags.
        threshold: tau, where phrases are judged.
        tried: what may not be drawn again; None: anything may. `law_temperature`: its probabilities are those at this
            temperature.
    """

    insertion = ""
    checkpoint = committed = 0
    correcting = False
    group_failures = 0
    rewrites = False
    every_probability = False
    threshold: float | None = None
    tried: Tried | None = None
    law_temperature = 1.0

    def __init__(self, config: SamplingConfig, grammar: Grammar):
        self.config, self.grammar = config, grammar
        self.ids: list[int] = []
        self.temperature = config.temperature
        self.trace: list[dict[str, Any]] = []

    def note(self, kind: str, **event: Any) -> None:
        self.trace.append({"kind": kind, **event})

    def logit_bias(self) -> dict[int, float]:
        """What scales the probability of each next token by the untried share of its subtree."""
        if self.tried is None:
            return {}
        # at temperature 0 the token that has most untried probability is chosen
        return self.tried.bias(self.temperature or self.law_temperature)

    def observe(self, token: int, probability: float | None = None) -> Action:
        """Take the next token. At a close tag `probability` is P(</UN>) in the raw distribution it was drawn from."""
        raise NotImplementedError

    def answer(self) -> Answer:
        """The result; meaningful after FINISH."""
        raise NotImplementedError


class PlainDecoding(Machine):
    """Nothing is rewound; phrases and their P(</UN>) are recorded."""

    def __init__(self, config: SamplingConfig, grammar: Grammar):
        super().__init__(config, grammar)
        self.records: list[SpanRecord] = []
        self._open: int | None = None

    @property
    def committed(self) -> int:
        return len(self.ids)

    def observe(self, token: int, probability: float | None = None) -> Action:
        ids, grammar = self.ids, self.grammar
        if token in grammar.ends:
            return FINISH
        ids.append(token)
        if token in grammar.watched:
            if token == grammar.open:
                self._open = len(ids)
            elif self._open is not None:
                phrase = grammar.phrase(ids[self._open : -1])
                self.records.append(SpanRecord(phrase, probability, token == grammar.confident))
                self._open = None
        return FINISH if len(ids) >= self.config.max_new_tokens else CONTINUE

    def answer(self) -> Answer:
        """`ok` is True: plain decoding verifies nothing, so it cannot fail. A span is `accepted` when the model itself
        closed it with </CN>; it carries P(</UN>) for whoever wants another threshold."""
        text, tagged = self.grammar.plain(self.ids), self.grammar.decode(self.ids)
        counts = Counts(tokens_kept=len(self.ids))
        return Answer(text, tagged, True, text, text, self.records, self.trace, counts)


class StoppedDecoding(PlainDecoding):
    """Plain decoding that ends at the first of some strings; the answer ends before it. The last event of its trace is
    `{"kind": "drawn", "log_prob"}`: the mean log-probability of its tokens, close tags left out.

    Attributes:
        probability: that a first draw is this answer, where that is known; it stands in the event, too.
    """

    every_probability = True
    probability: float | None = None

    def __init__(self, config: SamplingConfig, grammar: Grammar, stop: Sequence[str]):
        super().__init__(config, grammar)
        self.ended = False
        self.stop = tuple(text for text in stop if text)
        self.log_probs: list[float] = []

    def observe(self, token: int, probability: float | None = None) -> Action:
        action = super().observe(token, probability)
        self.ended = token in self.grammar.ends
        if probability is not None and token not in self.grammar.closes:
            self.log_probs.append(math.log(max(probability, 1e-12)))
        if action == CONTINUE and self.stop:
            # a string is complete when its last character comes: a window of the end is enough
            tail = self.grammar.decode(self.ids[-STOP_WINDOW:])
            if any(text in tail for text in self.stop):
                return FINISH
        return action

    def answer(self) -> Answer:
        answer = super().answer()
        event = {} if self.probability is None else {"probability": self.probability}
        self.note("drawn", log_prob=sum(self.log_probs) / max(1, len(self.log_probs)), **event)
        cut = min((at for text in self.stop if (at := answer.text.find(text)) >= 0), default=None)
        if cut is not None:
            answer.text = answer.accepted_text = answer.best_effort_text = answer.text[:cut].rstrip()
        return answer


class DistinctDecoding(Machine):
    """Several answers, one behind the other, of which no two have the same tokens: each is drawn from what the earlier ones
    left (`tried`). It ends with `count` answers, or where there are no more.

    Attributes:
        drawn: the finished draws.
    """

    every_probability = True

    def __init__(self, config: SamplingConfig, grammar: Grammar, count: int, stop: Sequence[str] = ()):
        super().__init__(config, grammar)
        self.count, self.stop = count, stop
        self.tried = Tried([grammar.ends])
        self.law_temperature = config.temperature or 1.0
        self.drawn: list[StoppedDecoding] = []
        self._draw()

    def _draw(self) -> None:
        self.draw = StoppedDecoding(self.config, self.grammar, self.stop)
        self.ids = self.draw.ids

    def observe(self, token: int, probability: float | None = None) -> Action:
        if self.draw.observe(token, probability) == CONTINUE:
            self.tried.step(token)
            return CONTINUE
        self.draw.probability = self.tried.probability(token)
        self.tried.reject(token)
        self.drawn.append(self.draw)
        if len(self.drawn) == self.count or self.tried.exhausted(0):
            self.tried = None
            return FINISH
        self.tried.back(0)
        self._draw()
        return Rewind(0, False)

    def answer(self) -> Answer:
        """The first draw; `counts` of the engine are those of all."""
        return self.drawn[0].answer()
