"""The named prefill functions: what they compute, and what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    Full,
    Streaming,
    UnsupportedError,
    full_prefill,
    prefill_attention,
    streaming_prefill,
)
from sparseattn_jax.kernels.backends import Implementation
from sparseattn_jax.kernels.dense_attention import cudnn
from tests.oracles import attention as oracle

B, T, S, N, K = 2, 21, 40, 4, 2


def draw() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, N, 8), (B, S, K, 8), (B, S, K, 8)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def kept(mask: np.ndarray, *, is_causal: bool) -> np.ndarray:
    return oracle.visible_pairs(B, T, S, is_causal=is_causal)[:, None] & mask


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("shape", [(T, S), (B, T, S), (1, T, S), (B, N, T, S), (1, N, T, S)])
def test_full_prefill_takes_a_mask_of_any_rank(shape: tuple[int, ...], is_causal: bool) -> None:
    q, k, v = draw()
    mask = np.random.default_rng(1).random(shape) < 0.4
    call = functools.partial(full_prefill, is_causal=is_causal, return_lse=True)
    out, lse = jax.jit(call)(q, k, v, mask=jnp.asarray(mask))
    per_head = mask[:, None] if mask.ndim == 3 else mask
    keep = kept(np.broadcast_to(per_head, (B, N, T, S)), is_causal=is_causal)
    expected_out, expected_lse = oracle.attention(q, k, v, keep)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_full_prefill_without_a_mask_is_the_full_strategy() -> None:
    q, k, v = draw()
    lengths = jnp.array([40, 13], jnp.int32)
    options = {"kv_lengths": lengths, "return_lse": True}
    by_name = full_prefill(q, k, v, **options)
    by_strategy = prefill_attention(q, k, v, Full(), **options)
    jax.tree.map(np.testing.assert_array_equal, by_name, by_strategy)


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "taken"])
def test_full_prefill_asks_cudnn_first(monkeypatch: pytest.MonkeyPatch, refuses: bool) -> None:
    def sevens(q: jax.Array, *_: None, **options: object) -> tuple[jax.Array, None]:
        return 7 * jnp.ones_like(q), None

    def refusal(facts: cudnn.CallFacts) -> str | None:
        return "does not run here" if refuses or facts.has_masks else None

    monkeypatch.setattr(cudnn, "refusal", refusal)
    table = {"cudnn": Implementation(sevens, refusal)}
    monkeypatch.setattr("sparseattn_jax.kernels.dense_attention._TABLE", table)
    q, k, v = draw()
    assert (full_prefill(q, k, v) == 7).all() == (not refuses)
    assert not (full_prefill(q, k, v, backend="xla") == 7).any()
    assert not (full_prefill(q, k, v, kv_lengths=jnp.array([40, 40], jnp.int32)) == 7).any()


@pytest.mark.parametrize("exact", [False, True], ids=["blocks", "exact"])
def test_streaming_prefill_is_the_streaming_strategy(exact: bool) -> None:
    q, k, v = draw()
    sizes = {"sink_size": 4, "recent_size": 8, "block_size": 4, "exact": exact}
    by_name = jax.jit(functools.partial(streaming_prefill, **sizes))(q, k, v)
    by_strategy = prefill_attention(q, k, v, Streaming(**sizes))
    np.testing.assert_allclose(by_name, by_strategy, atol=1e-6)
    assert np.abs(by_name - full_prefill(q, k, v)).max() > 1e-3


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (jnp.ones((T, S), jnp.int32), "mask.dtype=int32 must be bool"),
        (jnp.ones((T, S + 1), bool), r"mask.shape=\(21, 41\) must be \[T, S\]"),
        (jnp.ones((3, T, S), bool), r"mask.shape=\(3, 21, 40\) must be"),
        (jnp.ones((B, 3, T, S), bool), "N=4 or 1, T=21 and S=40"),
        (jnp.ones((1, B, N, T, S), bool), "must be"),
        (jnp.ones((S,), bool), "must be"),
    ],
)
def test_a_mask_that_does_not_fit_raises(mask: jax.Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        full_prefill(*draw(), mask=mask)


def test_a_named_backend_that_cannot_raises() -> None:
    q, k, v = draw()
    mask = jnp.ones((T, S), bool)
    with pytest.raises(UnsupportedError, match="cudnn: needs compute capability"):
        full_prefill(q, k, v, backend="cudnn")
    with pytest.raises(UnsupportedError, match="this op has cudnn, xla"):
        full_prefill(q, k, v, mask=mask, backend="mosaic_sm90")


def test_a_window_needs_causality() -> None:
    with pytest.raises(ValueError, match="a streaming window looks back"):
        streaming_prefill(*draw(), is_causal=False)
