"""Rewind pairs: DPO on what a REVERSE model took back against what it let stand, against SFT on its own finished answers.

    python eval/beyond/rewind.py OUT DEMO… [--pictures 2400] [--scenes 500]

Every DEMO is the finished folder of `vlm-sft-rl demo reverse`, one a seed. Its verifier captions pictures of a world of its
own, drawn without the training bias, whose labels nobody reads; the traces give the pairs and the finished answers.

    pairs     `recipes/rewind/pocket.yaml`: sigmoid + sft on the pairs, no preference on verdicts, verdicts kept
    sigmoid   the same without the sft term
    credited  the same as `pairs`, but as plain DPO: the preference falls on verdicts too, and nothing keeps them
    sft       `recipes/rewind/pocket_sft.yaml`: the finished answers, as many steps as cost the same as `pairs`
              (2 FLOPs a parameter for a token forwarded, 6 for one trained on; the decoding is common to all)
    verdicts  the same, and the closing tags are taught as they stand, in place of what P(</UN>) was

Measured on further scenes without the bias, all seeds together: greedy captions; the area under the ROC curve of P(</UN>)
at the start's greedy phrases (the same for all) and at the model's own; captions resampled as the demo chose; and how vague
the words are. Finished parts are left out when the command is given again. Writes `OUT/rewind.json` and prints it.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from studies import ROUNDS, answers_of, as_demo_chose, command, fit, measure, of_seed, shown

from vlm_sft_rl.data.tagging.config import PairConfig
from vlm_sft_rl.data.tagging.pairs import NoPairs, write_pairs
from vlm_sft_rl.decode import DecodeOptions, decode
from vlm_sft_rl.evaluation.decoders import EngineOptions
from vlm_sft_rl.evaluation.metrics import load_metric
from vlm_sft_rl.evaluation.scoring import verifier_summary, with_verdicts
from vlm_sft_rl.evaluation.specs import load_spec
from vlm_sft_rl.io import read_json, read_jsonl, write_json, write_jsonl
from vlm_sft_rl.pocket.dataset import build_world
from vlm_sft_rl.self_training.rewinds import read_verdicts_of

SPEC = "pocket_captions"
DPO = {
    "pairs": {},
    "sigmoid": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "credited": {"phrases_only": False, "verdict_weight": 0.0},
}
PARTS = (
    ("greedy", ("start", "pairs", "sft")),
    ("retrospective", ("start", "pairs", "sft")),
    ("greedy", ("credited",)),
    ("retrospective", ("credited",)),
    ("greedy", ("sigmoid",)),
    ("retrospective", ("sigmoid",)),
    ("greedy", ("verdicts",)),
    ("retrospective", ("verdicts",)),
)
METRICS = ("chair_i", "chair_i_distinct", "coverage", "repeats", "length")


def draw_pictures(folder: Path, pictures: int, seed: int) -> Path:
    """The world of pictures without labels, and `pictures.jsonl`."""
    world = folder / "pictures"
    build_world(world, seed=1000 + seed, sizes={"train": 2, "val": pictures, "test": 2})
    questions = (row for _, row in read_jsonl(world / "val_captions.jsonl"))
    rows = [{name: row[name] for name in ("id", "images", "question")} for row in questions]
    write_jsonl(folder / "pictures.jsonl", rows)
    return world


def collect(start: Path, rows: Path, images: Path, folder: Path, **decoder) -> dict:
    """`pairs.jsonl` and `finished.jsonl` of the folder, from the start's own answers to rows; returns their counts."""
    if not (folder / "pairs.json").is_file():
        options = DecodeOptions(traces=True, image_root=images, batch_size=64)
        decode(rows, folder / "traces", start, options=options, **decoder)
        counts = write_pairs(folder / "traces", None, PairConfig(), folder / "finished.jsonl")
        try:
            counts |= write_pairs(folder / "traces", folder / "pairs.jsonl", PairConfig())
        except NoPairs:
            counts["pairs"] = 0
        write_json(folder / "pairs.json", counts)
    return read_json(folder / "pairs.json")


def teach(start: Path, images: Path, folder: Path, system: str, seed: int) -> dict:
    """Train a system on `pairs.jsonl` or `finished.jsonl` of the folder; returns what it cost."""
    output = folder / "models" / system
    common = {"model_name_or_path": start, "image_root": images, "seed": seed}
    if system in DPO:
        cost = fit("rewind/pocket", output, **common, train_file=folder / "pairs.jsonl", **DPO[system])
        cost["flops"] *= 8 / 6  # every token is forwarded by the reference, too
        return cost
    wanted = teach(start, images, folder, "pairs", seed)["flops"]
    common["train_file"] = folder / "finished.jsonl"
    if system == "verdicts":
        common["train_file"] = with_verdicts_taught(folder)
    trial = fit("rewind/pocket_sft", folder / "trial", **common, max_steps=1)
    return fit("rewind/pocket_sft", output, **common, max_steps=round(wanted / trial["flops"]))


