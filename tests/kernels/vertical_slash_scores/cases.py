"""Calls of vertical and slash scoring over the options of its kernels, and what to expect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles import vertical_slash as oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call: T queries at the end of S keys, N query heads on K key/value heads of size H."""

    dtype: str = "bfloat16"
    H: int = 64
    num_queries: int = 64
    N: int = 2
    K: int = 1
    B: int = 1
    T: int = 300
    S: int = 300
    lengths: tuple[int, ...] | None = None

    def __str__(self) -> str:
        names = [f"{self.dtype}-H{self.H}-n{self.num_queries}-N{self.N}K{self.K}"]
        names.append(f"B{self.B}-T{self.T}-S{self.S}")
        names += [] if self.lengths is None else ["lengths" + "_".join(map(str, self.lengths))]
        return "-".join(names)


def operands(case: Case) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Queries and keys whose logits spread enough that the softmax is far from flat; lengths."""
    rng = np.random.default_rng(0)

    def normal(length: int, heads: int) -> jax.Array:
        return jnp.asarray(1.3 * rng.normal(size=(case.B, length, heads, case.H)), case.dtype)

    lengths = None if case.lengths is None else jnp.asarray(case.lengths, jnp.int32)
    return normal(case.T, case.N), normal(case.S, case.K), lengths


def call(
    run, case: Case, q: jax.Array, k: jax.Array, lengths: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The scores of an implementation of the op."""
    return run(q, k, lengths, num_queries=case.num_queries, workspace_bytes=2**29)


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The formula in float64."""
    q, k, _ = operands(case)
    cpu = jax.devices("cpu")[0]
    q, k = (np.asarray(jax.device_put(x, cpu).astype(jnp.float32)) for x in (q, k))
    return oracle.vertical_slash_scores(q, k, num_queries=case.num_queries, kv_lengths=case.lengths)


def assert_right(scores: tuple[jax.Array, jax.Array], sums: tuple[np.ndarray, np.ndarray]) -> None:
    """Every sum of weights is right to some float32 rounding errors of its logits."""
    for name, x, y in zip(("vertical", "slash"), scores, sums, strict=True):
        assert (x.shape, x.dtype) == (y.shape, jnp.float32)
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7, err_msg=name)
