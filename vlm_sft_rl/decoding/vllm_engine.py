"""Decoding on vLLM: the state machines and the sampler of the other engine, over the logits of vLLM.

One request decodes a stretch of an answer. In every step a logits processor draws the token of each row by `engine.draw`,
from the row's own random stream and without what was tried, and leaves vLLM that one to choose; the machines take the tokens
before the next step begins. Where a machine goes back, rewrites the question, or has another token in its answer than the
drawn one, the request is aborted, and the next one begins with the tokens that are kept: their keys are in vLLM's prefix
cache, all but those of its last block. vLLM is imported when a model is loaded.
"""

import gc
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import psutil
import torch
from transformers import AutoConfig, GenerationConfig

from ..data import chat
from ..errors import UserError, first_line
from ..models.load import adapter_base, check_config, is_adapter, processor_for_inference
from ..models.vllm_names import for_vllm
from ..models.weights import weight_files
from .engine import Job, Row, draw
from .machines import CONTINUE, FINISH, Rewind
from .sampling import row_rng

# vLLM's settings of this process; those of the user's environment go before
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# what the logits processor needs: it reads the machines, so it lives in their process
REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
CPU_BLOCK = 32  # tokens; attention on a CPU takes multiples of it
CPU_SHARE = 0.7  # of the memory that is free, for weights and keys, at the most


def load_vllm(
    folder: str | Path, device: str | None, dtype: str, in_flight: int, **options: Any
) -> tuple["VLLMModel", Any]:
    """A checkpoint in vLLM, and its processor.

    Args:
        options: further arguments of vLLM's `EngineArgs`.

    Raises UserError: an adapter, a device (vLLM has that which it was built for), no chat template, or a checkpoint that
    vLLM cannot run.
    """
    if device is not None:
        raise UserError(f"--engine vllm runs on what it was built for: leave out the device {device!r}.")
    folder = for_vllm(folder)
    check_config(folder)
    processor = processor_for_inference(folder)
    return VLLMModel(folder, dtype, in_flight, **options), processor


def engine_config(folder: str | Path, dtype: str, in_flight: int, **options: Any) -> Any:
    """vLLM's `VllmConfig` of a checkpoint; no weight is read. Arguments are those of `VLLMModel`.

    Raises UserError: vLLM cannot run this checkpoint, as far as its configuration tells.
    """
    _set_environment()
    from vllm import EngineArgs
    from vllm.platforms import current_platform
    from vllm.usage.usage_lib import UsageContext

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        free = psutil.virtual_memory().available / psutil.virtual_memory().total
        # its default takes nearly all memory there is, and refuses to start where others use some
        options = {
            "block_size": CPU_BLOCK,
            "enforce_eager": True,
            "gpu_memory_utilization": round(CPU_SHARE * free, 2),
            **options,
        }
    if dtype == "auto":
        dtype = "float32" if on_cpu else "bfloat16"
    arguments = {
        "model": str(folder),
        "dtype": dtype,
        "max_model_len": -1,  # what fits into the memory
        "max_num_seqs": in_flight,
        "enable_prefix_caching": True,
        "async_scheduling": False,
        "disable_log_stats": True,
        "seed": 0,
    }
    try:
        config = EngineArgs(**arguments | options).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except Exception as error:  # of many types
        raise _cannot_run(folder, error) from error
    if on_cpu:
        _fit_keys(config, sum(path.stat().st_size for path in weight_files(Path(folder))))
    return config


def check_runs(model: str | Path) -> None:
    """Whether vLLM knows model and processor of a checkpoint, or of an adapter's base, before work whose end needs them;
    no weight is read.

    Raises UserError: vLLM cannot run the family.
    """
    folder = adapter_base(model) if is_adapter(model) else model
    config = engine_config(folder, "auto", 1)
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    renderer = renderer_from_config(config)
    try:
        InputProcessor(config, renderer)  # counts the tokens of a picture
    except Exception as error:  # of many types
        raise _cannot_run(folder, error) from error
    finally:
        renderer.shutdown()


