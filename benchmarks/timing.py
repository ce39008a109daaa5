"""Device time of JAX functions, by the same two methods as torch_peers.py uses for torch.

"kernel" sums the durations of a call's kernels as CUPTI reports them, so neither dispatch nor
gaps count. "queued" is the wall time of a queue of calls over their number, so dispatch is hidden
while a call takes longer than it. Where the two agree, launch overhead does not count. "single" is
the wall time of one call, dispatch included: 0.1 ms of calls that take hundreds. Here alone.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler

from benchmarks.rounds import Timer, calls_per_queue, heat, queued_rounds, single_runs

_L2_BYTES = 50 * 2**20  # H100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Milliseconds of a call: one figure per run by the chosen timer, and the queued median."""

    runs_ms: Sequence[float]
    queued_ms: float

    @property
    def median_ms(self) -> float:
        """The figure that is recorded."""
        return statistics.median(self.runs_ms)


def time_call[Out](
    function: Callable[..., Out], operands: Sequence[Any], *, timer: Timer, runs: int
) -> tuple[Out, Timing]:
    """Heats up with and times a jitted or compiled function; also returns its result."""
    out = jax.block_until_ready(function(*operands))
    if timer == "single":
        once = functools.partial(_queue_ms, function, operands, calls=1)
        call_ms = once()
        heat(once)
        runs_ms = [once() for _ in range(single_runs(call_ms, runs))]
        return out, Timing(runs_ms=runs_ms, queued_ms=statistics.median(runs_ms))
    call_ms = _queue_ms(function, operands, calls=2)
    calls = calls_per_queue(call_ms)
    queue = functools.partial(_queue_ms, function, operands, calls=calls)
    heat(queue)
    rounds = runs if timer == "queued" else queued_rounds(call_ms)
    queued = [queue() for _ in range(rounds)]
    runs_ms = queued if timer == "queued" else kernel_ms(function, operands, max(runs, calls))
    return out, Timing(runs_ms=runs_ms, queued_ms=statistics.median(queued))


def check_exceeds_cache(operands: Any) -> None:
    """Operands that fit the GPU's L2 cache would be timed from the cache, as no model runs them."""
    arrays = [leaf for leaf in jax.tree.leaves(operands) if isinstance(leaf, jax.Array)]
    size = sum(array.nbytes for array in arrays)
    if size <= _L2_BYTES:
        raise ValueError(
            f"operands of {size / 2**20:.0f} MiB fit the L2 cache of {_L2_BYTES >> 20} MiB; "
            "time a longer sequence"
        )


def _queue_ms(function: Callable[..., Any], operands: Sequence[Any], *, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        function(*operands)
    jax.block_until_ready(function(*operands))
    return (time.perf_counter() - start) * 1e3 / calls


def kernel_ms(function: Callable[..., Any], operands: Sequence[Any], runs: int) -> list[float]:
    """Device time of a call's kernels, in each of at least two runs."""
    _, runs_ms = profiler.measure(function, iterations=runs)(*operands)
    if runs_ms is None:
        raise RuntimeError("CUPTI reported no kernel; time with --timer queued")
    return runs_ms
