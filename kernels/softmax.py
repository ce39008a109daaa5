"""The softmax of the plain XLA implementations, over rows that may be empty."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32


def softmax(
    scores: Float32[Array, "*rows keys"],
) -> tuple[Float32[Array, "*rows keys"], Float32[Array, "*rows"]]:
    """Weights and log-sum-exp; of a row that is -inf throughout they are 0 and -inf."""
    highest = lax.stop_gradient(scores.max(axis=-1))
    shift = jnp.where(jnp.isneginf(highest), 0.0, highest)
    weights = jnp.exp(scores - shift[..., None])
    total = weights.sum(axis=-1)
    divisor = jnp.where(total == 0.0, 1.0, total)
    lse = jnp.where(total == 0.0, -jnp.inf, shift + jnp.log(divisor))
    return weights / divisor[..., None], lse


def gradient_terms(
    out: Float[Array, "B T N H"],
    lse: Float32[Array, "B T N"],
    d_out: Float[Array, "B T N H"],
    d_lse: Float32[Array, "B T N"],
) -> tuple[Float32[Array, "B T N"], Float32[Array, "B T N"]]:
    """The log-sum-exp and the delta of P = exp(S - lse) and dS = P * (dP - delta)."""
    # exp(score - inf) = 0 keeps empty rows out of every gradient.
    finite_lse = jnp.where(jnp.isneginf(lse), jnp.inf, lse)
    # The softmax's own term, and the gradient that arrives through lse.
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    return finite_lse, delta