def _fit_keys(config: Any, stored: int) -> None:
    """On a CPU: room for the keys of all answers at their longest, where vLLM would take more than that.

    Args:
        stored: bytes of the checkpoint's weights on the disk.
    """
    cache, model, parallel = config.cache_config, config.model_config, config.parallel_config
    if cache.kv_cache_memory_bytes is not None or model.is_hybrid:  # VLLM_CPU_KVCACHE_SPACE, or an option
        return
    size, heads = model.dtype.itemsize, model.get_num_kv_heads(parallel) * model.get_head_size()
    token = 2 * size * model.get_num_layers(parallel) * heads
    blocks = 1 + config.scheduler_config.max_num_seqs * (1 + -(-model.max_model_len // cache.block_size))
    needed = blocks * cache.block_size * token
    # weights of 16 bits may be stored
    weights = stored * size // 2 + psutil.Process().memory_info().rss
    if needed < psutil.virtual_memory().total * cache.gpu_memory_utilization - weights:
        cache.kv_cache_memory_bytes = needed


def _set_environment() -> None:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ.update(REQUIRED)


def _cannot_run(folder: str | Path, error: Exception) -> UserError:
    from pydantic import ValidationError  # vLLM's settings are checked by it; its first line is a count

    reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else first_line(error)
    return UserError(
        f"{folder}: vLLM cannot run this checkpoint ({reason:.200}). Use --engine hf, which runs every family of "
        "docs/families.md."
    )


@dataclass(frozen=True)
class VLLMPrompt:
    """A prompt as vLLM takes it.

    Attributes:
        ids: its tokens, of which a picture is one; tail: how many of them stand behind the last picture.
        names: what vLLM knows the pictures by: equal ones are encoded once.
        expanded: the tokens that the processor makes of it, to be compared with those that vLLM makes; None: they are not.
    """

    ids: list[int]
    tail: int
    pictures: list
    names: list[str]
    expanded: list[int] | None

    @classmethod
    def read(cls, processor, text: str, pictures: list, expanded: list[int] | None = None) -> "VLLMPrompt":
        """A prompt that the chat template wrote."""
        ids = chat.encode_text(processor, text)
        tail = len(ids) - (chat.image_end(processor, ids) or 0)
        names = []
        for picture in pictures:
            content = hashlib.sha256(f"{picture.size}".encode())
            content.update(picture.tobytes())
            names.append(content.hexdigest())
        return cls(ids, tail, pictures, names, expanded)


class VLLMModel:
    """A checkpoint in vLLM. It stands where the decoders take a model of transformers, and runs jobs as `Engine` does: all
    of a list (`run`), or whatever is admitted while others decode (`admit`, `step`).

    Args:
        folder: a whole checkpoint, as `models.vllm_names.for_vllm` gives it.
        dtype: `auto` is bfloat16 on a GPU and float32 on a CPU.
        in_flight: most answers that are decoded side by side.
        options: further arguments of vLLM's `EngineArgs`.

    Attributes:
        config, generation_config: those of the checkpoint.
        traffic: `requests`, their `prompt_tokens`, how many of these were `cached`, and the tokens `drawn`.
        prompts_seen: where it is a dict, the tokens that vLLM makes of each job's prompt, by the job's id; then none are
            refused for being others than the processor's.

    Raises UserError: vLLM cannot run this checkpoint; its reason is quoted.
    """

    device, dtype = "cpu", torch.float32  # of what a processor gives

    def __init__(self, folder: str | Path, dtype: str = "auto", in_flight: int = 128, **options: Any):
        _choose_gpu()
        _set_environment()
        from vllm.v1.engine.llm_engine import LLMEngine

        self.folder = Path(folder)
        self.config = AutoConfig.from_pretrained(folder)
        self.generation_config = _generation_config(self.folder)
        self.in_flight, self.traffic = in_flight, Counter()
        self._numbers = count()
        self._live: dict[int, _Row] = {}
        self._fault: Exception | None = None  # of the draws of a step
        self.prompts_seen: dict[str, list[int]] | None = None
        self._expands = False  # whether vLLM was seen to expand a picture as the processor does
        choose = [_processor(self._live, self._choose)]
        config = engine_config(folder, dtype, in_flight, logits_processors=choose, **options)
        try:
            self.engine = LLMEngine.from_vllm_config(config, disable_log_stats=True)
        except Exception as error:  # of many types
            raise _cannot_run(folder, error) from error

    @property
    def longest(self) -> int:
        """Most tokens of a prompt, pictures included, and its answer."""
        return self.engine.model_config.max_model_len

    @property
    def rows(self) -> list["_Row"]:
        """Of the jobs that are not finished."""
        return list(self._live.values())

    def run(self, jobs: Sequence[Job], prompts, batch_size: int) -> None:
        """Decode all jobs; results are in their machines and counts.

        Args:
            prompts: a `generate.PromptBatch`; every prompt has equally many jobs, one prompt after the other.
            batch_size: most requests in flight; vLLM takes up `in_flight` of them at a time.

        Raises UserError: a prompt that vLLM refuses, or an answer that is longer than the model's positions. NotFinite: the
        model's logits are no numbers.
        """
        share = len(jobs) // max(1, len(prompts.names))
        waiting = list(enumerate(jobs))[::-1]
        prompt: dict[int, VLLMPrompt] = {}
        compare = not self._expands and self.prompts_seen is None  # once a model
        try:
            while waiting or self._live:
                while waiting and len(self._live) < batch_size:
                    number, job = waiting.pop()
                    place = number // share
                    if place not in prompt:
                        expanded = None
                        if compare and prompts.pictures[place]:
                            expanded, compare = prompts.encode([place])["input_ids"][0].tolist(), False
                        parts = prompts.rendered[place], prompts.pictures[place]
                        prompt = {place: VLLMPrompt.read(prompts.processor, *parts, expanded)}
                    self.admit(job, prompt[place])
                for _, error in self.step():
                    raise error
        finally:
            self.clear()

    def admit(self, job: Job, prompt: VLLMPrompt) -> None:
        """A new row. Raises UserError: vLLM refuses the prompt."""
        self._request(_Row(job, prompt, _Uniforms(row_rng(job.machine.config.seed, job.id))))

    def step(self) -> list[tuple[Job, UserError]]:
        """A token for every row, or a part of its prompt. Returns the jobs that had to be given up, and why.

        Raises NotFinite: the model's logits are no numbers.
        """
        outputs, failed = self.engine.step(), []
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        for output in outputs:
            row = self._live.get(int(output.request_id))
            if row is not None:
                try:
                    self._take(row, output)
                except UserError as error:
                    self.remove(row.job)
                    failed.append((row.job, error))
        return failed

    def remove(self, job: Job) -> None:
        """Give up a job that is not finished."""
        self._abort([number for number, row in self._live.items() if row.job is job])

    def clear(self) -> None:
        """Give up all jobs."""
        self._abort(list(self._live))

    def close(self) -> None:
        """Give the memory back. vLLM ends with it what all models of the process share: no other may still be in use."""
        self.engine.engine_core.shutdown()
        self.engine = None  # vLLM itself keeps its logits processor, by which it would keep the weights
        gc.collect()

    def _abort(self, numbers: list[int]) -> None:
        for number in numbers:
            del self._live[number]
        self.engine.abort_request([str(number) for number in numbers])

    def _choose(self, logits: torch.Tensor, rows: list["_Row"]) -> list[int]:
        """`_draw` inside of vLLM, which does not go on after an error in the middle of a step."""
        try:
            return self._draw(logits, rows)
        except Exception as error:
            self._fault = error
            return [0] * len(rows)

    def _draw(self, logits: torch.Tensor, rows: list["_Row"]) -> list[int]:
        """The next tokens of rows, and what their machines are told of them."""
        tokens = draw(logits, rows)
        probabilities: list[float | None] = [None] * len(rows)
        if any(row.machine.every_probability for row in rows):
            probabilities = rows[0].job.sampler.probabilities(logits, tokens)
        for i, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            row.probability = probabilities[i] if row.machine.every_probability else None
            grammar = row.machine.grammar
            if token in grammar.closes:
                row.probability = row.job.sampler.p_unconfident(logits[i], row, grammar.unconfident)
        return tokens

    def _request(self, row: "_Row") -> None:
        """Let vLLM go on behind what the row holds."""
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind

        number = next(self._numbers)
        prompt: dict[str, Any] = {"prompt_token_ids": row.tokens()}
        pictures = row.source.pictures
        if pictures:
            prompt["multi_modal_data"] = {"image": pictures}
            prompt["multi_modal_uuids"] = {"image": row.source.names}
        params = SamplingParams(
            temperature=0.0,  # one token is left to choose from
            max_tokens=None,
            ignore_eos=True,  # the machine ends the answer
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args={"row": number},
            skip_clone=True,
        )
        row.begun = False
        self._live[number] = row
        try:
            self.engine.add_request(str(number), prompt, params)
        except (ValueError, VLLMClientError) as error:
            del self._live[number]
            raise UserError(
                f"{row.place}: vLLM refuses {len(prompt['prompt_token_ids'])} tokens and {len(pictures)} images "
                f"({first_line(error)}). Shorten the prompt or --max-new-tokens, or use --engine hf."
            ) from error

    def _take(self, row: "_Row", output) -> None:
        """Give a request's new tokens to its machine."""
        if not row.begun:
            self._count_prompt(row, output.prompt_token_ids, output.num_cached_tokens or 0)
        for token in output.outputs[0].token_ids:
            row.rng.use()
            row.job.counts.forwards += 1
            row.job.counts.tokens_forwarded += row.begun
            row.begun = True
            self.traffic["drawn"] += 1
            machine, length = row.machine, len(row.machine.ids)
            action = machine.observe(token, row.probability)
            if isinstance(action, Rewind) and action.rewrite:
                row.insertion = row.job.encode_insertion(machine.insertion) if machine.insertion else []
            streams = action == CONTINUE and machine.ids[length:] == [token]
            if streams and output.finished:
                raise UserError(
                    f"{row.place}: prompt and answer are longer than the {self.engine.model_config.max_model_len} tokens "
                    "that vLLM has room for. Shorten the prompt or --max-new-tokens, or use --engine hf."
                )
            if not streams:
                del self._live[int(output.request_id)]
                if not output.finished:
                    self.engine.abort_request([output.request_id])
                if action != FINISH:
                    self._request(row)
                return

    def _count_prompt(self, row: "_Row", prompt: list[int], cached: int) -> None:
        counts = row.job.counts
        if not counts.prompt_tokens:
            if self.prompts_seen is None:
                self._check_expansion(row, prompt)
            else:
                self.prompts_seen[row.job.id] = list(prompt)
            counts.prompt_tokens = len(prompt)
            row.image_end = len(prompt) - row.source.tail
        counts.tokens_forwarded += len(prompt) - cached
        if cached < row.image_end:
            counts.image_encodes += row.job.images
        self.traffic.update(requests=1, prompt_tokens=len(prompt), cached=cached)

    def _check_expansion(self, row: "_Row", prompt: list[int]) -> None:
        """vLLM puts the tokens of a picture in its place by code of its own, for each family."""
        expected = row.source.expanded
        if expected is None:
            return
        if prompt != expected:
            raise UserError(
                f"{self.folder}: vLLM makes {len(prompt)} tokens of the prompt of {row.job.id!r} and its picture, "
                f"transformers {len(expected)}, or others: the model was trained on the latter. Use --engine hf."
            )
        self._expands = True


class _Row(Row):
    """A row whose keys vLLM holds.

    Attributes:
        source: its prompt; image_end: where the last picture ends in the tokens that vLLM makes of it.
        probability: what the machine is told of the token just drawn.
        begun: the request has given a token.
    """

    def __init__(self, job: Job, source: VLLMPrompt, rng: "_Uniforms"):
        super().__init__(job, source.ids, rng)
        self.source, self.image_end = source, 0
        self.probability: float | None = None
        self.begun = False

    def tokens(self) -> list[int]:
        """Everything that the next token follows; a picture is one token."""
        return self.prompt[: self.cut] + self.insertion + self.job.header + self.machine.ids


class _Uniforms:
    """A random stream whose next number stays until it is used: vLLM also draws behind a part of a prompt, where it has no
    room for the whole, and throws that token away."""

    def __init__(self, stream: Random):
        self.stream, self.value = stream, None

    def random(self) -> float:
        if self.value is None:
            self.value = self.stream.random()
        return self.value

    def use(self) -> None:
        self.value = None


def _processor(live: dict[int, _Row], choose: Callable[[torch.Tensor, list[_Row]], list[int]]) -> type:
    """The class of vLLM's logits processor that leaves each row of `live` one token, that of `choose`."""
    from vllm.v1.sample.logits_processor import LogitsProcessor
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates

    class DrawnTokens(LogitsProcessor):
        def __init__(self, vllm_config, device, is_pin_memory):
            self.numbers: dict[int, int] = {}  # place in vLLM's batch -> number of the request

        def is_argmax_invariant(self) -> bool:
            return False

        def update_state(self, batch_update) -> None:
            # text, because vLLM's function takes a number 0 for nothing
            process_dict_updates(
                self.numbers, batch_update, lambda params, *_: str((params.extra_args or {}).get("row", ""))
            )

        def apply(self, logits: torch.Tensor) -> torch.Tensor:
            places = [i for i, number in sorted(self.numbers.items()) if number and int(number) in live]
            if not places:
                return logits
            rows = [live[int(self.numbers[i])] for i in places]
            tokens = choose(logits if places == list(range(len(logits))) else logits[places], rows)
            logits.fill_(float("-inf"))
            logits[places, tokens] = 0.0
            return logits

    return DrawnTokens


def _generation_config(folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))


def _choose_gpu() -> None:
    """Of several processes on a machine each has a GPU of its own; vLLM takes the first that it sees."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[int(rank)]
