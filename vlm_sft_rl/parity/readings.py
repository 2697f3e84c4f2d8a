"""The ways in which a model is run: collator and trainer, transformers' `generate`, the rewinding engine, vLLM.

Every way is made to say the same answers, and gives the tokens it read, the positions it gave them where they can be seen,
and the log-probability of each token of the answers in the distribution before any sampling setting.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from peft import PeftModel
from PIL import ImageOps
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from ..data import chat
from ..data.collators import VisionCollator
from ..data.marks import IGNORE
from ..data.messages import typed_messages
from ..decoding.answers import Answer
from ..decoding.config import SamplingConfig
from ..decoding.generate import PromptBatch, decode_jobs, encode_batch
from ..decoding.machines import CONTINUE, FINISH, Action, Machine, Rewind
from ..decoding.sampling import Sampler
from ..models.lora import finish_peft
from ..models.parts import LANGUAGE, part_of, unwrap
from ..packing.collator import PackedCollator
from ..packing.layout import SEGMENTS, as_table, rows_of
from ..trainers.base import WeightedSFTConfig, WeightedSFTTrainer
from ..trainers.checks import may_hold_float32
from .compare import Reading

DETOUR = 3  # tokens that are drawn and taken back; the last of them is not fed
EVERY = 5  # tokens of an answer between two detours


@dataclass(frozen=True)
class Case:
    """A row as it is certified: its last answer, behind the conversation before it.

    Attributes:
        row: as the collator reads it, its pictures open.
        prompt: the rendered conversation up to the answer, as decoders render it.
        ids, start: tokens of prompt and answer as the collator makes them, and where the answer begins.
    """

    row: dict
    prompt: str
    pictures: list
    ids: list[int]
    start: int

    @property
    def answer(self) -> list[int]:
        return self.ids[self.start :]


def case_of(collator: VisionCollator, row: dict) -> Case:
    """Raises RowError: the collator refuses the row."""
    prepared = collator.prepare(row)
    example, row = collator.encode(row), prepared.row
    turn, (*before, _) = example.turns[-1], row["messages"]
    if [message["role"] for message in before] == ["user"]:
        prompt = chat.render(collator.processor, before[0]["content"], len(prepared.images))
    else:
        prompt = chat.render_messages(collator.processor, typed_messages({**row, "messages": before}))
    row = {**row, "images": prepared.images}
    return Case(row, prompt, prepared.images, example.input_ids[: turn.end], turn.start)


def decoded_case(model, processor, case: Case) -> Case:
    """The case of a family that no collator reads: tokens as decoding has them, the answer encoded by itself."""
    prompt = encode_batch(model, processor, [case.prompt], [case.pictures])["input_ids"][0].tolist()
    tokenizer = chat.get_tokenizer(processor)
    answer = tokenizer.encode(case.row["messages"][-1]["content"], add_special_tokens=False)
    return replace(case, ids=[*prompt, *answer, tokenizer.eos_token_id], start=len(prompt))


def stray_token(grammar, case: Case) -> int | None:
    """The first token of the answer behind which its text, decoded, departs from the row's; None where it does not. Blanks
    do not count."""
    wanted = "".join(case.row["messages"][-1]["content"].split())
    for end in range(1, len(case.answer) + 1):
        text = "".join(grammar.decode(case.answer[:end]).split())
        # a character may be in the making
        if not wanted.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")):
            return case.start + end - 1
    return None if text == wanted else len(case.ids) - 1


def other_pictures(case: Case) -> Case:
    """The same row with each picture in negative."""
    return replace(case, row={**case.row, "images": [ImageOps.invert(p) for p in case.row["images"]]})


def groups(cases: Sequence[Case]) -> list[list[int]]:
    """Numbers of the cases with pictures, and of those without: few processors take both in a batch."""
    split = ([i for i, case in enumerate(cases) if bool(case.pictures) == seen] for seen in (True, False))
    return [group for group in split if group]


@contextmanager
def recorded_positions(model) -> Iterator[list[torch.Tensor | None]]:
    """Collect, for each pass of the model, the positions `(planes, rows, width)` that its rotary embedding is given."""
    passes: list[torch.Tensor | None] = []

    def begin(module, args):
        passes.append(None)

    def note(module, args, kwargs):
        positions = kwargs.get("position_ids", args[1] if len(args) > 1 else None)
        if positions is not None and passes and passes[-1] is None:
            passes[-1] = positions.reshape(-1, *positions.shape[-2:]).cpu()

    hooks = [unwrap(model).base_model.register_forward_pre_hook(begin)]
    for name, module in model.named_modules():
        if type(module).__name__.endswith("RotaryEmbedding") and part_of(name) == LANGUAGE:
            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def row_positions(positions: torch.Tensor | None, row: int, places) -> list[tuple[int, ...]] | None:
    """Of some places of a row; a row stands for all where the model makes one of them."""
    if positions is None:
        return None
    row = min(row, positions.shape[1] - 1)
    return [tuple(planes) for planes in positions[:, row, places].T.tolist()]


# --- Collator and trainer ---


class ReadingTrainer(WeightedSFTTrainer):
    """Trains nothing: it gives the log-probabilities of its passes."""

    def finish_model(self) -> None:
        # what a run would be refused or warned for is no concern here
        if isinstance(self.model, PeftModel):
            finish_peft(self.model, upcast=may_hold_float32(self.model, self.args))

    def watch(self, outputs, batch) -> None:
        self.log_probs = outputs.log_probs

    @torch.no_grad()
    def read(self, rows: list[dict]) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor | None]:
        """The batch of these rows, its `(batch, length - 1)` log-probabilities of the next tokens, and its positions."""
        batch = self.data_collator(rows)
        inputs = self._prepare_inputs(dict(batch))
        self.model.eval()
        with recorded_positions(self.model) as passes, self.compute_loss_context_manager():
            self.compute_loss(self.model, inputs)
        return batch, self.log_probs.float().cpu(), passes[0]


def by_trainer(
    model, processor, cases: Sequence[Case], collator: VisionCollator, batches: Sequence[Sequence[int]]
) -> list[Reading]:
    """Through the collator and the forward pass of the trainers.

    Args:
        batches: numbers of the cases in each batch.
    """
    readings: dict[int, Reading] = {}
    with _trainer(model, processor, cases, collator) as trainer:
        for numbers in batches:
            batch, log_probs, positions = trainer.read([cases[i].row for i in numbers])
            for place, i in enumerate(numbers):
                real = batch["attention_mask"][place].nonzero()[:, 0]
                readings[i] = _reading(batch, log_probs, positions, place, real, cases[i])
    return [readings[i] for i in range(len(cases))]


def by_packs(model, processor, cases: Sequence[Case]) -> list[Reading]:
    """Through the packing collator and the trainers' forward pass, all rows in a pack, those about a picture sharing it.

    Raises UserError: the family cannot be packed.
    """
    packing = "image" if isinstance(getattr(processor, "image_token", None), str) else "rows"
    collator = PackedCollator(processor, packing=packing)
    packs = groups(cases) if collator.trial(1, 0) else [list(range(len(cases)))]
    readings: dict[int, Reading] = {}
    with _trainer(model, processor, cases, collator, vision_packing=packing) as trainer:
        for numbers in packs:
            rows = [cases[i].row for i in numbers]
            features, _ = collator.process([collator.prepare(row) for row in rows])
            order = [numbers[place] for group in features.groups for place in group]
            batch, log_probs, positions = trainer.read(rows)
            for i, (start, end, p, q) in zip(order, rows_of(as_table(batch[SEGMENTS])), strict=True):
                real = torch.tensor([*range(p, q), *range(start, end)])
                readings[i] = _reading(batch, log_probs, positions, 0, real, cases[i])
    return [readings[i] for i in range(len(cases))]


def _reading(batch, log_probs, positions, row: int, real: torch.Tensor, case: Case) -> Reading:
    """One row of a batch; `real`: places of its tokens, of which those behind the answer are left out."""
    real = real[: len(case.ids)]
    labels = batch["labels"][row, real].tolist()[case.start :]
    values = log_probs[row, real[case.start :] - 1].tolist()
    return Reading(
        batch["input_ids"][row, real].tolist(),
        case.start,
        [None if label == IGNORE else value for label, value in zip(labels, values, strict=True)],
        row_positions(positions, row, real),
    )


@contextmanager
def _trainer(model, processor, cases: Sequence[Case], collator, **settings) -> Iterator[ReadingTrainer]:
    plain = unwrap(model)
    in_float32 = {"bf16": False, "fp16": False} if plain.dtype == torch.float32 else {}
    with TemporaryDirectory() as folder:
        args = WeightedSFTConfig(
            folder,
            use_cpu=plain.device.type == "cpu",
            report_to="none",
            gradient_checkpointing=False,
            disable_tqdm=True,
            **in_float32,
            **settings,
        )
        rows = Dataset.from_list([case.row for case in cases])
        yield ReadingTrainer(model, args, collator, rows, processing_class=processor)


def padded(collator: VisionCollator, side: str) -> VisionCollator:
    collator = copy.copy(collator)
    collator.padding_side = side
    return collator


# --- transformers' generate ---


class Forced(LogitsProcessor):
    """Leaves each row the next token of its answer; behind its end, its first again."""

    def __init__(self, answers: Sequence[Sequence[int]], width: int):
        self.answers, self.width = answers, width

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.width
        tokens = [answer[step] if step < len(answer) else answer[0] for answer in self.answers]
        forced = torch.full_like(scores, float("-inf"))
        forced[range(len(tokens)), tokens] = 0.0
        return forced


@torch.inference_mode()
def by_generate(model, processor, cases: Sequence[Case], batches: Sequence[Sequence[int]]) -> list[Reading]:
    """Through `model.generate` of transformers with its own cache; batches are padded on the left."""
    readings: dict[int, Reading] = {}
    for numbers in batches:
        part = [cases[i] for i in numbers]
        inputs = encode_batch(model, processor, [c.prompt for c in part], [c.pictures for c in part])
        answers, width = [case.answer for case in part], inputs["input_ids"].shape[1]
        config = GenerationConfig(
            max_new_tokens=max(map(len, answers)),
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            pad_token_id=chat.get_tokenizer(processor).pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
        with recorded_positions(model) as passes:
            output = model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([Forced(answers, width)]),
            )
        for place, (i, answer) in enumerate(zip(numbers, answers, strict=True)):
            real = inputs["attention_mask"][place].nonzero()[:, 0].cpu()
            prompt = inputs["input_ids"][place].cpu()[real].tolist()
            steps = zip_longest(
                output.logits[: len(answer)], answer
            )  # it stops behind a token that ends answers
            log_probs = [None if logits is None else log_prob(logits[place], t) for logits, t in steps]
            positions = row_positions(passes[0], place, real)
            for step in passes[1 : len(answer)]:
                positions = positions and positions + row_positions(step, place, [-1])
            readings[i] = Reading(prompt + answer, len(prompt), log_probs, positions)
    return [readings[i] for i in range(len(cases))]


def log_prob(logits: torch.Tensor, token: int) -> float:
    """Of a token; `logits` is `(vocabulary,)`."""
    logits = logits.float()
    return float(logits[token] - logits.logsumexp(-1))


# --- The engine, on transformers or on vLLM ---


class ForcedDecoding(Machine):
    """Says a given answer. With detours it feeds other tokens now and then and takes them back.

    In turns it goes back to where the detour began, where the engine has saved the logits; some tokens further, which the
    engine feeds again; and to the question's end, from which on the engine computes everything again.

    Attributes:
        log_probs: of each token of the answer, as read last.
        positions: of each token that was fed, if they can be told.
    """

    def __init__(self, config: SamplingConfig, grammar, case: Case, detours: bool):
        super().__init__(config, grammar)
        self.case, self.rewrites = case, detours
        self.log_probs: list[float | None] = [None] * len(case.answer)
        self.positions: dict[int, tuple[int, ...]] = {}
        self.starts = set(range(1, len(case.answer), EVERY)) if detours else set()
        self.checkpoint, self.astray, self.back = -1, 0, Rewind(0, False)
        self._turn_off()

    def _turn_off(self) -> None:
        """Begin a detour where one is due."""
        here = len(self.ids)
        if here not in self.starts:
            return
        kind = len(self.starts) % 3
        self.starts.remove(here)
        self.astray = DETOUR
        self.checkpoint = here if kind == 0 else -1
        self.back = Rewind(max(0, here - 2) if kind == 1 else here, kind == 2)

    @property
    def wanted(self) -> int:
        """The next token: the answer's, or on a detour one that stands elsewhere in the answer."""
        answer, here = self.case.answer, len(self.ids)
        return answer[(here + 1 + self.astray) % len(answer)] if self.astray else answer[here]

    def observe(self, token: int, probability: float | None = None) -> Action:
        self.ids.append(token)
        if self.astray:
            self.astray -= 1
            if self.astray:
                return CONTINUE
            del self.ids[self.back.length :]
            return self.back
        self._turn_off()
        return CONTINUE if len(self.ids) < len(self.case.answer) else FINISH

    def answer(self) -> Answer:
        raise NotImplementedError("its readings are what is asked for")


