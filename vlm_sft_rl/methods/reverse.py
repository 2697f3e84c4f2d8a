"""REVERSE: a recipe and its files to a `VerificationSFTTrainer`."""

from ..decoding import SamplingConfig, generate_plain
from ..dry_run import Plan
from ..evaluation.probe import VerifierProbe
from ..trainers.verification_sft import VerificationSFTConfig, VerificationSFTTrainer, build_collator
from . import row_sft

CONFIG = VerificationSFTConfig


def build(recipe: dict, model_args, data_args, args) -> VerificationSFTTrainer:
    """Model, data and trainer of a recipe, ready for `train()`."""
    configs = (model_args, data_args, args)
    trainer = row_sft.build(VerificationSFTTrainer, build_collator, recipe, *configs, verification=True)
    if data_args.probe_spec:
        trainer.add_callback(build_probe(data_args, trainer, trainer.processing_class))
    return trainer


def plan(recipe: dict, model_args, data_args, args) -> Plan:
    """What `build` would make, with the model on the meta device."""
    return row_sft.plan(build_collator, model_args, data_args, args, verification=True)


def build_probe(data_args, trainer, processor):
    """The callback that asks the model questions during training (`probe_*` keys)."""

    def generate(model, images, prompts, max_new_tokens):
        # the projector may be float32 beside 16-bit weights
        with trainer.accelerator.autocast():
            config = SamplingConfig(max_new_tokens=max_new_tokens)
            return generate_plain(model, processor, images, prompts, config, batch_size=16)

    return VerifierProbe(
        trainer.record,
        generate,
        data_args.probe_spec,
        data_args.probe_data_dir or ".",
        questions=data_args.probe_questions,
        every=data_args.probe_every,
        limit=data_args.probe_limit,
    )
