"""Calls of decode attention over the options of its kernels, and what to expect of them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparseattn_jax.kernels import block_lists
from tests.oracles import attention, decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call: T queries per sequence, N query heads on K kv heads of size H, S slots of cache.

    Attributes:
        lengths: tokens so far, of each sequence.
        block_kv: slots per block of random lists, None for no lists.
        density: how many blocks they keep.
        shared: whether the kv heads share their lists.
        ring: whether the last `ring` slots of the cache hold recent tokens in rotated order, and
            the others the first tokens; 0 for a cache in order.
        rows: the row of the cache that each sequence reads; () for its own.
    """

    dtype: str = "bfloat16"
    H: int = 128
    N: int = 8
    K: int = 2
    T: int = 1
    S: int = 256
    lengths: tuple[int, ...] = (256,)
    block_kv: int | None = None
    density: float = 0.5
    shared: bool = False
    ring: int = 0
    rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        names = [f"{self.dtype}-H{self.H}-N{self.N}K{self.K}-T{self.T}-S{self.S}"]
        names.append("lengths" + "_".join(map(str, self.lengths)))
        if self.block_kv is not None:
            names.append(f"blocks{self.block_kv}-density{self.density}")
        names += ["shared"] * self.shared + [f"ring{self.ring}"] * (self.ring > 0)
        names += ["rows" + "_".join(map(str, self.rows))] * (self.rows != ())
        return "-".join(names)

    @property
    def B(self) -> int:  # noqa: N802 the alphabet of array axes
        return len(self.lengths)

    @property
    def scale(self) -> float:
        return self.H**-0.5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    q: jax.Array
    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    positions: jax.Array | None
    blocks: jax.Array | None
    rows: jax.Array | None = None


def operands(case: Case) -> Operands:
    """Random operands; keys spread the logits, so that the softmax is far from flat."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(*shape, case.H)), case.dtype)

    num_rows = max(case.rows) + 2 if case.rows else case.B
    q = normal(case.B, case.T, case.N)
    k, v = (normal(num_rows, case.S, case.K) for _ in range(2))
    positions = blocks = None
    if case.ring:
        positions = np.stack([ring_positions(case, length) for length in case.lengths])
    if case.block_kv is not None:
        heads = 1 if case.shared else case.K
        blocks = rng.random((case.B, heads, -(-case.S // case.block_kv))) < case.density
    return Operands(
        q,
        k,
        v,
        jnp.asarray(case.lengths, jnp.int32),
        None if positions is None else jnp.asarray(positions, jnp.int32),
        None if blocks is None else jnp.asarray(blocks),
        jnp.asarray(case.rows, jnp.int32) if case.rows else None,
    )


def ring_positions(case: Case, length: int) -> np.ndarray:
    """Where the tokens of each slot stand after `length` tokens; -1 for a slot not yet used."""
    sinks = case.S - case.ring
    positions = np.full(case.S, -1)
    for token in range(length):
        slot = token if token < sinks else sinks + (token - sinks) % case.ring
        positions[slot] = token
    return positions


def call(
    run: Callable[..., tuple[jax.Array, jax.Array]], case: Case, given: Operands
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp of an implementation of the op."""
    lists = (None, None) if given.blocks is None else block_lists.from_dense(given.blocks)
    return run(
        given.q,
        given.k,
        given.v,
        given.lengths,
        given.positions,
        *lists,
        kv_rows=given.rows,
        block_kv=case.block_kv,
        scale=case.scale,
    )


def read_by(given: Operands) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, and the keys and values of the row that each sequence reads."""
    if given.rows is None:
        return given.q, given.k, given.v
    return given.q, given.k[given.rows], given.v[given.rows]


def visible(case: Case, given: Operands) -> np.ndarray:
    """[B, N, T, S] bool, by the oracle."""
    positions = np.broadcast_to(np.arange(case.S), (case.B, case.S))
    blocks = None
    if given.positions is not None:
        positions = np.asarray(given.positions)
    if given.blocks is not None:
        shape = case.B, case.K, given.blocks.shape[-1]
        blocks = np.broadcast_to(np.asarray(given.blocks), shape)
    lengths = np.asarray(given.lengths)
    return decode.visible_slots(case.N, case.T, positions, lengths, blocks, case.block_kv or 1)


def assert_right(case: Case, given: Operands, out: jax.Array, lse: jax.Array) -> None:
    """Errs at most twice as much as the rounding of weights and output to the operands' dtype."""
    q, k, v = (np.asarray(x, np.float64) for x in read_by(given))
    keep = visible(case, given)
    expected, expected_lse = attention.attention(q, k, v, keep, case.scale)
    assert (out.shape, out.dtype) == (given.q.shape, given.q.dtype)
    assert (lse.shape, lse.dtype) == (given.q.shape[:3], jnp.float32)
    np.testing.assert_allclose(lse, expected_lse, atol=5e-5)
    error = np.abs(np.asarray(out, np.float64) - expected).max()
    allowed = 2 * np.abs(_rounded(case, q, k, v, keep, expected_lse) - expected).max()
    assert error <= max(allowed, 1e-6), f"{error=} {allowed=}"


def _rounded(case: Case, q, k, v, keep: np.ndarray, lse: np.ndarray) -> np.ndarray:
    """The output with the weights, and then itself, rounded."""
    dtype = jnp.dtype(case.dtype)
    k, v = (np.repeat(x, case.N // case.K, axis=2) for x in (k, v))
    scores = np.einsum("btnh,bsnh->bnts", q, k) * case.scale
    shift = np.where(np.isinf(lse), 0.0, lse).transpose(0, 2, 1)[..., None]
    weights = np.where(keep, np.exp(scores - shift), 0.0).astype(dtype).astype(np.float64)
    return np.einsum("bnts,bsnh->btnh", weights, v).astype(dtype).astype(np.float64)
