"""Windows in the Hopper kernels, interpreted on the CPU with race detection; heads of all kinds."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90, mosaic_sm90_vjp
from sparseattn_jax.kernels.block_sparse_attention.mosaic_sm90 import Window
from sparseattn_jax.kernels.streaming_attention import mosaic_sm90 as streaming
from sparseattn_jax.kernels.streaming_attention import tiling as streaming_tiling
from tests.kernels.block_sparse_attention.cases import (
    Case,
    assert_right,
    call,
    operands,
    window_array,
)
from tests.kernels.block_sparse_attention.vjp_cases import (
    VjpOperands,
    assert_gradients_right,
    by_oracle,
    gradients,
    vjp_operands,
)
from tests.kernels.mosaic_interpret import interpret


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that some workers have several tiles."""
    for module in (mosaic_sm90, mosaic_sm90_vjp):
        monkeypatch.setattr(module, "multiprocessors", lambda *_: 2)


# The second of three tiles is cut by the end of the sinks and by the left edge.
CUT = Case(H=64, block_q=64, block_kv=64, N=1, T=64, S=192, density=1.0, windows=((70,), (40,)))

# Sinks and windows of nothing, of one token, within a tile, at its edges, over several tiles and
# over all keys.
CASES = [
    CUT,
    Case(
        H=64,
        N=4,
        K=2,
        T=77,
        S=201,
        density=0.8,
        lengths=(150,),
        windows=((0, 3, 130, 70), (1, 20, 0, 201)),
    ),
]
FURTHER_CASES = [
    Case(
        dtype="float16",
        H=64,
        block_q=64,
        block_kv=64,
        N=3,
        T=131,
        S=259,
        density=1.0,
        windows=((5, 64, 0), (40, 65, 129)),
    ),
    Case(N=2, K=2, T=130, S=200, density=1.0, windows=((10, 128), (31, 64))),
    Case(dtype="float16", H=256, N=2, T=200, S=200, density=1.0, windows=((64, 0), (1, 100))),
    Case(block_q=64, N=2, T=100, S=190, shared=True, density=1.0, windows=((1, 190), (128, 1))),
    Case(block_kv=64, N=2, T=150, S=150, density=0.7, windows=((65, 0), (63, 150))),
    Case(H=256, block_q=64, block_kv=64, N=3, B=2, T=90, S=100, windows=((1, 9, 0), (9, 1, 2))),
]
MARKED = [*CASES, *(pytest.param(case, marks=pytest.mark.full) for case in FURTHER_CASES)]


@pytest.mark.parametrize("case", MARKED, ids=str)
def test_values_and_races(case: Case):
    given = operands(case)
    (out, lse), raced = interpret(call, mosaic_sm90.run, case, given)
    assert_right(case, given, out, lse)
    assert not raced


@pytest.mark.parametrize("case", [pytest.param(CUT, marks=pytest.mark.full), *MARKED[1:]], ids=str)
def test_gradients_and_races(case: Case):
    given = vjp_operands(case)
    found, raced = interpret(gradients, mosaic_sm90_vjp.run, case, given)
    assert_gradients_right(case, given, found, by_oracle(case, given))
    assert not raced


# Heads of all kinds: one lists every block, one some, and one those of its window.
MIXED = Case(H=64, N=3, K=3, T=40, S=400, windows=((0, 0, 5), (400, 400, 90)))


def mixed_blocks() -> np.ndarray:
    blocks = np.ones(MIXED.blocks_shape, bool)
    blocks[:, 1] = [[False, True, False, True]]
    lists = streaming_tiling.covering_lists(
        window_array(MIXED), width=4, q_len=MIXED.T, kv_len=MIXED.S
    )
    blocks[:, 2] = block_lists.to_dense(*lists, 4)[2]
    assert not blocks[:, 2].all()
    return blocks


def of_head(head: int, arrays: Any) -> Any:
    """That head of arrays [B, length, heads, ...]."""
    return jax.tree.map(lambda x: x[:, :, head : head + 1], arrays)


def head_alone(head: int, given: VjpOperands) -> tuple[Case, VjpOperands]:
    """One head without a window."""
    forward = given.forward
    q, k, v = of_head(head, (forward.q, forward.k, forward.v))
    blocks = forward.blocks[:, head : head + 1]
    forward = dataclasses.replace(forward, q=q, k=k, v=v, blocks=blocks)
    rows = of_head(head, (given.out, given.lse, given.d_out, given.d_lse))
    return dataclasses.replace(MIXED, N=1, K=1, windows=None), VjpOperands(forward, *rows)


