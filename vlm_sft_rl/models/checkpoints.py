"""A checkpoint in, a checkpoint out: verification tokens added (`prepare`), an adapter merged (`merge`), a LLaVA in its
authors' format turned into one of transformers (`convert`)."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from ..data.chat import check_processor_works, get_tokenizer, load_processor, render
from ..data.model_files import check_tokenizer_file
from ..data.tags import CONFIDENT, OPEN
from ..errors import UserError, first_line
from ..io import give_user_mode, make_folder, new_folder, read_text, require_absent, writing
from .card import write_card
from .load import (
    check_config,
    is_adapter,
    load_adapter,
    load_for_inference,
    load_model,
    own_device,
    processor_source,
    read_config,
)
from .sidecar import Sidecar, read_sidecar, with_base, write_sidecar
from .tokens import (
    add_verification_tokens,
    embedding_matrices,
    embedding_rows,
    fill_rows,
    resize_if_needed,
)
from .weights import (
    FAILED_RUN,
    INDEX,
    check_finite,
    check_loaded,
    check_types,
    weight_files,
    without_loading_report,
)

# thresholds of REVERSE (arXiv 2504.13169, section 4) for captions and open questions
THRESHOLD, QWEN_THRESHOLD = 0.003, 0.01
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")
# relative distance of logits that rounding the merged weights explains
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def save_model(model, processor, target: str | Path) -> Path:
    """Write weights (safetensors), configs, processor, tokenizer and template to `target`."""
    target = Path(target)
    check_finite(
        model.state_dict().items(), "what is to be written", "Nothing is. Try again with --dtype float32."
    )
    cure_generation_config(model.generation_config)
    with writing(target):
        make_folder(target)
        model.save_pretrained(target)
        processor.save_pretrained(target)
        give_user_mode(target)
    return target


def save_checkpoint(model, processor, target: str | Path, sidecar: Sidecar) -> Path:
    """`save_model`, and the sidecar."""
    save_model(model, processor, target)
    write_sidecar(target, sidecar)
    return Path(target)


def cure_generation_config(config: GenerationConfig) -> None:
    """Unset sampling flags that contradict `do_sample=False`; transformers refuses to save such a config.

    Vicuna's and LLaVA's published configs are of this kind (temperature and top_p, no do_sample).
    """
    for flag in SAMPLING_FLAGS:
        if not config.do_sample and getattr(config, flag, None) is not None:
            setattr(config, flag, None)


def check_apart(source: str | Path, target: str | Path, what: str = "source") -> None:
    """Raises UserError: what is read and what is written are one folder."""
    if Path(source).exists() and Path(source).resolve() == Path(target).resolve():
        raise UserError(f"{target}: {what} and target are the same folder. Choose another target.")


def prepare(
    source: str | Path,
    target: str | Path,
    init: str = "mean",
    *,
    seed: int = 0,
    dtype: str = "auto",
    threshold: float | None = None,
    chat_template: str | Path | None = None,
) -> list[int]:
    """Load `source`, add the verification tokens, write an ordinary checkpoint directory with a sidecar.

    Args:
        source: directory or Hub name of any vision-language model.
        target: directory to write; it appears when it is whole.
        init: `mean` or `semantic`, see `add_verification_tokens`.
        dtype: `auto` keeps the checkpoint's own.
        threshold: default tau for decoding; None takes the paper's for the family.
        chat_template: `vicuna`, `llama3`, or a Jinja file; None keeps the checkpoint's own. Those of `llava-hf` checkpoints
            lack the system sentence that LLaVA was trained with.

    Returns:
        The ids of the three tokens.

    Raises UserError: no loadable model in `source`, or `target` exists.
    """
    check_apart(source, target)
    require_absent(target)
    check_config(source)
    processor = load_processor(source)
    if chat_template is not None:
        processor.chat_template = template_for(processor, chat_template)
        check_processor_works(processor, chat_template)
    model = load_model(source, dtype=dtype)
    ids = add_verification_tokens(model, processor, init=init, seed=seed)
    if threshold is None:
        threshold = QWEN_THRESHOLD if model.config.model_type.startswith("qwen") else THRESHOLD
    sidecar = with_base(read_sidecar(source) or Sidecar(threshold=threshold), source)
    with new_folder(target) as folder:
        save_checkpoint(model, processor, folder, sidecar)
    return ids


@dataclass(frozen=True)
class MergeReport:
    """Distances of logits, ||a - b|| / ||b||, over a probe (one picture, one tagged sentence).

    Attributes:
        effect: base against adapter: what training changed.
        error: merged checkpoint, read back from disk, against adapter: what merging lost.
        tolerance: the largest error that rounding explains.
    """

    effect: float
    error: float
    tolerance: float
    dtype: str
    path: str


def merge(
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
    name: str | None = None,
) -> MergeReport:
    """Fold LoRA, projector and token rows into the base and write an ordinary checkpoint directory.

    The LoRA products are computed in float32 and rounded once to the checkpoint's dtype (`dtype="auto"` keeps the
    base's). What was written is loaded again and its logits are compared with the adapter model's; only then does it
    appear as `out_dir`.

    Args:
        name: of the model in its card; None: that of `out_dir`.

    Raises UserError: no adapter there; `out_dir` exists; the adapter changes nothing; or the merged checkpoint does not
    reproduce it. There is no `out_dir` then.
    """
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    if not is_adapter(adapter_dir):
        raise UserError(
            f"{adapter_dir}: no adapter_config.json, so there is nothing to merge. A fully trained checkpoint can be "
            "used as it is."
        )
    check_apart(adapter_dir, out_dir, "adapter")
    require_absent(out_dir)
    device = device or own_device()
    processor = load_processor(processor_source(adapter_dir, base))
    model = load_adapter(adapter_dir, base=base, dtype=dtype).to(device).eval()
    inputs = probe(processor).to(device)
    adapted = logits(model, inputs)
    if not bool(adapted.isfinite().all()):
        raise UserError(
            f"{adapter_dir}: the adapter's logits are not finite in {weights_dtype(model)}. Merge with --dtype float32; if "
            "that fails, too, the adapter is of a run that failed."
        )
    with model.disable_adapter():
        effect = distance(logits(model, inputs), adapted)
    if not effect > 0:
        raise UserError(
            f"{adapter_dir}: the adapter changes no logit of its base model. It was not trained, or it is not for "
            "this base; check `base_model_name_or_path` in adapter_config.json."
        )
    merged = model.merge_and_unload()
    merged.tie_weights()
    written = weights_dtype(merged)
    with new_folder(out_dir) as folder:
        sidecar = read_sidecar(adapter_dir) or Sidecar()
        save_checkpoint(merged, processor, folder, sidecar)
        write_card(folder, sidecar, name=name or out_dir.name, tags=("vlm-sft-rl",), former=adapter_dir)
        del model, merged
        again = load_model(folder, dtype=written).to(device).eval()
        error = distance(logits(again, inputs), adapted)
        report = MergeReport(
            effect, error, TOLERANCE[written], str(written).removeprefix("torch."), str(out_dir)
        )
        if not error <= report.tolerance or error >= effect:
            raise UserError(
                f"{out_dir}: the merged checkpoint does not reproduce the adapter (distance {error:.2e}, allowed "
                f"{report.tolerance:.0e}; the adapter's whole effect is {effect:.2e}), so it is not kept. Merge with "
                "--dtype float32, or check that the base is the one the adapter was trained on."
            )
    return report


def probe(processor):
    """Inputs for one forward: a picture with structure and a question answered with a tagged phrase."""
    image = Image.linear_gradient("L").convert("RGB").resize((224, 224))
    text = f"{render(processor, 'What is in the image?', 1)} There is {OPEN} a grey wall {CONFIDENT}."
    return processor(text=[text], images=[image], return_tensors="pt")


@torch.inference_mode()
def logits(model, inputs) -> torch.Tensor:
    """(batch, length, vocabulary) in float32 on the CPU."""
    dtype = weights_dtype(model)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model(**cast, use_cache=False).logits.float().cpu()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


def weights_dtype(model) -> torch.dtype:
    """The dtype of the input embedding, which is never quantised."""
    return model.get_input_embeddings().weight.dtype


# LLaVA in its authors' format (LLaVA-1.5, LLaVA-MORE, Vicuna or Llama 3 inside): a language model whose folder also holds
# the projector (`model.mm_projector.0`, `.2`), or a language model and a file `mm_projector.bin` beside it. The CLIP or
# SigLIP tower is named in `config.json` (`mm_vision_tower`) and lies elsewhere.
IMAGE_TOKEN = "<image>"
TEMPLATES = Path(__file__).parent / "templates"
# model type of the authors' config -> of the language model inside
LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
TOWERS = {
    "clip": CLIPVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip_vision_model": SiglipVisionModel,
}
# how the authors' names of weights begin -> how those of published LLaVAs of transformers do; the first that fits counts
WEIGHT_NAMES = (
    (r".*mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r".*mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r".*\.vision_tower\.", "vision_tower."),
    (r"", "language_model."),  # all others
)


@dataclass(frozen=True)
class ConversionReport:
    """What was read, and where it went."""

    language_model: str
    tower: str
    projector: str
    image_token_id: int
    template: str
    path: str


def convert(
    source: str | Path,
    target: str | Path,
    *,
    vision_tower: str | Path | None = None,
    projector: str | Path | None = None,
    chat_template: str | Path | None = None,
    pad: bool | None = None,
    dtype: str = "auto",
) -> ConversionReport:
    """Write `source` and its tower as one `LlavaForConditionalGeneration` directory, and read it back.

    Args:
        source: the authors' folder, or a plain language model when `projector` is given.
        vision_tower: folder or Hub name of the CLIP or SigLIP model; None takes `mm_vision_tower` of the config.
        projector: `mm_projector.bin` or a safetensors file; None looks for the projector in the source's weights.
        chat_template: `vicuna`, `llama3`, or a Jinja file; None decides by the tokenizer.
        pad: pad pictures to a square (LLaVA-1.5) instead of cropping them; None does as the config's
            `image_aspect_ratio` says.
        dtype: `auto` keeps the checkpoint's own.

    Raises UserError: a part is missing, is of a kind that transformers' LLaVA has not, or is a pickle.
    """
    source, target = Path(source), Path(target)
    check_apart(source, target)
    require_absent(target)
    raw = read_config(source)
    if raw is None:
        raise UserError(f"{source}: no config.json. Give the folder of the language model.")
    check_convertible(source, raw)
    tower_name = vision_tower or raw.get("mm_vision_tower")
    if not tower_name:
        raise UserError(f"{source}: config.json names no `mm_vision_tower`. Pass --vision-tower.")

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # of many types, for files of many kinds
        check_tokenizer_file(source)
        raise UserError(f"{source}: no loadable tokenizer ({first_line(error)}).") from error
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    tower = load_tower(tower_name)
    model = assemble(source, projector, raw, tower, image_id, dtype)
    # rows for the image token in both embeddings, at the mean of the others; they are never read or said
    before = embedding_rows(model)
    resize_if_needed(model, image_id + 1)
    if image_id >= before:
        for matrix in embedding_matrices(model):
            fill_rows(matrix, [image_id], before, None, 0)
    template, text = choose_template(chat_template, tokenizer)
    if pad is not None:
        raw = {**raw, "image_aspect_ratio": "pad" if pad else "square"}
    processor = build_processor(tower_name, tower, tokenizer, raw, text)
    with new_folder(target) as folder:
        save_model(model, processor, folder)
        again, _, _ = load_for_inference(folder, "cpu", model.dtype)
        written = again.state_dict()
        for name, tensor in model.state_dict().items():
            if name not in written or not torch.equal(written[name].cpu(), tensor.cpu()):
                raise UserError(
                    f"{target}: {name} was not written as it was read. Check the disk and convert again."
                )
    return ConversionReport(
        language_model=MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model.config.text_config.model_type],
        tower=str(tower_name),
        projector=str(projector or source),
        image_token_id=image_id,
        template=template,
        path=str(target),
    )


def check_convertible(source: Path, raw: dict[str, Any]) -> None:
    """Raises UserError for projectors and image layouts that transformers' LLaVA-1.5 class does not have."""
    feature = raw.get("mm_vision_select_feature") or "patch"
    if feature not in ("patch", "cls_patch"):
        raise UserError(f"{source}: `mm_vision_select_feature` is {feature!r}, expected patch or cls_patch.")
    kind = raw.get("mm_projector_type", "mlp2x_gelu")
    if kind != "mlp2x_gelu":
        raise UserError(f"{source}: `mm_projector_type` is {kind!r}; only mlp2x_gelu can be converted.")
    if raw.get("mm_patch_merge_type", "flat") != "flat" or raw.get("image_aspect_ratio") == "anyres":
        raise UserError(
            f"{source}: several tiles an image (`anyres`): a LLaVA-NeXT. Use its transformers form, for example "
            "llava-hf/llava-v1.6-vicuna-7b-hf."
        )
    if raw.get("mm_use_im_start_end"):
        raise UserError(f"{source}: `mm_use_im_start_end` is on, which transformers' LLaVA has not.")


