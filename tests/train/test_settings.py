"""Every setting is read: changing it alone changes what the run does.

Settings of the run's folder, of the target sparsity and of training or freezing are changed in
test_main.py and test_step.py.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.train import config as configs
from sparseattn_jax.train import data, evaluation, objective, optimizer, step


def changed(config: configs.TrainConfig, setting: str, value) -> configs.TrainConfig:
    section, name = setting.split(".")
    return dataclasses.replace(
        config, **{section: dataclasses.replace(getattr(config, section), **{name: value})}
    )


def differ(first, second) -> bool:
    ours, theirs = jax.tree.leaves(first), jax.tree.leaves(second)
    return any(
        np.shape(a) != np.shape(b) or bool(np.any(a != b))
        for a, b in zip(ours, theirs, strict=True)
    )


def records(config: configs.TrainConfig) -> list[np.ndarray]:
    training, held_out = data.load_text(config.data)
    seed = config.run.seed
    return [data.make_batch(text, config.data, seed=seed, index=0) for text in (training, held_out)]


@pytest.fixture(scope="module")
def another_text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "another.txt"
    path.write_text("Call me Ishmael. " * 1000)
    return str(path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("run.seed", 1),
        ("data.text", None),
        ("data.held_out", 0.2),
        ("data.sequence_length", 224),
        ("data.batch_size", 3),
        ("data.num_needles", 3),
        ("data.num_questions", 2),
        ("data.min_depth", 30),
        ("data.min_distance", 60),
    ],
)
def test_records(tiny_config, another_text, setting: str, value) -> None:
    value = another_text if value is None else value
    assert differ(records(tiny_config), records(changed(tiny_config, setting, value)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("run.seed", 1),
        ("model.num_layers", 3),
        ("model.num_kv_heads", 4),
        ("gates.initial_log_alpha", 3.0),
        ("gates.initial_stddev", 0.5),
    ],
)
def test_gates_at_the_start(tiny_config, tiny_weights, setting: str, value) -> None:
    def log_alpha(config: configs.TrainConfig):
        return step.initial_state(config, tiny_weights).params["log_alpha"]

    assert differ(log_alpha(tiny_config), log_alpha(changed(tiny_config, setting, value)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("gates.sink_size", 0), ("gates.recent_size", 16), ("gates.block_size", 8)],
)
def test_streaming_heads(tiny_config, setting: str, value: int) -> None:
    def listed(config: configs.TrainConfig):
        q, k = jnp.zeros((1, 96, 4, 8)), jnp.zeros((1, 96, 2, 8))
        return step.streaming(config.gates).select(q, k).blocks.kv_num_blocks

    assert differ(listed(tiny_config), listed(changed(tiny_config, setting, value)))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model.num_layers", 3),
        ("model.embed_dim", 32),
        ("model.num_heads", 2),
        ("model.num_kv_heads", 4),
        ("model.head_dim", 16),
        ("model.mlp_dim", 32),
        ("model.rope_theta", 500.0),
        ("model.dtype", "bfloat16"),
    ],
)
def test_the_model(tiny_config, setting: str, value) -> None:
    assert tiny_config.model.llama() != changed(tiny_config, setting, value).model.llama()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("run.num_steps", 9),
        ("optimizer.warmup_ratio", 0.5),
        ("optimizer.min_lr_ratio", 0.5),
        ("optimizer.mask_learning_rate", 0.123),
        ("optimizer.reg_learning_rate", 0.123),
        ("optimizer.weights_learning_rate", 0.123),
        ("optimizer.embedding_learning_rate", 0.123),
        ("optimizer.weight_decay", 0.5),
        ("optimizer.clip_norm", 1e-9),
        ("optimizer.train_weights", False),
    ],
)
def test_updates(tiny_config, setting: str, value) -> None:
    params = {
        "weights": {"kernel": jnp.ones((2, 3, 3)), "scale": jnp.ones(2)},
        "log_alpha": jnp.ones((2, 2)),
        "multipliers": objective.initial_multipliers(),
    }

    def updated(config: configs.TrainConfig):
        rule = optimizer.make_optimizer(
            config.optimizer, num_steps=config.run.num_steps, train_gates=True
        )
        state = rule.init(params)
        for gradient in (1.0, 3.0, 0.5):
            gradients = jax.tree.map(lambda leaf, size=gradient: jnp.full_like(leaf, size), params)
            updates, state = rule.update(gradients, state, params)
        return updates

    config = changed(tiny_config, "optimizer.train_weights", True)
    config = changed(config, "optimizer.weights_learning_rate", 0.01)
    config = changed(config, "optimizer.embedding_learning_rate", 0.01)
    assert differ(updated(config), updated(changed(config, setting, value)))


@pytest.mark.parametrize(
    ("setting", "value"), [("evaluation.num_batches", 3), ("evaluation.num_random_masks", 4)]
)
def test_evaluation(tiny_config, tiny_weights, monkeypatch, setting: str, value: int) -> None:
    config = changed(tiny_config, setting, value)
    text = data.load_text(config.data)[1]
    read = []

    def counted(*args, **options):
        read.append(options["index"])
        return make_batch(*args, **options)

    make_batch = data.make_batch
    monkeypatch.setattr(data, "make_batch", counted)
    evaluation.score_masks(config, tiny_weights, np.array([[1, 0], [0, 0]]), text)
    # Dense, learned, streaming, and the random masks, each on every batch.
    num_masks = 3 + config.evaluation.num_random_masks
    assert read == num_masks * list(range(config.evaluation.num_batches))
