"""The certificate: every way compared with collator and trainer, as a verdict, as JSON, for a terminal and as a page."""

import gc
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..data.chat import get_tokenizer
from ..data.collators import VisionCollator
from ..data.marks import verification_marks
from ..data.rows import read_raw, sft_row
from ..decoding.answers import build_grammar
from ..decoding.capabilities import rewind_obstacle, rewindable_attention
from ..decoding.config import engine_version
from ..errors import NotFinite, RowError, UserError, first_line
from ..evaluation.report import Cell, Section, Table, Tile, Tiles, render_report
from ..io import write_json
from ..models.load import is_adapter, load_adapter, load_for_inference, untrainable_reason
from ..models.parts import unwrap
from ..runs import versions
from ..trainers.vllm_rollouts import unequal_reason
from .compare import LIMITS, Comparison, Limits, Place, Reading, around, compare
from .options import CertifyOptions
from .readings import (
    EVERY,
    Case,
    by_engine,
    by_generate,
    by_packs,
    by_trainer,
    case_of,
    decoded_case,
    groups,
    other_pictures,
    padded,
    stray_token,
)
from .rows import sample_rows

logger = logging.getLogger(__name__)
FORMAT = 1
TRAINER, GENERATE, CONTROL, VLLM = "trainer", "generate", "other pictures", "vLLM"
# name -> what it is, in the order of the tables
WAYS = {
    TRAINER: "collator and trainer, a row at a time",
    "trainer, padded right": "all rows in a batch, as in SFT",
    "trainer, padded left": "all rows in a batch, as in GRPO",
    "trainer, packed": "all rows in one sequence, those about a picture share it",
    GENERATE: "transformers' generate, a row at a time",
    "generate, padded left": "transformers' generate on a batch",
    "engine": "the decoding engine, a row at a time",
    "engine, rewinds": "it takes tokens back and goes on, a row at a time",
    "engine, rewinds in a batch": "the same, all rows side by side",
    VLLM: "the engine's rewinds on vLLM",
}
EQUAL, REFUSED, CRASHED = "equal", "refused", "crashed"


@dataclass(frozen=True)
class Outcome:
    """What became of a way: its readings, or why there are none (`refused` or `crashed`)."""

    readings: Sequence[Reading] | None
    status: str = ""
    reason: str = ""


