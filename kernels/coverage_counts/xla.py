"""Coverage counts in plain XLA: the meaning of the op, on any device.

A search for the value at which a row, taken in falling order, holds the share: some bits at a time,
as the bits of non-negative floats order like their values. Equal entries need no order.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32

# Bits that are found in one pass over the rows, of the 30 below the highest.
_AT_ONCE = 3


@jax.jit
def run(x: Float32[Array, "B N L"], share: Float32[Array, " N"]) -> Int32[Array, "B N"]:
    """Counts; the arguments are those of the op."""
    length = x.shape[-1]
    allowed = share[None, :] * x.sum(axis=-1)

    def refine(bits: Int32[Array, "B N"], shift: Array | int, width: int) -> Int32[Array, "B N"]:
        """`bits` with the next `width` of them, which end at `shift`."""
        digits = range(1, 2**width)
        values = [_as_value(jnp.bitwise_or(bits, jnp.left_shift(digit, shift))) for digit in digits]
        # Bits of no number are no less than any: no entry is left, and they are not taken.
        masses = _sums([jnp.where(x >= value, x, 0.0) for value in values])
        digit = sum((mass > allowed).astype(jnp.int32) for mass in masses)
        return jnp.bitwise_or(bits, jnp.left_shift(digit, shift))

    # Of the highest value at or above which the entries hold more than the share; 0 if none do.
    bits = refine(jnp.zeros(x.shape[:-1], jnp.int32), 30, 1)
    bits = lax.fori_loop(
        0,
        30 // _AT_ONCE,
        lambda step, bits: refine(bits, 30 - _AT_ONCE * (step + 1), _AT_ONCE),
        bits,
    )
    value = _as_value(bits)
    is_above = x > value
    left = allowed - jnp.where(is_above, x, 0.0).sum(axis=-1)
    tied = jnp.sum(x == value, axis=-1, dtype=jnp.int32)
    within = jnp.floor(left / jnp.where(bits == 0, 1.0, value[..., 0]))
    within = jnp.clip(within, 0.0, tied.astype(jnp.float32)).astype(jnp.int32)
    counts = 1 + is_above.sum(axis=-1, dtype=jnp.int32) + within
    covers_all = (bits == 0) | (share >= 1.0)[None, :]
    return jnp.minimum(jnp.where(covers_all, length, counts), length)


def _as_value(bits: Int32[Array, "B N"]) -> Float32[Array, "B N 1"]:
    return lax.bitcast_convert_type(bits, jnp.float32)[..., None]


def _sums(terms: list[Float32[Array, "B N L"]]) -> list[Float32[Array, "B N"]]:
    """Sums of the rows, in one pass over what the terms are made of."""
    zeros = [jnp.float32(0.0)] * len(terms)
    return lax.reduce(terms, zeros, lambda a, b: jax.tree.map(jnp.add, a, b), [2])
