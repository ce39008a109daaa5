"""The Hopper kernel, interpreted on the CPU with race detection, over its options."""

import dataclasses
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparseattn_jax.kernels.decode_attention import mosaic_sm90, tiling
from sparseattn_jax.kernels.mosaic import Ring
from tests.kernels.decode_attention.cases import Case, Operands, assert_right, call, operands
from tests.kernels.faulty_rings import (
    FilledWithoutWait,
    FreedWhileRead,
    ReadWithoutWait,
    plant,
)
from tests.kernels.mosaic_interpret import FAULTS_SAID, interpret, is_fault_seen

CASES = [
    Case(N=2, K=2, S=264, lengths=(263,)),
    Case(N=2, K=1, S=200, lengths=(130, 0), block_kv=128),
    Case(dtype="float16", H=64, N=2, K=2, S=136, T=2, lengths=(130,), block_kv=64, shared=True),
    Case(H=256, N=3, K=1, S=136, lengths=(400,), ring=72),
    Case(H=64, N=2, K=1, S=136, lengths=(0, 130, 0, 0, 70, 0), rows=(9, 4, 0, 5, 2, 9)),
]
FURTHER_CASES = [
    Case(H=64, N=2, K=1, S=200, lengths=(400,), ring=72, block_kv=128, density=0.7),
    Case(dtype="float16", H=256, N=2, K=2, S=200, T=3, lengths=(197, 1), block_kv=64, density=0.8),
    Case(N=6, K=2, S=192, T=2, lengths=(192, 70, 0, 1)),
    Case(dtype="float16", N=8, K=1, S=136, T=2, lengths=(90, 300), ring=128),
    Case(H=64, N=4, K=4, S=512, lengths=(512, 100), block_kv=64, density=0.3),
    Case(N=3, K=1, S=200, lengths=(130, 0, 200), rows=(3, 1, 0), block_kv=64, density=0.6),
    Case(dtype="float16", N=4, K=2, S=136, T=2, lengths=(300, 0, 20), rows=(2, 0, 2), ring=128),
]
FULL_CASES = [pytest.param(case, marks=pytest.mark.full) for case in FURTHER_CASES]


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two multiprocessors, and merges and sums of several rounds."""
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 2)
    monkeypatch.setattr(mosaic_sm90, "_MERGED_AT_ONCE", 2)
    monkeypatch.setattr(mosaic_sm90, "_SUMMED_AT_ONCE", 2)


def interpret_kernels(case: Case, given: Operands) -> tuple[tuple[jax.Array, jax.Array], bool]:
    """The kernel's results, and whether it or the merge raced; each is interpreted by itself.

    The interpreter remembers the races of the last kernel only.
    """
    merge, merged = mosaic_sm90._merge, []

    def postpone(decode: Any, *operands: Any) -> tuple[jax.Array, jax.Array]:
        merged.append((decode, *operands))
        return given.q, jnp.zeros(given.q.shape[:3])

    with mock.patch.object(mosaic_sm90, "_merge", postpone):
        _, attention_raced = interpret(call, mosaic_sm90.run, case, given)
    (out, lse), merge_raced = interpret(merge, *merged[0])
    return (out[..., : case.H], lse), attention_raced or merge_raced


@pytest.mark.parametrize("case", CASES + FULL_CASES, ids=str)
def test_values_and_races(case: Case):
    given = operands(case)
    (out, lse), raced = interpret_kernels(case, given)
    assert_right(case, given, out, lse)
    assert not raced


@pytest.mark.parametrize("multiprocessors", [1, pytest.param(3, marks=pytest.mark.full)])
def test_the_number_of_shares_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, multiprocessors: int
):
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: multiprocessors)
    case = Case(N=2, K=2, H=64, S=256, lengths=(250,), block_kv=64, density=0.8)
    given = operands(case)
    (out, lse), raced = interpret_kernels(case, given)
    assert_right(case, given, out, lse)
    assert not raced


def test_an_unlisted_block_is_never_used():
    case = Case(N=1, K=1, H=64, S=192, lengths=(192, 192), block_kv=64)
    blocks = jnp.array([[[False, True, False]], [[False, False, False]]])
    given = dataclasses.replace(operands(case), blocks=blocks)
    given = dataclasses.replace(
        given, k=given.k.at[:, :64].set(jnp.nan), v=given.v.at[:, 128:].set(jnp.nan)
    )
    (out, lse), _ = interpret_kernels(case, given)
    assert np.isfinite(np.asarray(out, np.float32)).all()
    assert np.isfinite(lse[0]).all()
    assert np.isneginf(lse[1]).all()


def test_of_an_empty_row_nothing_is_read():
    """Neither a key nor a value of a row that is another's, nor the row itself."""
    case = Case(N=2, K=1, H=64, S=72, lengths=(0, 70, 0), rows=(1, 2, 1))
    given = operands(case)
    poisoned = dataclasses.replace(
        given,
        k=given.k.at[jnp.array([0, 1, 3])].set(jnp.nan),
        v=given.v.at[jnp.array([0, 1, 3])].set(jnp.nan),
        rows=jnp.array([2**30, 2, -1], jnp.int32),
    )
    (out, lse), raced = interpret_kernels(case, poisoned)
    assert_right(case, given, out, lse)
    assert not raced


