"""Models: loading, verification tokens, freezing, LoRA, merging, and the sidecar beside every checkpoint."""
