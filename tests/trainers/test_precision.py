import dataclasses
import os

import pytest
import torch
from regions import config

from vlm_sft_rl.trainers.base import OpenPrecision
from vlm_sft_rl.trainers.grpo import VisionGRPOConfig
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOConfig
from vlm_sft_rl.trainers.sc_tune.config import SCTuneConfig
from vlm_sft_rl.trainers.self_correction_sft import SelfCorrectionSFTConfig
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig

CONFIGS = [
    VerificationSFTConfig,
    ReflectionDPOConfig,
    SelfCorrectionSFTConfig,
    SCTuneConfig,
    VisionGRPOConfig,
]


@pytest.mark.parametrize("launched_with", ["bf16", "fp16", "no", None])
@pytest.mark.parametrize(
    "asked, found", [({"bf16": False}, "no"), ({"bf16": None}, "no"), ({"bf16": True}, "bf16")]
)
@pytest.mark.parametrize(
    "kind",
    [
        config,
        lambda folder, **own: VerificationSFTConfig(str(folder), use_cpu=True, **own),
        lambda folder, **own: ReflectionDPOConfig(str(folder), use_cpu=True, **own),
    ],
)
def test_on_a_cpu_the_arguments_decide_not_the_launcher(
    tmp_path, monkeypatch, kind, asked, found, launched_with
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched_with:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    args = kind(tmp_path, **asked)
    assert args.mixed_precision == found and args.bf16 == (found == "bf16") and not args.fp16


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_config_leaves_the_precision_open(kind):
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    assert fields["bf16"] is None and fields["fp16"] is False


@dataclasses.dataclass
class LikeTransformers:
    """What transformers' arguments do with the precision, without looking for a real GPU."""

    bf16: bool | None
    fp16: bool = False
    use_cpu: bool = False

    def __post_init__(self):
        self.mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        if self.fp16 or self.bf16:
            self.mixed_precision = "fp16" if self.fp16 else "bf16"


@dataclasses.dataclass
class Arguments(OpenPrecision, LikeTransformers):
    pass


@pytest.mark.parametrize(
    "bf16, launched_with, has_bf16, precision",
    [
        (None, None, True, "bf16"),
        (None, "bf16", True, "bf16"),
        (None, "no", True, "bf16"),
        (None, "fp16", True, "fp16"),
        (None, "bf16", False, "no"),
        (None, "fp16", False, "fp16"),
        (False, "bf16", True, "no"),
        (False, "fp16", True, "no"),
        (False, "fp8", True, "fp8"),
        (True, "fp16", True, "bf16"),
    ],
)
def test_on_a_gpu_what_is_left_open_is_its_own_precision(
    monkeypatch, bf16, launched_with, has_bf16, precision
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with or "no")
    args = Arguments(bf16)
    assert args.mixed_precision == precision
    assert (args.fp16, args.bf16) == (precision == "fp16", precision == "bf16")
    # whoever reads the launcher's word finds it as it was
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == (launched_with or "no")