@dataclass
class Certificate:
    """The readings of all ways, and what they say.

    Attributes:
        facts: of the model and the machine, by name.
        piece: token id -> its text.
        left_out: rows of the command's own that this processor does not take, and why.
        outcomes: by the names of `WAYS`.
        control: readings of the trainer with other pictures: what a fault of the pictures would change.
        strays: rows whose answer, decoded, is not its text: number -> the first token that departs.
        endless: numbers of rows whose answer has no token at which decoding ends.
    """

    facts: dict[str, Any]
    limits: Limits
    cases: list[Case]
    piece: Callable[[int], str]
    left_out: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    control: Sequence[Reading] | None = None
    strays: dict[int, int] = field(default_factory=dict)
    endless: Sequence[int] = ()

    @property
    def reference(self) -> str:
        """What the others are compared with: the trainer; for a family that cannot be trained, `generate`."""
        ways = (name for name in (TRAINER, GENERATE, *WAYS) if self.readings(name) is not None)
        return next(ways, TRAINER)

    def readings(self, way: str) -> Sequence[Reading] | None:
        """Of a way; None where it gave none, or was not run."""
        return self.outcomes[way].readings if way in self.outcomes else None

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Every way but the reference that gave readings."""
        reference = self.readings(self.reference)
        return {
            name: compare(reference, outcome.readings)
            for name, outcome in self.outcomes.items()
            if name != self.reference and None not in (reference, outcome.readings)
        }

    @property
    def failures(self) -> list[str]:
        """A line for everything that is not as it must be."""
        lines = [f"{name}: {o.reason}" for name, o in self.outcomes.items() if o.status == CRASHED]
        trainer = self.outcomes.get(TRAINER)
        if trainer and trainer.status == REFUSED and self.facts["training"] == "allowed":
            lines.append(f"{TRAINER}: {trainer.reason}")
        for row, token in self.strays.items():
            place = self.words(Place(row, token, None, None))
            lines.append(f"collator: the answer's tokens are not its text, {place}")
        for row in self.endless[:1]:
            place = self.words(Place(row, len(self.cases[row].ids) - 1, None, None))
            lines.append(f"collator: decoding does not end where the answer does, {place}")
        compared = self.comparisons
        for name, comparison in compared.items():
            if (verdict := comparison.verdict(self.limits)) != EQUAL:
                place = comparison.place
                where = f", {self.words(place, verdict)}" if place else ""
                lines.append(f"{name}: {verdict}{where}")
        if not compared:
            lines.append("no two ways could be compared")
        elif all(name.startswith(TRAINER) for name in (self.reference, *compared)):
            lines.append("no way of decoding could be compared")
        return lines

    @property
    def certified(self) -> bool:
        return not self.failures

    def words(self, place: Place, verdict: str = "") -> str:
        """Where a token is, with the text around it, and what both ways have there."""
        case = self.cases[place.row]
        before, here, behind = around(case.ids, place.token, self.piece)
        text = f"row {case.row['id']!r}, token {place.token} ({before!r} [{here!r}] {behind!r})"
        if place.reference is None and place.value is None:
            return text
        values = (place.reference, place.value)
        if verdict == "token ids differ":
            values = [None if token is None else f"{token} {self.piece(token)!r}" for token in values]
        elif verdict != "positions differ":
            values = [None if value is None else f"{value:.4f}" for value in values]
        return f"{text}: {self.reference} {values[0]}, here {values[1]}"

    def to_json(self) -> dict[str, Any]:
        """Everything; ids and positions of a way only of rows in which they are not the reference's."""
        reference = self.readings(self.reference) or []
        rows = [
            {"id": case.row["id"], "prompt": case.prompt, "answer": "".join(map(self.piece, case.answer))}
            | _values(reading)
            for case, reading in zip(self.cases, reference, strict=False)
        ]
        ways: dict[str, Any] = {}
        comparisons = self.comparisons
        for name, outcome in self.outcomes.items():
            if outcome.readings is None:
                ways[name] = {"verdict": outcome.status, "reason": outcome.reason}
            elif name in comparisons:
                ways[name] = self._way(comparisons[name], outcome.readings, reference)
        return {
            "format": FORMAT,
            "certified": self.certified,
            "failures": self.failures,
            **self.facts,
            "limits": asdict(self.limits),
            "reference": self.reference,
            "rows": rows,
            "ways": ways,
            "left_out": self.left_out,
            "other_pictures": self.picture_change(),
        }

    def _way(self, comparison: Comparison, readings: Sequence[Reading], reference) -> dict[str, Any]:
        verdict, values = comparison.verdict(self.limits), []
        for a, b in zip(reference, readings, strict=True):
            differs = list(a.ids) != list(b.ids) or a.positions != b.positions
            values.append(_values(b) if differs else {"log_probs": list(b.log_probs)})
        place = comparison.place
        return {
            "verdict": verdict,
            "largest": comparison.largest,
            "mean": comparison.mean,
            "tokens": comparison.tokens,
            "positions_shifted_by": comparison.shifts,
            "place": place and {**asdict(place), "words": self.words(place, verdict)},
            "rows": values,
        }

    def picture_change(self) -> dict[str, float] | None:
        """What other pictures change at the token where they change most: in the row where that is least, and at all."""
        reference = self.readings(self.reference)
        if self.control is None or reference is None:
            return None
        seen = [i for i, case in enumerate(self.cases) if case.pictures]
        changes = [compare([reference[i]], [self.control[i]]).largest for i in seen]
        return {"least": min(changes), "largest": max(changes)} if changes else None

    # --- Shown ---

    def table(self) -> Table:
        """Each way with its verdict, for terminal and page."""
        comparisons, rows = self.comparisons, []
        for name, outcome in self.outcomes.items():
            if outcome.readings is None:
                tone = "muted" if outcome.status == REFUSED else "bad"
                rows.append([name, Cell(outcome.status, tone), "", "", "", ""])
            elif name == self.reference:
                rows.append([name, Cell("reference", "strong"), "", "", "", ""])
            else:
                rows.append([name, *self._cells(comparisons[name])])
        note = f"Differences of log-probabilities of {sum(self.tokens)} tokens in {len(self.cases)} rows; allowed in "
        note += (
            f"{self.facts['dtype']}: {self.limits.largest:g}, on average {self.limits.mean:g}. Positions are "
        )
        note += "compared up to a shift of a whole row."
        columns = ["way", "verdict", "largest", "mean", "at", "positions"]
        return Table("Ways", columns, rows, note)

    def _cells(self, comparison: Comparison) -> list[str | Cell]:
        verdict, place = comparison.verdict(self.limits), comparison.place
        shifts = comparison.shifts
        positions = "not seen" if shifts is None else "shifted" if any(shifts) else EQUAL
        return [
            Cell(verdict, "good" if verdict == EQUAL else "bad"),
            f"{comparison.largest:.1e}",
            f"{comparison.mean:.1e}",
            f"{self.cases[place.row].row['id']}, {place.token}" if place else "",
            "differ" if comparison.positions else positions,
        ]

    def places(self) -> Table:
        """Where each way differs most, with the text around."""
        rows = [
            [name, self.words(place, verdict)]
            for name, comparison in self.comparisons.items()
            if (place := comparison.place) and (verdict := comparison.verdict(self.limits))
        ]
        note = "The number of a token is its place in the row, pictures expanded; the token itself is in brackets."
        return Table("Where the largest differences lie", [], rows, note, numeric=False)

    @property
    def tokens(self) -> list[int]:
        """How many tokens of each row are compared: those to which the reference gives a log-probability."""
        readings = self.readings(self.reference) or []
        return [sum(value is not None for value in reading.log_probs) for reading in readings]

    def notes(self) -> dict[str, str]:
        """What is refused or left out, and what the comparison could not have seen."""
        notes = {name: o.reason for name, o in self.outcomes.items() if o.status == REFUSED}
        notes |= {f"row {name!r}": f"left out: {reason}" for name, reason in self.left_out.items()}
        if "row_limit" in self.facts:
            notes["rows"] = f"{self.facts['row_limit']}; --limit takes more"
        notes |= {
            f"row {case.row['id']!r}": "its last answer has no loss, so no log-probability of it is compared"
            for case, count in zip(self.cases, self.tokens, strict=False)
            if not count
        }
        if max(len(case.answer) for case in self.cases) <= 2 * EVERY + 1:
            notes["engine, rewinds"] = f"not of every kind: no answer has {2 * EVERY + 2} tokens or more"
        if (obstacle := self.facts["engine"]) != "rewinds":
            notes["rewinds"] = f"everything is computed again after each: {obstacle}"
        if (reason := self.facts["grpo_with_vllm"]) != "allowed":
            notes["GRPO with use_vllm"] = f"refused: {reason}"
        control = self.picture_change()
        if control and control["least"] <= 2 * self.limits.largest:
            notes["pictures"] = (
                f"others change as little as {control['least']:.1g} in a row, where a fault could hide"
            )
        return notes

    def sections(self) -> list[Section]:
        """What stands on the page."""
        comparisons, control = self.comparisons, self.picture_change()
        worst = max((c.largest for c in comparisons.values()), default=0.0)
        verdict, tone = ("certified", "good") if self.certified else ("failed", "bad")
        tiles = [
            Tile("verdict", verdict, f"{len(comparisons)} ways against {self.reference}", tone),
            Tile("largest difference", f"{worst:.2g}", f"allowed: {self.limits.largest:g}"),
            Tile(
                "computed in",
                str(self.facts["dtype"]),
                f"{self.facts['attention']} on {self.facts['device']}",
            ),
        ]
        if control:
            note = "at least in every row, by the trainer"
            tiles.append(Tile("other pictures change", f"{control['least']:.2g}", note))
        sections: list[Section] = [Tiles("", tiles), self.table(), self.places()]
        if self.failures:
            rows = [[name, Cell(what, "bad")] for name, _, what in (f.partition(": ") for f in self.failures)]
            sections.insert(1, Table("What differs", [], rows, numeric=False))
        if notes := self.notes():
            rows = [[name, text] for name, text in notes.items()]
            sections.append(Table("Not covered", [], rows, numeric=False))
        sections.append(Table("The ways", [], [[n, WAYS[n]] for n in self.outcomes], numeric=False))
        sections += [self._tokens_of(row) for row in range(len(self.cases))]
        facts = {**self.facts, **self.facts["versions"]}
        facts = [[name.replace("_", " "), str(v)] for name, v in facts.items() if name != "versions"]
        return [*sections, Table("Model and machine", [], facts, numeric=False)]

    def _tokens_of(self, row: int) -> Table:
        """A row's answer, token by token, side by side."""
        case, rows = self.cases[row], []
        ways = {name: o.readings[row] for name, o in self.outcomes.items() if o.readings is not None}
        reference = ways.get(self.reference)
        for place, token in enumerate(case.answer):
            cells: list[str | Cell] = [repr(self.piece(token))]
            for reading in ways.values():
                value, other = reading.log_probs[place], reference.log_probs[place]
                far = None not in (value, other) and not abs(value - other) <= self.limits.largest
                cells.append(Cell("" if value is None else f"{value:.4f}", "bad" if far else "plain"))
            rows.append(cells)
        note = f"Prompt of {case.start} tokens. Log-probabilities of the answer's tokens."
        return Table(f"Row {case.row['id']}", ["token", *ways], rows, note, folded=True)


