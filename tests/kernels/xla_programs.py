"""What the programs of xla implementations compute, and faulty implementations in their place."""

import math
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from sparseattn_jax.kernels.backends import Implementation, never_refuses

type Operations = list[tuple[Any, int]]
"""Of a program, each with how often it runs."""


def operations(function: Callable[..., Any], *operands: Any) -> Operations:
    """All that a function does."""
    return list(_equations(jax.make_jaxpr(function)(*operands).jaxpr, 1))


def operations_with_gradients(
    attend: Callable[..., Any], operands: Sequence[jax.Array]
) -> Operations:
    """Those of a forward and a backward pass."""

    def gradients(*operands: jax.Array) -> Any:
        out, vjp = jax.vjp(attend, *operands)
        return vjp(out)

    return operations(gradients, *operands)


def multiplications(found: Operations) -> int:
    """Those of the matrix products."""
    return sum(trips * _multiplications(equation) for equation, trips in found)


def arrays(found: Operations) -> list[Any]:
    """Shapes and dtypes of all that they make."""
    return [variable.aval for equation, _ in found for variable in equation.outvars]


def plant(monkeypatch: pytest.MonkeyPatch, op: types.ModuleType, **faulty: Callable) -> None:
    """Puts faulty implementations, by `forward` and `backward`, into the tables of an op."""
    for name, run in faulty.items():
        table = {"xla": Implementation(run, never_refuses)}
        monkeypatch.setattr(op, f"_{name.upper()}", table)


def _equations(jaxpr: Any, trips: int) -> Iterator[tuple[Any, int]]:
    for equation in jaxpr.eqns:
        yield equation, trips
        inside = trips * equation.params.get("length", 1)
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner, inside)


def _multiplications(equation: Any) -> int:
    if equation.primitive.name != "dot_general":
        return 0
    (contracted, _), _ = equation.params["dimension_numbers"]
    terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
    return terms * equation.outvars[0].aval.size
