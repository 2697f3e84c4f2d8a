"""A checkpoint for others: its card says how to use it and what it is made of, and no word of this machine."""

import json
import os
import re
import subprocess
import sys

import fake_hub
import pytest
import yaml
from huggingface_hub import ModelCard
from launched import recipe
from PIL import Image
from tagged_rows import prepared
from training import loaded_trainer

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.evaluation.pages import CARD_BEGIN, CARD_END
from vlm_sft_rl.io import read_json
from vlm_sft_rl.models.card import METHODS, public_recipe, write_card
from vlm_sft_rl.models.checkpoints import merge, prepare
from vlm_sft_rl.models.sidecar import Sidecar, read_sidecar, with_base, write_sidecar
from vlm_sft_rl.recipes import METHODS as RECIPE_METHODS
from vlm_sft_rl.train import main

BASE = "llava-hf/llava-1.5-7b-hf"
RECIPE = {
    "method": "reverse",
    "model_name_or_path": "/home/me/prepared",
    "train_file": "data/rows.jsonl",
    "image_root": "/home/me/images",
    "output_dir": "/home/me/out",
    "hub_token": "hf_secret",
    "learning_rate": 1e-4,
    "dpo": {"train_file": "/home/me/pairs.jsonl"},
}
EVALUATION = f"{CARD_BEGIN}\n## Evaluation\n\n| chair | 0.1 |\n{CARD_END}"


def programs(card):
    return re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)


def test_every_method_has_its_words():
    assert METHODS.keys() == set(RECIPE_METHODS)


@pytest.mark.parametrize("method", RECIPE_METHODS)
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("base", [None, BASE])
def test_a_card_names_method_base_and_data_and_no_place_of_this_machine(method, adapter, base, tmp_path):
    if adapter:
        (tmp_path / "adapter_config.json").write_text("{}")
    sidecar = Sidecar(base=base, recipe={**RECIPE, "method": method})
    write_card(tmp_path, sidecar, name="me/mine", tags=["trl"], figures={"loss": 0.12345})
    card = ModelCard.load(tmp_path / "README.md")
    text = card.content
    for word in ("/home", "hf_secret", "None", str(tmp_path)):
        assert word not in text
    assert card.data.base_model == base and card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == ("peft" if adapter else "transformers")
    assert "rows.jsonl" in text and "| loss | 0.1235 |" in text and 'snapshot_download("me/mine")' in text
    number = METHODS[method][2]
    assert number is None or f"https://arxiv.org/abs/{number}" in text
    (program,) = programs(card)
    compile(program, "card", "exec")
    assert ("generate_retrospective" in program) == (method == "reverse") and ("base=" in program) == adapter
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    assert settings["learning_rate"] == 1e-4 and settings["model_name_or_path"] == (base or "prepared")
    assert settings == public_recipe(sidecar)


def test_names_of_the_hub_stay_and_folders_become_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "set").mkdir(parents=True)
    named = Sidecar(recipe={"method": "sft", "dataset_name": "HuggingFaceM4/set"})
    write_card(tmp_path, named, name="x")
    assert ModelCard.load(tmp_path / "README.md").data.datasets == ["HuggingFaceM4/set"]
    assert public_recipe(Sidecar(recipe={"dataset_name": "data/set"}))["dataset_name"] == "set"


def test_what_an_evaluation_wrote_stays(tmp_path):
    write_card(tmp_path, Sidecar(), name="x")
    path = tmp_path / "README.md"
    index = "model-index:\n- name: x\n  results: []\n"
    path.write_text(path.read_text().replace("---\n", f"---\n{index}", 1) + f"\n{EVALUATION}\n")
    write_card(tmp_path, Sidecar(), name="x", figures={"loss": 1.0})
    text = path.read_text()
    assert EVALUATION in text and "model-index:" in text and "| loss | 1 |" in text
    (tmp_path / "merged").mkdir()
    write_card(tmp_path / "merged", Sidecar(), name="y", former=tmp_path)
    assert EVALUATION in (tmp_path / "merged" / "README.md").read_text()


