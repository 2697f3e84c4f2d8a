"""Seeing what a module returns without changing it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recorded(module: torch.nn.Module) -> Iterator[list]:
    """Collect what `module` returns while the context is open."""
    outputs: list = []
    handle = module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()
