"""The parts of a decoder layer beside attention: RMSNorm, rotary embedding, SwiGLU."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.rope_scaling import RopeScaling, plain_frequencies


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale, in float32 (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, dim: int, *, epsilon: float, param_dtype: DTypeLike):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        scale = jnp.broadcast_to(self.scale[...].astype(jnp.float32), x.shape)
        return (x32 * inverse_rms * scale).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        bias, dims = config.mlp_bias, (config.embed_dim, config.mlp_dim)
        self.gate = linear(config, *dims, use_bias=bias, rngs=rngs)
        self.up = linear(config, *dims, use_bias=bias, rngs=rngs)
        self.down = residual_linear(config, config.mlp_dim, use_bias=bias, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def linear(
    config: LlamaConfig, in_dim: int, out_dim: int, *, use_bias: bool, rngs: nnx.Rngs
) -> nnx.Linear:
    """A projection that keeps the variance of what it reads.

    Drawn from normal(0, 1 / sqrt(in_dim)) (LeCun et al., Efficient BackProp, 1998, eq. 16); a bias
    starts at 0.
    """
    return _linear(config, in_dim, out_dim, stddev=in_dim**-0.5, use_bias=use_bias, rngs=rngs)


def residual_linear(
    config: LlamaConfig, in_dim: int, *, use_bias: bool, rngs: nnx.Rngs
) -> nnx.Linear:
    """A projection that is added to the residual stream.

    Its standard deviation is divided by the root of the number of such projections, so that
    the stream's variance at the top does not grow with depth (GPT-2, Radford et al. 2019,
    section 2.3).
    """
    stddev = (2 * config.num_layers * in_dim) ** -0.5
    return _linear(config, in_dim, config.embed_dim, stddev=stddev, use_bias=use_bias, rngs=rngs)


def rotary_angles(
    positions: Int32[Array, "B T"],
    *,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
) -> Float32[Array, "B T half"]:
    """Angle of each pair of channels at each position (Su et al., arXiv:2104.09864, eq. 15).

    Args:
        positions: of the tokens.
        head_dim: channels of a head; `half` is half of it.
        theta: base of the frequencies theta^(-2 i / head_dim).
        scaling: how the frequencies are stretched.
    """
    if scaling is None:
        frequencies = plain_frequencies(head_dim=head_dim, theta=theta)
    else:
        frequencies = scaling.frequencies(positions, head_dim=head_dim, theta=theta)
    frequencies = jnp.asarray(frequencies, jnp.float32)
    return positions[..., None].astype(jnp.float32) * frequencies[None, None]


def rotate(
    x: Float[Array, "B T N H"], angles: Float32[Array, "#B T half"], *, magnitude: float
) -> Float[Array, "B T N H"]:
    """Turns channel i against channel i + H / 2 and multiplies by `magnitude`, in float32.

    This pairing of halves is that of Hugging Face's checkpoints; Meta's own pair neighbours.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = (magnitude * turn(angles)[:, :, None] for turn in (jnp.cos, jnp.sin))
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _linear(
    config: LlamaConfig,
    in_dim: int,
    out_dim: int,
    *,
    stddev: float,
    use_bias: bool,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    return nnx.Linear(
        in_dim,
        out_dim,
        use_bias=use_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nnx.initializers.normal(stddev),
        rngs=rngs,
    )
