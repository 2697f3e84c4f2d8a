import dataclasses
import re

import pytest
import torch
from launched import command, kill_at_first_checkpoint, launch, recipe
from safetensors.torch import load_file
from tagged_rows import prepared
from worlds import answer, write_world

from vlm_sft_rl import decoding
from vlm_sft_rl.data.config import VLMDataConfig
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.sidecar import read_sidecar, write_sidecar
from vlm_sft_rl.recipes import load_recipe
from vlm_sft_rl.train import last_complete_checkpoint, main, parse, resume_from, run
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer


def test_recipe_to_checkpoint_and_again(tmp_path, capsys):
    prepared(tmp_path)
    path = recipe(tmp_path)
    assert main(["--config", str(path), "--learning_rate", "2e-3"]) == 0
    for folder in ("out", "out/checkpoint-2", "out/checkpoint-4"):
        trained = read_sidecar(tmp_path / folder).recipe
        assert (
            trained["method"] == "reverse" and trained["learning_rate"] == 2e-3 and trained["max_steps"] == 4
        )
        assert (tmp_path / folder / "chat_template.jinja").is_file()
    table = capsys.readouterr().err
    assert "longest row" in table and "language parameters" in table
    # the same command finds the finished run and leaves it as it is; a changed setting is said
    before = load_file(tmp_path / "out" / "model.safetensors")
    chosen = dataclasses.replace(read_sidecar(tmp_path / "out"), threshold=0.3)
    write_sidecar(tmp_path / "out", chosen)
    assert main(["--config", str(path), "--learning_rate", "3e-3"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "Going on from" in said and "learning_rate: 0.002 -> 0.003" in said
    assert "All 4 steps were done before" in said and read_sidecar(tmp_path / "out") == chosen
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_dry_run_does_not_train(tmp_path, capsys):
    prepared(tmp_path)
    assert main(["--config", str(recipe(tmp_path)), "--dry-run"]) == 0
    assert "ready for the first step" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--lerning_rate", "1"], "did you mean `learning_rate`"),
        (["--learning_rate", "fast"], "learning_rate.*fast"),
        (["stray"], "stray"),
        (["--train_file", "absent.json"], "`train_file` is .absent.json., and there is no such file"),
        (["--image_root", "absent"], "absent"),
        (["--model_name_or_path", "absent"], "absent"),
        (["--subsample", "0"], "`subsample` is 0, expected an integer >= 1"),
        (["--learning_rate", "nan"], "`learning_rate` is nan, expected a number >= 0"),
        (["--resume_from_checkpoint", "absent"], "not a complete checkpoint"),
        (["--on_bad_row", "ignore"], "on_bad_row"),
        (["--load_in_4bit", "true"], "use_peft"),
        (["--eval_strategy", "steps"], "needs `eval_file`"),
        (["--freeze_language", "true", "--train_projector", "false"], "nothing is trained"),
    ],
)
def test_bad_input_is_one_message_and_status_2(tmp_path, capsys, words, complaint):
    prepared(tmp_path)
    assert main(["--config", str(recipe(tmp_path)), *words]) == 2
    message = capsys.readouterr().err
    assert message.count("Error:") == 1 and "Traceback" not in message
    assert re.search(complaint, message[message.index("Error:") :], re.S), message


def test_a_subsample_larger_than_the_file_takes_all_and_says_so(tmp_path, capsys, caplog):
    prepared(tmp_path)
    assert main(["--config", str(recipe(tmp_path)), "--dry-run", "--subsample", "100000"]) == 0
    assert "asks for 100000 rows and there are 16" in caplog.text


def test_images_lie_beside_the_rows_unless_said_otherwise(tmp_path, capsys, monkeypatch):
    prepared(tmp_path)
    path = recipe(tmp_path, image_root=None)
    monkeypatch.chdir("/")
    assert main(["--config", str(path), "--dry-run"]) == 0
    other = tmp_path / "other" / "rows.json"
    other.parent.mkdir()
    other.write_text((tmp_path / "data" / "rows.json").read_text())
    capsys.readouterr()
    assert main(["--config", str(path), "--dry-run", "--eval_file", str(other)]) == 2
    assert "lie in different folders" in capsys.readouterr().err
    both = ["--eval_file", str(other), "--image_root", str(tmp_path / "data")]
    assert main(["--config", str(path), "--dry-run", *both]) == 0


