"""The Hopper kernels, interpreted on the CPU with race detection; and planted faults."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels.antidiagonal_scores import (
    antidiagonal_scores,
    fold_sm90,
    mosaic_sm90,
    tiling,
)
from sparseattn_jax.kernels.antidiagonal_scores.tiling import CallFacts, TileConfig
from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.mosaic import SHARED_MEMORY_BYTES, Ring
from tests.kernels.antidiagonal_scores.cases import Case, assert_right, call, expected, operands
from tests.kernels.faulty_rings import (
    FilledWithoutWait,
    FreedOnArrival,
    FreedWhileRead,
    ReadWithoutWait,
)
from tests.kernels.mosaic_interpret import FAULTS_SAID, interpret, is_fault_seen

CASES = [
    Case(N=4, K=2, B=2, T=600, S=701, lengths=(701, 333)),
    Case(dtype="float16", N=3, stride=8, block_size=128, T=1500, S=1500),
    Case(N=1, stride=16, T=333, S=211, is_causal=False, B=2, lengths=(200, 0)),
    Case(N=6, K=3, T=333, S=1111, q_blocks=(1, 3)),
    Case(H=128, block_size=128, T=1100, S=1300, q_blocks=(3, 9), workspace_bytes=1),
]
FULL_CASES = [
    Case(H=256, N=4, stride=8, T=130, S=130),
    Case(H=128, stride=16, block_size=128, T=2304, S=4500),
    Case(dtype="float16", N=3, T=1030, S=1030, is_causal=False, workspace_bytes=1),
    Case(N=1, T=1, S=1),
    Case(N=6, K=2, B=3, T=257, S=300, lengths=(300, 44, 43)),
]


@pytest.fixture(autouse=True)
def four_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that CTAs have several tiles."""
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 4)


@functools.cache
def sums_of(case: Case):
    return expected(case)


def check(case: Case) -> None:
    scores, raced = interpret(
        lambda *x: call(mosaic_sm90.run.__wrapped__, case, *x), *operands(case)
    )
    assert_right(case, scores, sums_of(case))
    assert not raced


@pytest.mark.parametrize(
    "case", CASES + [pytest.param(case, marks=pytest.mark.full) for case in FULL_CASES], ids=str
)
def test_values_and_races(case: Case):
    check(case)


SMALL = Case(T=300, S=300, H=128)  # eight steps in four stages


@pytest.mark.parametrize(
    "config",
    [
        TileConfig(cluster=1, columns=128, lead=0),
        pytest.param(TileConfig(stages=3, lead=1), marks=pytest.mark.full),
        pytest.param(TileConfig(cluster=1, band=1, lead=3), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_other_tiles(monkeypatch: pytest.MonkeyPatch, config: TileConfig):
    monkeypatch.setattr(tiling, "tile_config", lambda *_: config)
    check(SMALL)


def test_a_loop_over_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mosaic_sm90, "_UNROLLED", 1)
    check(Case(T=700, S=700, workspace_bytes=1))


# A missed completion of a barrier, in one more wording.
WORDS_OF_THE_INTERPRETER = (*FAULTS_SAID, "must do so in all phases")


def is_seen(case: Case) -> bool:
    """Whether threads raced, missed the completion of a barrier, or the results are wrong."""
    return is_fault_seen(lambda: check(case), WORDS_OF_THE_INTERPRETER)


@pytest.mark.parametrize(
    "fault",
    [
        FreedOnArrival,
        FilledWithoutWait,
        pytest.param(FreedWhileRead, marks=pytest.mark.full),
        pytest.param(ReadWithoutWait, marks=pytest.mark.full),
    ],
)
def test_a_faulty_ring_is_seen(monkeypatch: pytest.MonkeyPatch, fault: type[Ring]):
    def ring(config: TileConfig, slots: Any, filled: Any, freed: Any) -> Ring:
        return fault(slots=slots, filled=filled, freed=freed, stages=config.stages)

    monkeypatch.setattr(tiling, "tile_config", lambda *_: TileConfig(cluster=1))
    monkeypatch.setattr(mosaic_sm90, "_ring", ring)
    assert is_seen(SMALL)


def test_reading_tiles_that_were_not_written_is_seen(monkeypatch: pytest.MonkeyPatch):
    # A warpgroup folds 256 rows, of which the first 128 see one column tile less.
    case = Case(T=1024, S=1224)

    def limits(self: fold_sm90._Rows) -> jax.Array:
        return jnp.full_like(right(self), case.S)

    right = fold_sm90._Rows._limits
    monkeypatch.setattr(fold_sm90._Rows, "_limits", limits)
    assert is_seen(case)


def test_a_shifted_mask_is_seen(monkeypatch: pytest.MonkeyPatch):
    def key_limit(self: tiling.Call, row: Any, length: Any) -> Any:
        return right(self, row, length) + self.stride

    right = tiling.Call.key_limit
    monkeypatch.setattr(tiling.Call, "key_limit", key_limit)
    assert is_seen(SMALL)


HOPPER = DeviceFacts(platform="gpu", compute_capability=(9, 0))
FACTS = CallFacts(
    device=HOPPER,
    dtype=jnp.dtype(jnp.bfloat16),
    head_dim=128,
    stride=16,
    block_size=128,
    has_segment_ids=False,
)
OLD_PTXAS = dataclasses.replace(HOPPER, ptxas_version=(12, 8, 93))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": DeviceFacts(platform="cpu", compute_capability=None)}, "got no NVIDIA GPU"),
        ({"device": DeviceFacts(platform="gpu", compute_capability=(8, 0))}, "got 8.0"),
        ({"device": OLD_PTXAS}, "ptxas 12.8.93 miscompiles"),
        ({"dtype": jnp.dtype(jnp.float32)}, "needs bfloat16 or float16, got float32"),
        ({"head_dim": 80}, "needs head_dim 64, 128 or 256, got 80"),
        ({"stride": 32}, "got stride 32 and blocks of 128"),
        ({"block_size": 32}, "got stride 16 and blocks of 32"),
        ({"has_segment_ids": True}, "does not mask segments"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusal(change: dict, reason: str):
    assert mosaic_sm90.refusal(FACTS) is None
    assert reason in (mosaic_sm90.refusal(dataclasses.replace(FACTS, **change)) or "")


def test_is_refused_without_a_hopper_gpu():
    q, k, _ = operands(SMALL)
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs compute capability 9"):
        antidiagonal_scores(q, k, stride=4, block_size=64, is_causal=True, backend="mosaic_sm90")


@pytest.mark.parametrize(
    "settings",
    [{"columns": 64}, {"cluster": 4}, {"lead": 4}, {"stages": 0, "lead": -1}, {"band": 0}],
)
def test_tiles_that_cannot_be(settings: dict):
    with pytest.raises(ValueError, match=r"must be"):
        TileConfig(**settings)


def test_shared_memory_suffices():
    for width in (8, 16, 32, 64):
        taken = tiling.shared_memory_bytes(TileConfig(), width, jnp.dtype(jnp.bfloat16))
        assert taken <= SHARED_MEMORY_BYTES
