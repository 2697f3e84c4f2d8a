"""Bridges to other projects' tools. Nothing is imported here; the other project need not be installed."""


def lmms_eval_manifest():
    """Entry point of lmms-eval's model registry: makes `--model vlm_sft_rl` known to it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vlm_sft_rl", simple_class_path="vlm_sft_rl.bridges.lmms_eval.VlmSftRl")