def _values(reading: Reading) -> dict[str, Any]:
    return {
        "ids": list(reading.ids),
        "start": reading.start,
        "log_probs": list(reading.log_probs),
        "positions": reading.positions and [list(p) for p in reading.positions],
    }


# --- Making one ---


def certify(
    source: str | Path,
    rows: str | Path | Iterable[dict] | None = None,
    options: CertifyOptions | None = None,
    progress: Callable[[str], None] = logger.info,
    name: str | None = None,
) -> Certificate:
    """Run a checkpoint, or an adapter on its base, in every way and compare.

    An adapter is trained beside its base and decoded merged into it, so the certificate covers the merge.

    Args:
        rows: SFT rows or a file of them (`data.rows`); the last answer of each is certified. None: `rows.sample_rows`.
        progress: told the name of each way before it is run.
        name: of the model on the certificate; default: `source`.

    Raises UserError: the model or a row cannot be read. NotFinite: the model's logits are no numbers.
    """
    options = options or CertifyOptions()
    load = {
        "device": options.device,
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
    }
    model, processor, _ = load_for_inference(source, **load)
    dtype, device = model.dtype, model.device
    collator = VisionCollator(processor, options.image_root or _root(rows))
    chosen, more = _rows(rows, options.limit)
    certificate = begin(model, processor, chosen, collator, name=name or str(source))
    if more:
        certificate.facts["row_limit"] = f"the first {options.limit} of more"
    decode_ways(certificate, model, processor, progress)
    if is_adapter(source):
        del model
        _free_memory()
        model = load_adapter(
            source, is_trainable=True, dtype=dtype, attn_implementation=options.attn_implementation
        ).to(device)
    train_ways(certificate, model, processor, collator, progress)
    del model
    _free_memory()  # vLLM takes most of a GPU
    way = partial(by_vllm, source, certificate.facts["dtype"], certificate.cases)
    attempt(certificate, VLLM, way, progress)
    if certificate.readings(VLLM) is not None:
        certificate.facts["versions"]["vllm"] = engine_version("vllm").removeprefix("vllm ")
    certificate.outcomes = {name: certificate.outcomes[name] for name in WAYS if name in certificate.outcomes}
    return certificate


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _root(rows) -> Path | None:
    return Path(rows).parent if isinstance(rows, str | Path) else None


