"""The adapter under lmms-eval's own base class and registry; runs where lmms-eval is installed."""

from types import SimpleNamespace

import pytest
from PIL import Image
from worlds import write_checkpoint

pytest.importorskip("lmms_eval.api.model", reason="lmms-eval is not installed")


@pytest.mark.parametrize(
    "decoder",
    ["greedy", "retrospective", "vcd", "correct", "self-select", "self-refine", "best-of-n", "opera"],
)
def test_requests_of_lmms_eval_are_answered(decoder, tmp_path):
    from vlm_sft_rl.bridges.lmms_eval import VlmSftRl

    checkpoint = write_checkpoint(tmp_path / "model")
    arguments = f"pretrained={checkpoint},decoder={decoder}"
    arguments += ",threshold=0.9" if decoder == "retrospective" else ""
    model = VlmSftRl.create_from_arg_string(arguments, {"batch_size": 2, "device": None})
    picture = Image.new("RGB", (28, 28), "red")
    model.task_dict = {"t": {"test": [{"image": picture}, {"image": None}]}}

    def visuals(document):
        return [document["image"]] if document["image"] else []

    settings = {"max_new_tokens": 6, "temperature": 0, "do_sample": False}
    requests = [SimpleNamespace(args=("What is it?", settings, visuals, i, "t", "test")) for i in (0, 1)]
    first = model.generate_until(requests)
    assert len(first) == 2 and all(isinstance(text, str) for text in first)
    assert model.generate_until(requests[::-1]) == first[::-1]


def test_lmms_eval_finds_the_model_by_its_manifest():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from vlm_sft_rl.bridges import lmms_eval_manifest
    from vlm_sft_rl.bridges.lmms_eval import VlmSftRl

    registry = ModelRegistryV2()
    registry.register_manifest(lmms_eval_manifest())
    assert registry.get_model_class("vlm_sft_rl") is VlmSftRl


def test_bad_arguments_are_explained(tmp_path):
    from vlm_sft_rl.bridges.lmms_eval import VlmSftRl
    from vlm_sft_rl.errors import UserError

    with pytest.raises(UserError, match="no option 'threshhold'"):
        VlmSftRl("x", threshhold=1)
    with pytest.raises(UserError, match="--decoder majority works in"):
        VlmSftRl("x", decoder="majority")