class ForcedSampler(Sampler):
    """Takes what the machines want and tells them how probable it was.

    Args:
        passes: positions of the model's passes, see `recorded_positions`; they are read where one row is decoded at a time.
    """

    def __init__(self, passes: list[torch.Tensor | None] | None = None):
        super().__init__()
        self.passes = passes

    def choose(self, logits: torch.Tensor, rows) -> list[int]:
        for row in rows if self.passes is not None else ():
            self._note_positions(row)
        for i, row in enumerate(rows):
            machine = row.machine
            if not machine.astray:
                machine.log_probs[len(machine.ids)] = log_prob(logits[i], machine.wanted)
        return [row.machine.wanted for row in rows]

    def _note_positions(self, row) -> None:
        machine = row.machine
        end = row.base + len(machine.ids)
        # the last passes end where the row ends; those before its prompt's were no row's
        while self.passes and end > 0:
            positions = self.passes.pop()
            if positions is None:
                break
            start = end - positions.shape[2]
            machine.positions |= zip(range(start, end), row_positions(positions, 0, slice(None)), strict=True)
            end = start
        self.passes.clear()


def by_engine(
    model, processor, cases: Sequence[Case], *, detours: bool, batch_size: int, **settings
) -> list[Reading]:
    """Through the decoding engine: prefill, cached steps, and with `detours` rewinds of three kinds.

    Args:
        model: of transformers, or a `VLLMModel`.

    Positions are read with a `batch_size` of 1 on a model of transformers; the tokens of prompts are vLLM's own on vLLM.
    """
    prompts = [case.prompt for case in cases]
    batch = PromptBatch(model, processor, [case.pictures for case in cases], prompts, rendered=prompts)
    waiting = iter(cases)

    def machine(config, grammar):
        return ForcedDecoding(config, grammar, next(waiting), detours)

    run = partial(decode_jobs, batch, machine, SamplingConfig(max_new_tokens=1), batch_size=batch_size)
    if not isinstance(unwrap(model), torch.nn.Module):
        model.prompts_seen = {}
        jobs = run(sampler=ForcedSampler())
        return [_decoded(job, model.prompts_seen[job.id]) for job in jobs]
    if batch_size > 1:
        jobs = run(sampler=ForcedSampler())
    else:
        with recorded_positions(model) as passes:
            jobs = run(sampler=ForcedSampler(passes))
    return [_decoded(job, batch.encode([i])["input_ids"][0].tolist()) for i, job in enumerate(jobs)]


def _decoded(job, prompt: list[int]) -> Reading:
    machine = job.machine
    positions = [machine.positions[place] for place in sorted(machine.positions)] or None
    return Reading(prompt + machine.case.answer, len(prompt), machine.log_probs, positions)
