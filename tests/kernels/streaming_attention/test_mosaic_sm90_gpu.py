"""The Hopper kernels on a Hopper GPU, over all their options."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels.streaming_attention import streaming_attention
from tests.kernels.block_sparse_attention.cases import Case, assert_right
from tests.kernels.block_sparse_attention.vjp_cases import assert_gradients_right, vjp_operands

pytestmark = pytest.mark.gpu

SHAPES = itertools.product((64, 128, 256), ("bfloat16", "float16"))

# Every block is listed for the reference, whose windows alone say what is seen. Where it is
# `shared` the heads have equal sizes.
OPTIONS = [
    Case(N=4, K=1, T=1024, S=1024, shared=True, windows=((128,) * 4, (256,) * 4)),
    Case(N=2, K=2, B=2, T=777, S=1000, shared=True, windows=((0, 0), (1, 1))),
    Case(N=4, K=2, T=515, S=515, windows=((0, 1, 130, 515), (515, 1, 100, 3))),
    Case(N=3, K=1, B=3, T=300, S=300, lengths=(300, 1, 0), windows=((4, 0, 7), (64, 0, 65))),
    Case(N=6, K=2, T=333, S=1111, lengths=(1000,), windows=((64,) * 6, (0, 1, 63, 64, 65, 200))),
    # A row's rounding of delta is in all its gradients: one row would compare two random numbers.
    Case(N=2, K=1, B=16, T=1, S=130, windows=((2, 0), (1, 40))),
]
CASES = [
    dataclasses.replace(options, H=head_dim, dtype=dtype, density=1.0)
    for head_dim, dtype in SHAPES
    for options in OPTIONS
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case: Case):
    given = vjp_operands(case)
    assert case.windows is not None
    sinks, recents = case.windows

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = not case.shared
        return streaming_attention(
            *(q, k, v),
            sink_size=max(sinks),
            recent_size=max(recents),
            sink_sizes=jnp.array(sinks, jnp.int32) if own else None,
            recent_sizes=jnp.array(recents, jnp.int32) if own else None,
            kv_lengths=None if case.lengths is None else jnp.array(case.lengths, jnp.int32),
            backend="mosaic_sm90",
        )

    forward = given.forward
    on_gpu = jax.device_put(
        ((forward.q, forward.k, forward.v), (given.d_out, given.d_lse)), jax.devices()[0]
    )
    (out, lse), vjp = jax.vjp(jax.jit(attend), *on_gpu[0])
    assert_right(case, forward, *jax.device_get((out, lse)))
    assert_gradients_right(case, given, jax.device_get(vjp(on_gpu[1])))
