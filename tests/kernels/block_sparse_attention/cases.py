"""Calls of block-sparse attention over the options of its kernels, and what to expect of them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from sparseattn_jax.kernels import block_lists


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call: T queries at the end of S keys, N query heads on K key/value heads of size H.

    `windows` are the sink sizes of the heads, then their recent sizes.
    """

    dtype: str = "bfloat16"
    H: int = 128
    block_q: int = 128
    block_kv: int = 128
    N: int = 2
    K: int = 1
    B: int = 1
    T: int = 256
    S: int = 256
    is_causal: bool = True
    shared: bool = False
    density: float = 0.5
    lengths: tuple[int, ...] | None = None
    windows: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        names = [f"{self.dtype}-H{self.H}-{self.block_q}x{self.block_kv}-N{self.N}K{self.K}"]
        names.append(f"B{self.B}-T{self.T}-S{self.S}")
        names.append("causal" if self.is_causal else "full")
        names += ["shared"] * self.shared + [f"density{self.density}"]
        names += [] if self.lengths is None else ["lengths" + "_".join(map(str, self.lengths))]
        for name, sizes in zip(("sinks", "recents"), self.windows or (), strict=False):
            names.append(name + "_".join(map(str, sizes)))
        return "-".join(names)

    @property
    def scale(self) -> float:
        return self.H**-0.5

    @property
    def blocks_shape(self) -> tuple[int, int, int, int]:
        heads = 1 if self.shared else self.N
        return self.B, heads, -(-self.T // self.block_q), -(-self.S // self.block_kv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    blocks: jax.Array
    kv_lengths: jax.Array | None


def operands(case: Case, blocks: np.ndarray | None = None) -> Operands:
    """Random operands; the blocks of the case's density unless given."""
    rng = np.random.default_rng(0)
    if blocks is None:
        blocks = rng.random(case.blocks_shape) < case.density

    def normal(length: int, heads: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(case.B, length, heads, case.H)), case.dtype)

    lengths = None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32)
    q, k, v = normal(case.T, case.N), normal(case.S, case.K), normal(case.S, case.K)
    return Operands(q, k, v, jnp.asarray(blocks), lengths)


def call(
    run: Callable[..., tuple[jax.Array, jax.Array]], case: Case, given: Operands
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of an implementation of the op."""
    return run(
        given.q,
        given.k,
        given.v,
        *block_lists.from_dense(given.blocks),
        given.kv_lengths,
        None,
        window_array(case),
        block_q=case.block_q,
        block_kv=case.block_kv,
        is_causal=case.is_causal,
        scale=case.scale,
    )


def window_array(case: Case) -> jax.Array | None:
    return None if case.windows is None else jnp.asarray(case.windows, jnp.int32)


def seen(case: Case, blocks: jax.Array, lengths: jax.Array) -> jax.Array:
    """[B, N, T, S] bool: which keys each query sees."""
    tokens = jnp.repeat(jnp.repeat(blocks, case.block_q, axis=2), case.block_kv, axis=3)
    position = jnp.arange(case.T)[:, None] + case.S - case.T
    key = jnp.arange(case.S)[None]
    end = jnp.reshape(lengths, (-1, 1, 1))
    causal = (key <= position)[None] & (position[None] < end) if case.is_causal else True
    visible = tokens[:, :, : case.T, : case.S] & (causal & (key[None] < end))[:, None]
    if case.windows is None:
        return visible
    sinks, recents = jnp.asarray(case.windows)[:, :, None, None]
    return visible & ((key[None] < sinks) | (key[None] > position[None] - recents))[None]


@functools.partial(jax.jit, static_argnums=(0, 2))
def dense(case: Case, given: tuple[jax.Array, ...], same_precision: bool):
    """Masked dense attention in float32; with `same_precision` rounded where a kernel rounds."""
    q, k, v, blocks, lengths = given
    k, v = (jnp.repeat(x.astype(jnp.float32), case.N // case.K, axis=2) for x in (k, v))
    scores = jnp.einsum(
        "btnh,bsnh->bnts", q.astype(jnp.float32), k, precision=lax.Precision.HIGHEST
    )
    visible = seen(case, blocks, lengths)
    scores = jnp.where(visible, scores * case.scale, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    shift = jnp.where(jnp.isinf(lse), 0.0, lse)[..., None]
    weights = jnp.where(visible, jnp.exp(scores - shift), 0.0)
    if same_precision:
        weights = rounded(weights, case.dtype)
    out = jnp.einsum("bnts,bsnh->btnh", weights, v, precision=lax.Precision.HIGHEST)
    if same_precision:
        out = rounded(out, case.dtype)
    return out, lse.transpose(0, 2, 1)


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x in float32, with the digits that the dtype has."""
    info = jnp.finfo(dtype)  # XLA may drop a pair of conversions, but not this
    return lax.reduce_precision(x, info.nexp, info.nmant)


def assert_right(case: Case, given: Operands, out: jax.Array, lse: jax.Array) -> None:
    """Errs at most twice as much as dense attention of the same precision, computed on the CPU."""
    lengths = jnp.full(case.B, case.S) if given.kv_lengths is None else given.kv_lengths
    arrays = (given.q, given.k, given.v, given.blocks, lengths)
    arrays = jax.device_put(arrays, jax.devices("cpu")[0])
    expected, expected_lse = dense(case, arrays, False)
    near, _ = dense(case, arrays, True)
    assert (out.shape, out.dtype) == (given.q.shape, given.q.dtype)
    assert (lse.shape, lse.dtype) == (given.q.shape[:3], jnp.float32)
    error = np.abs(np.asarray(out, np.float32) - expected).max(initial=0.0)
    allowed = 2 * np.abs(near - expected).max(initial=0.0)
    assert error <= allowed, f"{error=} {allowed=}"
    np.testing.assert_allclose(lse, expected_lse, atol=5e-5)
