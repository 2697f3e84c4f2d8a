"""How a checkpoint is asked: loading it, choosing the threshold, and one call per batch into `decoding`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from ..data.stages import conclusion
from ..data.tags import VERIFICATION_TOKENS
from ..errors import UserError
from ..io import read_json, read_text
from .candidates import REFLECTING, SEARCHING, CandidateConfig, candidate_settings
from .specs import EvalSpec, check_threshold

CONTRASTIVE = ("vcd", "dola")
DECODERS = (
    "greedy",
    "sample",
    "retrospective",
    "drop",
    "stop",
    *CONTRASTIVE,
    "opera",
    "correct",
    *REFLECTING,
    *SEARCHING,
)
VERIFYING = ("retrospective", "drop", "stop")

# (images of each row or None, prompts, ids) -> Answer.to_json() of each
Generate = Callable[[Sequence[list | None], Sequence[str], Sequence[str]], list[dict]]


def check_model_folder(model: str | Path) -> Path:
    folder = Path(model)
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such model folder. Give the folder that training or `vlm-sft-rl merge` wrote."
        )
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder}: neither config.json nor adapter_config.json is in it, so this is no model folder."
        )
    return folder


def model_type(folder: Path) -> str:
    """`model_type` of the checkpoint, or of an adapter's base; empty where the base is not on this machine."""
    config = folder / "config.json"
    if not config.is_file():
        base = Path(str(read_json(folder / "adapter_config.json").get("base_model_name_or_path", "")))
        config = base / "config.json"
        if not config.is_absolute() and not config.is_file():
            config = folder / config
    return str(read_json(config).get("model_type", "")) if config.is_file() else ""


def choose_threshold(spec: EvalSpec, folder: Path, decoder: str, explicit: float | None) -> float | None:
    """tau: the explicit one, else the spec's for this model family, else the checkpoint's own.

    None for decoders that need none.

    Raises:
        UserError: tau out of range or without effect, or the checkpoint has no verification tokens although the decoder
            needs them.
    """
    if explicit is not None:
        explicit = check_threshold(explicit)
    if decoder not in VERIFYING:
        if explicit is not None:
            raise UserError(
                f"--threshold has no effect on --decoder {decoder}; it belongs to {', '.join(VERIFYING)}."
            )
        return None
    from ..models.sidecar import read_sidecar

    sidecar = read_sidecar(folder)
    # every trainer writes a sidecar, also one whose model has no tags; an adapter's tokenizer may lie with its base
    if not knows_tags(folder) and (sidecar is None or (folder / "tokenizer.json").is_file()):
        raise UserError(
            f"{folder}: this model has no verification tokens, which --decoder {decoder} needs. Use --decoder greedy "
            "or sample, or add them with `vlm-sft-rl model prepare` and train with a `method: reverse` recipe."
        )
    if explicit is not None:
        return explicit
    tau = spec.decoding.threshold_for(model_type(folder))
    if tau is None and sidecar is None:
        raise UserError(
            f"{folder}: no vlm_sft_rl.json gives a threshold for this model, nor does the spec. Give --threshold "
            "(REVERSE: 0.003 for captions on LLaVA, 0.01 on Qwen2.5-VL, 0.5 for yes/no questions)."
        )
    return sidecar.threshold if tau is None else tau


def knows_tags(folder: Path) -> bool:
    """Are the three verification tokens in the checkpoint's tokenizer? True for checkpoints of the authors' own code,
    which have no sidecar."""
    for name in ("tokenizer.json", "added_tokens.json"):
        if (folder / name).is_file():
            text = read_text(folder / name)
            if all(json.dumps(token) in text for token in VERIFICATION_TOKENS):
                return True
    return False


