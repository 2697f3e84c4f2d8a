"""A tiny trainer on tagged rows, for the tests of families."""

from datasets import Dataset
from tagged_rows import write_rows

from vlm_sft_rl.data.rows import read_rows
from vlm_sft_rl.models.load import VLMModelConfig, load_for_training
from vlm_sft_rl.models.lora import build_peft_config
from vlm_sft_rl.trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator

# families that every test of families takes; the others are as thorough, and slow
QUICK = ["llava", "qwen2_5_vl", "mllama"]
OTHERS = [
    "llava_mistral",
    "llava_more",
    "llava_next",
    "qwen2_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "internvl",
]


def trainer_for(base, folder, *, training=None, **settings):
    """A trainer two steps long, and the ids of the verification tokens; `settings` are of `VLMModelConfig`.

    Args:
        training: what differs in the training arguments.
    """
    rows = list(read_rows(write_rows(folder / "data")))
    args = VLMModelConfig(model_name_or_path=str(base), **settings)
    model, processor, ids, _ = load_for_training(args)
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    config = VerificationSFTConfig(str(folder / "out"), **(arguments | (training or {})))
    trainer = VerificationSFTTrainer(
        model,
        config,
        data_collator=build_collator(processor, config, image_root=folder / "data"),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=build_peft_config(model, args, ids),
    )
    return trainer, ids
