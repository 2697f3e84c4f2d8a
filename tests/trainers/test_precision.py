import pytest
from regions import config

from vlm_sft_rl.trainers.reflection_dpo import ReflectionDPOConfig
from vlm_sft_rl.trainers.verification_config import VerificationSFTConfig


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
def test_the_arguments_decide_the_precision_not_the_launcher(
    tmp_path, monkeypatch, kind, asked, found, launched_with
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched_with:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched_with)
    args = kind(tmp_path, **asked)
    assert args.mixed_precision == found and args.bf16 == (found == "bf16")
