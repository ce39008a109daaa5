"""Block selection in XLA against the rule, and the rule against planted faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.select_blocks import select_blocks
from tests.drawing import block_matrix
from tests.oracles import selection as oracle


def select(scores, threshold, forced, visible, *, max_blocks=None):
    """The selection as a [B, N, Tb, Sb] bool array, with what was dropped."""
    function = jax.jit(select_blocks, static_argnames="max_blocks")
    indices, counts, num_dropped = function(
        jnp.array(scores, jnp.float32),
        jnp.array(threshold, jnp.float32),
        jnp.array(forced),
        jnp.array(visible),
        max_blocks=max_blocks,
    )
    return np.array(block_lists.to_dense(indices, counts, scores.shape[-1])), num_dropped


def row(scores, threshold, *, forced=(), hidden=(), max_blocks=None):
    """Selected blocks of a single row, and the number dropped."""
    scores = np.array(scores, np.float32)[None, None, None]
    is_forced, is_hidden = np.zeros(scores.shape, bool), np.zeros(scores.shape, bool)
    is_forced[..., list(forced)], is_hidden[..., list(hidden)] = True, True
    keep, num_dropped = select(scores, [threshold], is_forced, ~is_hidden, max_blocks=max_blocks)
    return np.flatnonzero(keep).tolist(), int(num_dropped[0, 0])


def causal_case(seed=0, B=2, N=3, blocks=12):
    """Scores with some ties and zeros, forced first and diagonal blocks, a threshold per head."""
    rng = np.random.default_rng(seed)
    scores = np.exp(3 * rng.normal(size=(B, N, blocks, blocks))).astype(np.float32)
    scores[rng.random(scores.shape) < 0.2] = 1.0
    scores[rng.random(scores.shape) < 0.1] = 0.0
    visible = np.tril(np.ones((blocks, blocks), bool))[None, None]
    forced = np.eye(blocks, dtype=bool)[None, None].copy()
    forced[..., 0] = True
    return scores, rng.uniform(0.3, 0.99, N).astype(np.float32), forced & visible, visible


@pytest.mark.parametrize(
    ("scores", "options", "expected"),
    [
        pytest.param([1, 4, 2, 3], {"threshold": 0.5}, [1, 3], id="highest-first"),
        pytest.param([1, 4, 2, 3], {"threshold": 0.4}, [1], id="reached-exactly"),
        pytest.param([2, 2, 2, 2], {"threshold": 0.5}, [0, 1], id="tie-takes-the-lower-index"),
        pytest.param([1, 3, 1, 1], {"threshold": 0.6}, [0, 1], id="tie-at-the-cut"),
        pytest.param([1, 4, 2, 3], {"threshold": 0.5, "forced": [0]}, [0, 1], id="forced-counts"),
        pytest.param([9, 1, 1, 9], {"threshold": 0.9, "forced": [0, 3]}, [0, 3], id="forced-do"),
        pytest.param([1, 4, 2, 3], {"threshold": 0.0}, [], id="threshold-0"),
        pytest.param([1, 4, 2, 3], {"threshold": 0.0, "forced": [2]}, [2], id="threshold-0-forced"),
        pytest.param([1, 4, 0, 1e-30], {"threshold": 1.0}, [0, 1, 2, 3], id="threshold-1-is-all"),
        pytest.param(
            [1, 4, 2], {"threshold": 1.0, "hidden": [1]}, [0, 2], id="all-that-is-visible"
        ),
        pytest.param([1, 9, 2], {"threshold": 0.5, "hidden": [1]}, [2], id="hidden-has-no-mass"),
        pytest.param(
            [5, 9], {"threshold": 0.3, "forced": [1], "hidden": [1]}, [0], id="hidden-wins"
        ),
        pytest.param([0, 0, 0], {"threshold": 0.9}, [], id="no-mass"),
        pytest.param([0, 0, 0], {"threshold": 0.9, "forced": [1]}, [1], id="no-mass-forced"),
        pytest.param([1, 2], {"threshold": 0.9, "hidden": [0, 1]}, [], id="empty-row"),
        pytest.param([3.0], {"threshold": 0.9}, [0], id="one-block"),
        pytest.param([0, 0, 5], {"threshold": 0.999}, [2], id="zeros-are-not-needed"),
        pytest.param([-0.0, 1, 2], {"threshold": 0.5}, [2], id="minus-zero"),
    ],
)
def test_a_row(scores: list, options: dict, expected: list):
    assert row(scores, **options) == (expected, 0)


@pytest.mark.parametrize(
    ("options", "expected", "num_dropped"),
    [
        pytest.param({"max_blocks": 2}, [1, 3], 2, id="keeps-the-highest"),
        pytest.param({"max_blocks": 2, "forced": [0]}, [0, 1], 2, id="keeps-the-forced"),
        pytest.param({"max_blocks": 3, "hidden": [1]}, [0, 2, 3], 0, id="fits"),
        pytest.param({"max_blocks": 9}, [0, 1, 2, 3], 0, id="more-than-there-are"),
        pytest.param({"max_blocks": 1, "forced": [0, 2]}, [2], 3, id="too-small-for-the-forced"),
    ],
)
def test_a_capacity(options: dict, expected: list, num_dropped: int):
    assert row([1, 4, 2, 3], 1.0, **options) == (expected, num_dropped)


def test_a_capacity_breaks_ties_by_the_lower_index():
    assert row([2, 1, 2, 2, 2], 1.0, forced=[1], max_blocks=3) == ([0, 1, 2], 2)


def test_causal_picture():
    scores = np.array([[9, 9, 9, 9], [1, 2, 9, 9], [1, 7, 1, 9], [2, 1, 5, 2]], np.float32)
    visible = np.tril(np.ones((4, 4), bool))
    forced = np.eye(4, dtype=bool)
    forced[:, 0] = True
    keep, _ = select(scores[None, None], [0.85], forced[None, None], visible[None, None])
    drawing = block_matrix("""
        #...
        ##..
        ###.
        #.##
    """)
    np.testing.assert_array_equal(keep[0, 0], drawing)


def test_entries_past_the_count_repeat_the_first():
    scores = jnp.array([[[[0, 3, 1, 2], [0, 0, 0, 0]]]], jnp.float32)
    nothing, everything = jnp.zeros((1, 1, 2, 4), bool), jnp.ones((1, 1, 2, 4), bool)
    threshold = jnp.array([0.8], jnp.float32)
    indices, counts, _ = select_blocks(scores, threshold, nothing, everything, max_blocks=3)
    np.testing.assert_array_equal(counts[0, 0], [2, 0])
    np.testing.assert_array_equal(indices[0, 0], [[1, 3, 1], [0, 0, 0]])


def test_equals_the_rule_with_a_threshold_per_head():
    case = causal_case()
    keep, num_dropped = select(*case)
    np.testing.assert_array_equal(keep, oracle.select_blocks(*case))
    np.testing.assert_array_equal(num_dropped, 0)


def test_a_traced_threshold_and_vmap():
    scores, threshold, forced, visible = causal_case()
    expected = oracle.select_blocks(scores, threshold, forced, visible)

    def counts_of(scores, threshold):
        forced_blocks, visible_blocks = jnp.array(forced), jnp.array(visible)
        return select_blocks(
            scores[None], threshold, forced_blocks, visible_blocks, max_blocks=None
        )[1][0]

    counts = jax.jit(jax.vmap(counts_of, in_axes=(0, None)))(jnp.array(scores), threshold)
    np.testing.assert_array_equal(counts, expected.sum(axis=-1))


@given(
    # Sixteenths add up without rounding, so equality with the rule is exact, ties and all.
    sixteenths=st.lists(st.integers(0, 40), min_size=6, max_size=6),
    threshold=st.integers(0, 64).map(lambda x: x / 64),
    forced=st.sets(st.integers(0, 5), max_size=3),
    hidden=st.sets(st.integers(0, 5), max_size=3),
    max_blocks=st.sampled_from([None, 3]),
)
def test_any_row_equals_the_rule(sixteenths, threshold, forced, hidden, max_blocks):
    scores = np.array(sixteenths) / 16
    is_forced, is_visible = (np.isin(np.arange(6), list(x)) for x in (forced, hidden))
    is_visible = ~is_visible
    expected = oracle.select_row(scores, threshold, is_forced, is_visible)
    ranked = sorted(np.flatnonzero(expected), key=lambda j: (not is_forced[j], -scores[j], j))
    ranked = ranked[:max_blocks]
    kept, num_dropped = row(scores, threshold, forced=forced, hidden=hidden, max_blocks=max_blocks)
    assert kept == sorted(ranked)
    assert num_dropped == expected.sum() - len(ranked)


@given(seed=st.integers(0, 10**6))
def test_any_selection_is_right(seed: int):
    case = causal_case(seed)
    keep, _ = select(*case)
    assert oracle.rows_at_fault(keep, *case) == []


def without_the_last_needed_block(keep, scores, threshold, forced, visible):
    """Stops one block early: the lowest unforced block of each row is missing."""
    scores = np.where(keep & ~forced, scores, np.inf)
    lowest = np.arange(scores.shape[-1]) == scores.argmin(axis=-1)[..., None]
    return keep & ~(lowest & np.isfinite(scores))


def with_forced_mass_ignored(keep, scores, threshold, forced, visible):
    """The sum starts at 0 when the forced blocks are already in."""
    selected = oracle.select_blocks(scores, threshold, np.zeros_like(forced), visible)
    return selected | np.broadcast_to(forced, scores.shape)


def with_one_block_too_many(keep, scores, threshold, forced, visible):
    """The stopping test lags by one block."""
    rest = np.where(~keep & visible, scores, -1)
    highest = np.arange(scores.shape[-1]) == rest.argmax(axis=-1)[..., None]
    return keep | (highest & (rest >= 0))


def with_the_predecessor_swapped(keep, scores, threshold, forced, visible):
    """The last needed block's next higher one is dropped instead of kept."""
    ranked = np.where(keep & ~forced, scores, np.inf)
    second = np.argsort(ranked, axis=-1, kind="stable")[..., 1]
    is_second = np.arange(scores.shape[-1]) == second[..., None]
    return keep & ~(is_second & np.isfinite(ranked))


