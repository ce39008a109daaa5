"""The attention layer: projections and rotary embedding around a function the caller gives."""

from typing import Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Float, Float32, PyTree

from sparseattn_jax.models import layers
from sparseattn_jax.models.config import LlamaConfig


@runtime_checkable
class Attend(Protocol):
    """How tokens attend to each other.

    It is traced once for all layers, so what differs between them comes through `layer_input`.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        layer_input: PyTree,
        /,
    ) -> Float[Array, "B T N H"]:
        """The heads' outputs.

        Args:
            q: queries, after the rotary embedding.
            k: keys, after the rotary embedding.
            v: values.
            layer_input: this layer's slice of the model's `per_layer`, None without one.
        """
        ...


def dense_causal_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer_input: PyTree,
    /,
) -> Float[Array, "B T N H"]:
    """Every token attends to itself and all before it; takes no layer input."""
    if layer_input is not None:
        raise ValueError(
            "dense_causal_attention reads no layer input; pass per_layer=None, "
            "or an attend that uses it"
        )
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245) through an `Attend`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        q_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.query = layers.linear(config, config.embed_dim, q_dim, rngs=rngs)
        self.key = layers.linear(config, config.embed_dim, kv_dim, rngs=rngs)
        self.value = layers.linear(config, config.embed_dim, kv_dim, rngs=rngs)
        self.output = layers.residual_linear(config, q_dim, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float32[Array, "#B T half"],
        *,
        attend: Attend,
        layer_input: PyTree,
    ) -> Float[Array, "B T D"]:
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = layers.rotate(self.query(x).reshape(heads), angles)
        k = layers.rotate(self.key(x).reshape(heads), angles)
        v = self.value(x).reshape(heads)
        out = attend(q, k, v, layer_input)
        if out.shape != q.shape:
            raise ValueError(
                f"attend returned shape {out.shape}; it must return q's shape {q.shape}"
            )
        return self.output(out.reshape(batch, length, -1))
