"""What training minimises: pure functions of arrays."""

import math

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int32

from sparseattn_jax.train import head_masks

type Multipliers = dict[str, Float32[Array, ""]]


def language_model_loss(
    logits: Float32[Array, "B T V"],
    targets: Int32[Array, "B T"],
    weights: Float32[Array, " T"],
) -> Float32[Array, ""]:
    """Mean cross-entropy in nats, each position by its weight."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * weights[None]) / (jnp.sum(weights) * losses.shape[0])


def expected_sparsity(log_alpha: Float32[Array, "L K"]) -> Float32[Array, ""]:
    """Expected share of heads whose gate is 0, in closed form."""
    return jnp.mean(head_masks.probability_of_zero(log_alpha))


def target_sparsity(
    step: Int32[Array, ""], *, start: float, end: float, warmup_steps: int
) -> Float32[Array, ""]:
    """The target of a step: from start to end along a line, then end."""
    if warmup_steps == 0:
        return jnp.float32(end)
    progress = jnp.minimum(step / warmup_steps, 1.0)
    return start + (end - start) * progress


def warmup_steps(ratio: float, num_steps: int) -> int:
    """Steps of a warm-up that is a share of a run."""
    return math.ceil(ratio * num_steps)


def initial_multipliers() -> Multipliers:
    """Those of `lagrangian` at the start, which is no penalty."""
    return {"linear": jnp.float32(0), "quadratic": jnp.float32(0)}


def lagrangian(
    sparsity: Float32[Array, ""], target: Float32[Array, ""], multipliers: Multipliers
) -> Float32[Array, ""]:
    """l1 (s - t) + l2 (s - t)^2: gates descend it, multipliers ascend it (PruLong, section 3)."""
    excess = sparsity - target
    return multipliers["linear"] * excess + multipliers["quadratic"] * excess**2
