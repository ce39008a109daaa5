"""What the runner and the torch process say to each other, with the torch process played."""

import json
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

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
    monkeypatch: pytest.MonkeyPatch, reply: Callable[[pathlib.Path], tuple[int, Any]]
) -> dict[tuple[str, str], measure.Measured | str]:
    """The runner's figures where the torch process gives this exit status and these answers."""

    def play(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        status, answers = reply(pathlib.Path(command[-1]))
        return subprocess.CompletedProcess(command, status, f"noise\n{json.dumps(answers)}\n")

    def judge(out_rows: np.ndarray) -> gate.Verdict:
        return gate.Verdict(max_error=float(out_rows.max()), max_error_allowed=1.0)

    monkeypatch.setattr(measure.subprocess, "run", play)
    judges = {"p=0.5": judge, "p=1": judge}
    return measure.torch_peers(CALLS, OPERANDS, KEEPS, judges, ROWS, OPTIONS)


def test_figures_and_failures_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(folder: pathlib.Path) -> tuple[int, Any]:
        request = json.loads((folder / "request.json").read_text())
        assert request == {
            "calls": [list(call) for call in CALLS],
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
        np.save(folder / "rows_0.npy", np.full((2, 1, 4), 0.25, np.float32))
        return 0, [{"runs_ms": [3.0, 1.0, 2.0], "queued_ms": 2.5}, {"failure": "no kernel"}]

    figures = figures_of(monkeypatch, reply)
    dense = figures["fa4", "p=1"]
    assert isinstance(dense, measure.Measured)
    assert (dense.timing.median_ms, dense.timing.queued_ms) == (2.0, 2.5)
    assert dense.verdict.max_error == 0.25
    assert figures["fa4_block_sparse", "p=0.5"] == "no kernel"


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
