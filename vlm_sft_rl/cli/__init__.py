"""The commands of `vlm-sft-rl`, thin: heavy libraries are imported inside a command."""
