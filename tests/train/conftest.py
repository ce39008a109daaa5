"""A run small enough for a test: the real program on a model of two layers."""

import dataclasses

import jax
import pytest

from sparseattn_jax.train import config as configs
from sparseattn_jax.train import gated_model, weights


@pytest.fixture(scope="session")
def tiny_model() -> configs.ModelConfig:
    return configs.ModelConfig(
        initial_weights="",
        num_layers=2,
        embed_dim=16,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=16,
        rope_theta=10000.0,
        dtype="float32",
    )


@pytest.fixture(scope="session")
def tiny_weights(tiny_model):
    """The weights of an untrained model."""
    return gated_model.draw_weights(tiny_model.llama(), jax.random.key(0))


@pytest.fixture(scope="session")
def tiny_config(tiny_model, tiny_weights, tmp_path_factory) -> configs.TrainConfig:
    """Gates on an untrained model, 8 steps."""
    path = tmp_path_factory.mktemp("weights") / "tiny.npz"
    weights.save(path, tiny_model.llama(), tiny_weights)
    shipped = configs.load("masks")
    return dataclasses.replace(
        shipped,
        run=dataclasses.replace(
            shipped.run,
            name="tiny",
            num_steps=8,
            log_every=1,
            save_every=4,
        ),
        model=dataclasses.replace(tiny_model, initial_weights=str(path)),
        data=dataclasses.replace(
            shipped.data,
            sequence_length=208,
            batch_size=2,
            num_needles=2,
            num_questions=1,
            min_depth=16,
            min_distance=48,
        ),
        gates=dataclasses.replace(shipped.gates, sink_size=16, recent_size=32, block_size=16),
        evaluation=configs.EvaluationConfig(num_batches=1, num_random_masks=2),
    )