def load_tower(name: str | Path):
    kind = (read_config(name) or {}).get("model_type")
    if kind not in TOWERS:
        raise UserError(
            f"{name}: a vision tower of type {kind!r}; a CLIP or SigLIP model is needed. Pass --vision-tower FOLDER."
        )
    try:
        with without_loading_report():
            tower, info = TOWERS[kind].from_pretrained(
                name,
                dtype="auto",
                use_safetensors=None,
                weights_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # of many types, for settings and files that do not fit each other
        raise UserError(f"{name}: the vision tower cannot be loaded ({first_line(error)}).") from error
    check_loaded(name, tower, {**info, "unexpected_keys": set()})  # a CLIP has a text model, too
    return tower


def assemble(
    source: Path, projector: str | Path | None, raw: dict[str, Any], tower, image_id: int, dtype: str
):
    """The three parts in one model."""
    kind = LANGUAGE_MODELS.get(raw.get("model_type"), raw.get("model_type"))
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"{source}: no loadable language model ({kind!r} is unknown).")
    settings = {k: v for k, v in raw.items() if not k.startswith("mm_") and k != "model_type"}
    try:
        text_config = AutoConfig.for_model(kind, **settings)
    except Exception as error:  # of many types, for values of wrong types
        raise UserError(f"{source}: config.json of no language model ({first_line(error)}).") from error
    stored = read_weights(source, projector)
    if dtype == "auto":
        dtype = text_config.dtype or next(t.dtype for t in stored.values() if t.is_floating_point())
    tower_weights = {f"vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    for name in list(stored):
        if name.startswith("vision_tower.vision_model.") and name not in tower_weights:
            stored[name.replace(".vision_model.", ".", 1)] = stored.pop(name)
    # the tower's weights among the source's own were trained along
    weights = tower_weights | stored
    try:
        config = LlavaConfig(
            vision_config=tower.config,
            text_config=text_config,
            image_token_index=image_id,
            projector_hidden_act="gelu",
            vision_feature_layer=raw.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy=feature_strategy(raw, tower),
            image_seq_length=(tower.config.image_size // tower.config.patch_size) ** 2,
            tie_word_embeddings=text_config.tie_word_embeddings,
        )
        model, info = LlavaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # of many types, for parts that do not fit
        raise UserError(
            f"{source}: the parts do not fit each other ({first_line(error)}). The tower has width "
            f"{tower.config.hidden_size}, the language model {text_config.hidden_size}. Check --projector and "
            "--vision-tower."
        ) from error
    missing = sorted(info["missing_keys"])
    if absent := [name.rpartition("projector.")[2] for name in missing if "projector." in name]:
        raise UserError(
            f"{projector or source}: no projector weights for {', '.join(absent)} (`mm_projector.0`, "
            "`mm_projector.2`). Pass --projector mm_projector.bin."
        )
    if missing:
        raise UserError(
            f"{source}: {len(missing)} weights of the language model are missing, the first is {missing[0]}. "
            "Copy the folder again, with all its shards."
        )
    check_loaded(source, model, info)
    check_types(source, model, weights)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(text_config)
    except Exception as error:  # of many types, for values of wrong types
        raise UserError(f"{source}: no readable generation_config.json ({first_line(error)}).") from error
    return model


def read_weights(source: Path, projector: str | Path | None) -> dict[str, torch.Tensor]:
    """All weights of the source and of a projector apart, by the names that published LLaVAs have."""
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    for index in ("pytorch_model.bin.index.json", INDEX):
        files = weight_files(source, index) or files
    if not files:
        raise UserError(f"{source}: no *.safetensors or *.bin files.")
    weights = {}
    for file in [*files, *([Path(projector)] if projector else [])]:
        tensors = read_tensors(file)
        check_finite(tensors.items(), file, FAILED_RUN)
        for name, tensor in tensors.items():
            pattern, prefix = next(pair for pair in WEIGHT_NAMES if re.match(pair[0], name))
            weights[prefix + name[re.match(pattern, name).end() :]] = tensor
    return weights


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or torch file; nothing but tensors is ever unpickled."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file.") from error
    except Exception as error:  # torch and safetensors raise many types for what is not a file of tensors
        raise UserError(
            f"{file}: not a file of tensors alone ({first_line(error)[:120]}). Pickles that hold other objects are "
            "never loaded: save it again as safetensors."
        ) from error


def is_clip(tower) -> bool:
    """CLIP puts a class token before the patches, SigLIP does not."""
    return isinstance(tower, CLIPVisionModel)


def feature_strategy(raw: dict[str, Any], tower) -> str:
    """`default` drops the class token."""
    patches_alone = raw.get("mm_vision_select_feature", "patch") == "patch"
    return "default" if patches_alone and is_clip(tower) else "full"


def choose_template(name: str | Path | None, tokenizer) -> tuple[str, str]:
    """The name and the text of the chat template."""
    if name is None:
        name = "llama3" if "<|start_header_id|>" in tokenizer.get_vocab() else "vicuna"
    for path in (TEMPLATES / f"{name}.jinja", Path(name)):
        if path.is_file():
            return str(name), read_text(path).strip()
    shipped = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
    raise UserError(f"chat template {name}: neither a file nor one of {shipped}.")


def template_for(processor, name: str | Path) -> str:
    """The text of a template for a checkpoint that has one already.

    Raises UserError: no such template, or a shipped one for a processor that writes images otherwise.
    """
    text = choose_template(name, get_tokenizer(processor))[1]
    token = getattr(processor, "image_token", None)
    if IMAGE_TOKEN in text and token != IMAGE_TOKEN:
        raise UserError(
            f"chat template {name}: it writes {IMAGE_TOKEN} for an image, {type(processor).__name__} needs {token}. "
            "It is for LLaVA checkpoints; leave the option out."
        )
    return text


def build_processor(tower_name, tower, tokenizer, raw: dict[str, Any], template: str):
    """The processor: the tower's own preprocessing, padded to a square where the authors did so."""
    try:
        images = AutoImageProcessor.from_pretrained(tower_name)
    except Exception as error:  # of many types, for values of wrong types
        raise UserError(f"{tower_name}: no loadable image processor ({first_line(error)}).") from error
    if raw.get("image_aspect_ratio") == "pad":
        settings = {k: v for k, v in images.to_dict().items() if k in LlavaImageProcessor().to_dict()}
        settings.pop("image_processor_type", None)
        images = LlavaImageProcessor(**{**settings, "do_pad": True})
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        reserved = "<|finetune_right_pad_id|>"
        tokenizer.pad_token = (
            reserved if reserved in tokenizer.get_vocab() else tokenizer.unk_token or tokenizer.eos_token
        )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy=feature_strategy(raw, tower),
        num_additional_image_tokens=1 if is_clip(tower) else 0,
        chat_template=template,
    )
