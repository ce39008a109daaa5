"""LLaMA's family of models in Flax nnx, with the attention function as an argument."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int32, PyTree

from sparseattn_jax.checks import checked
from sparseattn_jax.models import layers
from sparseattn_jax.models.attention import (
    Attend,
    Attention,
    LayerRun,
    check_per_layer,
    dense_runs,
    stateless,
)
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


def _check_tokens(tokens) -> None:
    if tokens.ndim != 2 or tokens.dtype != jnp.int32:
        raise ValueError(
            f"tokens has shape {tokens.shape} and dtype {tokens.dtype}; "
            "it must be int32 of shape [batch, length]"
        )


def _check_positions(tokens, positions) -> None:
    if positions is None:
        return
    batch, length = tokens.shape
    if positions.shape not in ((batch, length), (1, length)) or positions.dtype != jnp.int32:
        raise ValueError(
            f"positions has shape {positions.shape} and dtype {positions.dtype}; it must be "
            f"int32 of shape {(batch, length)} like tokens, or {(1, length)} for all rows"
        )


def _check_layers(self, attend, per_layer) -> None:
    check_per_layer(per_layer, self.config.num_layers)
    if attend is None and per_layer is not None:
        raise ValueError(
            "per_layer has no reader: dense attention, the default, takes no layer input; "
            "pass the attend that uses it"
        )


def _check_runs(self, runs) -> None:
    lengths = [run.num_layers for run in runs]
    if sum(lengths) != self.config.num_layers:
        raise ValueError(
            f"runs have {lengths} layers, {sum(lengths)} together; they must cover the model's "
            f"num_layers={self.config.num_layers} in order"
        )


class Llama(nnx.Module):
    """A decoder-only language model (Touvron et al., arXiv:2302.13971) of LLaMA's family.

    The parameters of all layers are stacked, `[num_layers, ...]`, and the layers are scanned: an
    80-layer model compiles like a 1-layer one.

    Weights are drawn from normal(0, s): s = 1 / sqrt(inputs) for projections, divided by
    sqrt(2 num_layers) for those that write to the residual stream, and 1 / sqrt(embed_dim) for
    the embedding and the head. Norms start at 1, biases at 0.

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

    @checked(_check_tokens, _check_positions, _check_layers)
    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        *,
        attend: Attend | None = None,
        per_layer: PyTree = None,
        positions: Int32[Array, "#B T"] | None = None,
        remat: bool = False,
    ) -> Float32[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
            tokens: ids in [0, vocab_size).
            attend: the attention function of every layer; by default it is dense and causal, and
                windowed in sliding layers.
            per_layer: arrays whose first axis is num_layers; `attend` gets its layer's slice.
            positions: of the tokens, for the rotary embedding; 0, 1, ... unless given.
            remat: recompute each layer in the backward pass instead of keeping its activations.

        Raises:
            ValueError: an argument has another shape or dtype, or per_layer has no reader.
        """
        hidden = self.hidden_states(
            tokens, attend=attend, per_layer=per_layer, positions=positions, remat=remat
        )
        return self.logits(hidden)

    @checked(_check_tokens, _check_positions, _check_layers)
    def hidden_states(
        self,
        tokens: Int32[Array, "B T"],
        *,
        attend: Attend | None = None,
        per_layer: PyTree = None,
        positions: Int32[Array, "#B T"] | None = None,
        remat: bool = False,
    ) -> Float[Array, "B T D"]:
        """What `logits` takes: the residual stream after the last norm; arguments as the call's."""
        if attend is None:
            runs = dense_runs(self.config)
        else:
            num_layers = self.config.num_layers
            run = LayerRun(num_layers=num_layers, attend=stateless(attend), per_layer=per_layer)
            runs = (run,)
        x, angles = self.embed(tokens, positions=positions)
        return self.final_norm(self._run_layers(x, angles, None, runs, remat=remat)[0])

    @checked(_check_tokens, _check_positions, _check_runs)
    def cached_hidden_states(
        self,
        tokens: Int32[Array, "B T"],
        state: PyTree,
        *,
        runs: Sequence[LayerRun],
        positions: Int32[Array, "#B T"],
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        """Hidden states where attention reads and writes a state, as a KV cache, layer by layer.

        The state is carried through the scans, so that under jit it is changed in place. A single
        run scans the stacked parameters. Several read theirs from the whole stack by the layer's
        index, since slices would be copies of the weights; its gradient adds to the whole stack in
        every layer, so train with a single run.

        Args:
            tokens: ids in [0, vocab_size).
            state: what the first layer's `attend` gets.
            runs: of all layers, in order.
            positions: of the tokens, for the rotary embedding.

        Returns:
            What `logits` takes, and the state that the last layer returned.

        Raises:
            ValueError: tokens or positions have another shape or dtype, or the runs do not cover
                the model's layers.
        """
        x, angles = self.embed(tokens, positions=positions)
        x, state = self._run_layers(x, angles, state, runs, remat=False)
        return self.final_norm(x), state

    def _run_layers(
        self,
        x: Float[Array, "B T D"],
        angles: Float32[Array, "#B T half"],
        state: PyTree,
        runs: Sequence[LayerRun],
        *,
        remat: bool,
    ) -> tuple[Float[Array, "B T D"], PyTree]:
        graphdef, stacked = nnx.split(self.layers)
        is_single = len(runs) == 1
        first = 0
        for run in runs:
            step = _layer_step(graphdef, stacked, angles, run)
            if remat:
                step = jax.checkpoint(step, prevent_cse=False)
            indices = jnp.arange(first, first + run.num_layers, dtype=jnp.int32)
            inputs = indices, stacked if is_single else None, run.per_layer
            (x, state), _ = jax.lax.scan(step, (x, state), inputs)
            first += run.num_layers
        return x, state

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


def _layer_step(
    graphdef: nnx.GraphDef,
    stacked: PyTree,
    angles: Float32[Array, "#B T half"],
    run: LayerRun,
) -> Callable[[tuple[Array, PyTree], tuple[Array, PyTree, PyTree]], tuple]:
    """One step of the scan over a run's layers: from (x, state) to (x, state).

    Its inputs are the layer's index, its parameters or None to take them from the stack, and its
    slice of the run's per_layer.
    """

    def step(
        carry: tuple[Array, PyTree], inputs: tuple[Array, PyTree, PyTree]
    ) -> tuple[tuple[Array, PyTree], None]:
        x, state = carry
        layer, params, layer_input = inputs
        if params is None:
            take = functools.partial(
                jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False
            )
            params = jax.tree.map(lambda leaf: take(leaf, layer), stacked)

        # The layer knows an attention without state; the state goes around it.
        def attend(q: Array, k: Array, v: Array, layer_input: PyTree, /) -> Array:
            nonlocal state
            out, state = run.attend(q, k, v, layer_input, state, layer)
            return out

        x = nnx.merge(graphdef, params)(x, angles, attend=attend, layer_input=layer_input)
        return (x, state), None

    return step


def abstract(config: LlamaConfig) -> tuple[nnx.GraphDef, PyTree]:
    """The structure of a model, and the shapes of its parameters by name; nothing is allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
