"""One optimizer, four kinds of parameters: each label has its own rule."""

from collections.abc import Hashable

import jax
import optax
import optax.contrib
from jaxtyping import PyTree

from sparseattn_jax.train.config import OptimizerConfig
from sparseattn_jax.train.objective import warmup_steps

ADAM_B1 = 0.9
ADAM_B2 = 0.95


def make_optimizer(
    config: OptimizerConfig, *, num_steps: int, train_gates: bool
) -> optax.GradientTransformation:
    """Updates for {"weights": ...} and, where gates learn, "log_alpha" and "multipliers".

    The weights' matrices move by Muon (Jordan et al., 2024), their embedding and norms by Adam.
    Frozen weights keep no state. Gates and multipliers have no weight decay, unlike PruLong's,
    whose rate of 1 times a decay of 0.1 pulls both towards 0 at every step.
    """
    labels = {"weights": "weights" if config.train_weights else "frozen"}
    if train_gates:
        labels |= {"log_alpha": "log_alpha", "multipliers": "multipliers"}

    def schedule(peak: float) -> optax.Schedule:
        return learning_rate(config, peak, num_steps)

    rules: dict[Hashable, optax.GradientTransformation] = {
        "weights": optax.chain(
            optax.clip_by_global_norm(config.clip_norm),
            optax.contrib.muon(
                schedule(config.weights_learning_rate),
                adam_learning_rate=schedule(config.embedding_learning_rate),
                adam_b1=ADAM_B1,
                adam_b2=ADAM_B2,
                weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=_matrices,
            ),
        ),
        "log_alpha": optax.adam(schedule(config.mask_learning_rate), b1=ADAM_B1, b2=ADAM_B2),
        "multipliers": optax.chain(
            optax.scale(-1.0),
            optax.adam(schedule(config.reg_learning_rate), b1=ADAM_B1, b2=ADAM_B2),
        ),
        "frozen": optax.set_to_zero(),
    }
    return optax.multi_transform(rules, labels)


def learning_rate(config: OptimizerConfig, peak: float, num_steps: int) -> optax.Schedule:
    """Linear from 0 to the peak, then a cosine to min_lr_ratio of it."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=peak,
        warmup_steps=warmup_steps(config.warmup_ratio, num_steps),
        decay_steps=num_steps,
        end_value=peak * config.min_lr_ratio,
    )


def _matrices(params: PyTree) -> PyTree:
    """The axes of each layer's matrices, stacked over layers; None for embedding and norms."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return jax.tree.map_with_path(
        lambda path, _: axes if path[-1].key == "kernel" else None, params
    )
