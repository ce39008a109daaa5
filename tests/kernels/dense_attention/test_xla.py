"""The xla implementation and its gradients against the float64 oracle."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels.dense_attention import dense_attention, xla
from tests.oracles import attention as oracle

B, T, S, N, K, H = 2, 11, 17, 4, 2, 8


def operands() -> tuple[list[jax.Array], np.random.Generator]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes], rng


def drawn_mask(batch: int, heads: int) -> np.ndarray:
    """Also a row that sees nothing, and one that sees all."""
    mask = np.random.default_rng(1).random((batch, heads, T, S)) < 0.5
    mask[:, :, 3], mask[:, :, 4] = False, True
    return mask


CALLS: dict[str, dict[str, Any]] = {
    "causal": {},
    "full": {"is_causal": False},
    "mask-for-all": {"mask": drawn_mask(1, 1)},
    "mask-per-sequence": {"mask": drawn_mask(B, 1), "is_causal": False},
    "mask-per-head": {"mask": drawn_mask(1, N)},
    "mask-per-sequence-and-head": {"mask": drawn_mask(B, N)},
    "lengths": {"kv_lengths": np.array([17, 8], np.int32)},
    "lengths-full": {"kv_lengths": np.array([0, 9], np.int32), "is_causal": False},
    "segments": {"segment_ids": np.sort(np.arange(B * S).reshape(B, S) % 3).astype(np.int32)},
    "everything": {
        "mask": drawn_mask(B, N),
        "kv_lengths": np.array([17, 8], np.int32),
        "segment_ids": np.zeros((B, S), np.int32),
    },
}


def kept(call: dict[str, Any]) -> np.ndarray:
    options = {"is_causal": True} | call
    mask = options.pop("mask", np.ones((1, 1, T, S), bool))
    return oracle.visible_pairs(B, T, S, **options)[:, None] & mask & np.ones((1, N, 1, 1), bool)


@pytest.mark.parametrize(
    ("name", "chunk_bytes"), [*((name, 2**28) for name in CALLS), ("everything", 1), ("full", 1)]
)
def test_values_and_gradients_equal_the_oracle(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk_bytes: int
) -> None:
    monkeypatch.setattr(xla, "_CHUNK_BYTES", chunk_bytes)
    xla.run.clear_cache()  # the number of bytes is no argument
    qkv, rng = operands()
    options = {"is_causal": True} | {
        key: x if key == "is_causal" else jnp.asarray(x) for key, x in CALLS[name].items()
    }
    (out, lse), vjp = jax.vjp(lambda *x: dense_attention(*x, scale=0.5, **options), *qkv)
    keep = kept(CALLS[name])
    expected_out, expected_lse = oracle.attention(*qkv, keep, scale=0.5)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)
    d_out, d_lse = (rng.normal(size=x.shape).astype(np.float32) for x in (out, lse))
    expected = oracle.attention_gradients(*qkv, keep, d_out, d_lse, scale=0.5)
    for gradient, reference in zip(vjp((d_out, d_lse)), expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=5e-6)


def test_an_additive_mask_is_a_boolean_one_where_it_is_infinite() -> None:
    qkv, _ = operands()
    mask = drawn_mask(B, N)
    options = {"is_causal": True, "scale": 0.5}
    added = jnp.where(mask, 0.0, -jnp.inf)
    by_sum = dense_attention(*qkv, mask=added, **options)
    by_choice = dense_attention(*qkv, mask=jnp.asarray(mask), **options)
    jax.tree.map(np.testing.assert_array_equal, by_sum, by_choice)


def test_an_additive_mask_shifts_logits_and_has_a_gradient() -> None:
    qkv, rng = operands()
    bias = jnp.asarray(rng.normal(size=(1, N, T, S)), jnp.float32)

    def total(bias: jax.Array) -> jax.Array:
        out, _ = dense_attention(*qkv, mask=bias, is_causal=True, scale=0.5)
        return jnp.sum(jnp.square(out))

    q, k, v = (np.asarray(x, np.float64) for x in qkv)

    def exact(bias: np.ndarray) -> float:
        k_all, v_all = (np.repeat(x, N // K, axis=2) for x in (k, v))
        logits = np.einsum("btnh,bsnh->bnts", q, k_all) * 0.5 + bias
        weights = np.where(kept({}), np.exp(logits), 0.0)
        weights /= weights.sum(axis=-1, keepdims=True)
        return float(np.square(np.einsum("bnts,bsnh->btnh", weights, v_all)).sum())

    value, gradient = jax.value_and_grad(total)(bias)
    start = np.asarray(bias, np.float64)
    np.testing.assert_allclose(value, exact(start), rtol=1e-5)
    direction = rng.normal(size=bias.shape)
    slope = (exact(start + 1e-5 * direction) - exact(start - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-4)


def test_chunks_bound_the_memory_of_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    q = jax.ShapeDtypeStruct((1, 512, 4, 8), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 512, 2, 8), jnp.float32)

    def temporary_bytes(chunk_bytes: int) -> int:
        monkeypatch.setattr(xla, "_CHUNK_BYTES", chunk_bytes)

        def call(q: jax.Array, k: jax.Array) -> jax.Array:
            out, _ = xla.run.__wrapped__(q, k, k, None, None, None, is_causal=True, scale=1.0)
            return out.sum()

        compiled = jax.jit(jax.grad(call)).lower(q, k).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * 4 * 512 * 512
    assert temporary_bytes(scores) > scores
    assert temporary_bytes(scores // 16) < scores / 2


def test_the_log_sum_exp_is_given_where_it_is_asked_for() -> None:
    qkv, _ = operands()
    out, lse = dense_attention(*qkv, is_causal=True, scale=0.5, needs_lse=False)
    with_lse, _ = dense_attention(*qkv, is_causal=True, scale=0.5)
    assert lse is None
    np.testing.assert_array_equal(out, with_lse)
