"""Products of the plain XLA implementations, exact to float32."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32


def matmul(equation: str, a: Array, b: Array) -> Float32[Array, "..."]:
    """`jnp.einsum` of two operands in float32."""
    # float32 operands must not be rounded to tf32; narrower ones multiply exactly as they are.
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=precision)
