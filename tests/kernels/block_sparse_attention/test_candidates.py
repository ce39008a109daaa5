"""The kernel with the tiles that may be chosen, interpreted: it ends, without a race, right."""

import functools

import pytest

from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, tiling
from tests.kernels.block_sparse_attention.cases import Case, assert_right, call, operands
from tests.kernels.mosaic_interpret import interpret

CASES = [
    Case(H=64, block_q=64, block_kv=128, N=3, T=200, S=333),
    Case(H=128, block_q=64, block_kv=64, N=3, T=200, S=333),
    Case(H=128, N=2, T=200, S=700),
    Case(H=256, block_q=64, block_kv=64, N=2, T=100, S=333),
]
CANDIDATES = [
    pytest.param(
        case,
        config,
        id=f"{case}-{index}",
        marks=() if config.workers == 3 and case.block_kv == 128 else pytest.mark.full,
    )
    for case in CASES
    for index, config in enumerate(tiling.candidates(case.H, case.block_q, case.block_kv))
]


@pytest.mark.parametrize(("case", "config"), CANDIDATES)
def test_values_and_races(monkeypatch: pytest.MonkeyPatch, case: Case, config: tiling.TileConfig):
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 2)
    given = operands(case)
    run = functools.partial(mosaic_sm90.run, config=config)
    (out, lse), raced = interpret(call, run, case, given)
    assert_right(case, given, out, lse)
    assert not raced
