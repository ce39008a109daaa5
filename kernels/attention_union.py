"""Attention over the union of two disjoint sets of keys, from attention over each.

With (a, lse_a) and (b, lse_b) of the two sets, the union's output is their mean weighted by the
softmax mass of each set (the split softmax of Flash-Decoding and Ring Attention):

    lse = log(exp(lse_a) + exp(lse_b))
    out = exp(lse_a - lse) * a + exp(lse_b - lse) * b

A set without visible keys has output 0 and log-sum-exp -inf, and adds nothing.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

type Arm = tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]
"""Output in q's dtype, and natural log-sum-exp."""


def union(a: Arm, b: Arm) -> Arm:
    """The union; differentiable, through outputs and log-sum-exps."""
    (a_out, a_lse), (b_out, b_lse) = a, b
    highest = jax.lax.stop_gradient(jnp.maximum(a_lse, b_lse))
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    a_mass, b_mass = jnp.exp(a_lse - shift), jnp.exp(b_lse - shift)
    total = a_mass + b_mass
    is_empty = total == 0.0
    divisor = jnp.where(is_empty, 1.0, total)
    out = (a_mass / divisor)[..., None] * a_out.astype(jnp.float32)
    out += (b_mass / divisor)[..., None] * b_out.astype(jnp.float32)
    lse = jnp.where(is_empty, -jnp.inf, shift + jnp.log(divisor))
    return out.astype(a_out.dtype), lse
