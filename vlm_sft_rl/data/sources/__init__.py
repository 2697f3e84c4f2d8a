"""Source formats: one function a format, from a file as its owner publishes it to rows, streamed.

Each takes a `Source` and yields rows: SFT rows (`messages`, `images`), question rows (`question`, `answer`,
`images`, …) or region rows (`image`, `width`, `height`, `box` in xyxy pixels, …). Paths of images are those of
the published folder layout, with `image_prefix` before them.
"""

from . import boxes as detection
from . import boxes as referring
from . import conversations, questions
from . import conversations as flat
from .source import Source

__all__ = ["FORMATS", "Source"]

# name -> (reader, what it reads)
FORMATS = {
    "llava": (conversations.llava, "LLaVA conversations, JSON or JSONL"),
    "reverse": (conversations.llava, "the published REVERSE set: conversations with tags, A_type and hint"),
    "llava_cot": (conversations.llava_cot, "LLaVA-CoT-100k JSONL: conversations in four stages"),
    "trl": (conversations.trl, "TRL rows: messages, or prompt and completion"),
    "tabmwp": (questions.tabmwp, "TabMWP problems_*.json"),
    "chartqa": (questions.chartqa, "ChartQA *_human.json or *_augmented.json"),
    "clevr_math": (questions.clevr_math, "CLEVR-Math JSON as MM-Self-Improve ships it"),
    "geoqa": (questions.geoqa, "GeoQA train.jsonl, JSON or JSONL"),
    "m3cot": (questions.m3cot, "M3CoT JSONL"),
    "coco": (detection.coco, "COCO detection JSON: instances_*.json, and MDETR's referring files"),
    "objects365": (detection.coco, "Objects365 detection JSON: zhiyuan_objv2_*.json"),
    "refcoco": (referring.refcoco, "RefCOCO refs as JSON, with --annotations instances.json"),
    "sc_tune": (referring.sc_tune, "SC-Tune's list of boxes: image_id and bbox as shares of the image"),
    "rec": (referring.rec, "referring expressions, one object with a box a row"),
    "jsonl": (flat.jsonl, "JSON or JSONL with any column names, see --map"),
    "hf": (flat.hf, "Hugging Face data: parquet file or folder, or a save_to_disk folder"),
}
