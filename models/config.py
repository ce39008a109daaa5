"""The shape of a model, and the named ones."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from sparseattn_jax.models.checks import check_positive_integer
from sparseattn_jax.models.rope_scaling import DynamicRopeScaling as DynamicRopeScaling
from sparseattn_jax.models.rope_scaling import LinearRopeScaling as LinearRopeScaling
from sparseattn_jax.models.rope_scaling import Llama3RopeScaling as Llama3RopeScaling
from sparseattn_jax.models.rope_scaling import RopeScaling as RopeScaling
from sparseattn_jax.models.rope_scaling import YarnRopeScaling as YarnRopeScaling


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a model: LLaMA, Mistral, Qwen2 and Qwen3 differ in these fields alone.

    Every field but `max_position` changes what the model computes.

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
        attention_bias: queries, keys and values have biases (Qwen2; Qwen technical report,
            arXiv:2309.16609, section 2.3).
        output_bias: so has what attention writes to the residual stream.
        mlp_bias: so have all three projections of the feed-forward layer.
        qk_norm: RMSNorm over the channels of each head of q and k, before they are rotated (Qwen3,
            arXiv:2505.09388, section 2).
        sliding_window: in sliding layers a query sees the last so many keys, its own counted
            (Mistral, arXiv:2310.06825, section 2). None if there are no such layers.
        sliding_layers: indices of the sliding layers, ascending; kept as a tuple.
        max_position: how many tokens the model was made for, None if that is not known.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_epsilon: float
    tie_embeddings: bool
    dtype: DTypeLike
    param_dtype: DTypeLike
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: Sequence[int] = ()
    max_position: int | None = None

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
            check_positive_integer(name, getattr(self, name))
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
        self._check_rope_scaling()
        self._check_windows()
        if self.max_position is not None:
            check_positive_integer("max_position", self.max_position)
        if not 0 < self.norm_epsilon < math.inf:
            raise ValueError(f"norm_epsilon={self.norm_epsilon} must be a small positive number")
        for name in ("dtype", "param_dtype"):
            dtype = jnp.dtype(getattr(self, name))
            if dtype.name not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"{name}={dtype} must be float32, bfloat16 or float16")
            # One spelling of each type, so that equal configurations compare and hash equal.
            object.__setattr__(self, name, dtype)

    def _check_rope_scaling(self) -> None:
        kinds = LinearRopeScaling, DynamicRopeScaling, Llama3RopeScaling, YarnRopeScaling
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, kinds):
            raise ValueError(
                f"rope_scaling={self.rope_scaling!r} must be None or one of "
                f"{', '.join(kind.__name__ for kind in kinds)}"
            )
        if isinstance(self.rope_scaling, DynamicRopeScaling) and self.head_dim == 2:
            raise ValueError(
                "head_dim=2 must be at least 4 with DynamicRopeScaling: it stretches all "
                "frequencies but the first"
            )

    def _check_windows(self) -> None:
        layers = tuple(self.sliding_layers)  # it was a list where the configuration was JSON
        object.__setattr__(self, "sliding_layers", layers)
        if layers != tuple(sorted(set(layers) & set(range(self.num_layers)))):
            raise ValueError(
                f"sliding_layers={layers} must be ascending indices of the "
                f"{self.num_layers} layers, each once"
            )
        if (self.sliding_window is None) != (not layers):
            raise ValueError(
                f"sliding_window={self.sliding_window} and sliding_layers={layers} go together; "
                "pass both or neither"
            )
        if self.sliding_window is not None:
            check_positive_integer("sliding_window", self.sliding_window)


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
