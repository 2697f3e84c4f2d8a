"""`model convert`: a LLaVA checkpoint in its authors' format -> an ordinary directory of transformers.

The authors' format (LLaVA-1.5, LLaVA-MORE, Vicuna or Llama 3 inside) is a language model whose folder also holds the
projector (`model.mm_projector.0`, `.2`), or a language model and a file `mm_projector.bin` beside it; the CLIP or
SigLIP tower is named in `config.json` (`mm_vision_tower`) and lies elsewhere.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    SiglipVisionModel,
)
from transformers.models.llava.image_processing_llava import LlavaImageProcessor

from ..errors import UserError
from .load import load_model, read_config
from .prepare import cure_generation_config
from .tokens import embedding_matrices, fill_rows, resize_if_needed

IMAGE_TOKEN = "<image>"
TEMPLATES = Path(__file__).parent / "templates"
# model type of the authors' config -> of the language model inside
LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_qwen": "qwen2",
}
TOWERS = {"clip": CLIPVisionModel, "clip_vision_model": CLIPVisionModel}
TOWERS |= {"siglip": SiglipVisionModel, "siglip_vision_model": SiglipVisionModel}
PROJECTOR_KEYS = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias"}
PROJECTOR_KEYS |= {"2.weight": "linear_2.weight", "2.bias": "linear_2.bias"}


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

    Raises:
        UserError: a part is missing, is of a kind that transformers' LLaVA has not, or is a pickle.
    """
    source, target = Path(source), Path(target)
    if source.resolve() == target.resolve():
        raise UserError(f"{target}: source and target are the same folder. Choose another target.")
    raw = read_config(source)
    if raw is None:
        raise UserError(f"{source}: no config.json. Give the folder of the language model.")
    check_convertible(source, raw)
    tower_name = vision_tower or raw.get("mm_vision_tower")
    if not tower_name:
        raise UserError(f"{source}: config.json names no `mm_vision_tower`. Pass --vision-tower.")

    language = load_language_model(source, raw, dtype)
    tower, tower_kind = load_tower(tower_name, language.dtype)
    weights = projector_weights(source, projector)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = assemble(language, tower, tower_kind, weights, raw, image_id)
    add_rows(model, image_id)
    restore_tower(model, source)

    template, text = choose_template(chat_template, tokenizer)
    if pad is not None:
        raw = {**raw, "image_aspect_ratio": "pad" if pad else "square"}
    processor = build_processor(tower_name, tower, tower_kind, tokenizer, raw, text)
    cure_generation_config(model.generation_config)
    model.save_pretrained(target)
    processor.save_pretrained(target)
    compare(model, load_model(target, dtype=model.dtype), target)
    return ConversionReport(
        type(language).__name__,
        str(tower_name),
        str(projector or source),
        image_id,
        template,
        str(target),
    )


def check_convertible(source: Path, raw: dict[str, Any]) -> None:
    """Raises UserError for projectors and image layouts that transformers' LLaVA-1.5 class does not have."""
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


def load_language_model(source: Path, raw: dict[str, Any], dtype: str):
    """The language model inside of the authors' folder, its multimodal weights left out.

    Raises:
        UserError: it cannot be read, or a weight is missing.
    """
    kind = LANGUAGE_MODELS.get(raw.get("model_type"), raw.get("model_type"))
    settings = {k: v for k, v in raw.items() if not k.startswith("mm_") and k != "model_type"}
    try:
        config = AutoConfig.for_model(kind, **settings)
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            weights_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source}: no loadable language model ({str(error).splitlines()[0]}).") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{source}: {len(missing)} weights of the language model are missing, the first is {missing[0]}. "
            "Copy the folder again, with all its shards."
        )
    return model


def load_tower(name: str | Path, dtype: torch.dtype):
    """The vision model and its kind (`clip` or `siglip`).

    Raises:
        UserError: it cannot be loaded, or is of another kind.
    """
    raw = read_config(name) or {}
    kind = raw.get("model_type")
    if kind not in TOWERS:
        raise UserError(
            f"{name}: a vision tower of type {kind!r}; a CLIP or SigLIP model is needed. Pass --vision-tower FOLDER."
        )
    try:
        tower = TOWERS[kind].from_pretrained(name, dtype=dtype, use_safetensors=None, weights_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{name}: the vision tower cannot be loaded ({str(error).splitlines()[0]})."
        ) from error
    return tower, kind.split("_")[0]


def projector_weights(source: Path, projector: str | Path | None) -> dict[str, torch.Tensor]:
    """The four tensors of the projector by transformers' names.

    Raises:
        UserError: one is missing, or a file is a pickle of more than tensors.
    """
    files = [Path(projector)] if projector else weight_files(source, "mm_projector")
    found = {}
    for file in files:
        for name, tensor in tensors(file).items():
            tail = name.rpartition("mm_projector.")[2]
            if "mm_projector." in name and tail in PROJECTOR_KEYS:
                found[PROJECTOR_KEYS[tail]] = tensor
    if missing := sorted(set(PROJECTOR_KEYS.values()) - set(found)):
        where = projector or source
        raise UserError(
            f"{where}: no projector weights for {', '.join(missing)} (`mm_projector.0`, `mm_projector.2`). Pass "
            "--projector mm_projector.bin."
        )
    return found


