"""The Hopper kernels, interpreted on the CPU with race detection; and planted faults."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.backends import DeviceFacts, UnsupportedError
from sparseattn_jax.kernels.mosaic import SHARED_MEMORY_BYTES, Ring
from sparseattn_jax.kernels.vertical_slash_scores import (
    mosaic_sm90,
    tiling,
    vertical_slash_scores,
)
from sparseattn_jax.kernels.vertical_slash_scores.tiling import Call, CallFacts, TileConfig
from tests.kernels.faulty_rings import (
    FilledWithoutWait,
    FreedOnArrival,
    FreedWhileRead,
    ReadWithoutWait,
    plant,
)
from tests.kernels.mosaic_interpret import FAULTS_SAID, interpret, is_fault_seen
from tests.kernels.vertical_slash_scores.cases import (
    Case,
    assert_right,
    call,
    expected,
    operands,
)

CASES = [
    # All its queries, a whole tile less of keys, fewer queries than are asked for, and none.
    Case(B=4, T=300, S=333, lengths=(333, 250, 60, 20)),
    Case(dtype="float16", H=128, num_queries=128, N=3, T=100, S=500),
]
FULL_CASES = [
    Case(N=4, K=2, B=2, T=700, S=700, num_queries=128, lengths=(700, 100)),
    Case(H=256, N=2, T=200, S=200),
    Case(N=1, T=1, S=1),
    Case(N=1, T=64, S=513),
    Case(N=6, K=2, B=2, T=257, S=1100, lengths=(1100, 901)),
    *(Case(N=1, T=length, S=length) for length in (127, 128, 129, 191, 192, 193)),
]


@pytest.fixture(autouse=True)
def quick_to_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few multiprocessors that ranges have several tiles; fewer loads and stores in a loop."""
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 4)
    monkeypatch.setattr(mosaic_sm90, "_STORED", 64)
    monkeypatch.setattr(mosaic_sm90, "_ROWS_AT_ONCE", 4)


@functools.cache
def sums_of(case: Case):
    return expected(case)


def check(case: Case) -> None:
    scores, raced = interpret(
        lambda *x: call(mosaic_sm90.run.__wrapped__, case, *x), *operands(case)
    )
    assert_right(scores, sums_of(case))
    assert not raced


@pytest.mark.parametrize(
    "case", CASES + [pytest.param(case, marks=pytest.mark.full) for case in FULL_CASES], ids=str
)
def test_values_and_races(case: Case):
    check(case)


SMALL = Case(N=1, S=300)  # three tiles of keys


def test_loads_and_stores_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.undo()
    check(Case(N=1, S=130))


@pytest.mark.full
@pytest.mark.parametrize("multiprocessors", [1, 2, 16])
def test_other_ranges(monkeypatch: pytest.MonkeyPatch, multiprocessors: int):
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: multiprocessors)
    check(Case(N=1, S=1500))


@pytest.mark.full
def test_padding_may_hold_anything():
    case = Case(N=2, B=2, T=300, S=300, lengths=(300, 190))
    q, k, lengths = operands(case)
    q, k = q.at[1, 190:].set(jnp.nan), k.at[1, 190:].set(jnp.nan)
    run = functools.partial(call, mosaic_sm90.run.__wrapped__, case)
    scores, raced = interpret(run, q, k, lengths)
    assert_right(scores, sums_of(case))
    assert not raced


# A missed completion of a barrier, in one more wording.
WORDS_OF_THE_INTERPRETER = (*FAULTS_SAID, "must do so in all phases")


def is_seen(case: Case) -> bool:
    """Whether threads raced, missed the completion of a barrier, or the results are wrong."""
    return is_fault_seen(lambda: check(case), WORDS_OF_THE_INTERPRETER)


@pytest.mark.parametrize(
    "fault",
    [
        FreedOnArrival,
        pytest.param(Ring, marks=pytest.mark.full, id="none"),
        pytest.param(FilledWithoutWait, marks=pytest.mark.full),
        pytest.param(FreedWhileRead, marks=pytest.mark.full),
        pytest.param(ReadWithoutWait, marks=pytest.mark.full),
    ],
)
def test_a_faulty_ring_is_seen(monkeypatch: pytest.MonkeyPatch, fault: type[Ring]):
    monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 1)
    monkeypatch.setattr(tiling, "tile_config", lambda *_: TileConfig(workers=1, stages=2))
    plant(monkeypatch, "k", fault)
    assert is_seen(SMALL) == (fault is not Ring)


def diagonals_shifted(right: Any) -> Any:
    return lambda smem, row, first: right(smem, row, first if isinstance(first, int) else row)


def tail_dropped(right: Any) -> Any:
    return lambda smem, first, x: right(smem, first, 0.0 * x if first == 0 else x)


