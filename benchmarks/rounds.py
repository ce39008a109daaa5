"""How many calls a timing queues: the same for JAX functions and for torch ones."""

from typing import Literal

# "kernel": device time of a call's kernels; "queued": wall time of queued calls.
Timer = Literal["kernel", "queued"]


def calls_per_queue(call_ms: float) -> int:
    """Calls to queue at once: 0.2 s of work, at least 10 calls and at most 50."""
    return max(10, min(50, round(200 / max(call_ms, 1e-3))))


def queued_rounds(call_ms: float) -> int:
    """Queues to time: dispatch is 0.1 ms, so one queue is enough for calls of 20 ms."""
    return 1 if call_ms > 20 else 5
