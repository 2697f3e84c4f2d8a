"""`merge`: adapter + base -> one standalone checkpoint, proved by reloading it."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from ..data.chat import load_processor
from ..data.tags import CONFIDENT, OPEN
from ..errors import UserError
from ..io import new_folder, require_absent
from .load import is_adapter, load_adapter, load_model, own_device, processor_source
from .prepare import checkpoint_dtype, save_checkpoint
from .sidecar import Sidecar, read_sidecar

# relative distance of logits that rounding the merged weights explains
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


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

    def to_json(self) -> dict:
        return asdict(self)


def merge(
    adapter_dir: str | Path,
    out_dir: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str = "auto",
    device: str | None = None,
) -> MergeReport:
    """Fold LoRA, projector and token rows into the base and write an ordinary checkpoint directory.

    The LoRA products are computed in float32 and rounded once to the checkpoint's dtype (`dtype="auto"` keeps the
    base's). What was written is loaded again and its logits are compared with the adapter model's; only then does it
    appear as `out_dir`.

    Raises:
        UserError: no adapter there; `out_dir` exists; the adapter changes nothing; or the merged checkpoint does not
            reproduce it. There is no `out_dir` then.
    """
    adapter_dir, out_dir = Path(adapter_dir), Path(out_dir)
    if not is_adapter(adapter_dir):
        raise UserError(
            f"{adapter_dir}: no adapter_config.json, so there is nothing to merge. A fully trained checkpoint can be "
            "used as it is."
        )
    if adapter_dir.resolve() == out_dir.resolve():
        raise UserError(f"{out_dir}: adapter and target are the same folder. Choose another target.")
    require_absent(out_dir)
    device = device or own_device()
    processor = load_processor(processor_source(adapter_dir, base))
    model = load_adapter(adapter_dir, base=base, dtype=dtype).to(device).eval()
    inputs = probe(processor).to(device)
    adapted = logits(model, inputs)
    with model.disable_adapter():
        effect = distance(logits(model, inputs), adapted)
    if not effect > 0:
        raise UserError(
            f"{adapter_dir}: the adapter changes no logit of its base model. It was not trained, or it is not for "
            "this base; check `base_model_name_or_path` in adapter_config.json."
        )
    merged = model.merge_and_unload()
    merged.tie_weights()
    kept = checkpoint_dtype(merged)
    with new_folder(out_dir) as folder:
        save_checkpoint(merged, processor, folder, read_sidecar(adapter_dir) or Sidecar())
        del model, merged
        again = load_model(folder, dtype=kept).to(device).eval()
        error = distance(logits(again, inputs), adapted)
        report = MergeReport(effect, error, TOLERANCE[kept], str(kept).removeprefix("torch."), str(out_dir))
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
    user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}
    prompt = processor.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    text = f"{prompt} There is {OPEN} a grey wall {CONFIDENT}."
    return processor(text=[text], images=[image], return_tensors="pt")


@torch.inference_mode()
def logits(model, inputs) -> torch.Tensor:
    """(batch, length, vocabulary) in float32 on the CPU."""
    dtype = checkpoint_dtype(model)
    cast = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    return model(**cast, use_cache=False).logits.float().cpu()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())
