"""The Hopper kernel, interpreted on the CPU with race detection, over all its options in pairs."""

import pytest

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90
from tests.kernels.block_sparse_attention.cases import Case, assert_right, call, operands
from tests.kernels.mosaic_interpret import interpret

CASES = [
    Case(H=64),
    Case(H=128, T=77, S=201, N=4, B=2, lengths=(201, 150)),
    Case(H=64, block_q=64, block_kv=64, is_causal=False, density=1.0, shared=True),
]


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch):
    """So few that each worker has several query tiles."""
    monkeypatch.setattr(mosaic_sm90, "_multiprocessors", lambda *_: 2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_races(case: Case):
    given = operands(case)
    (out, lse), raced = interpret(call, mosaic_sm90.run, case, given)
    assert_right(case, given, out, lse)
    assert not raced
