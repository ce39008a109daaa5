"""Calls of block selection over the options of its kernels, and what to expect of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tests.oracles import selection as oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Scores [B, N, Tb, Sb]; forced and visible blocks of their own per sequence or per head."""

    B: int = 1
    N: int = 2
    Tb: int = 6
    Sb: int = 40
    per_sequence: bool = False
    per_head: bool = False
    max_blocks: int | None = None
    sixteenths: bool = True
    thresholds: tuple[float, ...] = (0.5, 0.9, 1.0, 0.0)

    def __str__(self) -> str:
        names = [f"B{self.B}N{self.N}-{self.Tb}x{self.Sb}-max{self.max_blocks}"]
        names += ["per_sequence"] * self.per_sequence + ["per_head"] * self.per_head
        names += ["ties"] * self.sixteenths
        return "-".join(names)


def operands(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scores, thresholds, forced and visible blocks; some rows see nothing.

    Sixteenths add up without rounding, so that equality with the rule is exact, ties and all.
    """
    rng = np.random.default_rng(0)
    shape = (case.B, case.N, case.Tb, case.Sb)
    if case.sixteenths:
        scores = rng.integers(0, 40, size=shape) / 16
    else:
        scores = np.exp(3 * rng.normal(size=shape))
    of_states = (case.B if case.per_sequence else 1, case.N if case.per_head else 1, *shape[2:])
    visible = (rng.random(of_states) < 0.8) & (np.arange(case.Tb) != 1)[:, None]
    threshold = np.resize(case.thresholds, case.N)
    return (
        scores.astype(np.float32),
        threshold.astype(np.float32),
        rng.random(of_states) < 0.15,
        visible,
    )


def call(run, case: Case) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The lists of an implementation of the op."""
    return run(*(jnp.asarray(x) for x in operands(case)), max_blocks=case.max_blocks)


def assert_right(case: Case, indices: jax.Array, counts: jax.Array, dropped: jax.Array) -> None:
    """The lists are those of the rule, or right by the rule where sums may be rounded."""
    scores, threshold, forced, visible = operands(case)
    selected = oracle.select_blocks(scores, threshold, forced, visible)
    width = case.Sb if case.max_blocks is None else min(case.max_blocks, case.Sb)
    lists, sizes = np.asarray(indices), np.asarray(counts)
    assert lists.shape == (*sizes.shape, width)
    keep = np.zeros(scores.shape, bool)
    for row in np.ndindex(sizes.shape):
        listed = lists[row][: sizes[row]]
        assert (np.diff(listed) > 0).all()
        assert (lists[row][sizes[row] :] == (listed[0] if listed.size else 0)).all()
        keep[row][listed] = True
    if not case.sixteenths:
        faults = oracle.rows_at_fault(keep, scores, threshold, forced, visible)
        assert not faults, faults
        return
    forced = np.broadcast_to(forced, scores.shape)
    for row in np.ndindex(sizes.shape):
        candidates = np.flatnonzero(selected[row])
        key = np.lexsort((candidates, -scores[row][candidates], ~forced[row][candidates]))
        assert set(np.flatnonzero(keep[row])) == set(candidates[key][:width]), row
    expected = np.maximum(selected.sum(axis=-1) - width, 0).sum(axis=-1)
    np.testing.assert_array_equal(dropped, expected)
