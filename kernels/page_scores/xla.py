"""Page bounds and scores in plain XLA: the meaning of the ops, on any device."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.products import matmul


@functools.partial(jax.jit, static_argnames=("page_size",))
def run_bounds(
    k: Float[Array, "B S K H"], kv_lengths: Int32[Array, " B"] | None, *, page_size: int
) -> tuple[Float[Array, "B P K H"], Float[Array, "B P K H"]]:
    """Least and greatest keys; the arguments are those of the op."""
    batch, kv_len, *rest = k.shape
    is_valid = jnp.ones((1, kv_len, 1, 1), bool)
    if kv_lengths is not None:
        is_valid = (jnp.arange(kv_len)[None] < kv_lengths[:, None])[..., None, None]

    def paged(empty: float) -> Array:
        padding = (0, 0), (0, -kv_len % page_size), (0, 0), (0, 0)
        keys = jnp.pad(jnp.where(is_valid, k, empty), padding, constant_values=empty)
        return keys.reshape(batch, -1, page_size, *rest)

    return paged(jnp.inf).min(axis=2), paged(-jnp.inf).max(axis=2)


@functools.partial(jax.jit, static_argnames=("page_size",))
def extend_bounds(
    key_min: Float[Array, "B P K H"],
    key_max: Float[Array, "B P K H"],
    new_keys: Float[Array, "B T K H"],
    kv_lengths: Int32[Array, " B"],
    *,
    page_size: int,
) -> tuple[Float[Array, "B P K H"], Float[Array, "B P K H"]]:
    """The bounds after T tokens were appended to every sequence; in place if they are donated.

    Args:
        key_min: least keys of each page before.
        key_max: greatest keys.
        new_keys: keys of the new tokens. Those past the last page are left out.
        kv_lengths: tokens of each sequence before the new ones.
        page_size: tokens per page.

    Returns:
        The least and the greatest keys.
    """
    batch, num_new = new_keys.shape[:2]
    positions = kv_lengths[:, None] + jnp.arange(num_new, dtype=jnp.int32)[None]
    index = jnp.arange(batch)[:, None], positions // page_size
    return (
        key_min.at[index].min(new_keys, mode="drop"),
        key_max.at[index].max(new_keys, mode="drop"),
    )


@jax.jit
def run_scores(
    q: Float[Array, "B T N H"], key_min: Float[Array, "B P K H"], key_max: Float[Array, "B P K H"]
) -> Float32[Array, "B T N P"]:
    """Upper bounds; the arguments are those of the op."""
    batch, q_len, num_heads, head_dim = q.shape
    num_pages, num_kv_heads = key_min.shape[1:3]
    queries = q.reshape(batch, q_len, num_kv_heads, -1, head_dim)
    # The greater of q * min and q * max is the one with max where q is positive.
    scores = matmul("btkgh,bpkh->btkgp", jnp.maximum(queries, 0), key_max)
    scores += matmul("btkgh,bpkh->btkgp", jnp.minimum(queries, 0), key_min)
    is_empty = jnp.swapaxes(key_min[..., 0] > key_max[..., 0], 1, 2)
    scores = jnp.where(is_empty[:, None, :, None], -jnp.inf, scores)
    return scores.reshape(batch, q_len, num_heads, num_pages)
