"""A benchmark's fixture as its owners would publish it: pictures drawn, parquet files and base64 columns filled in."""

import base64
import hashlib
import io
import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

FIXTURES = Path(__file__).parents[1] / "evaluation/fixtures"
# benchmarks over the files of one owner -> their fixture
SHARED = dict.fromkeys(("refcoco_rec", "refcoco_reg", "self_consistency"), "refcoco")
BENCHMARKS = sorted({path.name for path in FIXTURES.iterdir()} - set(SHARED.values()) | set(SHARED))


def picture(name: str) -> bytes:
    """A drawn PNG that differs from name to name."""
    red, green, blue = hashlib.sha256(name.encode()).digest()[:3]
    image = Image.new("RGB", (28, 28), (red, green, blue))
    ImageDraw.Draw(image).ellipse((6, 6, 20, 20), fill="white")
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def write_benchmark(name: str, folder: Path) -> Path:
    """The files of benchmark `name` below `folder`, in the places where its spec looks for them.

    `images.txt` lists pictures to draw; `X.parquet.json` becomes the parquet file X, with every `{"$image": …}` an
    encoded picture; `$image` in another file becomes one in base64.
    """
    source = FIXTURES / SHARED.get(name, name)
    for path in sorted(source.rglob("*")):
        target = folder / path.relative_to(source)
        if path.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == "images.txt":
            for image in path.read_text().split():
                (folder / image).parent.mkdir(parents=True, exist_ok=True)
                (folder / image).write_bytes(picture(image))
        elif path.name.endswith(".parquet.json"):
            rows = json.loads(path.read_text())
            filled = [{k: _fill(v, f"{i}{k}") for k, v in row.items()} for i, row in enumerate(rows)]
            pq.write_table(pa.Table.from_pylist(filled), target.with_suffix(""))
        elif path.suffix == ".tsv" or "$image" in path.read_text():
            lines = path.read_text().splitlines()
            encoded = [
                line.replace("$image", base64.b64encode(picture(str(i))).decode())
                for i, line in enumerate(lines)
            ]
            target.write_text("\n".join(encoded) + "\n")
        else:
            shutil.copyfile(path, target)
    return folder


def _fill(value, name: str):
    return {"bytes": picture(name), "path": None} if isinstance(value, dict) and "$image" in value else value
