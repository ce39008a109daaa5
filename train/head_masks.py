"""Hard-concrete gates per layer and KV head (Louizos et al., arXiv:1712.01312), and masks of heads.

A gate z of 1 is full attention, 0 streaming. With u uniform on (0, 1),

    s = sigmoid((log u - log(1 - u) + log_alpha) / TEMPERATURE),  z = clip(1.2 s - 0.1, 0, 1).
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Key

from sparseattn_jax import head_gates
from sparseattn_jax.train.config import InvalidRunError

STRETCH_LOW = -0.1
STRETCH_HIGH = 1.1
TEMPERATURE = 2 / 3
# What the mean of s counts for at evaluation; PruLong's choice.
EVALUATION_SHARPNESS = 0.8
_EPSILON = 1e-8
# logit of the s at which z reaches 0, times the temperature.
_ZERO_SHIFT = TEMPERATURE * math.log(-STRETCH_LOW / STRETCH_HIGH)


def initialise(
    key: Key[Array, ""], shape: tuple[int, int], *, mean: float, stddev: float
) -> Float32[Array, "L K"]:
    """The parameters at the start: log_alpha of every layer and KV head."""
    return mean + stddev * jax.random.normal(key, shape, jnp.float32)


def sample(log_alpha: Float32[Array, "L K"], key: Key[Array, ""]) -> Float32[Array, "L K"]:
    """One draw of every gate; its gradient is 0 where the gate is clipped."""
    uniform = jax.random.uniform(
        key, log_alpha.shape, jnp.float32, minval=_EPSILON, maxval=1 - jnp.finfo(jnp.float32).epsneg
    )
    noise = jnp.log(uniform) - jnp.log1p(-uniform)
    return _stretch(jax.nn.sigmoid((noise + log_alpha) / TEMPERATURE))


def probability_of_zero(log_alpha: Float32[Array, "L K"]) -> Float32[Array, "L K"]:
    """P(z = 0), in closed form."""
    return jax.nn.sigmoid(_ZERO_SHIFT - log_alpha)


def deterministic_gates(log_alpha: Float32[Array, "L K"]) -> Float32[Array, "L K"]:
    """The gates without noise: as many zeros per layer as expected, at the smallest log_alpha.

    The others are sigmoid(EVALUATION_SHARPNESS * log_alpha / TEMPERATURE).
    """
    num_zeros = jnp.round(jnp.sum(probability_of_zero(log_alpha), axis=1, keepdims=True))
    gates = jax.nn.sigmoid(EVALUATION_SHARPNESS * log_alpha / TEMPERATURE)
    # The stable sort keeps heads of lower index first among equals: they are the last to be zero.
    rank = jnp.argsort(jnp.argsort(log_alpha, axis=1, descending=True), axis=1)
    return jnp.where(rank >= log_alpha.shape[1] - num_zeros, 0.0, gates)


def round_to_sparsity(log_alpha: Float32[Array, "L K"], sparsity: float) -> Int[np.ndarray, "L K"]:
    """The 0/1 mask that keeps the highest log_alpha over all layers; ties keep the lower index."""
    return head_gates.sparsify_by_quantile(np.asarray(log_alpha), sparsity).astype(int)


def random_mask(
    shape: tuple[int, int], num_kept: int, random: np.random.Generator
) -> Int[np.ndarray, "L K"]:
    """A 0/1 mask that keeps heads at random."""
    mask = np.zeros(math.prod(shape), int)
    mask[random.permutation(mask.size)[:num_kept]] = 1
    return mask.reshape(shape)


def write_tsv(path: pathlib.Path, mask: Int[np.ndarray, "L K"]) -> None:
    """One line per layer, one 0 or 1 per KV head: PruLong's format."""
    head_gates.write_head_masks(path, mask == 1)


def read_tsv(path: pathlib.Path, *, num_layers: int, num_kv_heads: int) -> Int[np.ndarray, "L K"]:
    """The mask that `write_tsv` wrote.

    Raises:
        InvalidRunError: the file holds something else, or the mask of a model of another shape.
    """
    try:
        mask = head_gates.read_head_masks(path)
    except ValueError as error:
        raise InvalidRunError(str(error)) from error
    if mask.shape != (num_layers, num_kv_heads):
        raise InvalidRunError(
            f"{path} has {mask.shape[0]} layers of {mask.shape[1]} KV heads; the model has "
            f"{num_layers} of {num_kv_heads}: take the masks that were learned for it"
        )
    return mask.astype(int)


def _stretch(s: Float32[Array, "L K"]) -> Float32[Array, "L K"]:
    return jnp.clip(STRETCH_LOW + (STRETCH_HIGH - STRETCH_LOW) * s, 0.0, 1.0)
