"""Coverage counts in XLA against the rule that sorts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.coverage_counts import coverage_counts
from tests.oracles import coverage as oracle

EPSILON = 1e-5  # of a row's mass, for the rounding of its sums

count_in_jit = jax.jit(coverage_counts)


def count(x, share) -> np.ndarray:
    counts = count_in_jit(jnp.asarray(x, jnp.float32), jnp.asarray(share, jnp.float32))
    assert counts.dtype == jnp.int32
    return np.asarray(counts)


def assert_right(x, share) -> None:
    x, share = np.asarray(x, np.float32), np.asarray(share, np.float32)
    counts = count(x, share)
    assert (oracle.coverage_counts(x, share, slack=-EPSILON) <= counts).all()
    assert (counts <= oracle.coverage_counts(x, share, slack=EPSILON)).all()


# Sums of few small powers of two are exact, and so are the counts.
@pytest.mark.parametrize(
    ("row", "share", "expected"),
    [
        ([8, 4, 2, 1, 1], 0.25, 1),
        ([8, 4, 2, 1, 1], 0.5, 2),  # the entry that reaches the share is not enough
        ([8, 4, 2, 1, 1], 0.75, 3),
        ([1, 2, 8, 1, 4], 0.75, 3),  # in any order
        ([8, 4, 2, 1, 1], 0.9375, 5),
        ([8, 4, 2, 1, 1], 1.0, 5),
        ([8, 4, 2, 1, 1], 0.0, 1),
        ([2, 2, 2, 2, 8], 0.5, 2),
        ([2, 2, 2, 2, 8], 0.6875, 3),  # one of the tied entries, and a part of the next
        ([2, 2, 2, 2, 8], 0.75, 4),
        ([4, 4, 4, 4, 0], 0.75, 4),
        ([4, 4, 4, 4, 0], 1.0, 5),
        ([4, 4, 4, 4, -0.0], 0.75, 4),
        ([0, 0, 0, 0, 0], 0.5, 5),
        ([0, 0, 3, 0, 0], 0.999, 1),
        ([2**-120] * 4 + [2**-118], 0.5, 2),
        ([2**120] * 4 + [2**122], 0.5, 2),
    ],
)
def test_by_hand(row: list[float], share: float, expected: int):
    assert count([[row]], [share]).item() == expected
    assert oracle.coverage_counts(np.array([[row]]), np.array([share])).item() == expected


def test_one_entry():
    np.testing.assert_array_equal(count([[[3.0]], [[0.0]]], [0.5]), [[1], [1]])


def test_each_head_has_its_share_or_all_have_one():
    x = np.broadcast_to(np.float32([8, 4, 2, 1, 1]), (2, 3, 5))
    np.testing.assert_array_equal(count(x, [0.0, 0.5, 1.0]), [[1, 2, 5]] * 2)
    np.testing.assert_array_equal(coverage_counts(jnp.array(x), 0.5), [[2] * 3] * 2)


@given(
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([1, 2, 5, 10**6]),
    shares=st.lists(st.integers(0, 64), min_size=3, max_size=3),
)
def test_any_row_as_by_sorting(seed: int, levels: int, shares: list[int]):
    # Sums of integers are exact, as are shares of so few bits: so is the whole rule.
    x = np.random.default_rng(seed).integers(0, levels, size=(2, 3, 16), endpoint=True)
    share = np.array(shares, np.float32) / 64
    if levels > 2**18:
        assert_right(x, share)
    else:
        np.testing.assert_array_equal(count(x, share), oracle.coverage_counts(x, share))


SPREADS = {
    "flat": lambda rng, size: rng.uniform(size=size),
    "lognormal": lambda rng, size: np.exp(2.0 * rng.normal(size=size)),
    "heavy": lambda rng, size: np.exp(6.0 * rng.normal(size=size)),
    "softmax-of-large-logits": lambda rng, size: np.exp(20.0 * rng.normal(size=size) - 60.0),
    "all-equal": lambda rng, size: np.full(size, 1 / 3),
    "two-values": lambda rng, size: np.where(rng.uniform(size=size) < 0.3, 0.7, 1e-3),
}


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("length", [1000, pytest.param(2**17, marks=pytest.mark.full)])
def test_the_counted_mass_is_the_share(spread: str, length: int):
    x = SPREADS[spread](np.random.default_rng(0), (2, 4, length))
    assert_right(x, [0.1, 0.5, 0.9, 0.95])


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_long_row(share: int):
    x = SPREADS["lognormal"](np.random.default_rng(1), (1, 1, 2**17))
    assert_right(x, [share])


def test_a_wrong_rule_is_seen():
    x = np.random.default_rng(0).uniform(size=(1, 2, 100))
    share = np.array([0.5, 0.9])
    counts = count(x, share)
    assert (counts - 1 < oracle.coverage_counts(x, share, slack=-EPSILON)).all()
    assert (counts + 1 > oracle.coverage_counts(x, share, slack=EPSILON)).all()


def test_works_under_vmap_and_has_no_gradient():
    x, share = jnp.arange(24.0).reshape(2, 3, 4), jnp.array([0.1, 0.5, 0.9])
    mapped = jax.vmap(lambda row: coverage_counts(row[None], share)[0])(x)
    np.testing.assert_array_equal(mapped, coverage_counts(x, share))
    gradient = jax.grad(lambda x: coverage_counts(x, share).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(gradient, 0.0)


def test_an_unknown_backend_is_refused():
    with pytest.raises(UnsupportedError, match="backend='mosaic_sm90': this op has xla"):
        coverage_counts(jnp.ones((1, 1, 4)), jnp.ones(1), backend="mosaic_sm90")
