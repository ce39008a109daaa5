"""Both arms and their gradients against the float64 oracle of each."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels import block_lists, two_arm_attention
from tests.oracles import attention as oracle

B, T, S, N, K, H, BLOCK = 2, 13, 19, 4, 2, 8, 4
Tb, Sb = -(-T // BLOCK), -(-S // BLOCK)


def drawn_blocks(density: float, *, heads: int = N, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).random((B, heads, Tb, Sb)) < density


def sinks_and_window() -> np.ndarray:
    """The first key block, and each query block's diagonal one and the one before it."""
    column, diagonal = np.arange(Sb)[None, :], (np.arange(Tb)[:, None] * BLOCK + S - T) // BLOCK
    window = (column <= diagonal + 1) & (column >= diagonal - 1)
    return np.broadcast_to((column == 0) | window, (B, 1, Tb, Sb))


CASES = {
    "streaming": (np.ones((B, 1, Tb, Sb), bool), sinks_and_window()),
    "drawn": (drawn_blocks(0.7), drawn_blocks(0.4, seed=2)),
    "one-inner-list": (drawn_blocks(0.7), drawn_blocks(0.4, heads=1, seed=2)),
    "one-outer-list": (drawn_blocks(0.7, heads=1), drawn_blocks(0.4, seed=2)),
    "no-inner-blocks": (drawn_blocks(0.7), drawn_blocks(0.0)),
    "nothing-else": (drawn_blocks(0.7), drawn_blocks(0.7)),
    "nothing": (drawn_blocks(0.0), drawn_blocks(0.0)),
}


def operands() -> tuple[list[np.ndarray], np.random.Generator]:
    rng = np.random.default_rng(0)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes], rng


def both_arms(outer: np.ndarray, inner: np.ndarray, *qkv: Any, **options: Any) -> Any:
    lists = (*block_lists.from_dense(jnp.asarray(outer)), *block_lists.from_dense(inner))
    settings = {"block_q": BLOCK, "block_kv": BLOCK, "is_causal": True, "scale": H**-0.5}
    return two_arm_attention.two_arm_attention(*qkv, *lists, **(settings | options))


def pairs(blocks: np.ndarray, **visibility: Any) -> np.ndarray:
    visible = oracle.visible_pairs(B, T, S, **({"is_causal": True} | visibility))
    blocks = np.broadcast_to(blocks, (B, N, Tb, Sb))
    return visible[:, None] & oracle.listed_pairs(blocks, T, S, BLOCK, BLOCK)


def check(outer: np.ndarray, inner: np.ndarray, **visibility: Any) -> None:
    qkv, rng = operands()
    options = {name: x if name == "is_causal" else jnp.asarray(x) for name, x in visibility.items()}
    call = jax.jit(functools.partial(both_arms, outer, jnp.asarray(inner), **options))
    arms, vjp = jax.vjp(call, *qkv)
    d_arms = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), arms)
    expected = [0.0, 0.0, 0.0]
    for arm, d_arm, blocks in zip(arms, d_arms, (outer | inner, inner), strict=True):
        keep = pairs(blocks, **visibility)
        for found, right in zip(arm, oracle.attention(*qkv, keep), strict=True):
            np.testing.assert_allclose(found, right, atol=3e-6)
        gradients = oracle.attention_gradients(*qkv, keep, *d_arm)
        expected = [total + x for total, x in zip(expected, gradients, strict=True)]
    for found, right in zip(vjp(d_arms), expected, strict=True):
        np.testing.assert_allclose(found, right, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_both_arms_and_their_gradients_equal_the_oracle(name: str) -> None:
    check(*CASES[name])


def test_lengths_and_padding_queries() -> None:
    check(*CASES["drawn"], kv_lengths=np.array([19, 9], np.int32))


def test_all_keys_are_visible_without_causality() -> None:
    check(*CASES["drawn"], is_causal=False)


def test_segments() -> None:
    segments = np.sort(np.random.default_rng(3).integers(0, 3, (B, S)), axis=-1).astype(np.int32)
    check(*CASES["drawn"], segment_ids=segments)


def test_no_block_is_visited_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = CASES["drawn"]
    visits = np.zeros(outer.shape, int)
    attend = two_arm_attention.block_sparse_attention

    def count(q: Any, k: Any, v: Any, indices: Any, counts: Any, **options: Any) -> Any:
        nonlocal visits
        visits = visits + np.asarray(block_lists.to_dense(indices, counts, Sb))
        return attend(q, k, v, indices, counts, **options)

    monkeypatch.setattr(two_arm_attention, "block_sparse_attention", count)
    both_arms(outer, jnp.asarray(inner), *map(jnp.asarray, operands()[0]))
    np.testing.assert_array_equal(visits, outer | inner)


def test_a_shared_block_counted_twice_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(is_rest: jax.Array) -> Any:
        return block_lists.from_dense(jnp.ones_like(is_rest))

    lists = two_arm_attention.block_lists
    fault = type("Lists", (), {"to_dense": lists.to_dense, "from_dense": whole})
    monkeypatch.setattr(two_arm_attention, "block_lists", fault)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        check(*CASES["streaming"])


def test_bfloat16_stays_bfloat16() -> None:
    qkv, _ = operands()
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in qkv]
    outer, inner = CASES["streaming"]
    (out, lse), _ = both_arms(outer, jnp.asarray(inner), *narrow)
    right, right_lse = oracle.attention(*(np.asarray(x, np.float32) for x in narrow), pairs(outer))
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float32), right, atol=2**-7)
    np.testing.assert_allclose(lse, right_lse, atol=1e-3)


def test_gradients_that_cancel_do_in_bfloat16() -> None:
    """A query that sees one key has gradient 0, whatever digits its output's gradient lost."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, 8, 2, H)), jnp.bfloat16) for _ in range(3))
    weights = [jnp.asarray(rng.normal(size=q.shape), jnp.float32) for _ in range(2)]
    blocks = np.ones((1, 1, 2, 2), bool)

    @jax.jit
    def d_q(q: jax.Array, k: jax.Array, v: jax.Array, weights: list[jax.Array]) -> jax.Array:
        def loss(q: jax.Array) -> jax.Array:
            arms = both_arms(blocks, jnp.asarray(blocks), q, k, v)
            terms = (
                weight * out.astype(jnp.float32)
                for weight, (out, _) in zip(weights, arms, strict=True)
            )
            return jnp.sum(sum(terms))

        return jax.grad(loss)(q)

    gradient = np.abs(np.asarray(d_q(q, k, v, weights), np.float32)).max(axis=(0, 2, 3))
    assert gradient[0] < 1e-6
    assert (gradient[1:] > 1e-2).all()
