"""LLaMA in Flax nnx, with the attention function as an argument."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, PyTree

from sparseattn_jax.models import layers
from sparseattn_jax.models.attention import Attend, Attention, dense_causal_attention
from sparseattn_jax.models.config import LlamaConfig


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(
            layers.RMSNorm,
            config.embed_dim,
            epsilon=config.norm_epsilon,
            param_dtype=config.param_dtype,
        )
        self.attention_norm = norm()
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = layers.SwiGLU(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        angles: Float32[Array, "#B T half"],
        *,
        attend: Attend,
        layer_input: PyTree,
    ) -> Float[Array, "B T D"]:
        x = x + self.attention(
            self.attention_norm(x), angles, attend=attend, layer_input=layer_input
        )
        return x + self.mlp(self.mlp_norm(x))


def _validated[F: Callable](method: F) -> F:
    """Checks the arguments of a call of `Llama` before the types of its signature are checked."""

    @functools.wraps(method)
    def checked(self, tokens, *, per_layer=None, positions=None, **options):
        _check_inputs(self.config, tokens, per_layer, positions)
        return method(self, tokens, per_layer=per_layer, positions=positions, **options)

    return checked  # pyright: ignore[reportReturnType]


class Llama(nnx.Module):
    """A decoder-only language model (Touvron et al., arXiv:2302.13971).

    The parameters of all layers are stacked, `[num_layers, ...]`, and the layers are scanned: an
    80-layer model compiles like a 1-layer one.

    Weights are drawn from normal(0, s): s = 1 / sqrt(inputs) for projections, divided by
    sqrt(2 num_layers) for those that write to the residual stream, and 1 / sqrt(embed_dim) for
    the embedding and the head. Norms start at 1.

    A token outside the vocabulary makes the logits of its sequence NaN, from its place on or all.
    """

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked_layers(rngs: nnx.Rngs) -> DecoderLayer:
            return DecoderLayer(config, rngs=rngs)

        def table() -> nnx.Param:
            init = nnx.initializers.normal(config.embed_dim**-0.5)
            shape = (config.vocab_size, config.embed_dim)
            return nnx.Param(init(rngs.params(), shape, config.param_dtype))

        self.config = config
        self.embedding = table()
        self.layers = stacked_layers(rngs)
        self.final_norm = layers.RMSNorm(
            config.embed_dim, epsilon=config.norm_epsilon, param_dtype=config.param_dtype
        )
        if not config.tie_embeddings:
            self.head = table()

    @_validated
    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        *,
        attend: Attend = dense_causal_attention,
        per_layer: PyTree = None,
        positions: Int32[Array, "#B T"] | None = None,
        remat: bool = False,
    ) -> Float32[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
            tokens: ids in [0, vocab_size).
            attend: the attention function of every layer.
            per_layer: arrays whose first axis is num_layers; `attend` gets its layer's slice.
            positions: of the tokens, for the rotary embedding; 0, 1, ... unless given.
            remat: recompute each layer in the backward pass instead of keeping its activations.
        """
        hidden = self.hidden_states(
            tokens, attend=attend, per_layer=per_layer, positions=positions, remat=remat
        )
        return self.logits(hidden)

    @_validated
    def hidden_states(
        self,
        tokens: Int32[Array, "B T"],
        *,
        attend: Attend = dense_causal_attention,
        per_layer: PyTree = None,
        positions: Int32[Array, "#B T"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T D"]:
        """What `logits` takes: the residual stream after the last norm; arguments as the call's."""
        x, angles = self.embed(tokens, positions=positions)
        graphdef, stacked = nnx.split(self.layers)

        def step(x, inputs):
            params, layer_input = inputs
            layer = nnx.merge(graphdef, params)
            return layer(x, angles, attend=attend, layer_input=layer_input), None

        if remat:
            step = jax.checkpoint(step, prevent_cse=False)
        x, _ = jax.lax.scan(step, x, (stacked, per_layer))
        return self.final_norm(x)

    def embed(
        self, tokens: Int32[Array, "B T"], *, positions: Int32[Array, "#B T"] | None
    ) -> tuple[Float[Array, "B T D"], Float32[Array, "#B T half"]]:
        """What the first layer reads, and the rotary angles of all layers."""
        config = self.config
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        angles = layers.rotary_angles(
            positions,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
        )
        rows = self.embedding[...].at[tokens].get(mode="fill", wrap_negative_indices=False)
        return rows.astype(config.dtype), angles

    def logits(self, hidden: Float[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """Logits of any stretch of the hidden states, so that a loss can take them in chunks."""
        head = self.embedding if self.config.tie_embeddings else self.head
        table = head[...].astype(hidden.dtype)
        return jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)


def _check_inputs(config: LlamaConfig, tokens, per_layer, positions) -> None:
    if tokens.ndim != 2 or tokens.dtype != jnp.int32:
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; "
            "it must be int32 of shape [batch, length]"
        )
    if positions is not None:
        batch, length = tokens.shape
        if positions.shape not in ((batch, length), (1, length)) or positions.dtype != jnp.int32:
            raise ValueError(
                f"positions has shape {positions.shape} and dtype {positions.dtype}; it must be "
                f"int32 of shape {(batch, length)} like tokens, or {(1, length)} for all rows"
            )
    for path, leaf in jax.tree.leaves_with_path(per_layer):
        if jnp.ndim(leaf) == 0 or leaf.shape[0] != config.num_layers:
            raise ValueError(
                f"per_layer{jax.tree_util.keystr(path)} has shape {jnp.shape(leaf)}; "
                f"its first axis must be num_layers={config.num_layers}"
            )
