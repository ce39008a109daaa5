"""The training step: state and batch in, state and metrics out."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int32, PyTree

from sparseattn_jax import Streaming
from sparseattn_jax.train import data, gated_model, head_masks, objective
from sparseattn_jax.train.config import GatesConfig, TrainConfig
from sparseattn_jax.train.optimizer import make_optimizer

type Metrics = dict[str, Float32[Array, ""]]


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from shapes and from what a checkpoint held
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that a step reads and writes.

    Attributes:
        step: steps done.
        params: {"weights": ...} and, where gates learn, "log_alpha" and "multipliers".
        optimizer: state of the optimizer.
    """

    step: Int32[Array, ""]
    params: PyTree
    optimizer: PyTree


def initial_state(config: TrainConfig, weights: PyTree) -> TrainState:
    """The state before the first step."""
    params = {"weights": weights}
    if config.gates.train:
        params["log_alpha"] = head_masks.initialise(
            jax.random.fold_in(jax.random.key(config.run.seed), 0),
            (config.model.num_layers, config.model.num_kv_heads),
            mean=config.gates.initial_log_alpha,
            stddev=config.gates.initial_stddev,
        )
        params["multipliers"] = objective.initial_multipliers()
    return TrainState(step=jnp.int32(0), params=params, optimizer=_optimizer(config).init(params))


def make_train_step(
    config: TrainConfig,
) -> Callable[[TrainState, Int32[Array | np.ndarray, "B record"]], tuple[TrainState, Metrics]]:
    """The jitted step of a configuration; it takes over the buffers of the state it is given."""
    optimizer = _optimizer(config)
    gate_key = jax.random.fold_in(jax.random.key(config.run.seed), 1)
    answers = data.answer_positions(config.data)
    loss_weights = np.ones(config.data.sequence_length, np.float32)
    loss_weights[answers] = config.data.answer_weight

    def losses(params: PyTree, tokens: Array, step: Array) -> tuple[Array, Metrics]:
        weights, gates = params["weights"], None
        if not config.optimizer.train_weights:
            weights = jax.lax.stop_gradient(weights)
        if config.gates.train:
            gates = head_masks.sample(params["log_alpha"], jax.random.fold_in(gate_key, step))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = gated_model.logits(
            config.model.llama(), weights, inputs, gates=gates, streaming=streaming(config.gates)
        )
        loss = objective.language_model_loss(logits, targets, jnp.asarray(loss_weights))
        is_right = jnp.argmax(logits[:, answers], axis=-1) == targets[:, answers]
        metrics = {"lm_loss": loss, "accuracy": jnp.mean(jnp.all(is_right, axis=-1))}
        if config.gates.train:
            sparsity = objective.expected_sparsity(params["log_alpha"])
            target = objective.target_sparsity(
                step,
                start=config.gates.start_head_sparsity,
                end=config.gates.end_head_sparsity,
                warmup_steps=objective.warmup_steps(
                    config.gates.sparsity_warmup_ratio, config.run.num_steps
                ),
            )
            penalty = objective.lagrangian(sparsity, target, params["multipliers"])
            loss += penalty
            metrics |= {
                "sparsity_loss": penalty,
                "sparsity": sparsity,
                "target_sparsity": target,
                "linear_multiplier": params["multipliers"]["linear"],
                "quadratic_multiplier": params["multipliers"]["quadratic"],
            }
        return loss, {"loss": loss, **metrics}

    def train_step(state: TrainState, tokens: Array) -> tuple[TrainState, Metrics]:
        gradients, metrics = jax.grad(losses, has_aux=True)(state.params, tokens, state.step)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(step=state.step + 1, params=params, optimizer=optimizer_state), metrics

    return jax.jit(train_step, donate_argnums=0)


def streaming(config: GatesConfig) -> Streaming:
    """The pattern of a head whose gate is 0."""
    return Streaming(
        sink_size=config.sink_size, recent_size=config.recent_size, block_size=config.block_size
    )


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    return make_optimizer(
        config.optimizer, num_steps=config.run.num_steps, train_gates=config.gates.train
    )
