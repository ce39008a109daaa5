"""The fastest candidate that is right gets the row, and a run that was cut goes on."""

import dataclasses
import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import Array

from benchmarks import autotune, gate
from benchmarks.tuned_kernels import KERNELS, Problem, TunedKernel
from sparseattn_jax.kernels.decode_attention.tile_table import TABLES
from sparseattn_jax.kernels.tile_tables import Row

ORIGIN = {
    "device": "NVIDIA H100 80GB HBM3",
    "jax": "0.11.2",
    "commit": "a" * 40,
    "date": "2026-11-23",
}
CASES = {"short": (jnp.float32(1.0),), "long": (jnp.float32(4.0),)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A candidate: `ms` is its time for an operand of 1, and a factor of 2 is right."""

    ms: int
    factor: int = 2


def compute(x: Array, *, config: Config) -> tuple[Array, Array]:
    if config.factor == 0:
        raise ValueError("exceeds available shared memory")
    return config.factor * x, config.ms * x


def judge(case: str, operands: tuple[Array], result: tuple[Array, Array]) -> gate.Verdict:
    assert operands == CASES[case]
    error = abs(float(result[0] - 2 * operands[0]))
    if error > 1e3:
        raise RuntimeError("CUDA_ERROR_LAUNCH_FAILED")
    return gate.Verdict(max_error=error, max_error_allowed=0.1)


def kernel(*configs: Config) -> TunedKernel:
    """With two keys: one has these candidates, the other the first of them only."""
    return TunedKernel(
        op="decode_attention",
        parameters=("head_dim", "block_kv"),
        keys=((64, None), (128, 64)),
        candidates=lambda head_dim, _: configs if head_dim == 64 else configs[:1],
        problem=lambda *_: Problem(run=compute, draw=lambda: CASES, judge=judge),
    )


def milliseconds(function: Any, operands: tuple[Array], runs: int) -> list[float]:
    return [float(function(*operands)[1])] * runs


@pytest.fixture
def tuning(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> autotune.Tuning:
    """One that writes beside an empty table, and heats nothing."""
    monkeypatch.setitem(TABLES, "decode_attention", {})
    monkeypatch.setattr(autotune, "heat", lambda queue: queue())
    return autotune.Tuning(model="h100", origin=ORIGIN, out=tmp_path, time=milliseconds)


def tune(tuning: autotune.Tuning, *configs: Config) -> tuple[list[str], int]:
    """The lines, and how many keys have no row."""
    lines = list(autotune.tune("decode_attention", kernel(*configs), tuning))
    return [line for line, _ in lines], sum(not found for _, found in lines)


def written(tuning: autotune.Tuning) -> Mapping[str, Mapping[tuple, Row]]:
    found: dict[str, Any] = {}
    exec((tuning.out / "decode_attention" / "tile_table.py").read_text(), found)
    return found["TABLES"]


RULE, FASTER, WRONG = Config(ms=300), Config(ms=200), Config(ms=100, factor=3)
FAILING, TOO_LARGE = Config(ms=50, factor=10**6), Config(ms=10, factor=0)


def test_the_fastest_that_is_right_gets_the_row(tuning: autotune.Tuning):
    lines, missing = tune(tuning, RULE, WRONG, FASTER, FAILING, TOO_LARGE)
    assert missing == 0
    row = Row(config={"ms": 200, "factor": 2}, ms=400.0, rule_ms=600.0, origin=ORIGIN)
    assert written(tuning) == {"decode_attention": {("h100", 64, None): row}}
    assert TABLES["decode_attention"] == {("h100", 64, None): row}
    key = "decode_attention head_dim 64, block_kv None"
    assert lines == [
        "decode_attention head_dim 128, block_kv 64: only one config can be launched",
        f"{key} ms=100 factor=3: wrong: Verdict(max_error=1.0, max_error_allowed=0.1)",
        f"{key} ms=50 factor=1000000: failed: RuntimeError: CUDA_ERROR_LAUNCH_FAILED",
        f"{key} ms=10 factor=0: failed: ValueError: exceeds available shared memory",
        f"{key} ms=300 factor=2: 600 ms (short 300, long 1200)",
        f"{key} ms=200 factor=2: 400 ms (short 200, long 800)",
        f"{key}: ms=200 factor=2",
    ]


def test_a_gain_within_the_noise_leaves_the_rule(tuning: autotune.Tuning):
    tune(tuning, RULE, Config(ms=295))
    row = TABLES["decode_attention"]["h100", 64, None]
    assert row.config == dataclasses.asdict(RULE)
    assert (row.ms, row.rule_ms) == (600.0, 600.0)


def test_a_rule_that_is_wrong_is_reported(tuning: autotune.Tuning):
    lines, missing = tune(tuning, WRONG, FASTER)
    assert lines[-1].endswith("no row, the rule's config is not right")
    assert missing == 1
    assert TABLES["decode_attention"] == {}


def test_what_this_commit_measured_is_not_measured_again(tuning: autotune.Tuning):
    tune(tuning, RULE, FASTER)
    dirty = dataclasses.replace(tuning, origin=ORIGIN | {"commit": ORIGIN["commit"] + "-dirty"})
    for again in (tuning, dirty):
        lines, _ = tune(again, RULE, FASTER)
        assert lines[0] == "decode_attention head_dim 64, block_kv None: measured before"
        assert len(lines) == 2
    other = dataclasses.replace(tuning, origin=ORIGIN | {"commit": "b" * 40})
    assert len(tune(other, RULE, FASTER)[0]) == 4
    assert TABLES["decode_attention"]["h100", 64, None].origin["commit"] == "b" * 40


def test_rows_of_other_models_and_kernels_stay(
    tuning: autotune.Tuning, monkeypatch: pytest.MonkeyPatch
):
    row = Row(config={"ms": 1, "factor": 2}, ms=1.0, rule_ms=1.0, origin=ORIGIN)
    monkeypatch.setitem(TABLES, "another", {("h100", 64): row})
    monkeypatch.setitem(TABLES["decode_attention"], ("h200", 64, None), row)
    tune(tuning, RULE, FASTER)
    assert written(tuning)["another"] == {("h100", 64): row}
    models = [model for model, *_ in written(tuning)["decode_attention"]]
    assert models == ["h100", "h200"]
    text = (tuning.out / "decode_attention" / "tile_table.py").read_text()
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("op", sorted({kernel.op for kernel in KERNELS.values()}))
def test_the_tables_are_as_written(op: str, tmp_path: pathlib.Path):
    module = importlib.import_module(f"sparseattn_jax.kernels.{op}.tile_table")
    assert module.__file__ is not None
    autotune.write(tmp_path / "tile_table.py", module.TABLES)
    assert (tmp_path / "tile_table.py").read_text() == pathlib.Path(module.__file__).read_text()


def test_another_device_raises():
    if jax.default_backend() == "gpu":
        pytest.skip("tables are measured on this device")
    with pytest.raises(ValueError, match="device 'cpu': the tables are for H100 and H200"):
        autotune.run()
