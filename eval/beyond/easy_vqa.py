"""SFT on finished answers of rewinding, on pictures and questions that nobody of this project made: the package easy-vqa.

    python eval/beyond/easy_vqa.py OUT DATA [--seeds 3] [--labelled 1000] [--questions 3000] [--limit 1500]

DATA is the folder `easy_vqa/data` of the package (`pip download --no-deps easy-vqa`, unpacked). For each seed, REVERSE
trains the base model of the pocket world on the questions about some of the training pictures (`start`): right answers, and
wrong ones of the same sort (yes or no, shapes, colours). It answers questions about the other training pictures, whose
answers nobody reads, by retrospective resampling with tau 0.5. `sft` goes on from it with the answers that were verified to
their end (`recipes/rewind/pocket_sft.yaml`); how many pairs the traces would give is counted.

Measured on test questions, all seeds together: the share of right answers, greedy and resampled, and the area under the ROC
curve of P(</UN>) at the greedy answers. Finished parts are left out when the command is given again. Writes
`OUT/easy_vqa.json` and prints it as a table.
"""

import random
from pathlib import Path

from rewind import collect
from rich.console import Console
from rich.table import Table
from studies import answers_of, command, fit, measure, of_seed, shown

from vlm_sft_rl.data.convert import convert
from vlm_sft_rl.data.tags import CONFIDENT, OPEN, UNCONFIDENT
from vlm_sft_rl.demos.frame import BASE
from vlm_sft_rl.graders import load_grader
from vlm_sft_rl.io import read_jsonl, write_json, write_jsonl
from vlm_sft_rl.models.checkpoints import prepare
from vlm_sft_rl.roc import roc_auc

SPEC, METRICS = "easy_vqa", ("accuracy",)
SYSTEMS = ("start", "sft")
DECODING = {"greedy": None, "retrospective": {"threshold": 0.5}}
# of the start: the tower has never seen such pictures
START = {"freeze_vision": False, "max_steps": 1000, "learning_rate": 5e-4, "save_steps": 10_000}
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SORTS = (("yes", "no"), ("circle", "rectangle", "triangle"), COLOURS)
OTHERS = {answer: [other for other in sort if other != answer] for sort in SORTS for answer in sort}


def draw(data: Path, folder: Path, seed: int, labelled: int, questions: int) -> None:
    """`start.jsonl`: tagged answers about so many training pictures; `asked.jsonl`: questions about the others."""
    convert(data / "train/questions.json", folder / "train.jsonl", "easy_vqa")
    rows = [row for _, row in read_jsonl(folder / "train.jsonl")]
    rng = random.Random(seed)
    pictures = sorted({row["images"][0] for row in rows})
    known = set(rng.sample(pictures, labelled))
    tagged = (
        tagged_row(row, name, answer, tag)
        for row in rows
        if row["images"][0] in known
        for name, answer, tag in (
            ("pos", row["answer"], CONFIDENT),
            ("neg", rng.choice(OTHERS[row["answer"]]), UNCONFIDENT),
        )
    )
    write_jsonl(folder / "start.jsonl", tagged)
    others = rng.sample([row for row in rows if row["images"][0] not in known], questions)
    write_jsonl(
        folder / "asked.jsonl", [{key: row[key] for key in ("id", "images", "question")} for row in others]
    )


def tagged_row(row: dict, name: str, answer: str, tag: str) -> dict:
    talk = [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": f"{OPEN} {answer} {tag}"},
    ]
    return {"id": f"{row['id']}-{name}", "images": row["images"], "messages": talk}


def start_of(data: Path, folder: Path, seed: int, given) -> tuple[Path, dict]:
    """The verifier that the others go on from, and what it cost."""
    draw(data, folder, seed, given.labelled, given.questions)
    prepared, start = folder / "models/prepared", folder / "models/start"
    if not prepared.is_dir():
        prepare(BASE, prepared, init="semantic")
    cost = fit(
        "reverse/pocket",
        start,
        model_name_or_path=prepared,
        train_file=folder / "start.jsonl",
        image_root=data / "train",
        seed=seed,
        **START,
    )
    return start, cost


def area(samples: list[dict]) -> dict:
    """Whether P(</UN>) tells wrong answers from right ones."""
    grade = load_grader("exact")
    verdicts = [
        (sample["spans"][0]["p_unconfident"], not grade(sample["answer"], sample["reference"]).correct)
        for sample in samples
        if len(sample["spans"]) == 1
    ]
    return {
        "auc": roc_auc(*zip(*verdicts, strict=True)),
        "wrong": sum(wrong for _, wrong in verdicts),
        "n": len(verdicts),
    }


def main() -> None:
    parser = command(__doc__, "the folder `easy_vqa/data` of the package")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--labelled", type=int, default=1000, help="pictures that the start learns from")
    parser.add_argument("--questions", type=int, default=3000, help="without answers, about other pictures")
    parser.add_argument("--limit", type=int, default=1500, help="test questions, a seed")
    given = parser.parse_args()
    samples: dict = {decoder: {system: [] for system in SYSTEMS} for decoder in DECODING}
    result: dict = {"costs": {system: {} for system in SYSTEMS}, "pairs": {}}
    for seed in range(given.seeds):
        folder = given.output / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        start, result["costs"]["start"][seed] = start_of(given.data, folder, seed, given)
        images = given.data / "train"
        settings = DECODING["retrospective"]
        result["pairs"][seed] = collect(start, folder / "asked.jsonl", images, folder, settings=settings)
        result["costs"]["sft"][seed] = fit(
            "rewind/pocket_sft",
            folder / "models/sft",
            model_name_or_path=start,
            train_file=folder / "finished.jsonl",
            image_root=images,
            seed=seed,
        )
        for system in SYSTEMS:
            for decoder, settings in DECODING.items():
                run = folder / "eval" / f"{system}-{decoder}"
                answers = answers_of(
                    folder / "models" / system, SPEC, run, given.data / "test", decoder, settings, given.limit
                )
                samples[decoder][system] += of_seed(answers, seed)
        report(samples, result, given.output)


def report(samples: dict, result: dict, output: Path) -> None:
    """What there is so far."""
    for decoder, of in samples.items():
        figures = measure(of, SPEC, METRICS)
        view = Table("system", "n", *METRICS, "minus start", "area", "wrong answers", title=decoder)
        for system, row in figures.items():
            row["verifier"] = area(of[system])
            view.add_row(
                system,
                str(row["n"]),
                *(shown(row["metrics"][name]) for name in METRICS),
                shown(row["minus_start"]["accuracy"]) if "minus_start" in row else "–",
                f"{row['verifier']['auc']:.3f}",
                str(row["verifier"]["wrong"]),
            )
        result[decoder] = figures
        Console(width=160).print(view)
    write_json(output / "easy_vqa.json", result)


if __name__ == "__main__":
    main()
