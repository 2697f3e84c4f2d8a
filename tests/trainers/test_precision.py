import dataclasses
import os

import pytest
import torch
from regions import config
from tagged_rows import prepared
from training import loaded_trainer, tagged, tagged_dataset, trainer_of

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.base import OpenPrecision
from vlm_sft_rl.trainers.grpo import VisionGRPOConfig
from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOConfig
from vlm_sft_rl.trainers.sc_tune.config import SCTuneConfig
from vlm_sft_rl.trainers.self_correction_sft import SelfCorrectionSFTConfig
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer

CONFIGS = [
    VerificationSFTConfig,
    ReflectionDPOConfig,
    SelfCorrectionSFTConfig,
    SCTuneConfig,
    VisionGRPOConfig,
]


@pytest.mark.parametrize("launched_with", ["bf16", "fp16", "no", None])
@pytest.mark.parametrize("bf16, precision", [(False, "no"), (None, "no"), (True, "bf16")])
@pytest.mark.parametrize(
    "kind",
    [
        config,
        lambda folder, **settings: VerificationSFTConfig(str(folder), use_cpu=True, **settings),
        lambda folder, **settings: ReflectionDPOConfig(str(folder), use_cpu=True, **settings),
    ],
)
def test_on_a_cpu_the_arguments_decide_not_the_launcher(
    tmp_path, monkeypatch, kind, bf16, precision, launched_with
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched_with:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    args = kind(tmp_path, bf16=bf16)
    assert args.mixed_precision == precision and args.bf16 == (precision == "bf16") and not args.fp16


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
    gradient_checkpointing: bool = True
    max_grad_norm: float = 1.0
    dataloader_pin_memory: bool = True
    gradient_checkpointing_kwargs: dict | None = None
    activation_checkpointing: bool | None = None
    activation_checkpointing_kwargs: dict | None = None
    dataloader_pin_memory: bool = True

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


def test_full_training_in_16_bits_is_warned_of(tmp_path, caplog):
    for dtype, warnings in ((torch.float32, 0), (torch.bfloat16, 1)):
        fully_trained(tmp_path, dtype)
        assert sum("small updates vanish" in record.message for record in caplog.records) == warnings


@pytest.mark.parametrize(
    "dtype, settings, why",
    [(torch.float16, {}, "Adam divides by zero"), (torch.bfloat16, {"fp16": True}, "scaler of `fp16: true`")],
)
def test_weights_that_cannot_be_trained_are_refused(tmp_path, dtype, settings, why):
    with pytest.raises(UserError, match=why):
        fully_trained(tmp_path, dtype, **settings)


def fully_trained(folder, dtype, **settings):
    """A trainer of all of a model's weights."""
    model, processor = tagged()
    pair = model.to(dtype), processor
    return trainer_of(VerificationSFTTrainer, folder, tagged_dataset(folder), pair, **settings)


@pytest.mark.parametrize(
    "dtype, bf16, precision",
    [
        ("float32", False, torch.float32),
        ("bfloat16", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_what_trains_beside_quantised_weights_is_float32_where_it_can_be(tmp_path, dtype, bf16, precision):
    """TRL rounds it to bfloat16, where rows and LoRA's A stand still at usual learning rates."""
    settings = {"use_peft": True, "lora_r": 4, "bnb_4bit_quant_type": "nf4", "load_in_4bit": True}
    training, base = {"bf16": bf16, "max_steps": 1}, prepared(tmp_path)
    trainer, _ = loaded_trainer(base, tmp_path, training=training, dtype=dtype, **settings)
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {precision}
    trainer.train()