@pytest.mark.full
def test_batching_by_vmap():
    case = Case(N=2, K=1, H=64, S=136, lengths=(130, 64))
    given = operands(case)

    def one_sequence(given: Operands) -> tuple[jax.Array, jax.Array]:
        one = dataclasses.replace(case, lengths=(0,))
        batch_of_one = jax.tree.map(lambda x: x[None], given)
        return jax.tree.map(lambda x: x[0], call(mosaic_sm90.run, one, batch_of_one))

    (out, lse), raced = interpret(jax.vmap(one_sequence), given)
    assert_right(case, given, out, lse)
    assert not raced


# One worker with three steps per row: every slot of the shallow ring is used again.
FAULT_CASE = Case(N=1, K=1, H=256, S=192, lengths=(192,), ring=192)
SHALLOW = tiling.TileConfig(workers=1, kv_tile=64, stages=2)


# Copies that nobody waited for are told of too.
ALL_FAULTS_SAID = (*FAULTS_SAID, "before kernel finished")


@pytest.fixture
def shallow_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 1)
    monkeypatch.setattr(tiling, "tile_config", lambda *_: SHALLOW)
    monkeypatch.setattr(tiling.TileConfig, "position_stages", 1)


def is_seen() -> bool:
    """Whether threads raced, missed the completion of a barrier, or the results are wrong."""
    given = operands(FAULT_CASE)

    def check() -> bool:
        (out, lse), raced = interpret_kernels(FAULT_CASE, given)
        assert_right(FAULT_CASE, given, out, lse)
        return raced

    return is_fault_seen(check, ALL_FAULTS_SAID)


@pytest.mark.usefixtures("shallow_ring")
def test_without_a_fault_nothing_is_seen():
    assert not is_seen()


@pytest.mark.usefixtures("shallow_ring")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("kv", FreedWhileRead),
        ("kv", ReadWithoutWait),
        ("kv", FilledWithoutWait),
        ("positions", FreedWhileRead),
        pytest.param("positions", ReadWithoutWait, marks=pytest.mark.full),
        pytest.param("positions", FilledWithoutWait, marks=pytest.mark.full),
    ],
)
def test_a_faulty_ring_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, fault: type[Ring]):
    plant(monkeypatch, name, fault)
    assert is_seen()


@pytest.mark.usefixtures("shallow_ring")
@pytest.mark.parametrize(
    "name", ["commit_smem", pytest.param("wait_smem_to_gmem", marks=pytest.mark.full)]
)
def test_a_missing_fence_is_seen(monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(plgpu, name, lambda *_, **__: None)
    assert is_seen()
