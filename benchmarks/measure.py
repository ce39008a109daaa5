"""What the suites share: options, gated measurements of JAX functions and of torch peers."""

import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import Array

from benchmarks import gate, records
from benchmarks.rounds import Timer
from benchmarks.shapes import Shape
from benchmarks.timing import Timing, check_exceeds_cache, time_call
from sparseattn_jax.kernels.backends import Backend

_OPERANDS = ("q", "k", "v", "d_out")
Peer = Literal["cudnn", "xla", "fa4", "fa4_block_sparse"]
JudgeRows = Callable[..., gate.Verdict]
"""Judges the sampled rows [rows, heads, H] of each array of a result."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """The time of a call whose output passed, or did not pass, the gate.

    Attributes:
        peak_bytes: as `measured_with_memory` has it.
    """

    timing: Timing
    verdict: gate.Verdict
    peak_bytes: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One run of the benchmarks."""

    shape: Shape
    backend: Backend | None
    peers: Sequence[Peer]
    timer: Timer
    runs: int
    seed: int
    origin: records.Origin

    def record(
        self,
        *,
        op: str,
        case: str,
        inputs: str,
        density: float,
        ours: Measured,
        peer: str | None,
        theirs: Measured | str | None,
    ) -> records.Record | str:
        """The record, or where an output was wrong or a peer failed, a sentence instead of it."""
        name = f"{op} {case}"
        if not ours.verdict.passed:
            return f"{name}: not recorded, our output is wrong: {ours.verdict}"
        if isinstance(theirs, str):
            return f"{name}: not recorded, {peer} failed: {theirs}"
        if theirs is not None and not theirs.verdict.passed:
            return f"{name}: not recorded, the output of {peer} is wrong: {theirs.verdict}"
        ours_ms = ours.timing.median_ms
        peer_ms = None if theirs is None else theirs.timing.median_ms
        return records.Record(
            op=op,
            case=case,
            backend=self.backend or "default",
            timer=self.timer,
            ours_ms=_digits(ours_ms),
            ours_ms_min=_digits(min(ours.timing.runs_ms)),
            ours_ms_max=_digits(max(ours.timing.runs_ms)),
            ours_queued_ms=_digits(ours.timing.queued_ms),
            peer=peer,
            peer_ms=_digits(peer_ms) if peer_ms else None,
            peer_ms_min=_digits(min(theirs.timing.runs_ms)) if theirs else None,
            peer_ms_max=_digits(max(theirs.timing.runs_ms)) if theirs else None,
            peer_queued_ms=_digits(theirs.timing.queued_ms) if theirs else None,
            ratio=_digits(ours_ms / peer_ms) if peer_ms else None,
            density=_digits(density),
            max_error=_digits(ours.verdict.max_error),
            max_error_allowed=_digits(ours.verdict.max_error_allowed),
            inputs=inputs,
            ours_peak_gib=_gib(ours),
            peer_peak_gib=_gib(theirs),
            **dataclasses.asdict(self.origin),
        )


def measured[Out](
    function: Callable[..., Out],
    operands: Sequence[Any],
    judge: Callable[[Out], gate.Verdict],
    options: Options,
) -> Measured:
    """Times a jitted function and judges its result."""
    if options.timer == "kernel":
        check_exceeds_cache(operands)
    out, timing = time_call(function, operands, timer=options.timer, runs=options.runs)
    return Measured(timing=timing, verdict=judge(out))


def measured_with_memory[Out](
    function: Callable[..., Out],
    operands: Sequence[Any],
    judge: Callable[[Out], gate.Verdict],
    options: Options,
) -> Measured | str:
    """As `measured`, with the memory that the call takes; or if it fails, as for want of it, why.

    The memory is what the compiled program allocates: arguments, results and temporaries, among
    these the workspaces of libraries. The process's own peak would hold also what drew the
    operands and what judges the results.
    """
    try:
        compiled = jax.jit(function).lower(*operands).compile()
        figure = measured(compiled, operands, judge, options)
    except Exception as error:  # of any kind: reported, and the other calls go on
        return f"{type(error).__name__}: {error}"
    return dataclasses.replace(figure, peak_bytes=_peak_bytes(compiled))


def each_of(call: Measured, number: int) -> Measured:
    """The time of one of the equal parts of a call."""
    timing = Timing(
        runs_ms=[ms / number for ms in call.timing.runs_ms],
        queued_ms=call.timing.queued_ms / number,
    )
    return dataclasses.replace(call, timing=timing)


def _peak_bytes(compiled: jax.stages.Compiled) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    allocated = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return allocated + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def on_rows(
    judge: JudgeRows, rows: np.ndarray
) -> Callable[[Array | tuple[Array, ...]], gate.Verdict]:
    """Judges the sampled rows of a result, one array or several."""
    return lambda out: judge(*(np.asarray(x[0, rows], np.float32) for x in jax.tree.leaves(out)))


def dense_peers(options: Options) -> dict[str, Callable[[Array, Array, Array], Array]]:
    """jax.nn's dense causal attention, by those of its implementations that were asked for."""

    def attend(q: Array, k: Array, v: Array, *, implementation: Literal["cudnn", "xla"]) -> Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return {
        name: jax.jit(functools.partial(attend, implementation=name))
        for name in ("cudnn", "xla")
        if name in options.peers
    }


def torch_peers(
    calls: Sequence[tuple[str, str]],
    operands: Sequence[Array],
    keeps: Mapping[str, np.ndarray],
    judges: Mapping[str, JudgeRows],
    rows: np.ndarray,
    options: Options,
) -> dict[tuple[str, str], Measured | str]:
    """Times (peer, case) calls in a torch process; a failed call's answer is its traceback.

    The operands are q, k and v, and where gradients are wanted that of the output.
    """
    if not calls:
        return {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        request = {
            "calls": calls,
            "operands": _OPERANDS[: len(operands)],
            "dtype": options.shape.dtype,
            "block_size": options.shape.block_size,
            "rows": rows.tolist(),
            "runs": options.runs,
            "timer": options.timer,
        }
        (folder / "request.json").write_text(json.dumps(request))
        for operand_name, operand in zip(request["operands"], operands, strict=True):
            np.save(folder / f"{operand_name}.npy", np.asarray(operand).view(np.uint16))
        for case, keep in keeps.items():
            np.save(folder / f"mask_{case}.npy", keep)
        command = [sys.executable, "-m", "benchmarks.torch_peers", name]
        done = subprocess.run(
            command, cwd=records.ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode != 0:
            return dict.fromkeys(calls, f"the torch process ended with {done.returncode}")
        answers = json.loads(done.stdout.splitlines()[-1])
        return {
            call: _torch_measured(answer, folder / f"rows_{index}.npz", judges[call[1]])
            for index, (call, answer) in enumerate(zip(calls, answers, strict=True))
        }


def _torch_measured(
    answer: Mapping[str, Any], rows: pathlib.Path, judge: JudgeRows
) -> Measured | str:
    if "failure" in answer:
        return answer["failure"]
    timing = Timing(runs_ms=answer["runs_ms"], queued_ms=answer["queued_ms"])
    with np.load(rows) as arrays:
        return Measured(timing=timing, verdict=judge(*arrays.values()))


def _gib(figure: Measured | None) -> float | None:
    if figure is None or figure.peak_bytes is None:
        return None
    return _digits(figure.peak_bytes / 2**30)


def _digits(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")
