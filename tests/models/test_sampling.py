"""What tokens may be drawn, with what probability, against the definitions in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.models.sampling import Sampling, candidates, sample
from tests.oracles import generation as oracle

V = 11
# Powers of two with ties: sums of their probabilities are exact in float32.
HALVES = np.log2([1, 16, 4, 4, 2, 2, 1, 1, 1]).astype(np.float32) * np.float32(np.log(2))

COMBINATIONS = [
    pytest.param(Sampling(temperature=0.7), id="temperature"),
    pytest.param(Sampling(temperature=1.5, top_k=4), id="top_k"),
    pytest.param(Sampling(temperature=1.0, top_k=99), id="top_k-above-vocabulary"),
    pytest.param(Sampling(temperature=0.9, top_p=0.6), id="top_p"),
    pytest.param(Sampling(temperature=1.0, top_p=1.0), id="top_p-all"),
    pytest.param(Sampling(temperature=1.0, top_p=1e-9), id="top_p-one"),
    pytest.param(Sampling(temperature=2.0, top_k=5, top_p=0.8), id="top_k-top_p"),
]
jitted_sample = jax.jit(sample)
jitted_candidates = jax.jit(candidates)


def keys_of(seed: int, count: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


def drawn_logits(batch: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=2.0, size=(batch, V)).astype(np.float32)


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """[B, V], of the candidates and 0 elsewhere."""
    logs, tokens = jitted_candidates(jnp.asarray(logits), sampling)
    found = np.zeros(logits.shape)
    np.put_along_axis(found, np.asarray(tokens), np.exp(np.asarray(logs, np.float64)), axis=-1)
    return found


@pytest.mark.parametrize("sampling", COMBINATIONS)
def test_probabilities_are_their_definition(sampling: Sampling) -> None:
    logits = drawn_logits()
    expected = [
        oracle.probabilities(row, sampling.temperature, sampling.top_k, sampling.top_p)
        for row in logits
    ]
    found = probabilities(logits, sampling)
    np.testing.assert_array_equal(found > 0, np.stack(expected) > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=2.0, top_k=5, top_p=0.8),
        pytest.param(Sampling(temperature=0.7), marks=pytest.mark.full),
        pytest.param(Sampling(temperature=1.5, top_k=4), marks=pytest.mark.full),
        pytest.param(Sampling(temperature=0.9, top_p=0.6), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_what_is_drawn_is_a_candidate_and_each_is_drawn(sampling: Sampling) -> None:
    logits = np.linspace(-0.5, 0.5, V, dtype=np.float32)[None]
    allowed = np.flatnonzero(
        oracle.probabilities(logits[0], sampling.temperature, sampling.top_k, sampling.top_p)
    )
    drawn = jitted_sample(jnp.asarray(np.repeat(logits, 400, 0)), sampling, keys_of(0, 400))
    assert drawn.dtype == jnp.int32
    assert set(np.asarray(drawn).tolist()) == set(allowed.tolist())


@pytest.mark.parametrize(
    ("cut", "support"),
    [
        ({"top_k": 2}, [1, 2]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 4}, [1, 2, 3, 4]),
        ({"top_p": 0.5}, [1]),
        ({"top_p": 0.625}, [1, 2]),
        ({"top_p": 0.63}, [1, 2, 3]),
        ({"top_p": 0.76}, [1, 2, 3, 4]),
        ({"top_k": 3, "top_p": 0.66}, [1]),  # 16 of the 24 that top_k left
        ({"top_k": 3, "top_p": 0.67}, [1, 2]),
    ],
    ids=str,
)
def test_cuts_are_exact_and_of_equals_keep_the_first(cut: dict, support: list) -> None:
    sampling = Sampling(temperature=1.0, **cut)
    assert np.flatnonzero(probabilities(HALVES[None], sampling)[0]).tolist() == support


def test_the_most_probable_token_without_a_temperature() -> None:
    logits = drawn_logits(5)
    logits[2, [3, 7]] = 9.0
    tokens = jitted_sample(jnp.asarray(logits), Sampling(), keys_of(0, 5))
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))
    assert tokens[2] == 3


def test_a_key_draws_the_same_again_and_for_one_sequence_alone() -> None:
    sampling, logits, keys = Sampling(temperature=1.0), jnp.asarray(drawn_logits(8)), keys_of(1, 8)
    together = jitted_sample(logits, sampling, keys)
    np.testing.assert_array_equal(jitted_sample(logits, sampling, keys), together)
    alone = [jitted_sample(logits[b : b + 1], sampling, keys[b : b + 1])[0] for b in range(8)]
    np.testing.assert_array_equal(alone, together)
    assert (jitted_sample(logits, sampling, keys_of(2, 8)) != together).any()


def test_another_temperature_is_no_other_program() -> None:
    traces = []

    @jax.jit
    def traced(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
        traces.append(sampling)
        return sample(logits, sampling, keys)

    for temperature in (0.5, 1.0, 2.0):
        sampling = Sampling(temperature=temperature, top_p=temperature / 2)
        traced(jnp.zeros((2, V)), sampling, keys_of(0, 2))
    assert len(traces) == 1


@hypothesis.given(
    seed=st.integers(0, 1000), top_k=st.sampled_from([1, 4, V]), top_p=st.floats(0.01, 1.0)
)
def test_a_smaller_cut_is_part_of_a_larger(seed: int, top_k: int, top_p: float) -> None:
    logits = drawn_logits(1, seed)
    support = functools.partial(probabilities, logits)
    both = support(Sampling(temperature=1.0, top_k=top_k, top_p=top_p)) > 0
    only_k = support(Sampling(temperature=1.0, top_k=top_k)) > 0
    assert (both <= only_k).all()
    assert only_k.sum() == top_k
    assert both[0, logits.argmax()]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": 0.0}, "temperature=0.0 must be a positive number; leave it out"),
        ({"temperature": float("inf")}, "temperature=inf must be a positive number"),
        ({"temperature": float("nan")}, "temperature=nan must be a positive number"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p=0.0 must lie in \(0, 1\]"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1.5 must lie in \(0, 1\]"),
        ({"top_k": 5}, "top_k=5 has no use without a temperature.* pass temperature=1.0"),
        ({"top_p": 0.5}, "top_p=0.5 has no use without a temperature"),
    ],
    ids=str,
)
def test_refuses(settings: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Sampling(**settings)


def test_nothing_is_drawn_without_a_temperature() -> None:
    with pytest.raises(ValueError, match="temperature=None draws nothing; pass a positive number"):
        candidates(jnp.zeros((1, V)), Sampling())