def weight_files(source: Path, holding: str) -> list[Path]:
    """Weight files of a folder whose tensors' names contain `holding`, by the index where there is one.

    Raises:
        UserError: the folder has no weights.
    """
    from ..io import read_json

    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (source / name).is_file():
            places = read_json(source / name)["weight_map"]
            return sorted({source / file for key, file in places.items() if holding in key})
    files = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not files:
        raise UserError(f"{source}: no *.safetensors or *.bin files.")
    return files


def tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or torch file; nothing but tensors is ever unpickled.

    Raises:
        UserError: no such file, broken, or a pickle of more than tensors.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file.") from error
    except Exception as error:  # torch and safetensors raise many types for what is not a file of tensors
        raise UserError(
            f"{file}: not a file of tensors alone ({str(error).splitlines()[0][:120]}). Pickles that hold other "
            "objects are never loaded: save it again as safetensors."
        ) from error


def assemble(language, tower, tower_kind: str, weights: dict, raw: dict[str, Any], image_id: int):
    """The three parts in one model; no weight is copied twice.

    Raises:
        UserError: the projector's shapes fit neither the tower nor the language model.
    """
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=language.config,
        image_token_index=image_id,
        projector_hidden_act="gelu",
        vision_feature_layer=raw.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=feature_strategy(raw, tower_kind),
        image_seq_length=patches(tower),
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    config.text_config.tie_word_embeddings = language.config.tie_word_embeddings
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.model.vision_tower = tower
    projector = model.model.multi_modal_projector
    cast = {name: tensor.to(language.dtype) for name, tensor in weights.items()}
    try:
        projector.load_state_dict(cast, assign=True)
    except RuntimeError as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in cast.items()}
        raise UserError(
            f"The projector does not fit: its shapes are {shapes}, the tower has width {tower.config.hidden_size}, the "
            f"language model {language.config.hidden_size}. Check --projector and --vision-tower."
        ) from error
    model.generation_config = language.generation_config
    model.tie_weights()
    return model.eval()


def feature_strategy(raw: dict[str, Any], tower_kind: str) -> str:
    """`default` drops the class token, which SigLIP has not."""
    return (
        "default"
        if raw.get("mm_vision_select_feature", "patch") == "patch" and tower_kind == "clip"
        else "full"
    )


def patches(tower) -> int:
    return (tower.config.image_size // tower.config.patch_size) ** 2


def add_rows(model, image_id: int) -> None:
    """Give the image token rows in both embeddings, at the mean of the others; they are never read or said."""
    before = min(matrix.shape[0] for matrix in embedding_matrices(model))
    resize_if_needed(model, image_id + 1)
    if image_id >= before:
        for matrix in embedding_matrices(model):
            fill_rows(matrix, [image_id], before, None, 0)


@torch.no_grad()
def restore_tower(model, source: Path) -> None:
    """Tower weights that were trained along and lie in the source's own files take precedence."""
    own = model.model.vision_tower.state_dict()
    for file in weight_files(source, "vision_tower"):
        for name, tensor in tensors(file).items():
            if ".vision_tower." not in name:
                continue
            tail = name.rpartition("vision_tower.")[2]
            key = next((k for k in (tail, tail.removeprefix("vision_model.")) if k in own), None)
            if key is not None:
                own[key].copy_(tensor)


def choose_template(wanted: str | Path | None, tokenizer) -> tuple[str, str]:
    """The name and the text of the chat template.

    Raises:
        UserError: neither a shipped name nor a file.
    """
    if wanted is None:
        wanted = "llama3" if "<|start_header_id|>" in tokenizer.get_vocab() else "vicuna"
    for path in (TEMPLATES / f"{wanted}.jinja", Path(wanted)):
        if path.is_file():
            return str(wanted), path.read_text(encoding="utf-8").strip()
    shipped = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
    raise UserError(f"chat template {wanted}: neither a file nor one of {shipped}.")


def build_processor(tower_name, tower, tower_kind: str, tokenizer, raw: dict[str, Any], template: str):
    """The processor: the tower's own preprocessing, padded to a square where the authors did so."""
    images = AutoImageProcessor.from_pretrained(tower_name)
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
        vision_feature_select_strategy=feature_strategy(raw, tower_kind),
        num_additional_image_tokens=1 if tower_kind == "clip" else 0,
        chat_template=template,
    )


def compare(model, again, target: Path) -> None:
    """Raises UserError unless what was written is, weight for weight, what was assembled."""
    written = again.state_dict()
    for name, tensor in model.state_dict().items():
        if name not in written or not torch.equal(written[name].cpu(), tensor.cpu()):
            raise UserError(
                f"{target}: {name} was not written as it was read. Check the disk and convert again."
            )
