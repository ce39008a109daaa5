"""One training step: what moves, what stays, and what it depends on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.train import data, gated_model, head_masks, objective, step
from sparseattn_jax.train.config import TrainConfig


def changed(config: TrainConfig, section: str, **values) -> TrainConfig:
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **values)}
    )


def fresh_state(config: TrainConfig, weights) -> step.TrainState:
    """A state whose buffers a step may take over."""
    return step.initial_state(config, jax.tree.map(jnp.copy, weights))


def batch_of(config: TrainConfig) -> jax.Array:
    text = data.load_text(config.data)[0]
    return jnp.asarray(data.make_batch(text, config.data, seed=0, index=0))


def equal(first, second) -> bool:
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return all(bool((a == b).all()) for a, b in leaves)


@pytest.fixture(scope="module")
def stepped(tiny_config, tiny_weights):
    """The state before and after two steps on one batch, and the metrics of both."""
    config = changed(tiny_config, "optimizer", warmup_ratio=0.0)
    config = changed(config, "gates", start_head_sparsity=0.6, initial_log_alpha=0.0)
    before = fresh_state(config, tiny_weights)
    train_step = step.make_train_step(config)
    batch = batch_of(config)
    after, first = train_step(fresh_state(config, tiny_weights), batch)
    after, second = train_step(after, batch)
    return config, before, after, (first, second)


def test_gates_and_multipliers_move_and_frozen_weights_stay(stepped) -> None:
    _, before, after, _ = stepped
    assert after.step == 2
    assert equal(before.params["weights"], after.params["weights"])
    assert (before.params["log_alpha"] != after.params["log_alpha"]).all()
    # Below its target the sparsity makes the linear multiplier negative.
    assert after.params["multipliers"]["linear"] < 0
    assert after.params["multipliers"]["quadratic"] > 0


def test_metrics_are_those_of_the_gates_of_the_step(stepped) -> None:
    config, before, _, (first, second) = stepped
    batch = batch_of(config)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.run.seed), 1), 0)
    gates = head_masks.sample(before.params["log_alpha"], key)
    logits = gated_model.logits(
        config.model.llama(),
        before.params["weights"],
        batch[:, :-1],
        gates=gates,
        streaming=step.streaming(config.gates),
    )
    weights = np.ones(config.data.sequence_length, np.float32)
    weights[data.answer_positions(config.data)] = config.data.answer_weight
    expected = objective.language_model_loss(logits, batch[:, 1:], jnp.asarray(weights))
    np.testing.assert_allclose(first["lm_loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(first["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(second["target_sparsity"], 0.6 + 0.1 / 7, rtol=1e-5)
    np.testing.assert_allclose(
        second["loss"], second["lm_loss"] + second["sparsity_loss"], rtol=1e-5
    )


def test_draws_differ_between_steps(stepped) -> None:
    _, _, _, (first, second) = stepped
    assert first["lm_loss"] != second["lm_loss"]


def test_pre_training_moves_the_weights_and_has_no_gates(tiny_config, tiny_weights) -> None:
    config = changed(
        tiny_config,
        "optimizer",
        train_weights=True,
        weights_learning_rate=0.01,
        embedding_learning_rate=0.01,
        warmup_ratio=0.0,
    )
    config = changed(config, "gates", train=False)
    before = fresh_state(config, tiny_weights)
    assert before.params.keys() == {"weights"}
    train_step = step.make_train_step(config)
    after, first = train_step(fresh_state(config, tiny_weights), batch_of(config))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, after.params)
    assert all(jax.tree.leaves(moved))
    # The step takes over the state's buffers, so `after` is read before it.
    _, second = train_step(after, batch_of(config))
    assert second["loss"] < first["loss"]
    assert first.keys() == {"loss", "lm_loss", "accuracy"}


def test_accuracy_counts_answers_whose_every_digit_is_right(
    tiny_config, tiny_weights, monkeypatch
) -> None:
    config = tiny_config
    batch = batch_of(config)

    def logits(llama, weights, tokens, *, gates, streaming):
        """Right everywhere but for one digit of the first record's answer."""
        position = data.answer_positions(config.data)[0, 2]
        wrong = batch[:, 1:].at[0, position].add(1)
        return 9.0 * jax.nn.one_hot(wrong, llama.vocab_size)

    monkeypatch.setattr(gated_model, "logits", logits)
    state = fresh_state(config, tiny_weights)
    _, metrics = step.make_train_step(config)(state, batch)
    assert metrics["accuracy"] == 0.5
