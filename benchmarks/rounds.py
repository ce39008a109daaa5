"""How long a call runs before it is timed and how often then: the same for JAX and for torch."""

import time
from collections.abc import Callable
from typing import Literal

# "kernel": device time of a call's kernels; "queued": wall time of queued calls; "single": wall
# time of calls that are awaited one by one, for calls so large that few results fit the memory.
Timer = Literal["kernel", "queued", "single"]


_HEATING_SECONDS = 0.7


def heat(queue: Callable[[], object]) -> None:
    """Runs a queue of calls until the GPU's clock has settled at its power limit.

    A cool GPU runs attention at up to 1.2 times the clock that it can hold.
    """
    start = time.perf_counter()
    while time.perf_counter() - start < _HEATING_SECONDS:
        queue()


def calls_per_queue(call_ms: float) -> int:
    """Calls to queue at once: 0.2 s of work, at least 10 calls and at most 50."""
    return max(10, min(50, round(200 / max(call_ms, 1e-3))))


def single_runs(call_ms: float, runs: int) -> int:
    """Calls to time one by one: as many as were asked for, but of long ones 20 s or two calls."""
    return max(2, min(runs, round(20_000 / max(call_ms, 1e-3))))


def queued_rounds(call_ms: float) -> int:
    """Queues to time: dispatch is 0.1 ms, so one queue is enough for calls of 20 ms."""
    return 1 if call_ms > 20 else 3