def retrospective_settings(spec: EvalSpec, folder: Path, overrides: dict, common: dict) -> dict:
    """All fields of `RetrospectiveConfig`: the spec's, then the checkpoint's own, the overrides, the common ones.

    Raises:
        UserError: a field that does not exist, or a value out of range.
    """
    from ..decoding import RetrospectiveConfig
    from ..decoding.config import configured
    from ..models.sidecar import read_sidecar

    sidecar = read_sidecar(folder)
    own = sidecar.decoding if sidecar else {}
    values = spec.decoding.retrospective | own | overrides | common
    return asdict(configured(RetrospectiveConfig, values, "retrospective decoding"))


def correction_settings(folder: Path, overrides: dict, common: dict) -> dict:
    """All fields of `CorrectionConfig`: how the checkpoint was trained to correct, the overrides, the common ones.

    Raises:
        UserError: a field that does not exist, or a value out of range.
    """
    from ..decoding import CorrectionConfig
    from ..decoding.config import configured
    from ..models.sidecar import read_sidecar

    sidecar = read_sidecar(folder)
    recipe = (sidecar.recipe if sidecar else None) or {}
    trained = {"layout": "layout", "prompt": "correction_prompt", "line": "correction_line"}
    own = {name: recipe[key] for name, key in trained.items() if recipe.get(key) is not None}
    return asdict(configured(CorrectionConfig, own | overrides | common, "correction"))


def searching_settings(spec: EvalSpec, decoder: str, overrides: dict, seed: int) -> dict:
    """All that a decoder of `REFLECTING` or `SEARCHING` reads: the spec's, then the overrides.

    Raises:
        UserError: a setting that does not exist or has no effect, or a value out of range.
    """
    from ..decoding import SearchConfig
    from ..decoding.config import configured

    settings = candidate_settings(decoder, spec.decoding.candidates_for(decoder), overrides)
    if decoder in SEARCHING:
        further = {"seed": seed, **(settings["search"] or {})}
        if clash := sorted({"beams"} & set(further)):
            raise UserError(f"search: {clash[0]} is the number of `candidates`: give that.")
        sampling = {name: settings[name] for name in ("temperature", "top_p")}
        name = decoder.replace("-", "_")
        values = {"search": name, "beams": settings["candidates"], **sampling, **further}
        settings["search"] = asdict(configured(SearchConfig, values, "search"))
    return settings


def opera_settings(overrides: dict) -> dict:
    """All fields of `OperaConfig`: the published ones, the overrides.

    Raises:
        UserError: a field that does not exist, or a value out of range.
    """
    from ..decoding import OperaConfig
    from ..decoding.config import configured

    return asdict(configured(OperaConfig, overrides, "OPERA"))


def read_conclusion(answer: dict) -> dict:
    """An answer in stages is scored by its conclusion alone; the whole of it stays in `tagged_text`."""
    said = conclusion(answer["text"])
    return answer if said is None else {**answer, "text": said}


def load_system(folder: Path, *, device=None, dtype="auto"):
    """`(model, processor)` of a checkpoint, on this process's own GPU."""
    from ..models.load import load_for_inference

    model, processor, _ = load_for_inference(folder, device=device, dtype=dtype)
    return model, processor


def answer_batch(
    model,
    processor,
    settings: dict,
    images: Sequence[list | None],
    prompts: Sequence[str],
    ids: Sequence[str],
    batch_size: int,
) -> list[dict]:
    """`Answer.to_json()` of every prompt.

    Args:
        settings: `decoder`, `seed`, `max_new_tokens`, and `temperature`, `retrospective`, `correction`, `opera` or
            `candidates`.
    """
    from ..decoding import (
        CorrectionConfig,
        DoLaConfig,
        OperaConfig,
        RetrospectiveConfig,
        SamplingConfig,
        VCDConfig,
        generate_corrected,
        generate_dola,
        generate_opera,
        generate_plain,
        generate_retrospective,
        generate_vcd,
    )

    asked = (model, processor, list(images), list(prompts))
    decoder = settings["decoder"]
    if decoder == "retrospective":
        config = RetrospectiveConfig(**settings["retrospective"])
        answers = generate_retrospective(*asked, config, ids=list(ids), batch_size=batch_size)
    elif decoder == "correct":
        corrected = CorrectionConfig(**settings["correction"])
        answers = generate_corrected(*asked, corrected, ids=list(ids), batch_size=batch_size)
    elif decoder == "opera":
        opera = OperaConfig(**settings["opera"] | {"max_new_tokens": settings["max_new_tokens"]})
        answers = generate_opera(*asked, opera, ids=list(ids))
    elif decoder in (*REFLECTING, *SEARCHING):
        answers = _answer_by_candidates(asked, settings, list(ids), batch_size)
    else:
        options = {name: settings[name] for name in ("max_new_tokens", "temperature", "seed")}
        if decoder in CONTRASTIVE:
            config, contrast = {"vcd": (VCDConfig, generate_vcd), "dola": (DoLaConfig, generate_dola)}[
                decoder
            ]
            answers = contrast(*asked, config(**options), ids=list(ids))
        else:
            answers = generate_plain(*asked, SamplingConfig(**options), ids=list(ids), batch_size=batch_size)
    return [read_conclusion(json.loads(json.dumps(answer.to_json()))) for answer in answers]