def _rows(rows, limit: int) -> tuple[list[dict] | None, bool]:
    """The first rows, and whether there are more."""
    if rows is None:
        return None, False
    numbered = read_raw(rows) if isinstance(rows, str | Path) else enumerate(rows, 1)
    first = list(islice(numbered, limit + 1))
    if not first:
        raise UserError(f"{rows}: there are no rows in it.")
    where = rows if isinstance(rows, str | Path) else "rows"
    return [sft_row(raw, f"{where}:{n}") for n, raw in first[:limit]], len(first) > limit


def begin(
    model, processor, rows: Sequence[dict] | None, collator: VisionCollator, *, name: str
) -> Certificate:
    """A certificate without readings.

    Args:
        rows: None: `sample_rows`, of which those that the processor does not take are left out.
        collator: whose rows are certified.
    """
    grammar = build_grammar(unwrap(model), processor, required=False)
    cases, left_out = [], {}
    for row in sample_rows(bool(verification_marks(get_tokenizer(processor)))) if rows is None else rows:
        try:
            cases.append(case_of(collator, row))
        except (RowError, UserError) as error:
            if rows is not None:
                raise
            left_out[row["id"]] = getattr(error, "reason", str(error))
    if not cases:
        raise UserError(
            f"{name}: the processor takes none of the rows. The first: {next(iter(left_out.values()))}"
        )
    plain = unwrap(model)
    untrainable = untrainable_reason(plain.config.to_dict())
    if untrainable:
        cases = [decoded_case(model, processor, case) for case in cases]
    dtype = str(plain.dtype).removeprefix("torch.")
    with rewindable_attention(model), torch.inference_mode():
        obstacle = rewind_obstacle(model)
    facts = {
        "model": name,
        "model_type": plain.config.model_type,
        "dtype": dtype,
        "device": str(plain.device),
        "attention": plain.config._attn_implementation,
        "training": untrainable or "allowed",
        "engine": obstacle or "rewinds",
        "grpo_with_vllm": unequal_reason(plain.config.model_type) or "allowed",
        "versions": versions(),
    }
    certificate = Certificate(facts, LIMITS[dtype], cases, grammar.piece, left_out)
    strays = ((i, stray_token(grammar, case)) for i, case in enumerate(cases))
    certificate.strays = {i: token for i, token in strays if token is not None}
    certificate.endless = [i for i, case in enumerate(cases) if grammar.ends.isdisjoint(case.answer)]
    return certificate


