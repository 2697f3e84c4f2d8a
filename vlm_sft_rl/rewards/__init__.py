"""Rewards as TRL reward functions: `f(prompts, completions, completion_ids, **columns) -> list[float]`. No torch.

`regions` holds those of grounding, `answers` those of questions with a known answer, `verdicts` those of answers that judge
their own phrases.
"""
