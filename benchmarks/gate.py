"""The correctness gate: no figure is recorded for an output that is not right.

Sampled rows of every timed output are compared with dense masked attention in float32. The same
rows in the operands' precision, as a dense kernel would compute them, set the allowance.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

ALLOWED_TIMES = 2.0  # a row's largest error, over that of the same-precision dense reference

# For references. Tuning their float32 products takes XLA 20 s, and running them a few milliseconds.
jit_reference = functools.partial(jax.jit, compiler_options={"xla_gpu_autotune_level": 0})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The largest error of the sampled row that comes closest to its allowance, and that.

    Of an attention's output the error is an absolute difference. Of a selection it is how far the
    mass of a row's set, as a share, lies on the wrong side of the threshold.
    """

    max_error: float
    max_error_allowed: float

    @property
    def passed(self) -> bool:
        """False also where the output holds a NaN."""
        return self.max_error <= self.max_error_allowed


def sample_rows(length: int, block_size: int, *, seed: int, count: int = 32) -> np.ndarray:
    """Rows at the edges of blocks and of the sequence, and random ones, ascending."""
    edges = [0, 1, block_size - 1, block_size, length // 2, length - block_size, length - 1]
    drawn = np.random.default_rng(seed).integers(0, length, count)
    return np.unique(np.concatenate([edges, drawn]))


def judge(
    out_rows: Float[np.ndarray, "rows N H"],
    q: Float[Array, "1 T N H"],
    k: Float[Array, "1 T K H"],
    v: Float[Array, "1 T K H"],
    *,
    rows: Int[np.ndarray, " rows"],
    keep: Bool[np.ndarray, "#N rows Tb"],
    block_size: int,
) -> Verdict:
    """Compares the sampled rows of a causal output with the references.

    Args:
        out_rows: the sampled rows of the output, in float32.
        q: queries of the whole call.
        k: keys.
        v: values.
        rows: which rows were sampled.
        keep: the key blocks that each sampled row attends to.
        block_size: keys per block.
    """
    exact, rounded = _references(
        q[0, rows], k[0], v[0], jnp.asarray(rows), jnp.asarray(keep), block_size=block_size
    )
    exact, rounded = np.asarray(exact), np.asarray(rounded, np.float32)
    errors = np.abs(out_rows - exact).max(axis=(1, 2))
    # Late rows average many values and are small: each row is held to its own reference. A row
    # of one key is a copy without error, hence at least half a unit in the last place.
    half_unit = np.abs(exact).max(axis=(1, 2)) * (float(jnp.finfo(q.dtype).eps) / 2)
    allowed = ALLOWED_TIMES * np.maximum(np.abs(rounded - exact).max(axis=(1, 2)), half_unit)
    worst = int(np.argmax(np.nan_to_num(errors / allowed, nan=np.inf)))
    return Verdict(max_error=float(errors[worst]), max_error_allowed=float(allowed[worst]))


@functools.partial(jit_reference, static_argnames="block_size")
def _references(
    q: Float[Array, "rows N H"],
    k: Float[Array, "T K H"],
    v: Float[Array, "T K H"],
    rows: Int[Array, " rows"],
    keep: Bool[Array, "#N rows Tb"],
    *,
    block_size: int,
) -> tuple[Float[Array, "rows N H"], Float[Array, "rows N H"]]:
    """Dense masked attention in float32, and in the operands' dtype with float32 sums."""
    num_rows, num_heads, head_dim = q.shape
    num_keys, num_kv_heads, _ = k.shape
    group = num_heads // num_kv_heads
    keep = jnp.broadcast_to(keep, (num_heads, *keep.shape[1:]))
    keep = keep.reshape(num_kv_heads, group, num_rows, -1)
    queries = q.reshape(num_rows, num_kv_heads, group, head_dim).transpose(1, 2, 0, 3)
    is_past = jnp.arange(num_keys)[None, :] <= rows[:, None]

    def attend(kv_head: tuple[Array, ...], dtype: jnp.dtype) -> Array:
        queries, keys, values, keep = kv_head
        visible = jnp.repeat(keep, block_size, axis=-1)[..., :num_keys] & is_past[None]
        product = functools.partial(
            jnp.einsum,
            preferred_element_type=jnp.float32,
            precision=lax.Precision.HIGHEST,
        )
        logits = product("grh,sh->grs", queries.astype(dtype), keys.astype(dtype))
        logits = jnp.where(visible, logits * head_dim**-0.5, -jnp.inf)
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        out = product("grs,sh->grh", weights.astype(dtype), values.astype(dtype))
        return (out / weights.sum(axis=-1, keepdims=True)).astype(dtype)

    def both(kv_head: tuple[Array, ...]) -> tuple[Array, Array]:
        return attend(kv_head, jnp.dtype(jnp.float32)), attend(kv_head, q.dtype)

    heads = (queries, k.transpose(1, 0, 2), v.transpose(1, 0, 2), keep)
    exact, rounded = lax.map(both, heads)

    def rows_first(out: Array) -> Array:
        return out.transpose(2, 0, 1, 3).reshape(num_rows, num_heads, head_dim)

    return rows_first(exact), rows_first(rounded)
