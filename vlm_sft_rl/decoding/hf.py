"""Entry points for transformers models: Python functions, and a callable for `generate(custom_generate=...)`."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from ..errors import UserError
from ..models.unwrap import unwrap
from . import prompt as prompting
from .admission import choose_backend, rewindable_attention
from .backends import RecomputeBackend
from .engine import Engine, Job
from .grammar import Grammar
from .prefill import Prefill, forward_prompt, prefill
from .records import Answer, RetrospectiveConfig
from .released import ReleasedRetrospective
from .retrospective import Observer, Retrospective
from .sampling import Sampler

MACHINES = {"paper": Retrospective, "released-code": ReleasedRetrospective}


def generate_retrospective(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: RetrospectiveConfig | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 8,
) -> list[Answer]:
    """Answer `prompts` about `images` with retrospective resampling (REVERSE, arXiv 2504.13169, section 3.3).

    Args:
        images: per prompt a PIL image, a list of PIL images, or None.
        ids: names of the rows; randomness is seeded by (config.seed, id), so an answer does not depend on its batch.
        batch_size: rows decoded together; finished rows are replaced at once.

    Raises:
        UserError: lists of different lengths, no verification tokens, no chat template, an encoder-decoder model.
    """
    config = config or RetrospectiveConfig()
    grammar = prompting.build_grammar(unwrap(model), processor, required=True)
    machine = MACHINES[config.profile]
    return decode_with(
        model, processor, images, prompts, config, grammar, machine, ids=ids, batch_size=batch_size
    )


def generate_plain(
    model,
    processor,
    images: list,
    prompts: list[str],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    ids: list[str] | None = None,
    batch_size: int = 8,
) -> list[Answer]:
    """Ordinary decoding by the same engine; with verification tokens the spans carry P(</UN>).

    Raises:
        UserError: as `generate_retrospective`, but models without verification tokens are welcome.
    """
    config = RetrospectiveConfig(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    grammar = prompting.build_grammar(unwrap(model), processor, required=False)
    answers = decode_with(
        model, processor, images, prompts, config, grammar, Observer, ids=ids, batch_size=batch_size
    )
    for answer in answers:
        answer.threshold = None
    return answers


def decode_with(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: RetrospectiveConfig,
    grammar: Grammar,
    machine: Callable[[RetrospectiveConfig, Grammar], Any],
    *,
    ids: list[str] | None = None,
    batch_size: int = 8,
    sampler: Sampler | None = None,
) -> list[Answer]:
    """`generate_retrospective` with any state machine and, if given, any sampler."""
    names = check_lists(model, images, prompts, ids, batch_size)
    pictures = [to_pictures(item) for item in images]
    texts = [prompting.render(processor, p, len(own)) for p, own in zip(prompts, pictures, strict=True)]
    header = prompting.header_ids(processor)
    encode = prompting.insertion_encoder(processor)
    jobs = [
        Job(machine(config, grammar), name, header, encode, len(own))
        for name, own in zip(names, pictures, strict=True)
    ]

    def load(indices: Sequence[int]) -> tuple[Prefill, dict[str, Any]]:
        inputs = encode_batch(model, processor, [texts[i] for i in indices], [pictures[i] for i in indices])
        start = prefill(model, inputs, own_cache=not isinstance(backend, RecomputeBackend))
        if machine is not Observer and (config.rewrite_query or config.false_premise):
            _check_header(start.prompts, header)
        return start, inputs

    with rewindable_attention(model), torch.inference_mode():
        backend = choose_backend(model)
        engine = _engine(model, processor, backend, grammar, config, load, batch_size, sampler)
        # rows of a batch should be about equally long, and processors do not mix rows with and without images
        size = [sum(p.width * p.height for p in own) + len(t) for own, t in zip(pictures, texts, strict=True)]
        for with_images in (True, False):
            order = [i for i in range(len(jobs)) if bool(pictures[i]) == with_images]
            engine.run(jobs, sorted(order, key=lambda i: -size[i]))
    return [to_answer(job, prompt, config) for job, prompt in zip(jobs, prompts, strict=True)]


def _engine(
    model, processor, backend, grammar: Grammar, config, load, batch_size: int, sampler=None
) -> Engine:
    suppress = prompting.suppressed_ids(unwrap(model), prompting.tokenizer_of(processor), grammar.ends)
    sampler = sampler or Sampler(top_k=config.top_k, top_p=config.top_p, suppress=suppress)
    rows = 1 if isinstance(backend, RecomputeBackend) else batch_size
    return Engine(
        backend,
        grammar,
        sampler,
        load,
        batch_size=rows,
        seed=config.seed,
        parallel_attempts=1 if isinstance(backend, RecomputeBackend) else config.parallel_attempts,
    )


def check_lists(model, images: list, prompts: list, ids: list | None, batch_size: int) -> list[str]:
    """The rows' names. Raises UserError: lists of different lengths, a batch size below 1, an encoder-decoder model."""
    names = [str(i) for i in range(len(prompts))] if ids is None else [str(i) for i in ids]
    if not len(images) == len(prompts) == len(names):
        raise UserError(
            f"{len(images)} images, {len(prompts)} prompts, {len(names)} ids: the lists must be equally long."
        )
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}, expected an integer >= 1.")
    if unwrap(model).config.is_encoder_decoder:
        raise UserError(
            f"{type(unwrap(model)).__name__} is an encoder-decoder model: decoder-only models are supported."
        )
    return names


