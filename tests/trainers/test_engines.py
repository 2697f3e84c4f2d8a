"""A run is distributed as its launcher was told, or refused; what cannot be sharded is refused before it is tried."""

import families
import pytest
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from image_rows import tagged_rows
from peft import LoraConfig
from training import OTHERS, QUICK, tagged, trainer_of

from vlm_sft_rl.errors import UserError
from vlm_sft_rl.trainers.checks import check_engine, name_wrapped_layers
from vlm_sft_rl.trainers.mixture_sft import MixtureSFTTrainer
from vlm_sft_rl.trainers.verification_sft import VerificationSFTTrainer


def made(folder, trainer_class=MixtureSFTTrainer, pair=None, **settings):
    rows = tagged_rows(pictures=2, each=2)
    return trainer_of(trainer_class, folder, rows, pair or tagged(), gradient_checkpointing=False, **settings)


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_was_asked_for_and_is_not_used_is_an_error(tmp_path, monkeypatch, engine):
    trainer, reason = made(tmp_path), f"{engine} was asked for, and accelerate trains without it"
    for word in ("true", "1"):
        monkeypatch.setenv(f"ACCELERATE_USE_{engine}", word)
        for state, settled in ((trainer.accelerator.state, True), (PartialState(), False)):
            with pytest.raises(UserError, match=reason):
                check_engine(state, settled=settled)
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "0")
    check_engine(PartialState(), settled=False)
    if engine == "FSDP":
        with pytest.raises(UserError, match=reason):  # by a recipe
            check_engine(PartialState(), settled=False, fsdp=True)


def test_processes_that_would_train_each_by_itself_are_refused(tmp_path, monkeypatch):
    state = made(tmp_path).accelerator.state
    check_engine(state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes were started, and each would train by itself"):
        check_engine(state)


@pytest.mark.parametrize("family", [*QUICK, *OTHERS])
def test_fsdp_wraps_the_blocks_that_a_model_has(tmp_path, family):
    """transformers also names blocks for LLaVA that no LLaVA has, and accelerate refuses those."""
    trainer = made(tmp_path, pair=getattr(families, family)())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    trainer.accelerator.state.fsdp_plugin = plugin
    try:
        name_wrapped_layers(trainer)
        names = plugin.transformer_cls_names_to_wrap
        assert len(names) >= 2 and any("DecoderLayer" in name for name in names), names
        plugin.set_auto_wrap_policy(trainer.model)
    finally:
        del trainer.accelerator.state.fsdp_plugin


def test_token_rows_of_an_adapter_are_not_sharded(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    lora = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[3, 4])
    with pytest.raises(UserError, match="trainable token rows does not work under FSDP"):
        made(tmp_path, VerificationSFTTrainer, peft_config=lora)
