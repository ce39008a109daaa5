"""The Hopper kernels, interpreted on the CPU with race detection, and what they refuse."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import streaming_attention as op
from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90 as block_sparse
from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90_vjp as block_sparse_vjp
from sparseattn_jax.kernels.streaming_attention import mosaic_sm90, tiling
from tests.kernels.block_sparse_attention.cases import Case, assert_right, operands
from tests.kernels.block_sparse_attention.vjp_cases import (
    assert_gradients_right,
    by_oracle,
    vjp_operands,
)
from tests.kernels.mosaic_interpret import interpret


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that some workers have several tiles."""
    for module in (block_sparse, block_sparse_vjp):
        monkeypatch.setattr(module, "multiprocessors", lambda *_: 2)


# Every block is listed for the reference, whose windows alone say what is seen.
SAME_SIZES = Case(H=64, N=2, T=130, S=300, density=1.0, shared=True, windows=((20, 20), (100, 100)))
OWN_SIZES = Case(
    dtype="float16",
    H=64,
    N=4,
    K=2,
    B=2,
    T=131,
    S=131,
    density=1.0,
    lengths=(131, 70),
    windows=((0, 131, 3, 1), (1, 5, 60, 0)),
)


def run(implementation: Any, case: Case, q, k, v, kv_lengths, *rest: jax.Array) -> Any:
    """An implementation, with sizes of each head where they are not the same."""
    assert case.windows is not None
    sinks, recents = (jnp.asarray(sizes, jnp.int32) for sizes in case.windows)
    sizes = (None, None) if case.shared else (sinks, recents)
    return implementation(
        *(q, k, v, *sizes, kv_lengths, *rest),
        sink_size=max(case.windows[0]),
        recent_size=max(case.windows[1]),
        scale=case.scale,
    )


@pytest.mark.parametrize(
    "case", [SAME_SIZES, pytest.param(OWN_SIZES, marks=pytest.mark.full)], ids=str
)
def test_values_and_races(case: Case):
    given = operands(case)
    arrays = (given.q, given.k, given.v, given.kv_lengths)
    (out, lse), raced = interpret(run, mosaic_sm90.run, case, *arrays)
    assert_right(case, given, out, lse)
    assert not raced


@pytest.mark.parametrize(
    "case", [pytest.param(SAME_SIZES, marks=pytest.mark.full), OWN_SIZES], ids=str
)
def test_gradients_and_races(case: Case):
    given = vjp_operands(case)
    forward = given.forward
    arrays = (forward.q, forward.k, forward.v, forward.kv_lengths)
    rest = (given.out, given.lse, given.d_out, given.d_lse)
    found, raced = interpret(run, mosaic_sm90.run_vjp, case, *arrays, *rest)
    assert_gradients_right(case, given, found, by_oracle(case, given))
    assert not raced


@pytest.mark.full
def test_batching_by_vmap():
    given = operands(OWN_SIZES)

    def one_sequence(q: jax.Array, k: jax.Array, v: jax.Array, kv_length: jax.Array) -> Any:
        batch_of_one = (x[None] for x in (q, k, v, kv_length))
        return jax.tree.map(lambda x: x[0], run(mosaic_sm90.run, OWN_SIZES, *batch_of_one))

    arrays = (given.q, given.k, given.v, given.kv_lengths)
    (out, lse), raced = interpret(jax.vmap(one_sequence), *arrays)
    assert_right(OWN_SIZES, given, out, lse)
    assert not raced


def test_a_list_without_its_oldest_block_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = tiling.covering_lists

    def faulty(windows: jax.Array, **lengths: int) -> tuple[jax.Array, jax.Array]:
        return right(windows.at[1].add(-100), **lengths)

    monkeypatch.setattr(tiling, "covering_lists", faulty)
    given = operands(SAME_SIZES)
    arrays = (given.q, given.k, given.v, given.kv_lengths)
    (out, lse), _ = interpret(run, mosaic_sm90.run, SAME_SIZES, *arrays)
    with pytest.raises(AssertionError):
        assert_right(SAME_SIZES, given, out, lse)


TAKEN = tiling.CallFacts(
    device=DeviceFacts(platform="gpu", compute_capability=(9, 0), multiprocessors=132),
    dtype=jnp.dtype(jnp.bfloat16),
    head_dim=128,
)
REFUSALS = [
    (
        {"device": DeviceFacts(platform="cpu", compute_capability=None)},
        "needs compute capability 9.x (Hopper), got no NVIDIA GPU",
    ),
    ({"dtype": jnp.dtype(jnp.float32)}, "needs bfloat16 or float16, got float32"),
    ({"head_dim": 80}, "needs head_dim 64, 128 or 256, got 80"),
]


def test_what_is_taken():
    assert mosaic_sm90.refusal(TAKEN) is None


@pytest.mark.parametrize(("changed", "sentence"), REFUSALS, ids=lambda x: str(x)[:12])
def test_refusals(changed: dict[str, Any], sentence: str):
    assert mosaic_sm90.refusal(dataclasses.replace(TAKEN, **changed)) == sentence


def test_the_op_raises_the_sentence():
    q = jnp.zeros((1, 8, 1, 32), jnp.bfloat16)  # refused on every device
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs "):
        op.streaming_attention(q, q, q, sink_size=1, recent_size=2, backend="mosaic_sm90")


def test_the_kernels_are_taken_where_they_run():
    for table in (op._FORWARD, op._BACKWARD):
        assert next(iter(table)) == "mosaic_sm90"