def to_pictures(item) -> list[Image.Image]:
    if item is None:
        return []
    return [p.convert("RGB") for p in (item if isinstance(item, list | tuple) else [item])]


def encode_batch(model, processor, texts: list[str], pictures: list[list[Image.Image]]) -> dict[str, Any]:
    """Processor tensors on the model's device, left padded."""
    tokenizer = prompting.tokenizer_of(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so any token will do
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    options["add_special_tokens"] = not prompting.starts_with_bos(tokenizer, texts[0])
    if any(pictures):
        options["images"] = pictures
    return dict(processor(text=texts, **options).to(model.device, dtype=unwrap(model).dtype))


def _check_header(prompts: list[list[int]], header: list[int]) -> None:
    for ids in prompts:
        if ids[len(ids) - len(header) :] != header:
            raise UserError(
                "A prompt does not end with the assistant header that the chat template produces, so the place for "
                "the hint is unknown. Let the template put a special token or a space after the user's text."
            )


def to_answer(job: Job, prompt: str, config: RetrospectiveConfig) -> Answer:
    answer = job.machine.answer()
    job.counts.tokens_kept = answer.counts.tokens_kept
    answer.counts, answer.prompt, answer.id, answer.threshold = job.counts, prompt, job.id, config.threshold
    return answer


class ProcessorSampler(Sampler):
    """A sampler that also applies logits processors, row by row on that row's live ids: histories are ragged."""

    def __init__(self, processors: LogitsProcessorList, **options):
        super().__init__(**options)
        self.processors = processors

    def choose(self, logits: torch.Tensor, rows: Sequence[Any]) -> list[int]:
        processed = [
            self.processors(
                torch.tensor([row.prompt + row.machine.ids], device=logits.device), logits[i : i + 1].clone()
            )
            for i, row in enumerate(rows)
        ]
        return super().choose(torch.cat(processed), rows)


def retrospective_custom_generate(
    model,
    input_ids,
    logits_processor,
    stopping_criteria,
    generation_config,
    rewind: dict[str, Any] | None = None,
    **model_kwargs,
) -> list[Answer]:
    """`model.generate(**inputs, custom_generate=retrospective_custom_generate, rewind={"processor": processor})`.

    `rewind` has "processor", and optionally "config" (a `RetrospectiveConfig` or a dict of its fields), "ids" (row
    names for the random streams). Sampling follows the config; other logits processors (repetition penalty, ...) are
    applied to every row's own live ids. Returns a list of `Answer`.

    Raises:
        UserError: no processor, an unknown setting, a stopping criterion of one's own, or a batch for a model that
            cannot rewind (call `generate_retrospective` then).
    """
    rewind = dict(rewind or {})
    if "processor" not in rewind:
        raise UserError(
            'generate(custom_generate=retrospective_custom_generate) needs rewind={"processor": processor}.'
        )
    unknown = set(rewind) - {"processor", "config", "ids"}
    if unknown:
        raise UserError(f"rewind has unknown keys {sorted(unknown)}; known: processor, config, ids.")
    processor, config = rewind["processor"], _as_config(rewind.get("config"))
    own = [
        type(c).__name__ for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)
    ]
    if own:
        raise UserError(
            f"Stopping criteria {', '.join(own)} look at a fixed text; with rewinds there is none. Remove them."
        )
    grammar = prompting.build_grammar(unwrap(model), processor, required=True)
    header, encode = prompting.header_ids(processor), prompting.insertion_encoder(processor)
    image_ids = {getattr(model.config, n, None) for n in ("image_token_id", "image_token_index")} - {None}
    names = [str(i) for i in rewind.get("ids") or range(len(input_ids))]
    jobs = [
        Job(
            MACHINES[config.profile](config, grammar),
            name,
            header,
            encode,
            int(not image_ids.isdisjoint(row)),
        )
        for name, row in zip(names, input_ids.tolist(), strict=True)
    ]
    warpers = TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper
    processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, warpers))
    sampler = None
    if processors:
        suppress = prompting.suppressed_ids(unwrap(model), prompting.tokenizer_of(processor), grammar.ends)
        sampler = ProcessorSampler(processors, top_k=config.top_k, top_p=config.top_p, suppress=suppress)

    with rewindable_attention(model), torch.inference_mode():
        backend = choose_backend(model)
        replay = isinstance(backend, RecomputeBackend)
        if replay and len(jobs) > 1:
            raise UserError(
                f"{type(model).__name__} cannot rewind its cache: call generate_retrospective for batches."
            )

        def load(indices: Sequence[int]) -> tuple[Prefill, dict[str, Any]]:
            cache = model_kwargs.get("past_key_values") if replay else None
            start = forward_prompt(model, input_ids, model_kwargs, cache)
            _check_header(start.prompts, header)
            skip = ("past_key_values", "position_ids", "attention_mask", "use_cache", "logits_to_keep")
            return start, {k: v for k, v in model_kwargs.items() if k not in skip and v is not None}

        _engine(model, processor, backend, grammar, config, load, len(jobs), sampler).run(jobs)
    return [to_answer(job, "", config) for job in jobs]


def _as_config(value: RetrospectiveConfig | dict | None) -> RetrospectiveConfig:
    if value is None or isinstance(value, RetrospectiveConfig):
        return value or RetrospectiveConfig()
    known = {f.name for f in fields(RetrospectiveConfig)}
    if unknown := set(value) - known:
        raise UserError(
            f"rewind config has unknown fields {sorted(unknown)}; known: {', '.join(sorted(known))}."
        )
    return RetrospectiveConfig(**value)
