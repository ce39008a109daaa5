"""The gate for gradients: sampled rows of dq, dk and dv against the derivatives' formulas.

With P = softmax, dP = d_out v^T and delta = sum(d_out * out) of each query,

    dS = P * (dP - delta),  dq = scale * dS k,  dk = scale * dS^T q,  dv = P^T d_out

in float32. The same with out, P and dS rounded to the operands' precision, as a kernel that
multiplies on tensor cores rounds them, sets the allowance.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from benchmarks import gate

# Of a gradient's largest value: sums of terms that cancel, as of the first query, have no digit
# of their own that is right.
_NOISE = 1e-5

type Rows = tuple[Float[Array, "rows N H"], Float[Array, "rows K H"], Float[Array, "rows K H"]]


def judge_gradients(
    *found: Float[np.ndarray, "rows heads H"],
    operands: Sequence[Float[Array, "1 T heads H"]],
    rows: Int[np.ndarray, " rows"],
    keep: Bool[np.ndarray, "N Tb Sb"],
    block_size: int,
    further_arms: Sequence[tuple[Float[Array, "1 T N H"], Bool[np.ndarray, "N Tb Sb"]]] = (),
) -> gate.Verdict:
    """Compares the sampled rows of dq, dk and dv with the references.

    Args:
        found: those rows in float32.
        operands: q, k, v and the output's gradient of the whole causal call.
        rows: which queries, and which keys, were sampled.
        keep: the key blocks that each query block attends to.
        block_size: queries and keys per block.
        further_arms: of each other output of the same q, k and v, its gradient and the key
            blocks that it attends to; gradients of q, k and v are sums over the outputs.
    """
    *qkv, d_out = operands
    arms = [
        _references(
            *(x[0] for x in (*qkv, d_arm)),
            jnp.asarray(rows),
            jnp.asarray(of_arm),
            block_size=block_size,
        )
        for d_arm, of_arm in ((d_out, keep), *further_arms)
    ]
    exact, rounded = jax.tree.map(lambda *of_arms: sum(of_arms), *arms)
    verdicts = [
        _verdict(*(np.asarray(x, np.float32) for x in of_one), dtype=qkv[0].dtype)
        for of_one in zip(found, exact, rounded, strict=True)
    ]
    return max(verdicts, key=_share)


def _verdict(
    found: np.ndarray, exact: np.ndarray, rounded: np.ndarray, *, dtype: jnp.dtype
) -> gate.Verdict:
    """Of one gradient: its row that comes closest to its allowance."""
    errors = np.abs(found - exact).max(axis=(1, 2))
    size = np.abs(exact).max(axis=(1, 2))
    half_unit = size * (float(jnp.finfo(dtype).eps) / 2)
    allowed = np.maximum(np.abs(rounded - exact).max(axis=(1, 2)), half_unit)
    allowed = gate.ALLOWED_TIMES * np.maximum(allowed, _NOISE * size.max())
    worst = int(np.argmax(np.nan_to_num(errors / allowed, nan=np.inf)))
    return gate.Verdict(max_error=float(errors[worst]), max_error_allowed=float(allowed[worst]))


def _share(verdict: gate.Verdict) -> float:
    share = verdict.max_error / verdict.max_error_allowed
    return np.inf if np.isnan(share) else share


@functools.partial(gate.jit_reference, static_argnames="block_size")
def _references(
    q: Float[Array, "T N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    d_out: Float[Array, "T N H"],
    rows: Int[Array, " rows"],
    keep: Bool[Array, "N Tb Sb"],
    *,
    block_size: int,
) -> tuple[Rows, Rows]:
    """The sampled rows of the gradients in float32, and as rounded in the operands' dtype."""
    length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]

    def round_to_dtype(x: Array) -> Array:
        # A pair of conversions may be optimised away.
        return lax.reduce_precision(x, jnp.finfo(q.dtype).nexp, jnp.finfo(q.dtype).nmant)

    def of_kv_head(arrays: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        q, k, v, d_out = (x.astype(jnp.float32) for x in arrays[:4])
        head = _KvHead(q, k, v, d_out, arrays[4], block_size)
        return head.gradients(rows, lambda x: x), head.gradients(rows, round_to_dtype)

    def heads_first(x: Array) -> Float[Array, "K g T H"]:
        return x.reshape(length, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)

    def rows_first(d_q: Array, d_k: Array, d_v: Array) -> Rows:
        d_q = jnp.moveaxis(d_q, 0, 1).reshape(len(rows), num_heads, head_dim)
        return d_q, jnp.moveaxis(d_k, 0, 1), jnp.moveaxis(d_v, 0, 1)

    exact, rounded = lax.map(
        of_kv_head,
        (
            heads_first(q),
            k.transpose(1, 0, 2),
            v.transpose(1, 0, 2),
            heads_first(d_out),
            keep.reshape(num_kv_heads, -1, *keep.shape[1:]),
        ),
    )
    return rows_first(*exact), rows_first(*rounded)


@dataclasses.dataclass(frozen=True)
class _KvHead:
    """One key/value head in float32 and the query heads of its group."""

    q: Float[Array, "g T H"]
    k: Float[Array, "T H"]
    v: Float[Array, "T H"]
    d_out: Float[Array, "g T H"]
    keep: Bool[Array, "g Tb Sb"]
    block_size: int

    def gradients(
        self, rows: Int[Array, " rows"], rounding: Callable[[Array], Array]
    ) -> tuple[Float[Array, "rows g H"], Float[Array, "rows H"], Float[Array, "rows H"]]:
        """The sampled rows of dq, dk and dv, where out, P and dS are rounded as given."""
        group, length, head_dim = self.q.shape
        scale, every = head_dim**-0.5, jnp.arange(length)

        def statistics(queries: Array) -> tuple[Array, Array]:
            scores = self._scores(queries, every)
            lse = jax.nn.logsumexp(scores, axis=-1)
            weights = rounding(jnp.exp(scores - lse[..., None]))
            out = rounding(_product("gts,sh->gth", weights, self.v))
            return lse, (self.d_out[:, queries] * out).sum(axis=-1)

        # The weights of one block of queries exist at one time.
        of_blocks = lax.map(statistics, every.reshape(-1, self.block_size))
        lse, delta = (jnp.moveaxis(x, 0, 1).reshape(group, length) for x in of_blocks)

        def weights_and_d_scores(queries: Array, keys: Array) -> tuple[Array, Array]:
            weights = jnp.exp(self._scores(queries, keys) - lse[:, queries, None])
            d_weights = _product("gth,sh->gts", self.d_out[:, queries], self.v[keys])
            d_scores = weights * (d_weights - delta[:, queries, None])
            return rounding(weights), rounding(d_scores)

        _, d_scores = weights_and_d_scores(rows, every)
        d_q = _product("gts,sh->tgh", d_scores, self.k) * scale
        weights, d_scores = weights_and_d_scores(every, rows)
        d_k = _product("gts,gth->sh", d_scores, self.q) * scale
        d_v = _product("gts,gth->sh", weights, self.d_out)
        return rounding(d_q), rounding(d_k), rounding(d_v)

    def _scores(self, queries: Array, keys: Array) -> Float[Array, "g queries keys"]:
        blocks = queries[:, None] // self.block_size, keys[None, :] // self.block_size
        seen = self.keep[:, *blocks] & (keys[None, :] <= queries[:, None])[None]
        scores = _product("gth,sh->gts", self.q[:, queries], self.k[keys])
        return jnp.where(seen, scores * self.q.shape[-1] ** -0.5, -jnp.inf)


_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
