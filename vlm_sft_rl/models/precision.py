"""The precision that passes are computed in, which is not always that of the weights."""

import torch
from torch import nn

SIXTEEN_BIT = (torch.float16, torch.bfloat16)


def tolerance(of: nn.Module | torch.Tensor, exact: float, rounded: float = 0.05) -> float:
    """How far two ways to the same values may lie apart: `exact` where a model (or what came out of it) computes in
    float32, `rounded` with 16-bit weights or under autocast."""
    in_float32 = of.dtype == torch.float32 and not torch.is_autocast_enabled(of.device.type)
    return exact if in_float32 else rounded
