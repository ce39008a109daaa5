"""Cumulative block selection: for each row, the highest scores that reach a share of its sum.

Blocks rank by (forced, score, lower index). A row keeps its forced blocks and the shortest prefix
of that order whose mass reaches threshold * (mass of the visible blocks). A threshold of 1 or more
keeps every visible block, by definition and not by summation; 0 keeps the forced ones. Forced
blocks that are not visible are not kept.

Source: XAttention (arXiv:2503.16428) section 2.2, with the mass of forced blocks counted.
"""

from collections.abc import Mapping

import jax
from jaxtyping import Array, Bool, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.select_blocks import mosaic_sm90, xla

_TABLE: Mapping[Backend, Implementation[mosaic_sm90.CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run, mosaic_sm90.refusal),
    "xla": Implementation(xla.run, never_refuses),
}


def select_blocks(
    scores: Float32[Array, "B N Tb Sb"],
    threshold: Float32[Array, " N"],
    forced: Bool[Array, "#B #N Tb Sb"],
    visible: Bool[Array, "#B #N Tb Sb"],
    *,
    max_blocks: int | None,
    backend: Backend | None = None,
) -> tuple[Int32[Array, "B N Tb M"], Int32[Array, "B N Tb"], Int32[Array, "B N"]]:
    """Lists the selected blocks of every row.

    Args:
        scores: mass of each block, not negative.
        threshold: share of each row's mass to keep, per head.
        forced: blocks to keep whatever their score.
        visible: blocks that may be kept; the scores of others are ignored.
        max_blocks: capacity M of a list, by default (and at most) Sb. A row that selects more
            keeps the first M in rank, so the forced ones if M has room for them.
        backend: which implementation runs, by default the best that can.

    Returns:
        Indices and counts as in `kernels/block_lists.py`, and per head the number of selected
        blocks that the capacity dropped.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    facts = mosaic_sm90.CallFacts(device=device_facts(scores), num_columns=scores.shape[-1])
    return choose(_TABLE, backend, facts).run(
        jax.lax.stop_gradient(scores),
        jax.lax.stop_gradient(threshold),
        forced,
        visible,
        max_blocks=max_blocks,
    )