def without_the_first_block(keep, scores, threshold, forced, visible):
    """The sink is not forced."""
    return keep & ~((np.arange(scores.shape[-1]) == 0) & (keep.sum(axis=-1) > 2)[..., None])


def with_the_future(keep, scores, threshold, forced, visible):
    """Selection before causality."""
    return oracle.select_blocks(scores, threshold, forced, np.ones_like(visible))


@pytest.mark.parametrize(
    "fault",
    [
        without_the_last_needed_block,
        with_forced_mass_ignored,
        with_one_block_too_many,
        with_the_predecessor_swapped,
        without_the_first_block,
        with_the_future,
    ],
    ids=lambda fault: fault.__name__,
)
def test_the_comparison_rule_sees_planted_faults(fault):
    # Without zeros and ties, where several sets are right.
    scores, threshold, forced, visible = causal_case()
    rng = np.random.default_rng(1)
    scores = np.exp(rng.normal(size=scores.shape))
    keep = oracle.select_blocks(scores, threshold, forced, visible)
    assert oracle.rows_at_fault(keep, scores, threshold, forced, visible) == []
    wrong = fault(keep, scores, threshold, forced, visible)
    assert oracle.rows_at_fault(wrong, scores, threshold, forced, visible) != []


def test_the_comparison_rule_forgives_a_rounded_cut():
    # A mass a hair below the goal is as right as one more block.
    scores = np.array([[[[0.5 - 1e-7, 0.3, 0.2 + 1e-7]]]])
    none, all_visible = np.zeros(scores.shape, bool), np.ones(scores.shape, bool)
    for keep in ([True, False, False], [True, True, False]):
        assert oracle.rows_at_fault(np.array([[[keep]]]), scores, [0.5], none, all_visible) == []


def test_an_unknown_backend_is_refused():
    scores, threshold, forced, visible = (jnp.array(x) for x in causal_case())
    with pytest.raises(UnsupportedError, match="backend='cudnn': this op has mosaic_sm90, xla"):
        select_blocks(scores, threshold, forced, visible, max_blocks=None, backend="cudnn")
