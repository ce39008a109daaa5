"""The Hopper kernels on a Hopper GPU, over all their options."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels.vertical_slash_scores import mosaic_sm90, xla
from tests.kernels.vertical_slash_scores.cases import (
    Case,
    assert_right,
    call,
    expected,
    operands,
)

pytestmark = pytest.mark.gpu

OPTIONS = [
    Case(N=4, K=1, T=1024, S=1024),
    Case(N=3, K=1, B=2, T=1000, S=1000, lengths=(1000, 777)),
    Case(N=6, K=3, T=333, S=1111),
    Case(N=2, K=2, B=4, T=400, S=701, lengths=(701, 500, 302, 301)),
]
CASES = [
    dataclasses.replace(options, dtype=dtype, H=head_dim, num_queries=num_queries)
    for dtype, head_dim, num_queries in itertools.product(
        ("bfloat16", "float16"), (64, 128, 256), (64, 128)
    )
    for options in OPTIONS
]
EDGES = [
    Case(N=1, T=1, S=1),
    Case(N=1, T=1, S=130),
    Case(N=2, B=2, T=10, S=10, lengths=(10, 0)),
    *(Case(N=2, T=length, S=length) for length in (64, 127, 128, 129, 191, 192, 193)),
]


@pytest.mark.parametrize("case", CASES + EDGES, ids=str)
def test_values(case: Case):
    scores = jax.jit(functools.partial(call, mosaic_sm90.run, case))(*operands(case))
    assert_right(scores, expected(case))


LONG = Case(N=32, K=8, H=128, T=1000, S=32700)


@pytest.mark.parametrize("num_queries", [64, 128])
def test_a_long_call_is_as_xla_has_it_and_repeats_to_the_bit(num_queries: int):
    case = dataclasses.replace(LONG, num_queries=num_queries)
    given = operands(case)
    run = jax.jit(functools.partial(call, mosaic_sm90.run, case))
    scores = run(*given)
    wide = [x.astype(jnp.float32) for x in given[:2]]
    assert_right(scores, jax.device_get(call(xla.run, case, *wide, None)))
    for x, y in zip(scores, run(*given), strict=True):
        np.testing.assert_array_equal(x, y)