def test_unknown_recipe_and_key(tmp_path, capsys):
    assert main(["--config", "reverse/pockett"]) == 2
    assert "Did you mean reverse/pocket" in capsys.readouterr().err
    assert main(["--config", str(recipe(tmp_path, lora_rank=4))]) == 2
    assert "recipe.yaml: unknown key `lora_rank`" in capsys.readouterr().err


def test_values_keep_their_types():
    given = {
        "method": "reverse",
        "output_dir": "x",
        "use_cpu": True,
        "learning_rate": "2e-4",
        "max_length": None,
    }
    model, data, args = parse(
        given, ["--lora_target_modules", "q_proj", "v_proj", "--subsample", "5"], "recipe.yaml"
    )
    assert args.learning_rate == 2e-4 and args.max_length is None
    assert model.lora_target_modules == ["q_proj", "v_proj"] and data == VLMDataConfig(subsample=5)
    with pytest.raises(UserError, match=r"recipe\.yaml.*learning_rate"):
        parse({**given, "learning_rate": "fast"}, [], "recipe.yaml")


def test_a_full_disk_is_said(tmp_path, capsys, monkeypatch):
    prepared(tmp_path)

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VerificationSFTTrainer, "_save", full)
    assert main(["--config", str(recipe(tmp_path))]) == 2
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_launch_ends_with_the_weights_of_an_unbroken_one(tmp_path):
    prepared(tmp_path)
    path = recipe(tmp_path, max_steps=30, save_steps=3, use_peft=True, lora_r=4, dataloader_num_workers=1)
    launch(command(path, "--output_dir", str(tmp_path / "whole")))
    broken = tmp_path / "broken"
    kill_at_first_checkpoint(command(path, "--output_dir", str(broken)), broken)
    assert not (broken / "trainer_state.json").exists(), "ended before it was killed"
    stderr = launch(command(path, "--output_dir", str(broken)))
    assert "Going on from" in stderr
    name = "adapter_model.safetensors"
    whole, resumed = load_file(tmp_path / "whole" / name), load_file(broken / name)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_probe_joins_the_record_of_its_step(tmp_path, monkeypatch):
    """A tiny random model says nothing that can be graded, so the probe's figures come from fixed answers."""
    prepared(tmp_path)
    spec = write_world(tmp_path / "world", count=2)
    path = recipe(tmp_path, probe_spec=str(spec), probe_data_dir=str(spec.parent / "data"), probe_every=2)
    fixed = [answer(("a circle", 0.1), ("a square", 0.9)), answer(("a square", 0.2))]
    generate, real = decoding.generate_plain, []

    def generate_plain(*args, **options):
        real.append(generate(*args, **options))  # the real generator runs on the live model
        return fixed

    monkeypatch.setattr(decoding, "generate_plain", generate_plain)
    settings = load_recipe(path)
    trainer = run(settings, *parse(settings, [], str(path)))
    records = {row["step"]: row for row in trainer.state.log_history if "loss" in row}
    assert sorted(records) == [1, 2, 3, 4] and len(real[0]) == 2
    assert [step for step, row in records.items() if "verifier_auc" in row] == [2, 4]
    assert records[2]["verifier_auc"] == 1.0


def checkpoint(folder, step, *, weights=True, state='{"global_step": 1}'):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if weights:
        (path / "model.safetensors").write_bytes(b"x")
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_the_newest_complete_checkpoint_by_number(tmp_path):
    assert last_complete_checkpoint(tmp_path / "absent") == (None, [])
    checkpoint(tmp_path, 9)
    newest = checkpoint(tmp_path, 10)
    killed = [
        checkpoint(tmp_path, 40, state=None),
        checkpoint(tmp_path, 30, state='{"global_st'),
        checkpoint(tmp_path, 20, weights=False),
    ]
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) == (newest, killed)


def test_which_checkpoint_a_run_goes_on_from(tmp_path):
    first, second = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    assert resume_from(tmp_path, None) == resume_from(tmp_path, "true") == (second, [])
    assert resume_from(tmp_path, "no") == (None, [])
    assert resume_from(tmp_path, str(first)) == (first, [])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        resume_from(tmp_path, str(tmp_path))