STREAMING = {"sink_size": 5, "recent_size": 90, "scale": MIXED.scale}


def test_heads_of_all_kinds_are_what_each_is_alone():
    given = vjp_operands(MIXED, mixed_blocks())
    found, _ = interpret(call, mosaic_sm90.run, MIXED, given.forward)
    for head in range(3):
        case, alone = head_alone(head, given)
        forward = alone.forward

        def as_streaming(*qkv: jax.Array) -> tuple[jax.Array, jax.Array]:
            return streaming.run(*qkv, None, None, None, **STREAMING)

        if head < 2:
            expected, _ = interpret(call, mosaic_sm90.run, case, forward)
        else:
            expected, _ = interpret(as_streaming, forward.q, forward.k, forward.v)
        for one, other in zip(of_head(head, found), expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.full
def test_gradients_of_heads_of_all_kinds_are_what_each_has_alone():
    given = vjp_operands(MIXED, mixed_blocks())
    found, _ = interpret(gradients, mosaic_sm90_vjp.run, MIXED, given)
    for head in range(3):
        case, alone = head_alone(head, given)
        forward = alone.forward
        rest = (alone.out, alone.lse, alone.d_out, alone.d_lse)

        def as_streaming(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            return streaming.run_vjp(*arrays[:3], None, None, None, *arrays[3:], **STREAMING)

        if head < 2:
            expected, _ = interpret(gradients, mosaic_sm90_vjp.run, case, alone)
        else:
            expected, _ = interpret(as_streaming, forward.q, forward.k, forward.v, *rest)
        d_q, *d_kv = (np.asarray(x, np.float32) for x in of_head(head, found))
        # Tiles of dq are added in the order of their arrival.
        np.testing.assert_allclose(d_q, np.asarray(expected[0], np.float32), atol=1e-2)
        for one, other in zip(d_kv, expected[1:], strict=True):
            np.testing.assert_array_equal(one, np.asarray(other, np.float32))


def forward_is_right() -> bool:
    """Without a fault `CUT` is, as above."""
    given = operands(CUT)
    (out, lse), _ = interpret(call, mosaic_sm90.run, CUT, given)
    try:
        assert_right(CUT, given, out, lse)
    except AssertionError:
        return False
    return True


def backward_is_right() -> bool:
    given = vjp_operands(CUT)
    found, _ = interpret(gradients, mosaic_sm90_vjp.run, CUT, given)
    try:
        assert_gradients_right(CUT, given, found)
    except AssertionError:
        return False
    return True


FAULTS = {
    "left edge too far": lambda sink, recent: (sink, recent + 1),
    "left edge too near": lambda sink, recent: (sink, recent - 1),
    "a sink too many": lambda sink, recent: (sink + 1, recent),
    "a sink too few": lambda sink, recent: (sink - 1, recent),
    "sinks ignored": lambda sink, recent: (jnp.zeros_like(sink), recent),
}


def plant(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def faulty(cls: type[Window], windows_gmem: Any, head: jax.Array) -> Window:
        return cls(*FAULTS[fault](windows_gmem[0, head], windows_gmem[1, head]))

    monkeypatch.setattr(Window, "of", classmethod(faulty))


FEW = ("left edge too far", "sinks ignored")
MARKED_FAULTS = [
    fault if fault in FEW else pytest.param(fault, marks=pytest.mark.full) for fault in FAULTS
]


@pytest.mark.parametrize("fault", MARKED_FAULTS)
def test_a_wrong_window_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str):
    plant(monkeypatch, fault)
    assert not forward_is_right()


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_window_of_gradients_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str):
    plant(monkeypatch, fault)
    assert not backward_is_right()


def test_a_cut_tile_that_is_not_masked_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic_sm90._Rows, "_is_cut", lambda *_: jnp.bool_(False))
    assert not forward_is_right()


@pytest.mark.full
def test_gradients_of_a_cut_tile_that_is_not_masked_are_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic_sm90_vjp._Steps, "_is_cut", lambda *_: jnp.bool_(False))
    assert not backward_is_right()
