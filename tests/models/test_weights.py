"""A checkpoint whose weights are not all there, not of the model's shapes, or not finite, is refused wherever it is read."""

import json
import shutil
from pathlib import Path

import families
import pytest
import torch
from safetensors.torch import load_file, save_file
from tagged_rows import prepared
from training import loaded_trainer

import vlm_sft_rl
from vlm_sft_rl.errors import UserError
from vlm_sft_rl.models.checkpoints import merge, prepare
from vlm_sft_rl.models.load import load_adapter, load_for_inference, load_model, restore_weights
from vlm_sft_rl.models.weights import WHOLE, check_finite, is_finite, weight_files

POCKET = Path(vlm_sft_rl.__file__).parent / "pocket" / "base"


def changed(folder: Path, change) -> Path:
    """A copy of the pocket checkpoint whose tensors went through `change`."""
    shutil.copytree(POCKET, folder)
    save_file(change(load_file(POCKET / WHOLE)), folder / WHOLE, metadata={"format": "pt"})
    return folder


def sharded(folder: Path, **changes) -> Path:
    """A copy of the pocket checkpoint in two files, with an index of which some values are others."""
    shutil.copytree(POCKET, folder)
    tensors = load_file(POCKET / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(tensors)
    places = {name: f"model-{1 + (i > 40)}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file(
            {n: tensors[n] for n in names if places[n] == file}, folder / file, metadata={"format": "pt"}
        )
    index = {"metadata": {"total_size": 1}, "weight_map": places | changes.pop("places", {})} | changes
    (folder / f"{WHOLE}.index.json").write_text(json.dumps(index))
    return folder


def under(prefix: str):
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def without(part: str):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_value(value: float):
    def change(tensors):
        name = sorted(tensors)[3]
        tensors[name].view(-1)[5] = value
        return tensors

    return change


def of_a_third_layer(tensors):
    more = {n.replace("layers.3.", "layers.4."): t.clone() for n, t in tensors.items() if ".layers.3." in n}
    return tensors | more


def wider(tensors):
    name = next(n for n in sorted(tensors) if n.endswith("mlp.up_proj.weight"))
    return tensors | {name: torch.zeros(7, 192, dtype=torch.float16)}


def as_type(dtype: torch.dtype):
    def change(tensors):
        name = next(n for n in sorted(tensors) if n.endswith("q_proj.weight"))
        return tensors | {name: (100 * tensors[name]).to(dtype)}

    return change


BROKEN = [
    *(
        (
            as_type(dtype),
            r"1 weights are no real numbers of 16 bits or more, the first is \S*q_proj\.weight \(\w+8\w*\)",
        )
        for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn)
    ),
    (as_type(torch.bool), r"no real numbers.*\(bool\)"),
    (as_type(torch.complex64), r"no real numbers.*\(complex64\)"),
    (without("language_model"), r"39 of 98 weights are missing, the first is lm_head\.weight"),
    (without("vision_tower"), r"\d+ of 98 weights are missing"),
    (without("multi_modal_projector"), "4 of 98 weights are missing"),
    (under("module."), r"98 of 98 weights are missing.* All begin with `module\.`"),
    (under("_orig_mod."), r"98 of 98 weights are missing.* All begin with `_orig_mod\.`"),
    (under("policy."), r"98 of 98 weights are missing.* 97 others, the first is policy\."),
    (of_a_third_layer, "9 weights are of layers that config.json does not have"),
    (wider, r"1 of 98 weights have another shape.*\[7, 192\] in the file, \[480, 192\] expected"),
    (with_value(float("nan")), "1 tensors hold weights that are not finite"),
    (with_value(float("-inf")), "1 tensors hold weights that are not finite"),
]


