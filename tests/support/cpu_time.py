"""How long a reading takes, for tests that it is not quadratic."""

import time
from collections.abc import Callable


def cpu_seconds(call: Callable, enough: float = 1.0) -> float:
    """CPU seconds of a call; up to three tries, because a collection of garbage may fall into one of them."""
    best = float("inf")
    for _ in range(3):
        started = time.process_time()
        call()
        best = min(best, time.process_time() - started)
        if best < enough:
            break
    return best
