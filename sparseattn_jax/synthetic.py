"""Queries, keys and values with the structure of a language model's attention.

Independent normal q and k have no sparsity: every block weighs the same. Here the logit of the
query at position p and the key at position j, with d = p - j, is a sum of six parts, each from
its own channels of the head, or from those of a part of its kind:

    sink * [j < num_sinks]                                  1 channel
    column * [j is one of the columns]                      the same
    local * B(d),  B(d) = (1 / P) sum_m cos(omega_m d)      2 P channels, P = 3 H // 8
    slash * sum_n B(d - s_n)                                the same
    needle * [p in query span n] [j in key span n]          the rest
    noise * (a standard normal variable)                    the rest, too

*Sinks* draw every query, and so do *columns*: single keys, drawn per sequence and kv head. The
*band* B is made as rotary embeddings make one: channel pair m of q and k holds the phase omega_m
times the position, so that their product turns with d alone. The frequencies are the quantiles
omega_m = -log(1 - u_m) / width, u_m = (m + 1/2) / P, of an exponential distribution, whose
characteristic function makes B(d) = 1 / (1 + (d / width)^2) as P grows; a finite P leaves ripples
of 1 / sqrt(2 P) at all distances, which show as slashes. Each kv head has its own width, spread
over local_width * [1/4, 4] in even steps of the logarithm; the query heads of a group differ in
`local` by up to a tenth. *Slashes* are the same band around other distances s_n, drawn per kv head
from 1 to half the keys: a query's phases are turned back by them. They are as wide as the band, so
heads with narrow ones have a small width. *Needles*: per sequence and kv head, `num_needles` spans
of `needle_size` late queries look up as many early spans of keys, by a random direction that the
two share.

A strength may be an array, with a value for each kv head: a mixture of heads of several kinds.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from sparseattn_jax.checks import check_positive, checked, concrete

type Strength = float | Float32[Array, ""] | Float32[Array, " K"]


def _check_sizes(
    batch: int,
    q_len: int,
    kv_len: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    num_sinks: int,
    num_columns: int,
    num_slashes: int,
    num_needles: int,
    needle_size: int,
) -> None:
    check_positive(batch=batch, q_len=q_len, num_heads=num_heads, num_kv_heads=num_kv_heads)
    check_positive(needle_size=needle_size)
    numbers = {
        "num_sinks": num_sinks,
        "num_columns": num_columns,
        "num_slashes": num_slashes,
        "num_needles": num_needles,
    }
    for name, number in numbers.items():
        if number < 0:
            raise ValueError(f"{name}={number} must not be negative; 0 for none")
    if kv_len is not None and kv_len < q_len:
        raise ValueError(
            f"kv_len={kv_len} must be at least q_len={q_len}: queries stand at the end of the keys"
        )
    if num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a multiple of num_kv_heads={num_kv_heads}")
    if head_dim < 16:
        raise ValueError(f"head_dim={head_dim} must be at least 16 to hold all parts")


def _check_strengths(
    num_kv_heads: int,
    sink: Strength,
    column: Strength,
    local: Strength,
    slash: Strength,
    needle: Strength,
    noise: Strength,
    local_width: Strength,
) -> None:
    strengths = {
        "sink": sink,
        "column": column,
        "local": local,
        "slash": slash,
        "needle": needle,
        "noise": noise,
        "local_width": local_width,
    }
    for name, strength in strengths.items():
        if np.shape(strength) not in ((), (num_kv_heads,)):
            raise ValueError(
                f"{name} has shape {np.shape(strength)}; pass a scalar, or one per kv head, of "
                f"shape ({num_kv_heads},)"
            )
        values = concrete(strength)
        if values is not None and not np.all(values > 0 if name == "local_width" else values >= 0):
            raise ValueError(
                f"{name}={values.tolist()} must not be negative, and local_width not 0 either"
            )


@checked(_check_sizes, _check_strengths)
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
    column: Strength = 0.0,
    num_columns: int = 64,
    slash: Strength = 0.0,
    num_slashes: int = 4,
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
        local_width: distance that halves the logit of the band, in the middle kv head, or in each.
        needle: logit of a needle's queries and keys.
        num_needles: needles per sequence and kv head.
        needle_size: queries and keys per needle.
        noise: standard deviation of the unstructured part.
        column: logit of the columns; they are none of the sinks.
        num_columns: columns per sequence and kv head.
        slash: logit of a query with the key at one of the slashes' distances.
        num_slashes: slashes per kv head.

    Returns:
        (q, k, v), to be used with the scale H ** -0.5. v is standard normal.

    Raises:
        ValueError: a size or strength is out of range, or does not fit the others.
    """
    kv_len = q_len if kv_len is None else kv_len
    group, num_pairs = num_heads // num_kv_heads, 3 * head_dim // 8
    num_rest = head_dim - 1 - 2 * num_pairs
    q_key, k_key, v_key, needle_key = jax.random.split(key, 4)
    column_key, slash_key = jax.random.split(jax.random.fold_in(key, 1))

    def of_kv_heads(strength: Strength) -> Float32[Array, "1 1 K 1"]:
        strength = jnp.broadcast_to(jnp.asarray(strength, jnp.float32), num_kv_heads)
        return strength[None, None, :, None]

    def of_query_heads(x: Float32[Array, "B L K C"]) -> Float32[Array, "B L N C"]:
        return jnp.repeat(x, group, axis=2)

    is_column = _columns(column_key, (batch, num_kv_heads, num_columns), num_sinks, kv_len)
    q_constant, k_constant = _constants(
        of_kv_heads(sink), of_kv_heads(column), num_sinks, is_column
    )
    frequencies = _frequencies(num_kv_heads, num_pairs, local_width)
    k_band = _phases(jnp.arange(kv_len), frequencies)[None]
    farthest = max(kv_len // 2, 1)
    distances = jax.random.randint(slash_key, (num_slashes, num_kv_heads), 1, farthest + 1)
    slashes = _phases(distances, frequencies).sum(axis=0)[None, None]
    variation = jnp.tile(1.0 + 0.1 * jnp.linspace(-1.0, 1.0, group), num_kv_heads)
    q_band = _turned_back(
        of_query_heads(k_band[:, kv_len - q_len :]),
        of_query_heads(of_kv_heads(local) / num_pairs) * variation[None, None, :, None],
        of_query_heads(of_kv_heads(slash) / num_pairs * slashes),
    )
    q_needle, k_needle = _needles(
        needle_key, (batch, num_kv_heads, num_needles, num_rest), q_len, kv_len, needle_size
    )
    # A product of two sums of num_rest terms of this variance has the deviation `noise`.
    deviation = jnp.sqrt(of_kv_heads(noise) * num_rest**-0.5)
    length = jnp.sqrt(of_kv_heads(needle))
    q_rest = jax.random.normal(q_key, (batch, q_len, num_heads, num_rest))
    k_rest = jax.random.normal(k_key, (batch, kv_len, num_kv_heads, num_rest))
    q_rest = of_query_heads(deviation) * q_rest + of_query_heads(length * q_needle)
    k_rest = deviation * k_rest + length * k_needle

    q = _assemble(of_query_heads(q_constant), q_band, q_rest, dtype)
    k = _assemble(k_constant, k_band, k_rest, dtype)
    return q, k, jax.random.normal(v_key, k.shape).astype(dtype)


def _constants(
    sink: Float32[Array, "1 1 K 1"],
    column: Float32[Array, "1 1 K 1"],
    num_sinks: int,
    is_column: Bool[Array, "B S K"],
) -> tuple[Float32[Array, "1 1 K 1"], Float32[Array, "B S K 1"]]:
    """The channel of sinks and columns: the same for all queries, and that of each key."""
    is_sink = (jnp.arange(is_column.shape[1]) < num_sinks)[None, :, None, None]
    logits = jnp.where(is_sink, sink, jnp.where(is_column[..., None], column, 0.0))
    of_queries = jnp.sqrt(jnp.maximum(sink, column))
    return of_queries, logits / jnp.where(of_queries == 0.0, 1.0, of_queries)


def _columns(
    key: PRNGKeyArray, shape: tuple[int, int, int], num_sinks: int, kv_len: int
) -> Bool[Array, "B S K"]:
    """Whether a key is one of those drawn for its kv head, of the keys that are no sinks."""
    drawn = jax.random.randint(key, shape, min(num_sinks, kv_len - 1), kv_len)
    batch, heads = (jnp.arange(size) for size in shape[:2])
    is_column = jnp.zeros((shape[0], kv_len, shape[1]), bool)
    return is_column.at[batch[:, None, None], drawn, heads[None, :, None]].set(True)


def _frequencies(num_kv_heads: int, num_pairs: int, local_width: Strength) -> Float32[Array, "K P"]:
    widths = jnp.asarray(local_width, jnp.float32)
    if widths.ndim == 0:
        widths = widths * 4.0 ** jnp.linspace(-1.0, 1.0, num_kv_heads)
    quantiles = (jnp.arange(num_pairs, dtype=jnp.float32) + 0.5) / num_pairs
    return -jnp.log1p(-quantiles)[None, :] / widths[:, None]


def _phases(
    positions: Int32[Array, " L"] | Int32[Array, "L K"], frequencies: Float32[Array, "K P"]
) -> Float32[Array, "L K C"]:
    """Cosines and sines of positions * omega, per kv head."""
    positions = positions.reshape(len(positions), -1, 1).astype(jnp.float32)
    angles = positions * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _turned_back(
    phases: Float32[Array, "1 T N C"],
    local: Float32[Array, "1 1 N 1"],
    slashes: Float32[Array, "1 1 N C"],
) -> Float32[Array, "1 T N C"]:
    """The sum of `local` times the phases and of the phases turned back by those of `slashes`."""
    cosines, sines = jnp.split(phases, 2, axis=-1)
    real, imaginary = jnp.split(slashes, 2, axis=-1)
    real += local
    return jnp.concatenate(
        [cosines * real + sines * imaginary, sines * real - cosines * imaginary], axis=-1
    )


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
    constant: Float32[Array, "#B #L n 1"],
    band: Float32[Array, "#B L n C"],
    rest: Float32[Array, "B L n D"],
    dtype: DTypeLike,
) -> Float[Array, "B L n H"]:
    """Joins the parts' channels; the factor undoes the attention's scale of H ** -0.5."""
    constant = jnp.broadcast_to(constant, (*rest.shape[:-1], 1))
    band = jnp.broadcast_to(band, (*rest.shape[:-1], band.shape[-1]))
    joined = jnp.concatenate([constant, band, rest], axis=-1)
    return (joined * joined.shape[-1] ** 0.25).astype(dtype)