FAULTS = {
    "none": (mosaic_sm90, "_load", lambda right: right),
    "diagonals-shifted": (mosaic_sm90, "_load", diagonals_shifted),
    "tile-before-a-range-dropped": (mosaic_sm90, "_HALO", lambda _: 0),
    "tail-of-a-tile-dropped": (mosaic_sm90, "_store", tail_dropped),
    "mask-shifted": (
        mosaic,
        "columns_before",
        lambda right: lambda shape, end: right(shape, end + 1),
    ),
    "lengths-ignored": (
        mosaic_sm90,
        "last_queries",
        lambda right: lambda q, _, **sizes: right(q, None, **sizes),
    ),
}
BY_DEFAULT = ("diagonals-shifted", "tile-before-a-range-dropped")


@pytest.mark.parametrize(
    "fault",
    [
        fault if fault in BY_DEFAULT else pytest.param(fault, marks=pytest.mark.full)
        for fault in FAULTS
    ],
)
def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch, fault: str):
    module, name, replace = FAULTS[fault]
    monkeypatch.setattr(module, name, replace(getattr(module, name)))
    if fault == "tail-of-a-tile-dropped":
        # In one range: where each tile has its own, the tile before is the one that counts.
        monkeypatch.setattr(mosaic_sm90, "multiprocessors", lambda *_: 1)
    assert is_seen(dataclasses.replace(SMALL, lengths=(290,))) == (fault != "none")


HOPPER = DeviceFacts(platform="gpu", compute_capability=(9, 0))
FACTS = CallFacts(device=HOPPER, dtype=jnp.dtype(jnp.bfloat16), head_dim=128, num_queries=64)
OLD_PTXAS = dataclasses.replace(HOPPER, ptxas_version=(12, 8, 93))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": DeviceFacts(platform="cpu", compute_capability=None)}, "got no NVIDIA GPU"),
        ({"device": DeviceFacts(platform="gpu", compute_capability=(8, 0))}, "got 8.0"),
        ({"device": OLD_PTXAS}, "ptxas 12.8.93 miscompiles"),
        ({"dtype": jnp.dtype(jnp.float32)}, "needs bfloat16 or float16, got float32"),
        ({"head_dim": 80}, "needs head_dim 64, 128 or 256, got 80"),
        ({"num_queries": 32}, "needs num_queries 64 or 128, got 32"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refusal(change: dict, reason: str):
    assert mosaic_sm90.refusal(FACTS) is None
    assert reason in (mosaic_sm90.refusal(dataclasses.replace(FACTS, **change)) or "")


def test_is_refused_without_a_hopper_gpu():
    q, k, _ = operands(SMALL)
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs compute capability 9"):
        vertical_slash_scores(q, k, num_queries=64, backend="mosaic_sm90")


@pytest.mark.parametrize("settings", [{"workers": 0, "stages": 2}, {"workers": 1, "stages": 0}])
def test_tiles_that_cannot_be(settings: dict):
    with pytest.raises(ValueError, match=r"must be at least 1"):
        TileConfig(**settings)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("row_tiles", [1, 4])
def test_shared_memory_suffices_for_tiles_in_flight(head_dim: int, row_tiles: int):
    config = tiling.tile_config(head_dim, row_tiles)
    assert config.stages >= 2
    assert tiling.shared_memory_bytes(config, head_dim) <= SHARED_MEMORY_BYTES


def reference_call(**change: int) -> Call:
    """A call of the reference shape, but for what changes; with the rule's tiles."""
    sizes = {"batch": 1, "kv_len": 2**17, "kv_heads": 8, "group": 4, "num_queries": 64} | change
    config = tiling.tile_config(128, sizes["group"] * sizes["num_queries"] // 64)
    return Call(**sizes, head_dim=128, multiprocessors=132, config=config)


@pytest.mark.parametrize(
    ("change", "grid"),
    [
        ({}, (8, 8, 2)),
        ({"num_queries": 128}, (8, 4, 4)),
        ({"batch": 2}, (16, 4, 2)),
        ({"kv_len": 1000}, (8, 8, 2)),
        ({"kv_len": 1}, (8, 1, 2)),
        ({"group": 1}, (8, 16, 1)),
    ],
    ids=str,
)
def test_ranges_fill_the_multiprocessors(change: dict, grid: tuple[int, int, int]):
    assert reference_call(**change).grid == grid


@pytest.mark.parametrize("kv_len", [1, 128, 5000, 2**17])
def test_ranges_cover_the_keys(kv_len: int):
    call = reference_call(kv_len=kv_len, batch=3, group=7)
    assert (call.ranges - 1) * call.tiles_per_range < call.tiles
    assert call.ranges * call.tiles_per_range >= call.tiles