def test_the_name_of_the_base_is_kept_from_folder_to_folder(tmp_path):
    first = with_base(Sidecar(), BASE)
    assert first.base == BASE and with_base(first, "other/model").base == BASE
    assert with_base(Sidecar(), tmp_path).base is None and with_base(Sidecar(), "../x").base is None
    with pytest.raises(UserError, match=r"base = .*name of the Hub"):
        Sidecar(base="/home/me/model")
    source = prepared(tmp_path)
    write_sidecar(source, Sidecar(base=BASE))
    prepare(source, tmp_path / "again")
    assert read_sidecar(tmp_path / "again").base == BASE
    trainer, _ = loaded_trainer(source, tmp_path)
    trainer.save_model()
    assert read_sidecar(tmp_path / "out").base == BASE
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == BASE


def run(module, *words, hub, **options):
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        env={**os.environ, **hub.environment()},
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


def downloaded(hub, repository, folder, **options):
    """The snippet of the card, on files that came from the Hub; returns what it printed."""
    card = ModelCard(hub.repositories[repository]["README.md"].decode())
    (program,) = programs(card)
    folder.mkdir()

    Image.new("RGB", (56, 56)).save(folder / "photo.jpg")
    for old, new in options.items():
        program = program.replace(old, new)
    environment = {**os.environ, **hub.environment(), "HF_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_adapter_and_merged_model_on_the_hub(tmp_path):
    """Trained with `push_to_hub`, merged with `--push-to-hub`; each is fetched and used as its card says."""
    source = prepared(tmp_path)
    write_sidecar(source, Sidecar(base=BASE, decoding={"total_attempts": 2, "max_new_tokens": 8}))
    path = recipe(tmp_path, use_peft=True, save_strategy="no")
    with fake_hub.running() as hub:
        words = ["--config", path, "--push_to_hub", "true", "--hub_model_id", "me/adapter"]
        done = run("vlm_sft_rl.train", *words, hub=hub)
        assert done.returncode == 0, done.stderr
        files = hub.repositories["me/adapter"]
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "vlm_sft_rl.json",
            "README.md",
        } <= files.keys()
        assert (
            files["adapter_model.safetensors"]
            == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
        )
        card = files["README.md"].decode()
        assert str(tmp_path) not in card and f"vlm-sft-rl model prepare {BASE} prepared" in card
        assert "verdicts right" in card and "fine-tuned version of" not in card
        assert hub.tokens <= {f"Bearer {fake_hub.TOKEN}", None}
        assert fake_hub.TOKEN not in "".join(
            data.decode(errors="replace") for name, data in files.items() if name.endswith((".json", ".md"))
        )
        downloaded(hub, "me/adapter", tmp_path / "a", prepared=str(source))

        merged = tmp_path / "merged"
        words = ["merge", tmp_path / "out", merged, "--push-to-hub", "me/whole", "--private"]
        done = run("vlm_sft_rl.cli", *words, hub=hub)
        assert done.returncode == 0, done.stderr
        assert "Uploaded to" in done.stdout and hub.private["me/whole"]
        files = hub.repositories["me/whole"]
        assert {"model.safetensors", "config.json", "vlm_sft_rl.json", "README.md"} <= files.keys()
        whole = ModelCard(files["README.md"].decode())
        assert whole.data.base_model == BASE and whole.data.library_name == "transformers"
        downloaded(hub, "me/whole", tmp_path / "b")


def test_a_hub_that_refuses_is_one_message_and_the_model_stays(tmp_path):
    source = prepared(tmp_path)
    trained = recipe(tmp_path, use_peft=True, save_strategy="no")
    assert main(["--config", str(trained)]) == 0
    with fake_hub.running() as hub:
        hub.refuses = 403
        words = ["merge", tmp_path / "out", tmp_path / "merged", "--push-to-hub", "me/whole"]
        done = run("vlm_sft_rl.cli", *words, hub=hub)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "hf upload me/whole" in done.stderr.replace("\n", "")
    assert (tmp_path / "merged" / "model.safetensors").is_file() and source.is_dir()


def test_merging_keeps_the_base_in_card_and_sidecar(tmp_path):
    source = prepared(tmp_path)
    write_sidecar(source, Sidecar(base=BASE))
    assert main(["--config", str(recipe(tmp_path, use_peft=True, save_strategy="no"))]) == 0
    readme = tmp_path / "out" / "README.md"
    readme.write_text(readme.read_text() + f"\n{EVALUATION}\n")
    merge(tmp_path / "out", tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text()
    assert EVALUATION in text and f"base_model: {BASE}" in text and str(tmp_path) not in text
    assert read_json(tmp_path / "merged" / "vlm_sft_rl.json")["base"] == BASE
    assert "hub_token" not in json.dumps(read_json(tmp_path / "merged" / "vlm_sft_rl.json"))
