"""Entry points for transformers models: Python functions, and a callable for `generate(custom_generate=...)`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from ..data import chat as prompting
from ..errors import UserError
from ..models.parts import unwrap
from ..settings import configured
from .answers import Answer, Grammar, build_grammar
from .cache import Prefill, RecomputeBackend, forward_prompt, prefill
from .capabilities import choose_backend, rewindable_attention
from .config import RetrospectiveConfig, SamplingConfig
from .engine import Engine, Job
from .released import ReleasedRetrospective
from .retrospective import CONTINUE, FINISH, PlainDecoding, Retrospective
from .sampling import Sampler
from .shared_prefix import worth_sharing

MACHINES = {"ours": Retrospective, "released": ReleasedRetrospective}
R3V_SAMPLING = SamplingConfig(max_new_tokens=384, temperature=0.9, top_k=50, top_p=0.95)


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
    grammar = build_grammar(unwrap(model), processor, required=True)
    machine = MACHINES[config.rules]
    return decode_with(
        model, processor, images, prompts, config, grammar, machine, ids=ids, batch_size=batch_size
    )


def generate_plain(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: SamplingConfig | None = None,
    *,
    ids: list[str] | None = None,
    batch_size: int = 8,
) -> list[Answer]:
    """Ordinary decoding by the same engine; with verification tokens the spans carry P(</UN>).

    Raises:
        UserError: as `generate_retrospective`, but models without verification tokens are welcome.
    """
    config = config or SamplingConfig()
    grammar = build_grammar(unwrap(model), processor, required=False)
    answers = decode_with(
        model, processor, images, prompts, config, grammar, PlainDecoding, ids=ids, batch_size=batch_size
    )
    return answers


def decode_with(
    model,
    processor,
    images: list,
    prompts: list[str],
    config: SamplingConfig,
    grammar: Grammar,
    machine: Callable[[Any, Grammar], Any],
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
        if getattr(config, "rewrite_query", False) or getattr(config, "false_premise", False):
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
    suppress = prompting.suppressed_ids(unwrap(model), prompting.get_tokenizer(processor), grammar.ends)
    sampler = sampler or Sampler(top_k=config.top_k, top_p=config.top_p, suppress=suppress)
    rows = 1 if isinstance(backend, RecomputeBackend) else batch_size
    return Engine(
        backend,
        grammar,
        sampler,
        load,
        batch_size=rows,
        seed=config.seed,
        parallel_attempts=1
        if isinstance(backend, RecomputeBackend)
        else getattr(config, "parallel_attempts", 1),
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
    tokenizer = prompting.get_tokenizer(processor)
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


def to_answer(job: Job, prompt: str, config: SamplingConfig) -> Answer:
    answer = job.machine.answer()
    job.counts.tokens_kept = answer.counts.tokens_kept
    answer.counts, answer.prompt, answer.id = job.counts, prompt, job.id
    answer.threshold = getattr(config, "threshold", None)
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
    grammar = build_grammar(unwrap(model), processor, required=True)
    header, encode = prompting.header_ids(processor), prompting.insertion_encoder(processor)
    image_ids = {getattr(model.config, n, None) for n in ("image_token_id", "image_token_index")} - {None}
    names = [str(i) for i in rewind.get("ids") or range(len(input_ids))]
    jobs = [
        Job(
            MACHINES[config.rules](config, grammar),
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
        suppress = prompting.suppressed_ids(unwrap(model), prompting.get_tokenizer(processor), grammar.ends)
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
    return configured(RetrospectiveConfig, value, "rewind config")


# N answers to each prompt: prompt and images are computed once for all of them, and their keys held once.
PASS = 2048  # tokens of prompts in one pass: enough for full speed; more costs memory, and on a CPU time
STOP_WINDOW = 24  # tokens decoded behind the last one to look for a stop string


class StoppedDecoding(PlainDecoding):
    """Plain decoding that ends at the first of some strings; the answer ends before it. It also keeps the mean
    log-probability of its tokens."""

    every_probability = True

    def __init__(self, config: SamplingConfig, grammar: Grammar, stop: Sequence[str]):
        super().__init__(config, grammar)
        self.stop = tuple(stop)
        self.log_probs: list[float] = []

    def observe(self, token: int, p_unconfident: float | None = None):
        action = super().observe(token, p_unconfident)
        if p_unconfident is not None and token not in self.grammar.closes:
            self.log_probs.append(math.log(max(p_unconfident, 1e-12)))
        if action == CONTINUE and self.stop:
            # a string is found when its last character comes: a window of the end is enough
            tail = self.grammar.decode(self.ids[-STOP_WINDOW:])
            if any(text in tail for text in self.stop):
                return FINISH
        return action

    def answer(self) -> Answer:
        answer = super().answer()
        mean = sum(self.log_probs) / max(1, len(self.log_probs))
        answer.trace.append({"kind": "drawn", "log_prob": mean})
        cut = min((at for s in self.stop if (at := answer.text.find(s)) >= 0), default=None)
        if cut is not None:
            answer.text = answer.accepted_text = answer.best_effort_text = answer.text[:cut].rstrip()
        return answer


def sample_many(
    model,
    processor,
    images: list,
    prompts: list[str],
    n: int,
    config: SamplingConfig = R3V_SAMPLING,
    *,
    stop: Sequence[str] = (),
    ids: list[str] | None = None,
    batch_size: int = 24,
    prefixes: list[str] | None = None,
) -> list[list[Answer]]:
    """Draw `n` answers to each of `prompts` about `images`; the defaults are R3V's (arXiv 2411.00855, released code).

    Args:
        images: per prompt a PIL image, a list of PIL images, or None.
        stop: strings at which an answer ends; they are left out.
        ids: names of the prompts; answer k of prompt `a` is drawn from the stream (seed, "a#k") alone, so it depends
            neither on its batch nor on `n`.
        batch_size: answers decoded side by side.
        prefixes: how the answers to each prompt begin; they are continued and the beginning is not repeated.

    Returns:
        A list of `n` answers for each prompt. The first one's counts carry the prefill and the image encodes. Each trace
        ends with the event `{"kind": "drawn", "log_prob"}`, the mean log-probability of the answer's tokens.

    Raises:
        UserError: lists of different lengths, no chat template, an encoder-decoder model, a setting out of range.
    """
    if n < 1:
        raise UserError(f"n = {n}: at least one answer to each prompt must be drawn.")
    names = check_lists(model, images, prompts, ids, batch_size)
    pictures = [to_pictures(item) for item in images]
    texts = [prompting.render(processor, p, len(own)) for p, own in zip(prompts, pictures, strict=True)]
    if prefixes is not None:
        lead = prompting.answer_lead(processor)
        texts = [text + (lead + begun if begun else "") for text, begun in zip(texts, prefixes, strict=True)]
    with rewindable_attention(model), torch.inference_mode():
        # rows of a batch should be about equally long, and processors do not mix rows with and without images
        size = [sum(p.width * p.height for p in own) + len(t) for own, t in zip(pictures, texts, strict=True)]
        groups = []
        for with_images in (True, False):
            chosen = [i for i in range(len(texts)) if bool(pictures[i]) == with_images]
            groups.append(sorted(chosen, key=lambda i: -size[i]))
        kept: dict[tuple[int, ...], dict[str, Any]] = {}

        def encode(indices: Sequence[int]) -> dict[str, Any]:
            found = kept.pop(tuple(indices), None)
            own = [texts[i] for i in indices], [pictures[i] for i in indices]
            return found if found is not None else encode_batch(model, processor, *own)

        def length(i: int) -> int:
            kept[(i,)] = encode([i])
            return kept[(i,)]["input_ids"].shape[1]

        copies, load_size = 1, None
        if n > 1 and texts:
            longest = max(length(group[0]) for group in groups if group)
            shortest = min(length(group[-1]) for group in groups if group)
            copies = n if worth_sharing(shortest, config.max_new_tokens) else 1
            load_size = max(1, PASS // longest)
        backend = choose_backend(model, copies)
        shared = not isinstance(backend, RecomputeBackend)

        def load(indices: Sequence[int]) -> tuple[Any, dict[str, Any]]:
            inputs = encode(indices)
            return prefill(model, inputs, own_cache=shared), inputs

        counts = [len(own) for own in pictures]
        return draw_loaded(
            model,
            processor,
            backend,
            load,
            groups,
            names,
            prompts,
            n,
            config,
            stop,
            batch_size,
            counts,
            load_size,
        )


def draw_loaded(
    model,
    processor,
    backend,
    load: Callable[[Sequence[int]], tuple[Any, Any]],
    groups: Sequence[Sequence[int]],
    names: Sequence[str],
    prompts: Sequence[str],
    n: int,
    config: SamplingConfig,
    stop: Sequence[str],
    batch_size: int,
    images: Sequence[int],
    load_size: int | None = None,
) -> list[list[Answer]]:
    """`sample_many` of prompts that `load` prefills; to be called inside of `rewindable_attention`.

    Args:
        backend: of `choose_backend(model, copies)`, copies being 1 or n.
        load: numbers of prompts -> `(Prefill, inputs)` of exactly these, in this order.
        groups: the order in which prompts are taken; no prefill mixes two groups.
        images: per prompt how many of them `load` encodes.
        load_size: most prompts in one call of `load`.
    """
    shared = not isinstance(backend, RecomputeBackend)
    grammar = build_grammar(unwrap(model), processor, required=False)
    stop = tuple(text for text in stop if text)
    jobs = [
        Job(StoppedDecoding(config, grammar, stop), f"{name}#{k}", images=count)
        for name, count in zip(names, images, strict=True)
        for k in range(n)
    ]
    suppress = prompting.suppressed_ids(unwrap(model), prompting.get_tokenizer(processor), grammar.ends)
    engine = Engine(
        backend,
        grammar,
        Sampler(top_k=config.top_k, top_p=config.top_p, suppress=suppress),
        load if shared else lambda indices: load([i // n for i in indices]),
        batch_size=batch_size if shared else 1,
        seed=config.seed,
        copies=n if shared else 1,
        load_size=load_size,
    )
    for group in groups:
        engine.run(jobs, group if shared else [i * n + k for i in group for k in range(n)])
    answers = [to_answer(job, prompts[i // n], config) for i, job in enumerate(jobs)]
    return [answers[i * n : (i + 1) * n] for i in range(len(prompts))]
