"""The Hopper kernel on a Hopper GPU, over all its options."""

import pytest

from sparseattn_jax.kernels.select_blocks import mosaic_sm90
from tests.kernels.select_blocks.cases import Case, assert_right, call

pytestmark = pytest.mark.gpu

CASES = [
    Case(N=4, Tb=40),
    Case(B=2, N=4, Tb=41, Sb=70, per_sequence=True, per_head=True, max_blocks=7),
    Case(N=4, max_blocks=3, per_head=True),
    Case(Sb=128, Tb=4, max_blocks=128, thresholds=(1.0, 0.99)),
    Case(B=2, Sb=1, Tb=1, per_sequence=True),
    Case(Sb=1030, Tb=3, max_blocks=40),
    Case(Sb=8192, Tb=3, max_blocks=1000),
    Case(N=32, Sb=1024, Tb=20, sixteenths=False),
    Case(N=8, Sb=5000, Tb=20, sixteenths=False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists(case: Case):
    assert_right(case, *call(mosaic_sm90.run, case))