@pytest.mark.parametrize("change, reason", BROKEN)
def test_weights_are_never_made_up(tmp_path, change, reason):
    folder = changed(tmp_path / "model", change)
    with pytest.raises(UserError, match=rf"{folder}: .*{reason}"):
        prepare(folder, tmp_path / "prepared")
    with pytest.raises(UserError, match=reason):
        load_for_inference(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_the_message_is_the_only_one(tmp_path, caplog, capfd):
    with pytest.raises(UserError):
        load_model(changed(tmp_path / "model", without("language_model")))
    assert "REPORT" not in caplog.text + capfd.readouterr().err


def test_what_the_model_does_not_use_is_said_once(tmp_path, caplog):
    extra = {"value_head.weight": torch.zeros(2), "value_head.bias": torch.zeros(2)}
    load_model(changed(tmp_path / "model", lambda tensors: tensors | extra))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'model'}: 2 tensors are not used by this model: value_head.bias, value_head.weight"
    ]


def test_a_config_of_a_large_model_builds_none(tmp_path):
    folder = changed(tmp_path / "model", dict)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "text_config": {"model_type": "llama"}}))
    with pytest.raises(UserError, match=r"\d+ of \d+ weights are missing, the first is"):
        load_model(folder)


@pytest.mark.parametrize(
    "name", ["../model-2.safetensors", "/etc/passwd", "a/../../x", "..\\x.safetensors", "C:\\x.safetensors"]
)
def test_an_index_does_not_lead_out_of_its_folder(tmp_path, name):
    folder = sharded(tmp_path / "model", places={"multi_modal_projector.linear_1.bias": name})
    with pytest.raises(UserError, match=r"index\.json: .* leads out of the folder"):
        load_model(folder)


