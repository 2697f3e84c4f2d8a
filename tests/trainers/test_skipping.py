"""`on_bad_row: skip` through whole runs: every bad row once in the file, one total, whoever met it."""

import json

import families
import pytest
import yaml
from datasets import Dataset
from fussy import fussy_processor
from json_lines import read_lines
from launched import command, kill_at_first_checkpoint, launch, recipe
from tagged_rows import prepared, write_rows
from training import arguments, history, tagged, trainer_of

from vlm_sft_rl.data.collators import VisionCollator
from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.checks import check_first_rows, check_mixture, rows_without_images
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator

BAD = {3: "missing image", 4: "unbalanced tags", 9: "missing image", 14: "unbalanced tags"}


def spoil(path, bad):
    """Break some rows of a training file."""
    rows = json.loads(path.read_text())
    for i, kind in bad.items():
        if kind == "missing image":
            rows[i]["image"] = "gone.png"
        else:
            rows[i]["conversations"][1]["value"] = "There is <SPAN> a cat"
    path.write_text(json.dumps(rows))


def expected(path):
    return sorted((f"row-{i}", f"{path}:{i + 1}", kind) for i, kind in BAD.items())


def found(folder):
    return sorted((r["id"], r["source"], r["kind"]) for r in read_lines(folder / "rejects.jsonl"))


def skipping(folder, dataset, root, **settings) -> VerificationSFTTrainer:
    pair = tagged()
    args = arguments(VerificationSFTTrainer, folder, hint_probability=0.0)
    collator = build_collator(pair[1], args, image_root=root, rejects_path=folder / "rejects.jsonl")
    settings |= {"max_steps": -1, "num_train_epochs": 2}
    return trainer_of(VerificationSFTTrainer, folder, dataset, pair, data_collator=collator, **settings)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_bad_row_stands_there_once_for_any_number_of_workers(tmp_path, workers, caplog):
    path = write_rows(tmp_path / "data", count=16)
    spoil(path, BAD)
    dataset = Dataset.from_list(list(read_rows(path)))
    trainer = skipping(tmp_path / "out", dataset, path.parent, dataloader_num_workers=workers)
    trainer.train()
    assert found(tmp_path / "out") == expected(path)
    logged = history(trainer, "skipped_rows")
    assert len(logged) == 16 and logged == sorted(logged) and logged[-1] == 4
    assert any(
        "4 rows were skipped (2 missing image, 2 unbalanced tags)" in r.message for r in caplog.records
    )
    # a new run in the same folder begins a new file; what was corrected is not in it
    trainer.train_dataset = dataset.select(range(8))
    trainer.train()
    assert [r["id"] for r in sorted(read_lines(tmp_path / "out/rejects.jsonl"), key=lambda r: r["id"])] == [
        "row-3",
        "row-4",
    ]


@pytest.mark.slow
def test_two_ranks_and_a_killed_run_leave_every_bad_row_once(tmp_path):
    prepared(tmp_path)
    path = recipe(tmp_path, max_steps=24, save_steps=4, on_bad_row="skip", dataloader_num_workers=1)
    rows = yaml.safe_load(path.read_text())["train_file"]
    spoil(tmp_path / "data" / "rows.json", BAD)
    both = launch(command(path, "--output_dir", str(tmp_path / "two"), processes=2))
    assert [(i, k) for i, _, k in found(tmp_path / "two")] == [(i, k) for i, _, k in expected(rows)]
    assert both.count("4 rows were skipped") == 1
    broken = tmp_path / "broken"
    kill_at_first_checkpoint(command(path, "--output_dir", str(broken)), broken)
    before = found(broken)
    assert before, "rows were met before the kill"
    assert "4 rows were skipped" in launch(command(path, "--output_dir", str(broken)))
    assert found(broken) == expected(rows) and set(before) <= set(found(broken))


def test_first_rows_may_be_bad_when_bad_rows_are_skipped(tmp_path):
    path = write_rows(tmp_path / "data", count=16)
    spoil(path, dict.fromkeys(range(10), "missing image"))
    rows = list(read_rows(path))
    skipping(tmp_path / "out", Dataset.from_list(rows), path.parent)
    assert not (tmp_path / "out" / "rejects.jsonl").exists()
    with pytest.raises(
        UserError, match=r"None of the first 10 rows can be used \(10 missing image\).*rows.json:1"
    ):
        skipping(tmp_path / "out", Dataset.from_list(rows[:10]), path.parent)


def test_a_collator_that_does_not_skip_stops_at_the_first_bad_row(tmp_path):
    path = write_rows(tmp_path / "data")
    spoil(path, {0: "missing image"})
    args = VerificationSFTConfig("x", use_cpu=True)
    collator = build_collator(tagged()[1], args, image_root=path.parent)
    with pytest.raises(UserError, match=r"rows\.json:1.*gone\.png"):
        check_first_rows(list(read_rows(path)), collator, 10_000)
    with pytest.raises(UserError, match="no rows"):
        check_first_rows([], collator, 10_000)


def with_images(*counts) -> Dataset:
    return Dataset.from_list(
        [{"id": str(i), "images": ["a.png"] * n, "messages": []} for i, n in enumerate(counts)]
    )


def paligemma_collator(**options):
    """Its processor takes no row without an image."""
    processor = families.with_tags(families.paligemma())[1]
    return build_collator(processor, VerificationSFTConfig("x", use_cpu=True), **options)


def test_text_only_rows_are_refused_at_the_start_or_announced_when_they_are_skipped(tmp_path, caplog):
    with pytest.raises(UserError, match="PaliGemmaProcessor takes no rows without an image, and 1 of 3"):
        check_mixture(with_images(1, 0, 2), paligemma_collator(), 1)
    check_mixture(with_images(1, 2), paligemma_collator(), 4)
    skips = paligemma_collator(rejects_path=tmp_path / "r.jsonl")
    check_mixture(with_images(1, 0), skips, 1)
    assert "1 of 2 rows have none" in caplog.text and "They will be skipped" in caplog.text


@pytest.mark.parametrize(
    "processor", [fussy_processor, lambda: families.mllama()[1]], ids=["fussy", "mllama"]
)
def test_batches_of_both_kinds_are_refused_where_the_processor_does(processor):
    """Or where what it makes of them cannot be one batch."""
    collator = VisionCollator(processor())
    with pytest.raises(UserError, match="per_device_train_batch_size: 1"):
        check_mixture(with_images(1, 0), collator, 2)
    for counts, batch_size in (((1, 0), 1), ((0, 0), 2), ((1, 1), 2)):
        check_mixture(with_images(*counts), collator, batch_size)


def test_counting_rows_without_images():
    assert rows_without_images(with_images(0, 1, 0)) == (2, 3)
    assert rows_without_images(with_images(0, 1, 0).select([1])) == (0, 1)
    assert rows_without_images(Dataset.from_list([{"messages": "x"}])) == (1, 1)
    assert rows_without_images(iter([])) == (0, 0)
