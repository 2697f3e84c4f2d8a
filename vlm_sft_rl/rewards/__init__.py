"""Rewards as TRL reward functions: `f(prompts, completions, completion_ids, **columns) -> list[float]`.

`regions` holds those of grounding, `answers` those of questions with a known answer, `boxes` the overlap of two boxes,
`leak` the guard against spelt coordinates. No torch.
"""
