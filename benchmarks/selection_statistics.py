"""Suite selection_statistics: what FlexPrefill and MInference learn of q and k before they select.

Structured queries and keys, see sparseattn_jax.synthetic. The references are the same operations
by XLA on float32 operands; there is no peer.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import gate
from benchmarks.measure import Options, measured
from benchmarks.records import Record
from benchmarks.shapes import format_length
from benchmarks.xattention import structured_operands
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.coverage_counts import coverage_counts
from sparseattn_jax.kernels.pooled_scores import pooled_distance, pooled_scores
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores

SHARE = 0.9  # FlexPrefill's gamma
_EPSILON = 2e-5  # of a row's largest statistic, or of its mass


def run(options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    q, k, _ = structured_operands(options.shape, length, seed=options.seed)
    block_size = options.shape.block_size
    # Of these only the scores have a kernel of their own to name.
    for case, statistics, backend in (
        *(
            (f"vertical and slash of {n} queries", _vertical_and_slash(n), options.backend)
            for n in sorted({64, block_size})
        ),
        ("pooled scores", _pooled(block_size), None),
        ("all of FlexPrefill", _flex_prefill(block_size), None),
    ):
        exact = gate.jit_reference(functools.partial(statistics, backend="xla"))(
            q.astype(jnp.float32), k.astype(jnp.float32)
        )
        timed = jax.jit(functools.partial(statistics, backend=backend))
        yield dataclasses.replace(options, backend=backend).record(
            op="selection_statistics",
            case=f"{format_length(length)} {case}",
            inputs=f"{options.shape}, causal, structured q/k of sparseattn_jax.synthetic",
            density=1.0,
            ours=measured(timed, (q, k), functools.partial(_judge, exact=exact), options),
            peer=None,
            theirs=None,
        )


def _vertical_and_slash(num_queries: int) -> Callable[..., Sequence[Array]]:
    return functools.partial(vertical_slash_scores, num_queries=num_queries)


def _pooled(block_size: int) -> Callable[..., Sequence[Array]]:
    def statistics(q: Array, k: Array, *, backend: Backend | None) -> Sequence[Array]:
        return [pooled_scores(q, k, block_size=block_size, backend=backend)]

    return statistics


def _flex_prefill(block_size: int) -> Callable[..., Sequence[Array]]:
    """Vertical and slash, the distance that decides, pooled scores, and both coverage counts."""

    def statistics(q: Array, k: Array, *, backend: Backend | None) -> Sequence[Array]:
        vertical, slash = vertical_slash_scores(q, k, num_queries=block_size, backend=backend)
        return [
            vertical,
            slash,
            pooled_distance(q, k, vertical, block_size=block_size, backend=backend),
            pooled_scores(q, k, block_size=block_size, backend=backend),
            coverage_counts(vertical, SHARE, backend=backend),
            coverage_counts(slash, SHARE, backend=backend),
        ]

    return statistics


def _judge(found: Sequence[Array], *, exact: Sequence[Array]) -> gate.Verdict:
    """The largest error of any row; a count is judged by the mass that it covers."""
    worst = 0.0
    masses = [np.asarray(x[0], np.float64) for x in exact[:2]]
    counts = [x for x in found if x.dtype == jnp.int32]
    for mass, count in zip(masses, counts, strict=False):
        worst = max(worst, uncovered(mass, np.asarray(count[0])))
    for x, right in zip(found, exact, strict=True):
        if x.dtype == jnp.float32:
            error = jnp.abs(x - right).max(axis=-1) / jnp.abs(right).max(axis=-1)
            worst = max(worst, float(jnp.nan_to_num(error, nan=jnp.inf).max()))
    return gate.Verdict(max_error=worst, max_error_allowed=_EPSILON)


def uncovered(mass: np.ndarray, counts: np.ndarray) -> float:
    """How far the mass of any row's highest entries lies on the wrong side of the share."""
    shares = np.cumsum(-np.sort(-mass, axis=-1), axis=-1) / mass.sum(axis=-1, keepdims=True)
    covered = np.take_along_axis(shares, counts[:, None] - 1, axis=-1)[:, 0]
    before = np.take_along_axis(np.insert(shares, 0, 0, axis=-1), counts[:, None] - 1, axis=-1)
    return float(max((SHARE - covered).max(), (before[:, 0] - SHARE).max(), 0.0))
