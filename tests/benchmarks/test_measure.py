"""What the runner and the torch process say to each other, with the torch process played."""

import dataclasses
import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gate, measure, records
from benchmarks.shapes import SHAPES

OPTIONS = measure.Options(
    shape=SHAPES["toy"],
    backend="xla",
    peers=("fa4", "fa4_block_sparse"),
    timer="kernel",
    runs=3,
    seed=0,
    origin=records.Origin(device="cpu", versions={}, commit="abc", date="2026-01-31"),
)
CALLS = [("fa4", "p=1"), ("fa4_block_sparse", "p=0.5")]
ROWS = np.array([0, 5])
KEEPS = {"p=0.5": np.tri(2, dtype=bool)[None], "p=1": np.ones((1, 2, 2), bool)}
OPERANDS = tuple(jnp.full((1, 8, 1, 4), value, jnp.bfloat16) for value in (1, 2, 3))


def figures_of(
    monkeypatch: pytest.MonkeyPatch,
    reply: Callable[[pathlib.Path], tuple[int, Any]],
    operands: tuple[jax.Array, ...] = OPERANDS,
) -> dict[tuple[str, str], measure.Measured | str]:
    """The runner's figures where the torch process gives this exit status and these answers."""

    def play(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        status, answers = reply(pathlib.Path(command[-1]))
        return subprocess.CompletedProcess(command, status, f"noise\n{json.dumps(answers)}\n")

    def judge(*rows: np.ndarray) -> gate.Verdict:
        return gate.Verdict(max_error=float(np.sum([x.max() for x in rows])), max_error_allowed=1.0)

    monkeypatch.setattr(measure.subprocess, "run", play)
    judges = {"p=0.5": judge, "p=1": judge}
    return measure.torch_peers(CALLS, operands, KEEPS, judges, ROWS, OPTIONS)


def test_figures_and_failures_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(folder: pathlib.Path) -> tuple[int, Any]:
        request = json.loads((folder / "request.json").read_text())
        assert request == {
            "calls": [list(call) for call in CALLS],
            "operands": ["q", "k", "v"],
            "dtype": "bfloat16",
            "block_size": 64,
            "rows": [0, 5],
            "runs": 3,
            "timer": "kernel",
        }
        for name, operand in zip("qkv", OPERANDS, strict=True):
            bits = np.load(folder / f"{name}.npy")
            assert bits.dtype == np.uint16
            np.testing.assert_array_equal(bits.view(jnp.bfloat16), operand)
        np.testing.assert_array_equal(np.load(folder / "mask_p=0.5.npy"), KEEPS["p=0.5"])
        np.savez(folder / "rows_0.npz", np.full((2, 1, 4), 0.25, np.float32))
        return 0, [{"runs_ms": [3.0, 1.0, 2.0], "queued_ms": 2.5}, {"failure": "no kernel"}]

    figures = figures_of(monkeypatch, reply)
    dense = figures["fa4", "p=1"]
    assert isinstance(dense, measure.Measured)
    assert (dense.timing.median_ms, dense.timing.queued_ms) == (2.0, 2.5)
    assert dense.verdict.max_error == 0.25
    assert figures["fa4_block_sparse", "p=0.5"] == "no kernel"


def test_gradients_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(folder: pathlib.Path) -> tuple[int, Any]:
        request = json.loads((folder / "request.json").read_text())
        assert request["operands"] == ["q", "k", "v", "d_out"]
        d_out = np.load(folder / "d_out.npy").view(jnp.bfloat16)
        np.testing.assert_array_equal(d_out, 4 * OPERANDS[0])
        for index in range(len(CALLS)):
            rows = [np.full((2, 1, 4), value, np.float32) for value in (0.5, 0.25, 0.125)]
            np.savez(folder / f"rows_{index}.npz", *rows)
        return 0, [{"runs_ms": [1.0, 1.0], "queued_ms": 1.0}] * len(CALLS)

    figures = figures_of(monkeypatch, reply, (*OPERANDS, 4 * OPERANDS[0]))
    verdicts = [figure.verdict.max_error for figure in figures.values()]
    assert verdicts == [0.875, 0.875]


def test_memory_is_that_of_the_compiled_call() -> None:
    x = jnp.ones((1024, 1024), jnp.float32)
    options = dataclasses.replace(OPTIONS, timer="single", runs=2)

    def judge(out: jax.Array) -> gate.Verdict:
        return gate.Verdict(max_error=abs(float(out) - 1024.0**2), max_error_allowed=0.0)

    figure = measure.measured_with_memory(lambda x: jnp.sort(x).sum(), (x,), judge, options)
    assert isinstance(figure, measure.Measured)
    assert figure.verdict.passed
    assert figure.peak_bytes is not None
    assert 2 * x.nbytes <= figure.peak_bytes < 6 * x.nbytes  # the operand and the sorted rows
    record = options.record(
        op="op", case="8K", inputs="", density=1.0, ours=figure, peer=None, theirs=None
    )
    assert isinstance(record, records.Record)
    assert record.ours_peak_gib == pytest.approx(figure.peak_bytes / 2**30, rel=1e-3)
    assert record.peer_peak_gib is None


def test_a_call_that_fails_says_why() -> None:
    def fail(x: jax.Array) -> jax.Array:
        raise RuntimeError("out of memory")

    answer = measure.measured_with_memory(fail, (jnp.ones(1),), lambda _: None, OPTIONS)
    assert answer == "RuntimeError: out of memory"


def test_a_dead_process_fails_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = figures_of(monkeypatch, lambda _: (9, None))
    assert figures == dict.fromkeys(CALLS, "the torch process ended with 9")


@pytest.mark.parametrize(
    ("theirs", "sentence"),
    [
        ("no kernel", "op 8K p=1: not recorded, fa4 failed: no kernel"),
        (2.0, "op 8K p=1: not recorded, the output of fa4 is wrong"),
    ],
    ids=["failed", "wrong"],
)
def test_a_peer_that_failed_is_not_recorded(theirs: str | float, sentence: str) -> None:
    timing = measure.Timing(runs_ms=[1.0, 2.0], queued_ms=1.5)

    def figure(error: float) -> measure.Measured:
        verdict = gate.Verdict(max_error=error, max_error_allowed=1.0)
        return measure.Measured(timing=timing, verdict=verdict)

    answer = OPTIONS.record(
        op="op",
        case="8K p=1",
        inputs="",
        density=1.0,
        ours=figure(0.5),
        peer="fa4",
        theirs=theirs if isinstance(theirs, str) else figure(theirs),
    )
    assert isinstance(answer, str)
    assert answer.startswith(sentence)
