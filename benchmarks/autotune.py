"""Measures the tiles that kernels may choose on this GPU and writes the tables of the fastest.

    python -m benchmarks.autotune
    python -m benchmarks.autotune --op block_sparse_attention decode_attention --out TABLES

For each kernel and key it times every candidate that can be launched, in turns, so that the GPU's
clock is the same for all. Those whose outputs do not pass the gate are out. The candidate with the
least geometric mean over the cases wins; a gain below 2 % is noise, and the rule stays.

The table, kernels/<op>/tile_table.py, is written after every key. A run that was cut goes on with
the keys that have not been measured at the same commit, with the same versions, on the same day.
"""

import collections
import dataclasses
import functools
import importlib
import itertools
import json
import pathlib
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import tyro

from benchmarks import gate, records
from benchmarks.rounds import heat
from benchmarks.timing import kernel_ms
from benchmarks.tuned_kernels import KERNELS, Name, Operands, Problem, TunedKernel
from sparseattn_jax.kernels.backends import Model, device_facts
from sparseattn_jax.kernels.tile_tables import Key, Row

ROUNDS, RUNS = 2, 5  # of all candidates in turn, and of each in its turn
GAIN = 0.98  # of the rule's time, that a candidate must not exceed to replace it
_VERSIONS = ("jax", "jaxlib", "runtime")
_TRACING = threading.Lock()  # one at a time: it would not go faster, and the first key waits less

type Time = Callable[[Callable[..., Any], Operands, int], list[float]]
"""Milliseconds of so many runs of a function."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """One run of this command.

    Attributes:
        model: of the device, as the tables have it.
        origin: device, versions, commit and date.
        out: the folder of ops in which the tables are written.
        time: the timer.
    """

    model: Model
    origin: Mapping[str, str]
    out: pathlib.Path
    time: Time


def run(
    op: tuple[Name, ...] = tuple(KERNELS),
    out: pathlib.Path = records.ROOT / "kernels",
    commit: str | None = None,
) -> int:
    """Writes the tables of this GPU; the exit status is 1 if a key has no right candidate.

    Args:
        op: which kernels to measure.
        out: where <op>/tile_table.py is written.
        commit: the tree's commit, where git cannot tell.
    """
    model = device_facts().model
    if model is None:
        raise ValueError(
            f"device {jax.devices()[0].device_kind!r}: the tables are for H100 and H200; run on one"
        )
    tuning = Tuning(model=model, origin=_origin(commit), out=out, time=kernel_ms)
    missing = 0
    for name in op:
        for line, found in tune(name, KERNELS[name], tuning):
            print(line, flush=True)
            missing += not found
    return missing


def tune(name: str, kernel: TunedKernel, tuning: Tuning) -> Iterator[tuple[str, bool]]:
    """Measures a kernel's keys and writes its table.

    Yields:
        A line for each candidate and key; and whether it is not about a key without a row.
    """
    tables = importlib.import_module(f"sparseattn_jax.kernels.{kernel.op}.tile_table").TABLES
    rows: dict[Key, Row] = tables[name]
    path = tuning.out / kernel.op / "tile_table.py"
    with ThreadPoolExecutor() as pool:
        compiling = []
        for values in kernel.keys:
            configs, key = kernel.candidates(*values), (tuning.model, *values)
            label = f"{name} {_label(kernel.parameters, values)}"
            if len(configs) == 1:
                yield f"{label}: only one config can be launched", True
            elif key in rows and _clean(rows[key].origin) == _clean(tuning.origin):
                yield f"{label}: measured before", True
            else:
                problem = kernel.problem(*values)
                compiling.append((label, key, problem, _compile(problem, configs, pool)))
        checked = []
        for label, key, problem, compiled in compiling:
            functions, cases, lines = _right(problem, compiled)
            yield from ((f"{label} {line}", True) for line in lines)
            checked.append((label, key, next(iter(compiled)), functions, cases))
    # Only now: what XLA tries while it compiles would be in the times.
    for label, key, rule, functions, cases in checked:
        if rule not in functions:
            yield f"{label}: no row, the rule's config is not right", False
            continue
        figures, lines = _times(functions, cases, tuning.time)
        yield from ((f"{label} {line}", True) for line in lines)
        rows[key] = _row(rule, figures, tuning.origin)
        write(path, tables)
        yield f"{label}: {_describe(rows[key].config)}", True


def write(path: pathlib.Path, tables: Mapping[str, Mapping[Key, Row]]) -> None:
    """Writes a module of tables, in the form in which ruff leaves it."""
    lines = [
        '"""The fastest tiles that were measured; `python -m benchmarks.autotune` writes this.',
        "",
        "By kernel and key: the device's model and what the choice depends on, see `tiling.py`.",
        '"""',
        "",
        "from sparseattn_jax.kernels.tile_tables import Key, Row",
        "",
        "TABLES: dict[str, dict[Key, Row]] = {",
    ]
    for name, rows in tables.items():
        if not rows:
            lines.append(f"    {json.dumps(name)}: {{}},")
            continue
        lines.append(f"    {json.dumps(name)}: {{")
        for key in sorted(rows, key=_order):
            lines += _row_lines(key, rows[key])
        lines.append("    },")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "}", ""]))


