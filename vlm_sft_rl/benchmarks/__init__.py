"""Speed benchmarks: each module has `run(...) -> dict`."""
