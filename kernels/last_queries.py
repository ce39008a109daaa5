"""The last valid queries of each sequence of a causal call."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32


def last_queries(
    q: Float[Array, "B T N H"],
    kv_lengths: Int32[Array, " B"] | None,
    *,
    kv_len: int,
    num_queries: int,
) -> tuple[Float[Array, "B n N H"], Int32[Array, " B"], Int32[Array, " B"]]:
    """Up to `num_queries` consecutive queries that end with the last valid one.

    Returns:
        The queries, the position of the first one, and how many of them, from the first on, are
        valid: fewer than there are where the sequence has no more.
    """
    q_len = q.shape[1]
    num = min(num_queries, q_len)
    offset = kv_len - q_len
    if kv_lengths is None:
        kv_lengths = jnp.full(q.shape[0], kv_len, jnp.int32)
    end = jnp.clip(kv_lengths - offset, 0, q_len)
    first = jnp.maximum(end - num, 0)
    queries = jax.vmap(lambda x, start: lax.dynamic_slice_in_dim(x, start, num))(q, first)
    return queries, first + offset, jnp.minimum(end, num)
