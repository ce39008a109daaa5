"""Calls of the gradients of block-sparse attention, and what to expect of them."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparseattn_jax.kernels import block_lists
from tests.kernels.block_sparse_attention.cases import (
    Case,
    Operands,
    dense,
    operands,
    rounded,
    seen,
    window_array,
)
from tests.oracles import attention as oracle
from tests.oracles import streaming

type Gradients = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VjpOperands:
    """Those of the forward, its results and their cotangents."""

    forward: Operands
    out: jax.Array
    lse: jax.Array
    d_out: jax.Array
    d_lse: jax.Array

    @property
    def lengths(self) -> jax.Array:
        q, k = self.forward.q, self.forward.k
        given = self.forward.kv_lengths
        return jnp.full(q.shape[0], k.shape[1]) if given is None else given


def vjp_operands(case: Case, blocks: np.ndarray | None = None) -> VjpOperands:
    """Random operands and cotangents, on the CPU; the blocks of the case's density unless given."""
    with jax.default_device(jax.devices("cpu")[0]):
        rng = np.random.default_rng(1)
        given = operands(case, blocks)
        lengths = jnp.full(case.B, case.S) if given.kv_lengths is None else given.kv_lengths
        out, lse = dense(case, (given.q, given.k, given.v, given.blocks, lengths), True)
        d_out = jnp.asarray(rng.normal(size=out.shape), case.dtype)
        d_lse = jnp.asarray(rng.normal(size=lse.shape), jnp.float32)
        return VjpOperands(given, out.astype(case.dtype), lse, d_out, d_lse)


def gradients(run: Callable[..., Gradients], case: Case, given: VjpOperands) -> Gradients:
    """Those of an implementation of the op's backward."""
    forward = given.forward
    return run(
        forward.q,
        forward.k,
        forward.v,
        *block_lists.from_dense(forward.blocks),
        forward.kv_lengths,
        None,
        window_array(case),
        given.out,
        given.lse,
        given.d_out,
        given.d_lse,
        block_q=case.block_q,
        block_kv=case.block_kv,
        is_causal=case.is_causal,
        scale=case.scale,
    )


def by_oracle(case: Case, given: VjpOperands) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In float64, from the formulas."""
    forward = given.forward
    blocks = np.broadcast_to(
        np.asarray(forward.blocks), (case.B, case.N, *np.shape(forward.blocks)[2:])
    )
    listed = oracle.listed_pairs(blocks, case.T, case.S, case.block_q, case.block_kv)
    visible = oracle.visible_pairs(
        case.B, case.T, case.S, is_causal=case.is_causal, kv_lengths=np.asarray(given.lengths)
    )
    keep = listed & visible[:, None]
    if case.windows is not None:
        sinks, recents = case.windows
        sizes = {"sink_sizes": sinks, "recent_sizes": recents}
        keep &= streaming.visible_pairs(case.B, case.T, case.S, **sizes)
    return oracle.attention_gradients(
        *(np.asarray(x, np.float64) for x in (forward.q, forward.k, forward.v)),
        keep,
        np.asarray(given.d_out, np.float64),
        given.d_lse,
        case.scale,
    )


@functools.partial(jax.jit, static_argnums=(0, 2))
def dense_gradients(case: Case, given: VjpOperands, same_precision: bool) -> Gradients:
    """By dense matrices in float32; with `same_precision` rounded where a kernel rounds."""
    forward, group = given.forward, case.N // case.K

    def product(equation: str, one: jax.Array, other: jax.Array) -> jax.Array:
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        return jnp.einsum(equation, one, other, precision=lax.Precision.HIGHEST)

    def kept(x: jax.Array) -> jax.Array:
        return rounded(x, case.dtype) if same_precision else x

    def sum_over_group(x: jax.Array) -> jax.Array:
        return x.reshape(case.B, case.S, case.K, group, case.H).sum(axis=3)

    arrays = (forward.q, forward.k, forward.v, forward.blocks, given.lengths)
    out, lse = dense(case, arrays, same_precision)
    k, v = (jnp.repeat(x, group, axis=2) for x in (forward.k, forward.v))
    scores = product("btnh,bsnh->bnts", forward.q, k) * case.scale
    lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse).transpose(0, 2, 1)
    visible = seen(case, forward.blocks, given.lengths)
    weights = jnp.where(visible, jnp.exp(scores - lse[..., None]), 0.0)
    delta = jnp.sum(given.d_out.astype(jnp.float32) * out, axis=-1) - given.d_lse
    d_weights = product("btnh,bsnh->bnts", given.d_out, v)
    d_scores = kept(weights * (d_weights - delta.transpose(0, 2, 1)[..., None]))
    d_q = product("bnts,bsnh->btnh", d_scores, k) * case.scale
    d_k = sum_over_group(product("bnts,btnh->bsnh", d_scores, forward.q)) * case.scale
    d_v = sum_over_group(product("bnts,btnh->bsnh", kept(weights), given.d_out))
    return kept(d_q), kept(d_k), kept(d_v)


def assert_gradients_right(
    case: Case, given: VjpOperands, found: Gradients, expected: tuple | None = None
) -> None:
    """Err at most twice as much as dense gradients of the same precision, computed on the CPU."""
    given = jax.device_put(given, jax.devices("cpu")[0])
    expected = dense_gradients(case, given, False) if expected is None else expected
    same = dense_gradients(case, given, True)
    forward = given.forward
    sources = (forward.q, forward.k, forward.v)
    for name, one, right, near, source in zip("qkv", found, expected, same, sources, strict=True):
        assert (one.shape, one.dtype) == (source.shape, source.dtype)
        error = np.abs(np.asarray(one, np.float32) - right).max(initial=0.0)
        allowed = 2 * np.abs(np.asarray(near) - right).max(initial=0.0)
        assert error <= allowed, f"d_{name}: {error=} {allowed=}"
