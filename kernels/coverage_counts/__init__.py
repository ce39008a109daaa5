"""Coverage counts: how many of a row's highest entries hold a share of its mass.

With x sorted in falling order, C[k] the sum of its first k + 1 entries, and total the sum of all,

    count = min(L, 1 + the number of k with C[k] <= share * total)

so that the first `count` entries are the fewest that hold more than the share, or all L of them
where none do: share = 1 asks for all. A row whose mass is 0 is covered by nothing less than all.

There is no Hopper kernel: at 32 rows of 131072 entries the search goes 11 times over 16 MB, which
the L2 cache of a Hopper GPU holds, so that plain XLA is expected to take less than 0.5 ms.

Source: FlexPrefill (arXiv:2502.20766) algorithm 3, where x is the mass of each key, or of each
distance, and the rule sorts.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    DeviceFacts,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.coverage_counts import xla

_TABLE: Mapping[Backend, Implementation[DeviceFacts]] = {
    "xla": Implementation(xla.run, never_refuses),
}


def coverage_counts(
    x: Float32[Array, "B N L"],
    share: float | Float32[Array, " N"],
    *,
    backend: Backend | None = None,
) -> Int32[Array, "B N"]:
    """The count of each row: exact to the rule but for the rounding of float32 sums.

    Args:
        x: masses, not negative.
        share: which part of a row's mass its highest entries are to hold, 0 to 1; one for all
            heads, or one for each.
        backend: which implementation runs, by default the best that can.

    Returns:
        Counts from 1 to L.

    Raises:
        UnsupportedError: the named backend cannot run this call.
    """
    of_heads = jnp.broadcast_to(jnp.asarray(share, jnp.float32), x.shape[1])
    return choose(_TABLE, backend, device_facts(x)).run(
        jax.lax.stop_gradient(x), jax.lax.stop_gradient(of_heads)
    )
