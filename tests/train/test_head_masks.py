"""Gates: the hard-concrete distribution by its formulas, masks of heads, and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.train import head_masks
from sparseattn_jax.train.config import InvalidRunError


def drawn(log_alpha: float, count: int = 20_000, seed: int = 0) -> np.ndarray:
    return np.asarray(head_masks.sample(jnp.full((1, count), log_alpha), jax.random.key(seed)))


def hard_concrete(uniform: np.ndarray, log_alpha: float) -> np.ndarray:
    """The formula, arXiv:1712.01312 equations 10 and 11, in float64."""
    logit = (np.log(uniform) - np.log(1 - uniform) + log_alpha) / (2 / 3)
    return np.clip(1.2 / (1 + np.exp(-logit)) - 0.1, 0, 1)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5986, 0.0, 1.0, 4.0])
def test_samples_follow_the_formula(log_alpha: float) -> None:
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    expected = hard_concrete(quantiles, log_alpha)
    np.testing.assert_allclose(drawn(log_alpha).mean(), expected.mean(), atol=0.01)
    np.testing.assert_allclose(drawn(log_alpha).std(), expected.std(), atol=0.01)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5986, 0.0, 1.0, 4.0])
def test_probability_of_zero_is_the_share_of_zeros(log_alpha: float) -> None:
    closed_form = head_masks.probability_of_zero(jnp.full((1, 1), log_alpha)).item()
    np.testing.assert_allclose(closed_form, np.mean(drawn(log_alpha) == 0), atol=0.01)


def test_half_the_gates_are_zero_where_log_alpha_is_minus_1_6() -> None:
    probability = head_masks.probability_of_zero(jnp.array([[-1.5986, 4.0]]))
    np.testing.assert_allclose(probability, [[0.5, 0.0037]], atol=1e-4)


def test_samples_depend_on_the_key_alone() -> None:
    assert (drawn(0.0, seed=1) == drawn(0.0, seed=1)).all()
    assert (drawn(0.0, seed=1) != drawn(0.0, seed=2)).any()


def test_gradient_is_zero_exactly_where_a_gate_is_clipped() -> None:
    log_alpha = jnp.zeros((50, 50))
    key = jax.random.key(3)
    gates = head_masks.sample(log_alpha, key)
    gradient = jax.grad(lambda a: jnp.sum(head_masks.sample(a, key)))(log_alpha)
    is_clipped = (gates == 0) | (gates == 1)
    assert 0.1 < jnp.mean(is_clipped) < 0.9
    assert ((gradient == 0) == is_clipped).all()


def test_deterministic_gates_zero_as_many_as_expected_per_layer() -> None:
    log_alpha = jnp.array(
        [
            [4.0, 4.0, 4.0, 4.0],  # none expected
            [-6.0, 4.0, -6.0, 4.0],  # two
            [-1.6, -1.6, -1.6, -1.6],  # two of four equals: the ones of higher index
        ]
    )
    gates = head_masks.deterministic_gates(log_alpha)
    open_gate = 1 / (1 + np.exp(-4.0 / (2 / 3) * 0.8))
    half_open = 1 / (1 + np.exp(1.6 / (2 / 3) * 0.8))
    np.testing.assert_allclose(
        gates,
        [
            [open_gate, open_gate, open_gate, open_gate],
            [0, open_gate, 0, open_gate],
            [half_open, half_open, 0, 0],
        ],
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("sparsity", "mask"),
    [
        (0.0, [[1, 1, 1], [1, 1, 1]]),
        (0.5, [[1, 1, 0], [1, 0, 0]]),
        (0.7, [[1, 0, 0], [1, 0, 0]]),
        (1.0, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_rounding_keeps_the_highest_and_of_equals_the_first(sparsity: float, mask: list) -> None:
    log_alpha = jnp.array([[3.0, 1.0, 1.0], [5.0, 1.0, -2.0]])
    assert head_masks.round_to_sparsity(log_alpha, sparsity).tolist() == mask


@pytest.mark.parametrize("sparsity", [-0.1, 1.1, float("nan")])
def test_rounding_refuses_what_is_no_share(sparsity: float) -> None:
    with pytest.raises(ValueError, match=rf"sparsity={sparsity} must lie in \[0, 1\]"):
        head_masks.round_to_sparsity(jnp.zeros((2, 2)), sparsity)


def test_random_masks_keep_the_given_number() -> None:
    random = np.random.default_rng(0)
    masks = [head_masks.random_mask((4, 4), 5, random) for _ in range(20)]
    assert all(mask.sum() == 5 and mask.shape == (4, 4) for mask in masks)
    assert len({mask.tobytes() for mask in masks}) > 10


def test_masks_survive_their_file(tmp_path) -> None:
    mask = np.array([[1, 0, 0], [0, 1, 1]])
    head_masks.write_tsv(tmp_path / "masks.tsv", mask)
    assert (tmp_path / "masks.tsv").read_text() == "1\t0\t0\n0\t1\t1\n"
    read = head_masks.read_tsv(tmp_path / "masks.tsv", num_layers=2, num_kv_heads=3)
    assert (read == mask).all()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1\t0\n0\t1\n", "has 2 layers of 2 KV heads; the model has 2 of 3"),
        ("1\t0\t1\n", "has 1 layers of 3 KV heads; the model has 2 of 3"),
        ("1\t0\t1\n0\t1\n", "line 2 has 2 kv heads, line 1 has 3"),
        ("1\t0.5\t1\n1\t1\t1\n", "line 1: 0.5 must be 0 or 1"),
        ("", "masks.tsv is empty"),
    ],
    ids=["heads", "layers", "ragged", "gates", "empty"],
)
def test_masks_of_another_model_are_refused(tmp_path, text: str, sentence: str) -> None:
    (tmp_path / "masks.tsv").write_text(text)
    with pytest.raises(InvalidRunError, match=sentence):
        head_masks.read_tsv(tmp_path / "masks.tsv", num_layers=2, num_kv_heads=3)
