"""Benchmark of the reader: a generated file in the published tagged schema, indexed and opened.

Time and memory are those of fresh processes, so that generating the file does not count.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = [
    "kettle",
    "toaster",
    "blender",
    "window",
    "plant",
    "lamp",
    "sofa",
    "clock",
    "phone",
    "bicycle",
    "mirror",
]


def run(rows: int = 1_300_000, workdir: str | Path | None = None) -> dict:
    """Generate, index, reopen.

    Returns:
        rows: rows in the file.
        source_bytes, index_bytes: sizes of the JSON file and of its Arrow index.
        generate_s: seconds to write the JSON file.
        index_s, rows_per_s: seconds to index it, and the rate.
        first_batch_cold_s: seconds from a fresh process (imports included) to the first 8 rows, no index yet.
        first_batch_warm_s: the same with the index there.
        subsample_s: seconds to draw and open a seeded subsample of a tenth (index there).
        peak_rss_bytes, peak_rss_warm_bytes: highest resident memory of the indexing and the reopening
            process.
        epoch_s: seconds to read every row once as Python objects.
        epoch_rss_bytes, epoch_own_rss_bytes: resident memory after that, with and without the pages of the
            mapped index (those belong to the page cache: shared by all processes and given back under
            pressure).
    """
    with tempfile.TemporaryDirectory(dir=workdir) as folder:
        source = Path(folder) / "tagged.json"
        start = time.perf_counter()
        generate(source, rows)
        generated = time.perf_counter() - start
        cold, warm = _child(source), _child(source)
        index = next(Path(folder).glob(".vlm_sft_rl_index/*.arrow"))
        return {
            "rows": rows,
            "source_bytes": source.stat().st_size,
            "index_bytes": index.stat().st_size,
            "generate_s": generated,
            "index_s": cold["open_s"],
            "rows_per_s": rows / cold["open_s"],
            "first_batch_cold_s": cold["total_s"],
            "first_batch_warm_s": warm["total_s"],
            "subsample_s": warm["subsample_s"],
            "peak_rss_bytes": cold["peak_rss_bytes"],
            "peak_rss_warm_bytes": warm["peak_rss_bytes"],
            **{key: value for key, value in warm.items() if key.startswith("epoch")},
        }


def generate(path: Path, rows: int, seed: int = 0) -> None:
    """Write `rows` records of about 1.6 kB, the published file's average, as one JSON array."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as handle:
        handle.write("[")
        for i in range(rows):
            handle.write((",\n" if i else "") + json.dumps(_record(i, rng)))
        handle.write("]\n")


def _record(i: int, rng: random.Random) -> dict:
    turns = []
    for k in range(6):
        a, b, c = rng.choices(WORDS, k=3)
        question = f"What can be seen next to the {a} in the picture?"
        turns.append({"from": "human", "value": f"<image>\n{question}" if k == 0 else question})
        answer = f"There is <SPAN> a small blue {b} </CN> beside the wall, close to "
        answer += f"<SPAN> a {c} </UN>" if i % 2 else f"<SPAN> a {c} </CN>."
        turns.append({"from": "gpt", "value": answer, "A_type": "general_answer", "hint": f"a {c}"})
    return {"id": f"{i:09d}", "image": f"coco/train2017/{i:012d}.jpg", "conversations": turns}


def _child(source: Path) -> dict:
    start = time.perf_counter()
    command = [sys.executable, str(Path(__file__)), "measure", str(source)]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    after_first_batch = result["subsample_s"] + result["epoch_s"]
    return {**result, "total_s": time.perf_counter() - start - after_first_batch}


def _measure(source: str) -> dict:
    from vlm_sft_rl.data.index import load_train_rows

    start = time.perf_counter()
    dataset = load_train_rows(source)
    opened = time.perf_counter()
    first = dataset[:8]
    assert len(first["id"]) == 8
    batch = time.perf_counter()
    load_train_rows(source, subsample=max(1, len(dataset) // 10), seed=1)[0]
    drawn, peak = time.perf_counter(), resident("VmHWM")
    for at in range(0, len(dataset), 1000):
        _ = dataset[at : at + 1000]
    return {
        "open_s": opened - start,
        "subsample_s": drawn - batch,
        "peak_rss_bytes": peak,
        "epoch_s": time.perf_counter() - drawn,
        "epoch_rss_bytes": resident("VmRSS"),
        "epoch_own_rss_bytes": resident("RssAnon"),
    }


def resident(field: str) -> int:
    """A memory figure of this process in bytes: VmHWM (peak), VmRSS (now), RssAnon (now, without mapped
    files).
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource  # elsewhere only the peak can be had

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        print(json.dumps(_measure(sys.argv[2])))
    else:
        from bench import main  # heavy, and what is measured must not hold it

        main(__file__, run)
