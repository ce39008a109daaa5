"""The attention layer: projections and rotary embedding around a function the caller gives."""

import dataclasses
import functools
import itertools
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, PyTree

from sparseattn_jax.models import layers
from sparseattn_jax.models.checks import check_positive_integer
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.prefill import streaming_prefill


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


@runtime_checkable
class CachedAttend(Protocol):
    """How tokens attend to each other and to what `state`, as a KV cache, keeps of earlier ones.

    It is traced once for a run of layers; what differs between these comes through `layer_input`
    and `layer`.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        layer_input: PyTree,
        state: PyTree,
        layer: Int32[Array, ""],
        /,
    ) -> tuple[Float[Array, "B T N H"], PyTree]:
        """The heads' outputs, and the state for the next layer.

        Args:
            q: queries, after the rotary embedding.
            k: keys, after the rotary embedding.
            v: values.
            layer_input: this layer's slice of the run's `per_layer`, None without one.
            state: what the layer before returned; shapes and dtypes stay.
            layer: the layer's index in the model, traced.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerRun:
    """Consecutive layers that attend by one traced function.

    Attributes:
        num_layers: how many.
        attend: their attention; `stateless` makes one of an `Attend`.
        per_layer: arrays whose first axis is num_layers; `attend` gets its layer's slice.
    """

    num_layers: int
    attend: CachedAttend
    per_layer: PyTree = None

    def __post_init__(self) -> None:
        check_positive_integer("num_layers", self.num_layers)
        check_per_layer(self.per_layer, self.num_layers)


def check_per_layer(per_layer: PyTree, num_layers: int) -> None:
    """The first axis of every leaf is over the layers."""
    for path, leaf in jax.tree.leaves_with_path(per_layer):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != num_layers:
            raise ValueError(
                f"per_layer{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; "
                f"its first axis must be num_layers={num_layers}"
            )


def stateless(attend: Attend) -> CachedAttend:
    """An attention that keeps nothing: the state passes by."""

    def attend_and_keep(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        layer_input: PyTree,
        state: PyTree,
        layer: Int32[Array, ""],
        /,
    ) -> tuple[Float[Array, "B T N H"], PyTree]:
        return attend(q, k, v, layer_input), state

    return attend_and_keep


def dense_runs(config: LlamaConfig) -> tuple[LayerRun, ...]:
    """Dense causal attention of all layers, with the window in those that slide."""
    attends: dict[bool, Attend] = {False: dense_causal_attention}
    if config.sliding_window is not None:
        attends[True] = functools.partial(sliding_causal_attention, config.sliding_window)
    slides = [layer in config.sliding_layers for layer in range(config.num_layers)]
    return tuple(
        LayerRun(num_layers=len(list(run)), attend=stateless(attends[kind]))
        for kind, run in itertools.groupby(slides)
    )


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


def sliding_causal_attention(
    window: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer_input: PyTree,
    /,
) -> Float[Array, "B T N H"]:
    """Every token attends to the last `window` ones up to itself; takes no layer input.

    Time and memory are O(T window), so no mask of T x T is made.
    """
    if layer_input is not None:
        raise ValueError(
            "sliding_causal_attention reads no layer input; pass per_layer=None, "
            "or an attend that uses it"
        )
    return streaming_prefill(q, k, v, sink_size=0, recent_size=window, exact=True)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245) through an `Attend`."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        scaling = config.rope_scaling
        self.head_dim = config.head_dim
        self.rotary_magnitude = 1.0 if scaling is None else scaling.magnitude
        q_dim = config.num_heads * config.head_dim
        kv_dim = config.num_kv_heads * config.head_dim
        linear = functools.partial(
            layers.linear, config, config.embed_dim, use_bias=config.attention_bias, rngs=rngs
        )
        self.query = linear(q_dim)
        self.key = linear(kv_dim)
        self.value = linear(kv_dim)
        self.output = layers.residual_linear(config, q_dim, use_bias=config.output_bias, rngs=rngs)
        norm = functools.partial(
            layers.RMSNorm,
            config.head_dim,
            epsilon=config.norm_epsilon,
            param_dtype=config.param_dtype,
        )
        self.query_norm = norm() if config.qk_norm else None
        self.key_norm = norm() if config.qk_norm else None

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
        q, k = self.query(x).reshape(heads), self.key(x).reshape(heads)
        v = self.value(x).reshape(heads)
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = (layers.rotate(x, angles, magnitude=self.rotary_magnitude) for x in (q, k))
        out = attend(q, k, v, layer_input)
        if out.shape != q.shape:
            raise ValueError(
                f"attend returned shape {out.shape}; it must return q's shape {q.shape}"
            )
        return self.output(out.reshape(batch, length, -1))
