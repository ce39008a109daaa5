"""Queries, keys and values with the structure of a language model's attention.

Independent normal q and k have no sparsity: every block weighs the same. Here the logit of the
query at position p and the key at position j, with d = p - j, is a sum of four parts, each from
its own channels of the head:

    sink * [j < num_sinks]                                  1 channel
    local * (1 / P) sum_m cos(omega_m d)                    2 P channels, P = 3 H // 8
    needle * [p in query span n] [j in key span n]          the rest
    noise * (a standard normal variable)                    the rest, too

*Sinks* draw every query. The *band* is made as rotary embeddings make one: channel pair m of q and
k holds the phase omega_m times the position, so that their product turns with d alone. The
frequencies are the quantiles omega_m = -log(1 - u_m) / width, u_m = (m + 1/2) / P, of an
exponential distribution, whose characteristic function makes the sum local / (1 + (d / width)^2)
as P grows; a finite P leaves ripples of local / sqrt(2 P) at all distances, which show as slashes.
Each kv head has its own width, spread over local_width * [1/4, 4] in even steps of the logarithm;
the query heads of a group differ in `local` by up to a tenth. *Needles*: per sequence and kv head,
`num_needles` spans of `needle_size` late queries look up as many early spans of keys, by a random
direction that the two share.
"""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from sparseattn_jax.checks import check_positive, checked

type Strength = float | Float32[Array, ""]


def _check_sizes(
    batch: int,
    q_len: int,
    kv_len: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    check_positive(batch=batch, q_len=q_len, num_heads=num_heads, num_kv_heads=num_kv_heads)
    if kv_len is not None and kv_len < q_len:
        raise ValueError(
            f"kv_len={kv_len} must be at least q_len={q_len}: queries stand at the end of the keys"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    if head_dim < 16:
        raise ValueError(f"head_dim={head_dim} must be at least 16 to hold all parts")


@checked(_check_sizes)
def structured_qkv(
    key: PRNGKeyArray,
    *,
    batch: int = 1,
    q_len: int,
    kv_len: int | None = None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: DTypeLike = jnp.bfloat16,
    sink: Strength = 11.0,
    num_sinks: int = 64,
    local: Strength = 12.0,
    local_width: Strength = 2048.0,
    needle: Strength = 14.0,
    num_needles: int = 4,
    needle_size: int = 64,
    noise: Strength = 1.0,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Draws q, k and v; equal keys give equal draws. See the module for the formulas.

    Under `jit` the sizes (ints) and the dtype are static; the strengths (floats) may be traced.

    Args:
        key: of the random draws.
        batch: sequences, B.
        q_len: queries, T, at the end of the keys.
        kv_len: keys, S; by default as many as queries.
        num_heads: query heads, N.
        num_kv_heads: key/value heads, K; divides N.
        head_dim: H.
        dtype: of the results.
        sink: logit of the sinks.
        num_sinks: keys at the start that are sinks.
        local: logit of a query with its own position.
        local_width: distance that halves the logit of the band, in the middle kv head.
        needle: logit of a needle's queries and keys.
        num_needles: needles per sequence and kv head.
        needle_size: queries and keys per needle.
        noise: standard deviation of the unstructured part.

    Returns:
        (q, k, v), to be used with the scale H ** -0.5. v is standard normal.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    kv_len = q_len if kv_len is None else kv_len
    group, num_pairs = num_heads // num_kv_heads, 3 * head_dim // 8
    num_rest = head_dim - 1 - 2 * num_pairs
    q_key, k_key, v_key, needle_key = jax.random.split(key, 4)
    positions = jnp.arange(kv_len)

    band = _phases(positions, num_kv_heads, num_pairs, local_width)
    strengths = local / num_pairs * (1.0 + 0.1 * jnp.linspace(-1.0, 1.0, group))
    q_band = band[kv_len - q_len :, :, None, :] * strengths[None, None, :, None]
    q_needle, k_needle = _needles(
        needle_key, (batch, num_kv_heads, num_needles, num_rest), q_len, kv_len, needle_size
    )
    # A product of two sums of num_rest terms of this variance has the deviation `noise`.
    deviation = (noise * num_rest**-0.5) ** 0.5
    q_rest = deviation * jax.random.normal(q_key, (batch, q_len, num_heads, num_rest))
    k_rest = deviation * jax.random.normal(k_key, (batch, kv_len, num_kv_heads, num_rest))

    q = _assemble(
        jnp.float32(sink**0.5),
        q_band.reshape(1, q_len, num_heads, 2 * num_pairs),
        q_rest + needle**0.5 * jnp.repeat(q_needle, group, axis=2),
        dtype,
    )
    k = _assemble(
        jnp.where(positions < num_sinks, sink**0.5, 0.0)[None, :, None, None],
        band[None],
        k_rest + needle**0.5 * k_needle,
        dtype,
    )
    return q, k, jax.random.normal(v_key, k.shape).astype(dtype)


def _phases(
    positions: Int32[Array, " S"], num_kv_heads: int, num_pairs: int, local_width: Strength
) -> Float32[Array, "S K C"]:
    """Cosines and sines of positions * omega, per kv head."""
    widths = local_width * 4.0 ** jnp.linspace(-1.0, 1.0, num_kv_heads)
    quantiles = (jnp.arange(num_pairs, dtype=jnp.float32) + 0.5) / num_pairs
    frequencies = -jnp.log1p(-quantiles)[None, :] / widths[:, None]
    angles = positions.astype(jnp.float32)[:, None, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _needles(
    key: PRNGKeyArray, shape: tuple[int, int, int, int], q_len: int, kv_len: int, size: int
) -> tuple[Float32[Array, "B T K C"], Float32[Array, "B S K C"]]:
    """The needles' directions at the positions of their spans, zero elsewhere.

    Queries look from the last half of the keys to before their own range.
    """
    q_start_key, k_start_key, direction_key = jax.random.split(key, 3)
    first_query = max(kv_len - q_len, kv_len // 2)
    q_starts = jax.random.randint(
        q_start_key, shape[:3], first_query, max(first_query, kv_len - size) + 1
    )
    k_starts = jax.random.randint(k_start_key, shape[:3], 0, max(first_query - size, 0) + 1)
    directions = jax.random.normal(direction_key, shape)
    directions /= jnp.linalg.norm(directions, axis=-1, keepdims=True)

    def spread(starts: Int32[Array, "B K n"], positions: Int32[Array, " L"]) -> Array:
        distance = positions[None, :, None, None] - starts[:, None]
        is_inside = (distance >= 0) & (distance < size)
        return jnp.einsum("blkn,bknc->blkc", is_inside.astype(jnp.float32), directions)

    positions = jnp.arange(kv_len)
    return spread(q_starts, positions[kv_len - q_len :]), spread(k_starts, positions)


def _assemble(
    sink: Float32[Array, "..."],
    band: Float32[Array, "#B L n C"],
    rest: Float32[Array, "B L n D"],
    dtype: DTypeLike,
) -> Float[Array, "B L n H"]:
    """Joins the parts' channels; the factor undoes the attention's scale of H ** -0.5."""
    sink = jnp.broadcast_to(sink, (*rest.shape[:-1], 1))
    band = jnp.broadcast_to(band, (*rest.shape[:-1], band.shape[-1]))
    joined = jnp.concatenate([sink, band, rest], axis=-1)
    return (joined * joined.shape[-1] ** 0.25).astype(dtype)