def _row_lines(key: Key, row: Row) -> list[str]:
    return [
        f"        ({', '.join(map(_literal, key))}): Row(",
        *_dict_lines("config", row.config),
        f"            ms={row.ms!r},",
        f"            rule_ms={row.rule_ms!r},",
        *_dict_lines("origin", row.origin),
        "        ),",
    ]


def _dict_lines(name: str, values: Mapping[str, object]) -> list[str]:
    items = [f"                {_literal(k)}: {_literal(v)}," for k, v in values.items()]
    return [f"            {name}={{", *items, "            },"]


def _order(key: Key) -> list[Any]:
    return [key[0], *(-1 if value is None else value for value in key[1:])]


def _literal(value: object) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _origin(commit: str | None) -> dict[str, str]:
    origin = records.origin(commit)
    versions = {name: origin.versions[name] for name in _VERSIONS if name in origin.versions}
    return {"device": origin.device, **versions, "commit": origin.commit, "date": origin.date}


def _clean(origin: Mapping[str, str]) -> dict[str, str]:
    """Without the mark of a changed tree: the tables that a run writes change it."""
    return {**origin, "commit": origin["commit"].removesuffix("-dirty")}


def _compile(
    problem: Problem, configs: Sequence[Any], pool: ThreadPoolExecutor
) -> dict[Any, Future[jax.stages.Compiled]]:
    """The candidates' programs, being compiled; all cases have operands of the same shapes."""
    shapes = next(iter(jax.eval_shape(problem.draw).values()))

    def compile_one(config: Any) -> jax.stages.Compiled:
        with _TRACING:
            lowered = jax.jit(functools.partial(problem.run, config=config)).lower(*shapes)
        return lowered.compile()

    return {config: pool.submit(compile_one, config) for config in configs}


def _right(
    problem: Problem, compiled: Mapping[Any, Future[jax.stages.Compiled]]
) -> tuple[dict[Any, jax.stages.Compiled], Mapping[str, Operands], list[str]]:
    """The programs, by config, that pass the gate; the cases; and a line for each other config."""
    cases, functions, lines = problem.draw(), {}, []
    for config, future in compiled.items():
        try:
            function = future.result()
            verdict = _verdict(problem, function, cases)
        except Exception as error:  # of any kind: reported, and the other candidates go on
            lines.append(f"{_describe(config)}: failed: {type(error).__name__}: {error}")
            continue
        if verdict.passed:
            functions[config] = function
        else:
            lines.append(f"{_describe(config)}: wrong: {verdict}")
    return functions, cases, lines


def _times(
    functions: Mapping[Any, jax.stages.Compiled], cases: Mapping[str, Operands], time: Time
) -> tuple[dict[Any, float], list[str]]:
    """Geometric means over the cases, by config; and a line for each."""
    first = next(iter(functions.values()))
    heat(lambda: [jax.block_until_ready(first(*operands)) for operands in cases.values()])
    samples = collections.defaultdict(list)
    for _, config, case in itertools.product(range(ROUNDS), functions, cases):
        samples[config, case] += time(functions[config], cases[case], RUNS)
    figures, lines = {}, []
    for config in functions:
        medians = {case: statistics.median(samples[config, case]) for case in cases}
        figures[config] = statistics.geometric_mean(medians.values())
        each = ", ".join(f"{case} {ms:.4g}" for case, ms in medians.items())
        lines.append(f"{_describe(config)}: {figures[config]:.4g} ms ({each})")
    return figures, lines


def _verdict(
    problem: Problem, function: Callable[..., Any], cases: Mapping[str, Operands]
) -> gate.Verdict:
    """That on the first case whose result is wrong, else on the last."""
    verdicts = [
        problem.judge(case, operands, function(*operands)) for case, operands in cases.items()
    ]
    return next((verdict for verdict in verdicts if not verdict.passed), verdicts[-1])


def _row(rule: Any, figures: Mapping[Any, float], origin: Mapping[str, str]) -> Row:
    """The fastest config if it gains enough, else the rule's."""
    fastest = min(figures, key=lambda config: figures[config])
    best = fastest if figures[fastest] <= GAIN * figures[rule] else rule
    return Row(
        config=dataclasses.asdict(best),
        ms=float(f"{figures[best]:.4g}"),
        rule_ms=float(f"{figures[rule]:.4g}"),
        origin=origin,
    )


def _label(parameters: Sequence[str], values: Sequence[int | bool | None]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(parameters, values, strict=True))


def _describe(config: Any) -> str:
    fields = config if isinstance(config, Mapping) else dataclasses.asdict(config)
    return " ".join(f"{name}={value}" for name, value in fields.items())


if __name__ == "__main__":
    sys.exit(min(1, tyro.cli(run)))
