"""The Hopper backward kernel, interpreted on the CPU with race detection."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.block_sparse_attention import mosaic_sm90_vjp, tiling, vjp_plan, xla
from sparseattn_jax.kernels.mosaic import Ring
from tests.kernels.block_sparse_attention.cases import Case
from tests.kernels.block_sparse_attention.test_mosaic_sm90 import (
    CASES,
    FURTHER_CASES,
)
from tests.kernels.block_sparse_attention.vjp_cases import (
    Gradients,
    VjpOperands,
    assert_gradients_right,
    by_oracle,
    dense_gradients,
    gradients,
    vjp_operands,
)
from tests.kernels.faulty_rings import FreedOnArrival, ReadWithoutWait, plant
from tests.kernels.mosaic_interpret import interpret, is_fault_seen


@pytest.fixture(autouse=True)
def two_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that some have several key tiles."""
    monkeypatch.setattr(mosaic_sm90_vjp, "multiprocessors", lambda *_: 2)


# The forward's cases show every pair of values of the options, and every shape of tiles.
FEW = (0, 1, 3, 8)
MARKED = [
    case if i in FEW else pytest.param(case, marks=pytest.mark.full)
    for i, case in enumerate(CASES + FURTHER_CASES)
]


@pytest.mark.parametrize("case", MARKED, ids=str)
def test_gradients_and_races(case: Case):
    given = vjp_operands(case)
    found, raced = interpret(gradients, mosaic_sm90_vjp.run, case, given)
    assert_gradients_right(case, given, found, by_oracle(case, given))
    assert not raced


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_xla_is_right_by_the_same_measure(case: Case):
    given = vjp_operands(case)
    found = gradients(xla.run_vjp, case, given)
    assert_gradients_right(case, given, found, by_oracle(case, given))


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_dense_gradients_are_those_of_the_oracle(case: Case):
    given = vjp_operands(case)
    for one, other in zip(dense_gradients(case, given, False), by_oracle(case, given), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_batching_by_vmap():
    case = Case(H=64, block_q=64, block_kv=64, T=64, S=128, B=2, lengths=(128, 70))
    given = vjp_operands(case)

    def one_sequence(given: VjpOperands) -> Gradients:
        one = dataclasses.replace(case, B=1)
        batch_of_one = jax.tree.map(lambda x: x[None], given)
        return jax.tree.map(lambda x: x[0], gradients(mosaic_sm90_vjp.run, one, batch_of_one))

    found, raced = interpret(jax.vmap(one_sequence), given)
    assert_gradients_right(case, given, found, by_oracle(case, given))
    assert not raced


def test_an_invisible_listed_block_adds_nothing():
    """Blocks behind the diagonal and past the end may be listed."""
    case = Case(H=64, block_q=64, block_kv=64, T=128, S=192, lengths=(70,))
    given = vjp_operands(case, np.ones(case.blocks_shape, bool))
    found, _ = interpret(gradients, mosaic_sm90_vjp.run, case, given)
    assert_gradients_right(case, given, found, by_oracle(case, given))
    assert not np.asarray(found[1][:, 70:], np.float32).any()


def test_a_long_list_is_cut_into_pieces():
    case = Case(H=64, block_q=64, block_kv=64, T=300, S=300)
    blocks = np.broadcast_to(np.eye(5, dtype=bool), case.blocks_shape).copy()
    blocks[..., 0] = True
    given = vjp_operands(case, blocks)
    found, raced = interpret(gradients, mosaic_sm90_vjp.run, case, given)
    assert_gradients_right(case, given, found, by_oracle(case, given))
    assert not raced


def test_the_plan_is_of_pieces_of_long_lists_then_of_groups_of_heads(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(mosaic, "L2_BYTES", 1)
    call = vjp_plan.Call(
        q_len=640,
        kv_len=192,
        q_heads=2,
        kv_heads=2,
        head_dim=64,
        mask_heads=2,
        block_q=64,
        block_kv=64,
        is_causal=False,
        scale=1.0,
        num_tiles=6,
        max_ctas=1,
        config=tiling.vjp_config(64, 64),
    )
    counts = jnp.asarray([[[1, 3, 2], [2, 10, 3]]])
    order, length, long_tiles = vjp_plan.plan(counts, call)
    pieces = list(range(6, 6 + 8))  # of the first long list, which is tile 4
    assert order[: int(length[0])].tolist() == [*pieces, 1, 2, 0, 5, 3]
    assert long_tiles.tolist() == [4] + [6] * 5


# Planted faults. Every slot is used again; the query heads of a key/value head share their list.
SPLIT_KEYS = Case(H=64, block_q=64, T=128, S=256, is_causal=False, density=1.0, shared=True)
SPLIT_QUERIES = dataclasses.replace(SPLIT_KEYS, block_kv=64, S=128)


def is_seen(case: Case) -> bool:
    """Whether threads raced, missed the completion of a barrier, or the results are wrong."""
    given = vjp_operands(case)

    def check() -> bool:
        found, raced = interpret(gradients, mosaic_sm90_vjp.run, case, given)
        assert_gradients_right(case, given, found)
        return raced

    return is_fault_seen(check)


@pytest.fixture
def one_multiprocessor(monkeypatch: pytest.MonkeyPatch, two_multiprocessors: None) -> None:
    monkeypatch.setattr(mosaic_sm90_vjp, "multiprocessors", lambda *_: 1)


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("case", [SPLIT_KEYS, SPLIT_QUERIES], ids=["keys", "queries"])
def test_without_a_fault_nothing_is_seen(case: Case):
    assert not is_seen(case)


FAULTS = [
    *(("kv", FreedOnArrival), ("q", FreedOnArrival), ("d_out", FreedOnArrival)),
    *(pytest.param(x, ReadWithoutWait, marks=pytest.mark.full) for x in ("kv", "q", "d_out")),
]


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize(("ring", "fault"), FAULTS)
def test_a_faulty_ring_is_seen(monkeypatch: pytest.MonkeyPatch, ring: str, fault: type[Ring]):
    plant(monkeypatch, ring, fault)
    assert is_seen(SPLIT_QUERIES)


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(SPLIT_KEYS, id="keys"),
        pytest.param(SPLIT_QUERIES, id="queries", marks=pytest.mark.full),
    ],
)
def test_warpgroups_that_do_not_meet_are_seen(monkeypatch: pytest.MonkeyPatch, case: Case):
    monkeypatch.setattr(mosaic_sm90_vjp._Exchange, "meet", lambda self: None)
    assert is_seen(case)


@pytest.mark.usefixtures("one_multiprocessor")
def test_a_missing_query_head_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic_sm90_vjp._Cta, "_heads_per_list", 1)
    assert is_seen(SPLIT_QUERIES)


@pytest.mark.usefixtures("one_multiprocessor")
def test_an_ignored_gradient_of_the_log_sum_exp_is_seen(monkeypatch: pytest.MonkeyPatch):
    original = vjp_plan.row_statistics

    def ignoring(out, lse, d_out, d_lse, call):
        return original(out, lse, d_out, jnp.zeros_like(d_lse), call)

    monkeypatch.setattr(vjp_plan, "row_statistics", ignoring)
    assert is_seen(SPLIT_QUERIES)