def with_verdicts_taught(folder: Path) -> Path:
    """The finished answers with their closing tags as they stand."""
    rows = [row for _, row in read_jsonl(folder / "finished.jsonl")]
    for row in rows:
        del row["messages"][-1]["doubts"]
    write_jsonl(folder / "verdicts.jsonl", rows)
    return folder / "verdicts.jsonl"


def answer(demo: Path, folder: Path, system: str, decoder: str, scenes: int, seed: int) -> list[dict]:
    """A system's captions of scenes that nothing was trained or chosen on."""
    world = folder / "scenes"
    build_world(world, seed=2000 + seed, sizes={"train": 2, "val": 2, "test": scenes})
    model = demo / "models/reverse" if system == "start" else folder / "models" / system
    settings = as_demo_chose(demo) if decoder == "retrospective" else None
    return answers_of(model, SPEC, folder / "eval" / f"{system}-{decoder}", world, decoder, settings)


def read_again(demo: Path, folder: Path, system: str, samples: list[dict]) -> list[dict]:
    """The start's greedy captions with P(</UN>) at their phrases as a system reads them."""
    path = folder / "eval" / f"{system}-reading.json"
    if not path.is_file():
        model = demo / "models/reverse" if system == "start" else folder / "models" / system
        values = read_verdicts_of(model, samples, folder / "scenes", EngineOptions(batch_size=64))
        write_json(path, values)
    return with_verdicts(samples, read_json(path))


def figures_of(samples: dict[str, list[dict]], readings: dict[str, list[dict]]) -> dict[str, dict]:
    """Figures of systems over all seeds, their paired differences from the start and from SFT, and how vague they are."""
    spec = load_spec(SPEC)
    metric = load_metric(spec.metric, spec.metric_options)
    figures = measure(samples, SPEC, METRICS, ("start", "sft"))
    for system, answers in samples.items():
        nouns = [metric.nouns(sample["answer"])[0] for sample in answers]
        phrases = [span["text"] for sample in answers for span in sample["spans"]]
        figures[system]["distinct_mentions"] = float(np.mean([len(set(named)) for named in nouns]))
        # a phrase that names nothing of the vocabulary cannot be wrong
        vague = [not metric.nouns(phrase)[0] for phrase in phrases]
        figures[system]["vague_phrases"] = float(np.mean(vague)) if vague else None
        if system in readings:
            figures[system]["verifier_at_start"] = verifier_summary(readings[system], metric, ROUNDS)
    return figures


def table(title: str, figures: dict[str, dict]) -> Table:
    names = ("area at start", "area", "wrong phrases", "distinct", "vague", "forwarded per kept")
    view = Table("system", "n", *METRICS, *names, title=title)
    for system, row in figures.items():
        at_start, own = ((row.get(name) or {}).get("auc") for name in ("verifier_at_start", "verifier"))
        view.add_row(
            system,
            str(row["n"]),
            *(shown(row["metrics"][name]) for name in METRICS),
            shown(at_start),
            shown(own),
            str((row["verifier"] or {}).get("wrong_phrases", 0)),
            f"{row['distinct_mentions']:.2f}",
            "–" if row["vague_phrases"] is None else f"{row['vague_phrases']:.3f}",
            f"{row['cost']['tokens_forwarded_per_kept_token']:.2f}",
        )
    return view


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--pictures", type=int, default=2400, help="without labels, a seed")
    parser.add_argument("--scenes", type=int, default=500, help="to measure on, a seed")
    given = parser.parse_args()
    samples: dict[str, dict[str, list[dict]]] = {"greedy": {}, "retrospective": {}}
    readings: dict[str, list[dict]] = {}
    costs: dict[str, dict] = {}
    for decoder, systems in PARTS:
        for seed, demo in enumerate(given.demos):
            folder, start = given.output / f"seed-{seed}", demo / "models/reverse"
            world = draw_pictures(folder, given.pictures, seed)
            collect(start, folder / "pictures.jsonl", world, folder)
            for system in systems:
                if system != "start":
                    costs.setdefault(system, {})[seed] = teach(start, world, folder, system, seed)
                answers = answer(demo, folder, system, decoder, given.scenes, seed)
                # scenes of different seeds have the same names
                samples[decoder].setdefault(system, []).extend(of_seed(answers, seed))
                if decoder == "greedy":
                    first = answer(demo, folder, "start", decoder, given.scenes, seed)
                    again = read_again(demo, folder, system, first)
                    readings.setdefault(system, []).extend(of_seed(again, seed))
            report(samples, readings, costs, given.output)


def report(samples: dict, readings: dict, costs: dict, output: Path) -> None:
    """What there is so far: systems that have the same scenes."""
    result = {}
    for decoder, of in samples.items():
        most = max(map(len, of.values()), default=0)
        whole = {system: answers for system, answers in of.items() if len(answers) == most}
        if whole:
            result[decoder] = figures_of(whole, readings if decoder == "greedy" else {})
    write_json(output / "rewind.json", {"costs": costs, **result})
    for decoder, figures in result.items():
        Console(width=240).print(table(decoder, figures))


if __name__ == "__main__":
    main()
