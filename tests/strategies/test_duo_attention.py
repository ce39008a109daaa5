"""DuoAttention: heads that see everything, or what a strategy selects, beside streaming heads."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    DuoAttention,
    Full,
    PerHead,
    Streaming,
    UnsupportedError,
    XAttention,
    full_prefill,
    prefill_attention,
)
from tests.oracles import attention, selection, streaming

BLOCK = 8
SIZES = {"sink_size": 3, "recent_size": 10}
XATTENTION = XAttention(threshold=0.6, stride=4, block_size=BLOCK)


def draw(B: int = 2, T: int = 21, S: int = 37, N: int = 6, K: int = 3, H: int = 8):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [jnp.array(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


def duo(heads: list[bool], retrieval: Any = None, **sizes: int) -> DuoAttention:
    retrieval = Full(block_size=BLOCK) if retrieval is None else retrieval
    return DuoAttention(retrieval=retrieval, retrieval_heads=jnp.array(heads), **(SIZES | sizes))


@jax.jit
def attend_and_pull(strategy: DuoAttention, lengths: jax.Array | None, d_out, d_lse, *qkv):
    """Output, log-sum-exp, and the gradients of q, k and v."""
    call = functools.partial(
        prefill_attention, strategy=strategy, kv_lengths=lengths, return_lse=True
    )
    out, pull = jax.vjp(call, *qkv)
    return out, pull((d_out, d_lse))


def seen_pairs(heads: list[bool], listed: np.ndarray, T: int, S: int, lengths: Any) -> np.ndarray:
    """Windows in streaming heads, and in the others the tokens of the listed blocks."""
    B, N = len(listed), 2 * len(heads)
    windows = streaming.visible_pairs(
        *(B, T, S),
        sink_sizes=[SIZES["sink_size"]] * N,
        recent_sizes=[SIZES["recent_size"]] * N,
        kv_lengths=lengths,
    )
    visible = attention.visible_pairs(B, T, S, is_causal=True, kv_lengths=lengths)[:, None]
    blocks = attention.listed_pairs(np.broadcast_to(listed, (B, N, *listed.shape[2:])), T, S, 8, 8)
    return np.where(np.repeat(heads, 2)[None, :, None, None], blocks & visible, windows)


CASES = {
    "T<S": (XATTENTION, {}, None),
    "lengths": (Full(block_size=BLOCK), {}, [37, 20]),
    "square": (Full(block_size=BLOCK), {"T": 37}, [37, 11]),
}


@pytest.mark.parametrize(("retrieval", "shape", "lengths"), CASES.values(), ids=CASES)
def test_values_and_gradients_are_those_of_the_seen_pairs(
    retrieval: Any, shape: dict, lengths: list | None
) -> None:
    heads = [True, False, True]
    qkv = draw(**shape)
    rng = np.random.default_rng(1)
    B, T, N, _ = qkv[0].shape
    d_out = rng.normal(size=qkv[0].shape).astype(np.float32)
    d_lse = rng.normal(size=(B, T, N)).astype(np.float32)
    given = None if lengths is None else jnp.array(lengths, jnp.int32)
    if lengths is not None:  # the log-sum-exp of an empty row is -inf
        d_lse[1, 37 - T + np.arange(T) >= lengths[1]] = 0
    (out, lse), gradients = attend_and_pull(duo(heads, retrieval), given, d_out, d_lse, *qkv)
    own = jax.jit(retrieval.select)(*qkv[:2], kv_lengths=given)
    pairs = seen_pairs(heads, selection.listed_blocks(own.blocks), T, 37, lengths)
    expected_out, expected_lse = attention.attention(*qkv, pairs)
    np.testing.assert_allclose(out, expected_out, atol=5e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=5e-6)
    expected = attention.attention_gradients(*qkv, pairs, d_out, d_lse)
    for found, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(found, right, atol=5e-5)


@pytest.mark.parametrize("heads", [[True, False, True], [False] * 3, [True] * 3])
def test_is_a_mixture_of_retrieval_and_exact_streaming(heads: list[bool]) -> None:
    q, k, _ = draw()
    mixture = PerHead(
        first=XATTENTION,
        second=Streaming(**SIZES, block_size=BLOCK, exact=True),
        is_first=jnp.array(heads),
    )
    select = jax.jit(lambda strategy: strategy.select(q, k))
    ours, expected = select(duo(heads, XATTENTION)), select(mixture)
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_with_all_heads_to_retrieve_it_is_full_attention() -> None:
    qkv = draw()
    out = prefill_attention(*qkv, duo([True] * 3))
    np.testing.assert_allclose(out, full_prefill(*qkv), atol=5e-6)


def test_heads_may_be_traced_under_vmap_over_sequences() -> None:
    q, k, v = draw()
    lengths = jnp.array([37, 20], jnp.int32)

    @jax.jit
    def attend(strategy: DuoAttention) -> jax.Array:
        def alone(length: jax.Array, *qkv: jax.Array) -> jax.Array:
            return prefill_attention(*(x[None] for x in qkv), strategy, kv_lengths=length[None])[0]

        return jax.vmap(alone)(lengths, q, k, v)

    together = jax.jit(functools.partial(prefill_attention, kv_lengths=lengths))
    for heads in ([True, False, False], [False, True, True, False, False, True]):
        strategy = duo(heads)
        np.testing.assert_allclose(
            attend(strategy), together(q, k, v, strategy=strategy), atol=1e-6
        )


def test_packed_sequences_go_without_sinks() -> None:
    qkv = draw(T=37)
    segment_ids = jnp.array([[0] * 12 + [1] * 25, [0] * 37], jnp.int32)
    with pytest.raises(UnsupportedError, match=r"segment_ids with sink_size=3: exact sinks"):
        prefill_attention(*qkv, duo([True, False, False]), segment_ids=segment_ids)
    strategy = duo([True, False, False], sink_size=0)
    packed = jax.jit(prefill_attention)(*qkv, strategy, segment_ids=segment_ids)
    ids = np.array(segment_ids)
    windows = streaming.visible_pairs(
        2, 37, 37, sink_sizes=[0] * 6, recent_sizes=[37] * 2 + [SIZES["recent_size"]] * 4
    )
    pairs = windows & (ids[:, :, None] == ids[:, None, :])[:, None]
    np.testing.assert_allclose(packed, attention.attention(*qkv, pairs)[0], atol=5e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sink_size": -1}, "sink_size=-1 must not be negative"),
        ({"recent_size": 0}, "recent_size=0 must be at least 1"),
        ({"heads": [True] * 4}, r"retrieval_heads has shape \(4,\) and dtype bool; pass bool of"),
        ({"heads": [1, 0, 0]}, "retrieval_heads has shape .* dtype int32; pass bool"),
    ],
    ids=["sink", "recent", "shape", "dtype"],
)
def test_bad_parameters_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        duo(**({"heads": [True] * 3} | change)).select(*draw()[:2])


def test_a_window_without_causality_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is_causal=False: .* pass is_causal=True"):
        duo([True] * 3).select(*draw()[:2], is_causal=False)
