"""How the attention ops are differentiated: by a backward implementation of their own."""

import dataclasses
import functools
from typing import Any

import jax
from jax import Array

from sparseattn_jax.kernels.backends import Implementation


def attend(
    forward: Implementation[Any],
    backward: Implementation[Any],
    *operands: Array | None,
    **options: int | float,
) -> tuple[Array, Array]:
    """Output and log-sum-exp by `forward`; their gradients by `backward`.

    Args:
        forward: takes the operands and options.
        backward: takes the operands, both results, both cotangents, and the options; returns the
            gradients of the first three operands. The others have none.
        *operands: q, k, v and what else there is.
        **options: the static part of the call.
    """
    return _attend(_Call(forward, backward, tuple(options.items())), *operands)


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static in a call; hashable."""

    forward: Implementation[Any]
    backward: Implementation[Any]
    options: tuple[tuple[str, int | float], ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, *operands: Array | None) -> tuple[Array, Array]:
    return call.forward.run(*operands, **dict(call.options))


def _attend_fwd(call: _Call, *operands: Array | None) -> tuple[tuple[Array, Array], tuple]:
    out, lse = _attend(call, *operands)  # pyright: ignore[reportGeneralTypeIssues]
    return (out, lse), (operands, out, lse)


def _attend_bwd(call: _Call, residuals: tuple, cotangents: tuple[Array, Array]) -> tuple:
    operands, out, lse = residuals
    # As they were rounded: XLA would let a sum over them, such as delta, see more digits than the
    # products have seen, and what should cancel would not.
    cotangents = jax.lax.optimization_barrier(cotangents)
    d_qkv = call.backward.run(*operands, out, lse, *cotangents, **dict(call.options))
    return *d_qkv, *(None for _ in operands[3:])


_attend.defvjp(_attend_fwd, _attend_bwd)
