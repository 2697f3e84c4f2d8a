"""Rewards for grounding, as TRL reward functions: `f(prompts, completions, completion_ids, **columns) -> list[float]`.

`regions` holds the functions, `boxes` the overlap of two boxes, `leak` the guard against spelt coordinates. No torch.
"""