def _answer_by_candidates(asked: tuple, settings: dict, ids: list[str], batch_size: int) -> list:
    from ..decoding import SamplingConfig, SearchConfig, generate_by, generate_searched
    from ..decoding.search import sample_candidates, self_refine, self_select

    decoder, config = settings["decoder"], CandidateConfig(**settings["candidates"])
    limit = settings["max_new_tokens"]
    if decoder in SEARCHING:
        search = SearchConfig(**config.search | {"max_new_tokens": limit})
        return generate_searched(*asked, search, ids=ids, batch_size=batch_size)
    texts, n = config.texts(), config.candidates
    make = {
        "majority": lambda prompt, _: sample_candidates(prompt, n),
        "self-select": lambda prompt, _: self_select(prompt, n, texts.selecting),
        "self-refine": lambda prompt, _: self_refine(prompt, texts.refining),
    }[decoder]
    sampling = SamplingConfig(
        max_new_tokens=limit,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        seed=settings["seed"],
    )
    return generate_by(*asked, decoder, make, sampling, ids=ids, batch_size=batch_size)


def load_generate(folder: Path, settings: dict, *, batch_size: int, device=None, dtype="auto") -> Generate:
    """Load the checkpoint once and return the function that answers a batch; settings as in `answer_batch`."""
    model, processor = load_system(folder, device=device, dtype=dtype)

    def generate(images: Sequence[list | None], prompts: Sequence[str], ids: Sequence[str]) -> list[dict]:
        return answer_batch(model, processor, settings, images, prompts, ids, batch_size)

    return generate


def answer_of(sample: dict, threshold: float | None = None):
    """The decoder's `Answer` that a line of samples.jsonl was made from."""
    from ..decoding.answers import Answer, Counts, SpanRecord

    return Answer(
        text=sample["answer"],
        tagged_text=sample["tagged_answer"],
        ok=sample["ok"],
        accepted_text=sample["accepted_answer"],
        best_effort_text=sample["best_effort_answer"],
        spans=[SpanRecord(**span) for span in sample["spans"]],
        trace=sample["trace"],
        counts=Counts(**sample["counts"]),
        prompt=sample["prompt"],
        id=sample["id"],
        threshold=threshold,
    )


def trace_writer(output: Path, image_root: Path) -> Callable[[int, dict], str]:
    """(index, sample) -> the page about how the answer came about, written below `output`; "" where it came in one go.

    A page is written for answers on the way to which something was rejected, drawn to choose from, or asked again; its
    address is relative to `output`.
    """
    from ..data.images import open_image
    from ..decoding.trace import write_trace_html

    def write(index: int, sample: dict) -> str:
        if not any(
            event.get("kind") in ("reject", "candidates", "turn", "locate") for event in sample["trace"]
        ):
            return ""
        answer = answer_of(sample)
        images = [open_image(name, image_root) for name in sample["images"]]
        path = write_trace_html(answer, images, output / "traces" / f"{index}.html")
        return path.relative_to(output).as_posix()

    return write