def test_a_broken_index_is_named(tmp_path):
    assert [path.name for path in weight_files(sharded(tmp_path / "whole"))] == [
        "model-1.safetensors",
        "model-2.safetensors",
    ]
    load_model(tmp_path / "whole")
    (tmp_path / "whole" / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 2 files are missing, the first is model-2\.safetensors"):
        load_model(tmp_path / "whole")
    for number, change in enumerate(
        [
            {"metadata": None},
            {"weight_map": []},
            {"weight_map": {}},
            {"places": {"x": 7}},
            {"places": {"x": ""}},
        ]
    ):
        with pytest.raises(UserError, match=r"index\.json: expected the objects"):
            load_model(sharded(tmp_path / str(number), **change))


def test_a_weight_in_two_shards_is_refused(tmp_path):
    folder = sharded(tmp_path / "model")
    first, second = (folder / f"model-{number}.safetensors" for number in (1, 2))
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is in two of the files"):
        load_model(folder)


def test_weights_too_large_for_the_dtype_are_refused(tmp_path):
    def large(tensors):
        return as_type(torch.float64)(tensors) | {
            "multi_modal_projector.linear_1.bias": torch.full((192,), 1e30).double()
        }

    folder = changed(tmp_path / "model", large)
    load_model(folder, dtype="bfloat16")
    load_model(folder, dtype="float32")
    with pytest.raises(
        UserError,
        match=r"model in float16: 1 tensors hold weights that are not finite.* take `dtype: bfloat16`",
    ):
        load_model(folder, dtype="float16")


@pytest.mark.parametrize("part", [0, 5, 100, 4_000_000])
def test_a_truncated_file_is_named(tmp_path, part):
    folder = changed(tmp_path / "model", dict)
    (folder / WHOLE).write_bytes((POCKET / WHOLE).read_bytes()[:part])
    with pytest.raises(UserError, match=r"model\.safetensors: not a whole safetensors file"):
        load_model(folder)


def test_a_run_is_not_resumed_from_a_part_of_its_weights(tmp_path):
    folder = changed(tmp_path / "model", dict)
    model = load_model(folder, dtype="float32")
    restore_weights(model, folder)
    save_file(without("layers.2.")(load_file(POCKET / WHOLE)), folder / WHOLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="25 of 98 weights are missing"):
        restore_weights(model, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_any_number_that_is_none_is_seen(dtype):
    values = torch.zeros(3, 4).to(dtype)
    assert is_finite(values) and is_finite(torch.ones(2, dtype=torch.int8)) and is_finite(values[:0])
    broken = values.float().clone()
    broken[1, 2] = float("nan")
    assert not is_finite(broken.to(dtype))
    with pytest.raises(UserError, match=r"somewhere: 2 tensors .* the first is b"):
        check_finite([("a", values), ("b", broken), ("c", -broken / 0)], "somewhere", "")


@pytest.fixture
def adapter(tmp_path):
    trainer, _ = loaded_trainer(prepared(tmp_path), tmp_path, use_peft=True, lora_r=2)
    trainer.train()
    trainer.save_model()
    return trainer, Path(trainer.args.output_dir)


def test_an_adapter_is_whole_wherever_it_is_read(tmp_path, adapter):
    trainer, folder = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    load_adapter(folder)
    trainer._load_from_checkpoint(str(folder))
    name = next(n for n in tensors if "tokens" in n)
    for changed_tensors, reason in (
        (
            {n: t for n, t in tensors.items() if "layers.1." not in n},
            "tensors have no counterpart|does not fit",
        ),
        ({f"module.{n}": t for n, t in tensors.items()}, "tensors have no counterpart|does not fit"),
        (
            tensors | {name: torch.full_like(tensors[name], float("nan"))},
            f"not finite .* the first is {name}",
        ),
        (tensors | {name: tensors[name][:, :5].contiguous()}, "another shape|does not fit"),
        (tensors | {name: tensors[name].to(torch.int8)}, "no real numbers.* the first is"),
    ):
        save_file(changed_tensors, file)
        for read in (load_adapter, lambda path: merge(path, tmp_path / "merged")):
            with pytest.raises(UserError, match=reason):
                read(folder)
        with pytest.raises(UserError, match=reason.replace("|does not fit", "")):
            trainer._load_from_checkpoint(str(folder))
    file.unlink()
    for read in (load_adapter, trainer._load_from_checkpoint):
        with pytest.raises(UserError, match=r"no adapter_model\.safetensors"):
            read(str(folder))
    assert not (tmp_path / "merged").exists()


def test_an_adapter_is_no_whole_model(tmp_path, adapter):
    """transformers would load its base with it, and save the adapter alone."""
    _, folder = adapter
    second = Path(shutil.copytree(folder, tmp_path / "second"))
    settings = json.loads((second / "adapter_config.json").read_text())
    (second / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(folder)})
    )
    for use in (
        lambda: prepare(folder, tmp_path / "new"),
        lambda: merge(second, tmp_path / "new"),
        lambda: load_for_inference(second),
        lambda: merge(folder, tmp_path / "new", base=folder),
    ):
        with pytest.raises(UserError, match=rf"{folder}: an adapter, not a whole model\. Merge it first"):
            use()
    (second / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": float("nan")}))
    with pytest.raises(UserError, match="field `lora_alpha`: expected a number of at least 0, found nan"):
        load_for_inference(second)
    assert not (tmp_path / "new").exists()


def test_a_merge_that_overflows_writes_nothing(tmp_path, adapter):
    _, folder = adapter
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t * 1e8 if "linear_1" in n else t for n, t in tensors.items()}, file)
    with pytest.raises(UserError, match="not finite"):
        merge(folder, tmp_path / "merged", dtype="float16")
    assert not (tmp_path / "merged").exists()


FAMILIES = ["llava_next", "mllama", "idefics3", "internvl", "qwen3_vl", "gemma3", "paligemma", "smolvlm"]


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {"tie": tie}) for name in ("llava", "qwen2_5_vl") for tie in (False, True)),
        *((n, {}) for n in FAMILIES),
    ],
)
def test_whole_checkpoints_of_any_family_load(tmp_path, name, options, caplog):
    load_model(families.save(*getattr(families, name)(**options), tmp_path))
    assert not [record for record in caplog.records if "not used" in record.getMessage()]
