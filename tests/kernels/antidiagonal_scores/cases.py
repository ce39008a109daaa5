"""Calls of antidiagonal scoring over the options of its kernels, and what to expect of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles import xattention as oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call: T queries at the end of S keys, N query heads on K key/value heads of size H."""

    dtype: str = "bfloat16"
    H: int = 64
    stride: int = 4
    block_size: int = 64
    N: int = 2
    K: int = 1
    B: int = 1
    T: int = 256
    S: int = 256
    is_causal: bool = True
    lengths: tuple[int, ...] | None = None
    q_blocks: tuple[int, int] | None = None
    workspace_bytes: int = 2**29

    def __str__(self) -> str:
        names = [f"{self.dtype}-H{self.H}-s{self.stride}-b{self.block_size}-N{self.N}K{self.K}"]
        names.append(f"B{self.B}-T{self.T}-S{self.S}")
        names.append("causal" if self.is_causal else "full")
        names += [] if self.lengths is None else ["lengths" + "_".join(map(str, self.lengths))]
        names += [] if self.q_blocks is None else ["blocks" + "_".join(map(str, self.q_blocks))]
        return "-".join(names)

    @property
    def rows(self) -> tuple[int, int]:
        return self.q_blocks or (0, -(-self.T // self.block_size))


def operands(case: Case) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Queries and keys whose logits spread enough that the softmax is far from flat; lengths."""
    rng = np.random.default_rng(0)

    def normal(length: int, heads: int) -> jax.Array:
        size = (case.B, length, heads, case.H)
        return jnp.asarray(case.stride**0.25 * 1.5 * rng.normal(size=size), case.dtype)

    lengths = None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32)
    return normal(case.T, case.N), normal(case.S, case.K), lengths


def call(run, case: Case, q: jax.Array, k: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """The scores of an implementation of the op."""
    return run(
        q,
        k,
        lengths,
        stride=case.stride,
        block_size=case.block_size,
        is_causal=case.is_causal,
        q_blocks=case.rows,
        workspace_bytes=case.workspace_bytes,
    )


def expected(case: Case) -> np.ndarray:
    """The formula in float64."""
    q, k, _ = operands(case)
    cpu = jax.devices("cpu")[0]
    q, k = (np.asarray(jax.device_put(x, cpu).astype(jnp.float32)) for x in (q, k))
    sums = oracle.antidiagonal_scores(
        q,
        k,
        stride=case.stride,
        block_size=case.block_size,
        is_causal=case.is_causal,
        kv_lengths=case.lengths,
    )
    return sums[:, :, slice(*case.rows)]


def assert_right(case: Case, scores: jax.Array, sums: np.ndarray) -> None:
    """Each of a block's groups has weights that sum to 1, each right to 11 bits."""
    assert (scores.shape, scores.dtype) == (sums.shape, jnp.float32)
    error = np.abs(np.asarray(scores, np.float64) - sums)
    assert (error <= 2**-11 * sums + 1e-5).all(), error.max()
