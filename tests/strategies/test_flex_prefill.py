"""FlexPrefill's sets against the paper's rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import FlexPrefill, Full, UnsupportedError, flexprefill_prefill
from sparseattn_jax.attention import prefill_attention
from tests.oracles import flex_prefill as oracle
from tests.oracles import pooled, selection

TAU = 0.12


def draw(B: int = 1, T: int = 48, S: int = 48, N: int = 4, K: int = 2, H: int = 8):
    """Heads of one kv head follow block means, those of the others single keys."""
    rng = np.random.default_rng(T + S)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, S, K, H))
    k[:, :, 0] = 0.2 * k[:, :, 0] + 2 * np.repeat(k[:, ::8, 0], 8, axis=1)[:, :S]
    q[:, :, : N // K] = 0.2 * q[:, :, : N // K] + np.repeat(q[:, ::8, : N // K], 8, axis=1)[:, :T]
    k[:, :, 1:] *= 3
    return jnp.array(q, jnp.float32), jnp.array(k, jnp.float32)


CASES = {
    "square": ({}, {}, None),
    "odd-length": ({"T": 45, "S": 45}, {}, None),
    "T<S-aligned": ({"T": 16}, {}, None),
    "T<S-unaligned": ({"T": 21, "S": 61}, {}, None),
    "T<block": ({"T": 3, "S": 61}, {}, None),
    "gqa-3:1": ({"N": 6}, {}, None),
    "per-head": ({}, {"gamma": (0.3, 0.6, 0.9, 0.99)}, None),
    "no-query-aware": ({}, {"tau": 0.0}, None),
    "all-query-aware": ({}, {"tau": 1.0}, None),
    "per-row": ({"T": 45, "S": 45}, {"tau": 1.0, "per_row": True}, None),
    "budgets": ({"T": 61, "S": 93}, {"min_budget": 20, "max_budget": 30}, None),
    "most": ({"S": 93}, {"gamma": 0.99, "max_budget": 17}, None),
    "gamma-0": ({}, {"gamma": 0.0}, None),
    "gamma-1": ({"T": 45, "S": 61}, {"gamma": 1.0}, None),
    "block-16": ({"T": 70, "S": 90}, {"block_size": 16}, None),
    "capped": ({"T": 45, "S": 61}, {"gamma": 0.9, "sparsity_ratio": 0.6}, None),
    "capped-lengths": ({"B": 3}, {"sparsity_ratio": 0.6, "per_row": True}, [48, 22, 0]),
    "capped-to-nothing": ({"S": 93}, {"min_budget": 20, "sparsity_ratio": 0.0}, None),
    "lengths": ({"B": 3}, {}, [48, 22, 0]),
    "lengths-T<S": ({"B": 3, "T": 21}, {}, [48, 37, 10]),
}


FULL_CASES = {
    "T<S-aligned",
    "T<block",
    "all-query-aware",
    "most",
    "gamma-0",
    "block-16",
    "lengths",
    "capped-lengths",
    "capped-to-nothing",
}


@jax.jit
def select_in_jit(strategy: FlexPrefill, q, k, lengths):
    return strategy.select(q, k, kv_lengths=lengths)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name in FULL_CASES)) for name in CASES],
)
def test_sets_are_those_of_the_rules(name: str) -> None:
    sizes, parameters, lengths = CASES[name]
    q, k = draw(**sizes)
    parameters = {"gamma": 0.7, "tau": TAU, "block_size": 8} | parameters
    gamma = jnp.asarray(parameters["gamma"], jnp.float32)
    strategy = FlexPrefill(**(parameters | {"gamma": gamma}))
    lengths = None if lengths is None else np.array(lengths, np.int32)
    pattern = select_in_jit(strategy, q, k, None if lengths is None else jnp.asarray(lengths))
    expected = oracle.selected_blocks(
        np.asarray(q),
        np.asarray(k),
        kv_lengths=lengths,
        **(parameters | {"gamma": np.broadcast_to(gamma, q.shape[2])}),
    )
    np.testing.assert_array_equal(selection.listed_blocks(pattern.blocks), expected)


@pytest.mark.parametrize(
    ("block_size", "tau"), [(64, 0.25), pytest.param(128, 0.206, marks=pytest.mark.full)]
)
def test_sets_at_real_block_sizes(block_size: int, tau: float) -> None:
    q, k = draw(T=300, S=340, N=2, K=2)
    distances = pooled.pooled_distance(np.asarray(q), np.asarray(k), block_size=block_size)
    assert distances.min() < tau < distances.max()
    options = {"gamma": np.full(2, 0.7, np.float32), "tau": tau, "block_size": block_size}
    pattern = select_in_jit(FlexPrefill(**options | {"gamma": jnp.float32(0.7)}), q, k, None)
    expected = oracle.selected_blocks(np.asarray(q), np.asarray(k), **options)
    np.testing.assert_array_equal(selection.listed_blocks(pattern.blocks), expected)


@pytest.mark.parametrize("ratio", [0.3, 0.55, 1.0])
def test_sparsity_ratio_caps_the_density(ratio: float) -> None:
    q, k = draw(S=48)
    uncapped, capped = (
        select_in_jit(
            FlexPrefill(gamma=0.95, tau=TAU, block_size=8, sparsity_ratio=x), q, k, None
        ).blocks
        for x in (None, jnp.float32(ratio))
    )
    # Of 21 visible blocks 11 are forced.
    allowed = max(int(ratio * 21), 11) / 21
    expected = np.minimum(uncapped.density(), allowed)
    np.testing.assert_allclose(capped.density(), expected, rtol=1e-6)
    assert not (capped.to_dense() & ~uncapped.to_dense()).any()


def test_the_operands_have_heads_of_both_kinds() -> None:
    q, k = draw()
    distances = pooled.pooled_distance(np.asarray(q), np.asarray(k), block_size=8)
    assert distances.min() < TAU < distances.max()


def test_short_sequences_are_attended_to_whole() -> None:
    q, k = draw(T=16, S=16)
    everything = Full(block_size=8).select(q, k).blocks
    for strategy in (FlexPrefill(block_size=8), FlexPrefill(block_size=4, min_budget=16)):
        blocks = strategy.select(q, k).blocks
        assert blocks.density().min() == 1.0
    assert (blocks.block_q, everything.block_q) == (4, 8)


def test_prefill_is_selection_then_attention() -> None:
    q, k = draw(T=45, S=61)
    v = jnp.flip(k, axis=1)
    options = {"gamma": 0.6, "tau": 0.2, "block_size": 8, "max_budget": 24}
    call = functools.partial(flexprefill_prefill, **options)
    by_name, by_strategy = (
        jax.jit(call)(q, k, v),
        prefill_attention(q, k, v, FlexPrefill(**options)),
    )
    np.testing.assert_allclose(by_name, by_strategy, atol=1e-6)
    assert np.abs(by_name - prefill_attention(q, k, v, Full(block_size=8))).max() > 1e-3


def test_gamma_1_is_dense_attention() -> None:
    q, k = draw(T=45, S=61)
    v = jnp.flip(k, axis=1)
    out = flexprefill_prefill(q, k, v, gamma=1.0, block_size=8)
    np.testing.assert_allclose(out, prefill_attention(q, k, v, Full(block_size=8)), atol=2e-6)


def test_interleaved_heads_read_the_kv_head_of_their_remainder() -> None:
    q, k = draw(T=45, S=61, N=6)
    v = jnp.flip(k, axis=1)
    gamma = jnp.linspace(0.3, 0.8, 6, dtype=jnp.float32)
    call = functools.partial(flexprefill_prefill, tau=TAU, block_size=8, return_lse=True)
    # Heads of kv heads 0, 1, 0, 1, 0, 1 in the place of 0, 0, 0, 1, 1, 1.
    there = np.array([0, 3, 1, 4, 2, 5])
    expected = jax.jit(call)(q, k, v, gamma=gamma)
    interleaved = functools.partial(call, gqa_interleave=True)
    got = jax.jit(interleaved)(q[:, :, there], k, v, gamma=gamma[there])
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other[:, :, there], atol=1e-6)


def test_selection_has_no_gradient() -> None:
    q, k = draw()

    def density(q: jax.Array, k: jax.Array, gamma: jax.Array) -> jax.Array:
        blocks = FlexPrefill(gamma=gamma, block_size=8).select(q, k).blocks
        return blocks.density().sum()

    gradients = jax.grad(density, argnums=(0, 1, 2))(q, k, jnp.float32(0.7))
    assert not any(np.any(gradient) for gradient in gradients)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"gamma": 1.5}, r"gamma=1.5 must lie in \[0, 1\]"),
        ({"gamma": jnp.ones(3)}, r"gamma has shape \(3,\); pass a scalar, or one per query head"),
        ({"tau": -0.1}, r"tau=-0.1 must not be negative"),
        ({"min_budget": 0}, "min_budget=0 must be at least 1 token"),
        ({"max_budget": 0}, "max_budget=0 must be at least 1 token"),
        ({"min_budget": 9, "max_budget": 8}, "min_budget=9 must not exceed max_budget=8"),
        ({"sparsity_ratio": 1.2}, r"sparsity_ratio=1.2 must lie in \[0, 1\]"),
        ({"sparsity_ratio": jnp.ones(4)}, r"sparsity_ratio has shape \(4,\); pass one for all"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_parameters_out_of_range_raise(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlexPrefill(**parameters).select(*draw())


def test_gamma_for_other_heads_raises() -> None:
    q, k = draw()
    with pytest.raises(ValueError, match=r"gamma has shape \(3,\)"):
        flexprefill_prefill(q, k, k, gamma=jnp.ones(3), gqa_interleave=True)


def test_a_call_without_causality_raises() -> None:
    with pytest.raises(ValueError, match="is_causal=False: FlexPrefill judges by the last queries"):
        FlexPrefill().select(*draw(), is_causal=False)


def test_packed_sequences_are_refused() -> None:
    q, k = draw()
    with pytest.raises(UnsupportedError, match="FlexPrefill does not take segment_ids"):
        FlexPrefill().select(q, k, segment_ids=jnp.zeros((1, 48), jnp.int32))
