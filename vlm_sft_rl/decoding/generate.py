"""Entry points for transformers models: Python functions, and a callable for `generate(custom_generate=...)`."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

from ..data import chat
from ..errors import UserError, first_line, short
from ..models.parts import unwrap
from ..models.versions import CACHE
from ..settings import configured
from .answers import Answer, Counts, Grammar, build_grammar
from .cache import Prefill, prefill, prefill_prepared
from .capabilities import backend_for
from .config import RetrospectiveConfig, SamplingConfig
from .engine import Engine, Job
from .machines import DistinctDecoding, Machine, PlainDecoding, StoppedDecoding
from .released import ReleasedRetrospective
from .retrospective import Retrospective
from .sampling import Sampler
from .shared_prefix import worth_sharing
from .vllm_engine import VLLMModel

MACHINES = {"ours": Retrospective, "released": ReleasedRetrospective}
R3V_SAMPLING = SamplingConfig(max_new_tokens=384, temperature=0.9, top_k=50, top_p=0.95)
# most tokens of prompts in one pass: the first is enough for full speed, where each prompt has several answers; the other
# bounds the memory of many prompts side by side (128 of LLaVA's in one pass: above 20 GB with two layers of its widths)
PASS, LARGEST_PASS = 2048, 16_384


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

    Raises UserError: lists of different lengths, no verification tokens, no chat template, an encoder-decoder model.
    """
    config = config or RetrospectiveConfig()
    batch = PromptBatch(model, processor, images, prompts, ids)
    return decode(batch, MACHINES[config.rules], config, batch_size=batch_size)


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

    Raises UserError: as `generate_retrospective`, but models without verification tokens are welcome.
    """
    batch = PromptBatch(model, processor, images, prompts, ids)
    return decode(batch, PlainDecoding, config or SamplingConfig(), batch_size=batch_size)


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
    """Draw `n` answers to each of `prompts` about `images`; the sampling is R3V's (arXiv 2411.00855, released code).

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

    Raises UserError: lists of different lengths, no chat template, an encoder-decoder model, n below 1.
    """
    batch = _several(n, model, processor, images, prompts, ids, prefixes)
    return draw_answers(batch, n, config, stop, batch_size)


def sample_distinct(
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
) -> list[list[Answer]]:
    """Draw `n` different answers to each of `prompts`: sampling without replacement (arXiv 2002.09067), the first answer by
    the law of `sample_many`. A prompt's answers are drawn one behind the other from one prefill, prompts side by side.

    Returns:
        For each prompt `n` answers, or fewer where the model has no others. Counts and traces as of `sample_many`; the event
        `drawn` also has `probability`, that a first draw is this answer (by which `tried.weights` counts).

    Raises UserError: as `sample_many`.
    """
    batch = _several(n, model, processor, images, prompts, ids)
    return draw_distinct(batch, n, config, stop, batch_size)


def _several(n: int, *prompts) -> "PromptBatch":
    """The `PromptBatch` of prompts to each of which `n` answers are drawn."""
    if n < 1:
        raise UserError(f"n = {n}: at least one answer to each prompt must be drawn.")
    return PromptBatch(*prompts)


def _drawn(job: Job) -> list[Answer]:
    answers = []
    for k, draw in enumerate(job.machine.drawn):
        answer = draw.answer()
        kept = answer.counts.tokens_kept
        # what was drawn last is not fed: the end, or the last token of what was cut off
        fed = kept if draw.ended else kept - 1
        answer.counts = Counts(fed, kept, fed, prompt_tokens=job.counts.prompt_tokens)
        answer.id, answer.prompt = f"{job.id}#{k}", job.prompt
        answers.append(answer)
    first, others = answers[0].counts, [answer.counts for answer in answers[1:]]
    first.tokens_forwarded = job.counts.tokens_forwarded - sum(c.tokens_forwarded for c in others)
    first.forwards = job.counts.forwards - sum(c.forwards for c in others)
    first.image_encodes = job.counts.image_encodes
    return answers


class PromptBatch:
    """Prompts that can be prefilled in any selection.

    Args:
        ids: names of the prompts; by default their numbers.
        prefixes: how the answers begin.
        rendered: the prompts as the model reads them, where they are no single questions.

    Attributes:
        names, texts, rendered, pictures: of each prompt.
        image_counts: of each prompt, how many images a prefill of it encodes.
        groups: numbers of prompts in the order of decoding; no prefill mixes two groups.

    Raises UserError: lists of different lengths, an encoder-decoder model, no chat template, marks that do not match.
    """

    def __init__(
        self, model, processor, images: list, prompts: list[str], ids=None, prefixes=None, rendered=None
    ):
        self.model, self.processor, self.texts = model, processor, list(prompts)
        self.names = [str(name) for name in (range(len(prompts)) if ids is None else ids)]
        if not len(images) == len(prompts) == len(self.names):
            raise UserError(
                f"{len(images)} images, {len(prompts)} prompts, {len(self.names)} ids: the lists must be equally long."
            )
        if unwrap(model).config.is_encoder_decoder:
            raise UserError(
                f"{type(unwrap(model)).__name__} is an encoder-decoder model: decoder-only models are supported."
            )
        self.pictures = [to_pictures(item) for item in images]
        self.image_counts = [len(pictures) for pictures in self.pictures]
        self.rendered = rendered or [
            _rendered(processor, *each)
            for each in zip(self.names, self.texts, self.image_counts, strict=True)
        ]
        if prefixes and any(prefixes):
            lead = chat.answer_lead(processor)
            pairs = zip(self.rendered, prefixes, strict=True)
            self.rendered = [text + lead + prefix if prefix else text for text, prefix in pairs]
        # rows of a batch should be about equally long, and processors do not mix rows with and without images
        sizes = [
            sum(picture.width * picture.height for picture in pictures) + len(text)
            for pictures, text in zip(self.pictures, self.rendered, strict=True)
        ]
        order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
        split = ([i for i in order if bool(self.pictures[i]) == with_images] for with_images in (True, False))
        self.groups = [group for group in split if group]
        self._encoded: dict[int, dict[str, Any]] = {}

    def answers_share(self, max_new_tokens: int) -> bool:
        """Whether the answers to a prompt share its row of the cache."""
        lengths = [self._length(group[-1]) for group in self.groups]
        return bool(lengths) and worth_sharing(min(lengths), max_new_tokens)

    def most_loaded(self, tokens: int) -> int | None:
        """The most prompts in a pass of so many tokens. None: any number."""
        lengths = [self._length(group[0]) for group in self.groups]
        return max(1, tokens // max(lengths)) if lengths else None

    def _length(self, i: int) -> int:
        """Tokens of a prompt; what was encoded for that serves for loading it alone."""
        self._encoded[i] = self._encoded.get(i) or self.encode([i])
        return self._encoded[i]["input_ids"].shape[1]

    def encode(self, indices: Sequence[int]) -> dict[str, Any]:
        """What the processor makes of these prompts."""
        texts, pictures = [self.rendered[i] for i in indices], [self.pictures[i] for i in indices]
        return encode_batch(self.model, self.processor, texts, pictures)

    def load(self, indices: Sequence[int], keeps_keys: bool) -> Prefill:
        """The prefill of exactly these prompts, in this order; `keeps_keys` as of the backend."""
        inputs = self._encoded.pop(indices[0], None) if len(indices) == 1 else None
        return prefill(self.model, inputs or self.encode(indices), own_cache=keeps_keys)


class PreparedPrompts:
    """What `decode` needs of a `PromptBatch`, for prompts that `model.generate` has prepared."""

    def __init__(
        self, model, processor, input_ids: torch.Tensor, model_kwargs: dict[str, Any], names: list[str]
    ):
        image_ids = {getattr(model.config, n, None) for n in ("image_token_id", "image_token_index")} - {None}
        self.model, self.processor, self.names = model, processor, names
        self.input_ids, self.model_kwargs = input_ids, model_kwargs
        self.texts = [""] * len(names)
        self.image_counts = [int(not image_ids.isdisjoint(ids)) for ids in input_ids.tolist()]
        self.groups = [list(range(len(names)))]

    def answers_share(self, max_new_tokens: int) -> bool:
        return False

    def most_loaded(self, tokens: int) -> None:
        return None

    def load(self, indices: Sequence[int], keeps_keys: bool) -> Prefill:
        if not keeps_keys and len(self.names) > 1:
            raise UserError(
                f"{type(self.model).__name__} cannot rewind its cache: call generate_retrospective for batches."
            )
        start = prefill_prepared(self.model, self.input_ids, self.model_kwargs, own_cache=keeps_keys)
        skip = (CACHE, "position_ids", "attention_mask", "use_cache", "logits_to_keep")
        start.inputs = {k: v for k, v in self.model_kwargs.items() if k not in skip and v is not None}
        return start


def draw_answers(
    prompts: PromptBatch, n: int, config: SamplingConfig, stop: Sequence[str], batch_size: int
) -> list[list[Answer]]:
    """`sample_many` of prompts at hand."""
    machine = partial(StoppedDecoding, stop=stop)
    answers = decode(prompts, machine, config, n=n, batch_size=batch_size)
    return [answers[i : i + n] for i in range(0, len(answers), n)]


def draw_distinct(
    prompts: PromptBatch, n: int, config: SamplingConfig, stop: Sequence[str], batch_size: int
) -> list[list[Answer]]:
    """`sample_distinct` of prompts at hand."""
    machine = partial(DistinctDecoding, count=n, stop=stop)
    return [_drawn(job) for job in decode_jobs(prompts, machine, config, batch_size=batch_size)]


def decode(
    prompts: PromptBatch | PreparedPrompts,
    machine: Callable[[Any, Grammar], Machine],
    config: SamplingConfig,
    *,
    n: int | None = None,
    batch_size: int = 8,
    sampler: Sampler | None = None,
) -> list[Answer]:
    """Answer every prompt with a machine of its own, on the engine.

    Args:
        n: that many answers to each prompt, one prompt after the other; the id of the k-th ends with "#k".
        sampler: instead of one that `config` describes.
    """
    jobs = decode_jobs(prompts, machine, config, n=n, batch_size=batch_size, sampler=sampler)
    return [job.answer() for job in jobs]


def decode_jobs(
    prompts: PromptBatch | PreparedPrompts,
    machine: Callable[[Any, Grammar], Machine],
    config: SamplingConfig,
    *,
    n: int | None = None,
    batch_size: int = 8,
    sampler: Sampler | None = None,
) -> list[Job]:
    """`decode`, and the machines with all that they have seen."""
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}, expected an integer >= 1.")
    model, processor = prompts.model, prompts.processor
    grammar = build_grammar(unwrap(model), processor, required=isinstance(config, RetrospectiveConfig))
    sampler = sampler or Sampler(**sampling_options(model, processor, config, grammar))
    jobs = []
    for name, text, images in zip(prompts.names, prompts.texts, prompts.image_counts, strict=True):
        ids = [name] if n is None else [f"{name}#{k}" for k in range(n)]
        jobs += [Job(machine(config, grammar), id_, text, images, sampler) for id_ in ids]
    if any(job.machine.rewrites for job in jobs):
        header, encode_insertion = chat.header_ids(processor), chat.insertion_encoder(processor)
        for job in jobs:
            job.header, job.encode_insertion = header, encode_insertion
    if isinstance(model, VLLMModel):
        model.run(jobs, prompts, batch_size)
        return jobs
    several = (n or 1) > 1
    share = several and prompts.answers_share(config.max_new_tokens)
    with backend_for(model, n if share else 1) as backend:
        engine = Engine(
            backend,
            grammar,
            lambda indices: prompts.load(indices, backend.keeps_keys),
            batch_size=batch_size,
            parallel_attempts=getattr(config, "parallel_attempts", 1),
            answers=n or 1,
            load_size=prompts.most_loaded(PASS if several else LARGEST_PASS),
        )
        engine.run(jobs, prompts.groups)
    return jobs


def sampling_options(model, processor, config: SamplingConfig, grammar: Grammar) -> dict[str, Any]:
    """Arguments of a `Sampler`."""
    suppress = chat.suppressed_ids(unwrap(model), chat.get_tokenizer(processor), grammar.ends)
    return {"top_k": config.top_k, "top_p": config.top_p, "suppress": suppress}


def _rendered(processor, name: str, text: str, images: int) -> str:
    """A prompt through the chat template.

    Raises UserError: it is empty, holds half of a character or a token that stands for a picture, or the template refuses
    it.
    """
    if not text.strip():
        raise UserError(f"The prompt {name!r} is empty. Give the question.")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(
            f"The prompt {name!r} holds half of a character: {short(text, 200)}. Write it as UTF-8."
        )
    for token in (getattr(processor, attribute, None) for attribute in ("image_token", "boi_token")):
        if token and token != chat.IMAGE and token in text:
            raise UserError(
                f"The prompt {name!r} holds {token!r}, which this model reads as a picture. Write {chat.IMAGE} where a "
                "picture stands, or leave it out."
            )
    try:
        return chat.render(processor, text, images)
    except UserError:
        raise
    except Exception as error:  # templates raise their own errors, and jinja its own
        raise UserError(
            f"The chat template refuses the prompt {name!r} ({first_line(error)}). Correct it in the model's folder."
        ) from error


def to_pictures(item) -> list[Image.Image]:
    if item is None:
        return []
    return [p.convert("RGB") for p in (item if isinstance(item, list | tuple) else [item])]


def encode_batch(model, processor, texts: list[str], pictures: list[list[Image.Image]]) -> dict[str, Any]:
    """Processor tensors on the model's device, left padded."""
    tokenizer = chat.get_tokenizer(processor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked out, so any token will do
    options: dict[str, Any] = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    options["add_special_tokens"] = not chat.starts_with_bos(tokenizer, texts[0])
    if any(pictures):
        options["images"] = pictures
    try:
        return dict(processor(text=texts, **options).to(model.device, dtype=unwrap(model).dtype))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many types, each processor in its own way
        first = f"{len(pictures[0])} pictures and the text {short(texts[0], 200)}"
        raise UserError(
            f"{type(processor).__name__} refuses {first} ({type(error).__name__}: {first_line(error)})."
        ) from error


class ProcessorSampler(Sampler):
    """A sampler that also applies logits processors, row by row on that row's live ids: histories are ragged."""

    def __init__(self, processors: LogitsProcessorList, **options):
        super().__init__(**options)
        self.processors = processors

    def processed(self, logits: torch.Tensor, rows: Sequence[Any]) -> torch.Tensor:
        processed = [
            self.processors(
                torch.tensor([row.prompt + row.machine.ids], device=logits.device), logits[i : i + 1].clone()
            )
            for i, row in enumerate(rows)
        ]
        return torch.cat(processed)


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

    Raises UserError: no processor, an unknown setting, a stopping criterion of one's own, or a batch for a model that cannot
    rewind (call `generate_retrospective` then).
    """
    rewind = dict(rewind or {})
    if "processor" not in rewind:
        raise UserError(
            'generate(custom_generate=retrospective_custom_generate) needs rewind={"processor": processor}.'
        )
    unknown = set(rewind) - {"processor", "config", "ids"}
    if unknown:
        raise UserError(f"rewind has unknown keys {sorted(unknown)}; known: processor, config, ids.")
    processor, config = rewind["processor"], rewind.get("config") or {}
    if not isinstance(config, RetrospectiveConfig):
        config = configured(RetrospectiveConfig, config, "rewind config")
    further = [
        type(c).__name__ for c in stopping_criteria if not isinstance(c, EosTokenCriteria | MaxLengthCriteria)
    ]
    if further:
        raise UserError(
            f"Stopping criteria {', '.join(further)} look at a fixed text; with rewinds there is none. Remove them."
        )
    names = [str(name) for name in rewind.get("ids") or range(len(input_ids))]
    prompts = PreparedPrompts(model, processor, input_ids, model_kwargs, names)
    warpers = TemperatureLogitsWarper | TopKLogitsWarper | TopPLogitsWarper
    processors = LogitsProcessorList(p for p in logits_processor if not isinstance(p, warpers))
    sampler = None
    if processors:
        grammar = build_grammar(unwrap(model), processor, required=True)
        sampler = ProcessorSampler(processors, **sampling_options(model, processor, config, grammar))
    return decode(prompts, MACHINES[config.rules], config, batch_size=len(names), sampler=sampler)
