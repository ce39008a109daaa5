"""The shape of a LLaMA model, and the named ones."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies to a longer context.

    With r = original_max_position / wavelength, a frequency f becomes

        s * f + (1 - s) * f / factor,  s = clip((r - low) / (high - low), 0, 1).

    Attributes:
        factor: what the slowest frequencies are divided by.
        low_freq_factor: `low`; frequencies that turn fewer times than this in the original context
            are divided by `factor`.
        high_freq_factor: `high`; those that turn more often than this are kept.
        original_max_position: the context length before the stretch.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(
                f"factor={self.factor} must be at least 1: it divides the slow frequencies"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        _check_positive_integer("original_max_position", self.original_max_position)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a LLaMA model. Every field changes what the model computes.

    Attributes:
        vocab_size: number of tokens.
        num_layers: number of decoder layers.
        embed_dim: width of the residual stream.
        num_heads: query heads; a multiple of `num_kv_heads`.
        num_kv_heads: key/value heads; query head n reads head n // (num_heads // num_kv_heads).
        head_dim: width of one head, even; num_heads * head_dim need not equal `embed_dim`.
        mlp_dim: width of the feed-forward layer.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how the rotary frequencies are stretched, None for not at all.
        norm_epsilon: added to the mean square in RMSNorm.
        tie_embeddings: the head multiplies by the embedding table instead of its own.
        dtype: of the computation; norms, rotary angles, softmax and logits are float32.
        param_dtype: in which parameters are held.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    rope_scaling: Llama3RopeScaling | None
    norm_epsilon: float
    tie_embeddings: bool
    dtype: DTypeLike
    param_dtype: DTypeLike

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "num_layers",
            "embed_dim",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "mlp_dim",
        ):
            _check_positive_integer(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of "
                f"num_kv_heads={self.num_kv_heads}: each kv head serves as many query heads"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} must be even: rotary embedding turns pairs of channels"
            )
        if not 1 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta={self.rope_theta} must be a finite number above 1")
        if not 0 < self.norm_epsilon < math.inf:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} must be a small positive number")
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if dtype.name not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"{name}={dtype} must be float32, bfloat16 or float16")
            # One spelling of each type, so that equal configurations compare and hash equal.
            object.__setattr__(self, name, dtype)


def llama3_8b() -> LlamaConfig:
    """Llama 3.1 8B: https://huggingface.co/meta-llama/Llama-3.1-8B/blob/main/config.json."""
    return LlamaConfig(
        vocab_size=128256,
        num_layers=32,
        embed_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        mlp_dim=14336,
        rope_theta=500000.0,
        rope_scaling=Llama3RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
        ),
        norm_epsilon=1e-5,
        tie_embeddings=False,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
    )


def tiny() -> LlamaConfig:
    """A model over bytes that runs on a CPU in milliseconds."""
    return LlamaConfig(
        vocab_size=256,
        num_layers=4,
        embed_dim=128,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        mlp_dim=384,
        rope_theta=10000.0,
        rope_scaling=None,
        norm_epsilon=1e-5,
        tie_embeddings=True,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )


def _check_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