def decode_ways(
    certificate: Certificate, model, processor, progress: Callable[[str], None] = logger.info
) -> None:
    """The ways that decode; the model is one for inference."""
    cases = certificate.cases
    each, together = [[i] for i in range(len(cases))], groups(cases)
    ways: dict[str, Callable[[], list[Reading]]] = {
        GENERATE: partial(by_generate, model, processor, cases, each),
        "generate, padded left": partial(by_generate, model, processor, cases, together),
    }
    sizes = {
        "engine": (False, 1),
        "engine, rewinds": (True, 1),
        "engine, rewinds in a batch": (True, len(cases)),
    }
    for name, (detours, size) in sizes.items():
        ways[name] = partial(by_engine, model, processor, cases, detours=detours, batch_size=size)
    for name, way in ways.items():
        attempt(certificate, name, way, progress)


def train_ways(
    certificate: Certificate,
    model,
    processor,
    collator: VisionCollator,
    progress: Callable[[str], None] = logger.info,
) -> None:
    """The ways that train; the model is one for training, and is changed by the last of them."""
    cases = certificate.cases
    each = [[i] for i in range(len(cases))]
    together = groups(cases) if collator.trial(1, 0) else [list(range(len(cases)))]

    def run(collator: VisionCollator, batches) -> list[Reading]:
        if certificate.facts["training"] != "allowed":
            raise UserError(certificate.facts["training"])
        return by_trainer(model, processor, cases, collator, batches)

    attempt(certificate, TRAINER, partial(run, collator, each), progress)
    for side in ("right", "left"):
        name = f"trainer, padded {side}"
        attempt(certificate, name, partial(run, padded(collator, side), together), progress)
    if certificate.readings(TRAINER) is not None:
        changed = [other_pictures(case) for case in cases]
        certificate.control = by_trainer(model, processor, changed, collator, each)
        attempt(certificate, "trainer, packed", partial(by_packs, model, processor, cases), progress)


def attempt(
    certificate: Certificate, name: str, way: Callable[[], list[Reading]], progress: Callable[[str], None]
) -> None:
    """Run a way; where it refuses or fails, keep why."""
    progress(name)
    try:
        outcome = Outcome(way())
    except NotFinite:
        raise
    except UserError as error:
        outcome = Outcome(None, REFUSED, first_line(error))
    except (
        Exception
    ) as error:  # of many types: what a newer transformers does not know any more is found here
        logger.debug("%s", name, exc_info=True)
        outcome = Outcome(None, CRASHED, f"{type(error).__name__}: {first_line(error)}")
    certificate.outcomes[name] = outcome


def by_vllm(source: str | Path, dtype: str, cases: Sequence[Case]) -> list[Reading]:
    """Through the rewinds of the engine on vLLM, which is closed afterwards.

    Raises UserError: vLLM is not here or of an unknown version, or cannot run the checkpoint.
    """
    if find_spec("vllm") is None:
        raise UserError("not installed (pip install vlm-sft-rl[vllm])")
    engine_version("vllm")  # one whose inner parts are known
    from ..decoding.vllm_engine import load_vllm

    model, processor = load_vllm(source, None, dtype, len(cases))
    try:
        return by_engine(model, processor, cases, detours=True, batch_size=len(cases))
    finally:
        model.close()


def write(certificate: Certificate, folder: str | Path, command: str = "") -> Path:
    """`certificate.json` and `certificate.html`; returns the page."""
    write_json(Path(folder) / "certificate.json", certificate.to_json())
    name = certificate.facts["model"]
    subtitle = f"{name}: do training and decoding see the same tokens, positions and log-probabilities?"
    return render_report(
        "Parity certificate",
        certificate.sections(),
        Path(folder) / "certificate.html",
        subtitle=subtitle,
        command=command,
    )
