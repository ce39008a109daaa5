"""Planted questions on held-out text, with given gates."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float32, Int, Int32, PyTree

from sparseattn_jax.train import data, gated_model, head_masks
from sparseattn_jax.train.config import TrainConfig
from sparseattn_jax.train.step import streaming

# Evaluation draws records of its own, not those of the training steps.
_SEED_OFFSET = 1_000_003


@dataclasses.dataclass(frozen=True)
class Score:
    """Answers on held-out records.

    Attributes:
        accuracy: share of questions whose every digit has the highest logit, so that greedy
            decoding writes the whole answer.
        text_loss: mean cross-entropy of the bytes before the questions, in nats.
    """

    accuracy: float
    text_loss: float


def make_evaluation(
    config: TrainConfig, weights: PyTree, text: data.Text
) -> Callable[[Int[np.ndarray, "L K"] | None], Score]:
    """Scores a mask of heads, always on the same records; None is dense attention."""
    answers = data.answer_positions(config.data)
    text_end = data.first_question(config.data)

    @jax.jit
    def measure(
        weights: PyTree, gates: Float32[Array, "L K"] | None, tokens: Int32[Array, "B record"]
    ) -> tuple[Array, Array]:
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        logits = gated_model.logits(
            config.model.llama(), weights, inputs, gates=gates, streaming=streaming(config.gates)
        )
        is_right = jnp.argmax(logits[:, answers], axis=-1) == targets[:, answers]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.mean(jnp.all(is_right, axis=-1)), jnp.mean(losses[:, : text_end - 1])

    def evaluate(mask: Int[np.ndarray, "L K"] | None) -> Score:
        gates = None if mask is None else jnp.asarray(mask, jnp.float32)
        seed = config.run.seed + _SEED_OFFSET
        scores = [
            measure(weights, gates, data.make_batch(text, config.data, seed=seed, index=index))
            for index in range(config.evaluation.num_batches)
        ]
        accuracy, loss = np.mean(jax.device_get(scores), axis=0)
        return Score(accuracy=float(accuracy), text_loss=float(loss))

    return evaluate


def score_masks(
    config: TrainConfig, weights: PyTree, learned: Int[np.ndarray, "L K"], text: data.Text
) -> dict[str, list[Score]]:
    """The learned mask against all heads full, random masks of its sparsity, and all streaming."""
    evaluate = make_evaluation(config, weights, text)
    random = np.random.default_rng(config.run.seed)
    random_masks = [
        head_masks.random_mask(learned.shape, int(learned.sum()), random)
        for _ in range(config.evaluation.num_random_masks)
    ]
    return {
        "dense": [evaluate(np.ones_like(learned))],
        "learned": [evaluate(learned)],
        "random": [evaluate(mask) for mask in random_masks],
        "streaming": [evaluate(np.zeros_like(learned))],
    }


def score_needles(config: TrainConfig, weights: PyTree, text: data.Text) -> dict[str, list[Score]]:
    """Dense attention with fewer and fewer planted codes, down to one."""
    scores = {}
    count = config.data.num_needles
    while count:
        fewer = dataclasses.replace(
            config.data, num_needles=count, num_questions=min(count, config.data.num_questions)
        )
        evaluate = make_evaluation(dataclasses.replace(config, data=fewer), weights, text)
        scores[f"needles: {count}"] = [evaluate(None)]
        count //= 2
    return scores
