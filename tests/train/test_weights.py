"""Weights in a file: what comes back, and what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from sparseattn_jax.models import weights as model_weights
from sparseattn_jax.train import config as configs
from sparseattn_jax.train import weights


@pytest.fixture
def llama(tiny_model):
    return tiny_model.llama()


def test_weights_survive_their_file_to_half_precision(tmp_path, llama, tiny_weights) -> None:
    weights.save(tmp_path / "weights.npz", llama, tiny_weights)
    loaded = weights.load(tmp_path / "weights.npz", llama)
    assert jax.tree.structure(loaded) == jax.tree.structure(tiny_weights)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(tiny_weights), strict=True):
        assert ours.dtype == theirs.dtype == np.float32
        np.testing.assert_array_equal(ours, np.float32(np.float16(theirs)))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.npz"]


def test_the_file_fits_any_computation_type(tmp_path, llama, tiny_weights) -> None:
    weights.save(tmp_path / "weights.npz", llama, tiny_weights)
    weights.load(tmp_path / "weights.npz", dataclasses.replace(llama, dtype="bfloat16"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_layers": 3}, "with num_layers 2, and the run's model has 3"),
        ({"rope_theta": 500.0}, "with rope_theta 10000.0, and the run's model has 500.0"),
    ],
    ids=str,
)
def test_weights_of_another_model_are_refused(
    tmp_path, llama, tiny_weights, changes, sentence
) -> None:
    weights.save(tmp_path / "weights.npz", llama, tiny_weights)
    with pytest.raises(configs.InvalidRunError, match=re.escape(sentence)):
        weights.load(tmp_path / "weights.npz", dataclasses.replace(llama, **changes))


def test_windows_are_part_of_the_model(tmp_path, llama, tiny_weights) -> None:
    """They have no arrays, so the configuration alone tells."""
    windowed = dataclasses.replace(llama, sliding_window=4, sliding_layers=(1,))
    weights.save(tmp_path / "windowed.npz", windowed, tiny_weights)
    weights.load(tmp_path / "windowed.npz", windowed)
    found = model_weights.load(tmp_path / "windowed.npz", dtype=windowed.dtype).config
    assert (found.sliding_window, found.sliding_layers) == (4, (1,))
    with pytest.raises(configs.InvalidRunError, match=r"sliding_window 4, .* model has None"):
        weights.load(tmp_path / "windowed.npz", llama)
    weights.save(tmp_path / "plain.npz", llama, tiny_weights)
    with pytest.raises(configs.InvalidRunError, match=r"sliding_window None, .* model has 4"):
        weights.load(tmp_path / "plain.npz", windowed)


def test_a_file_without_an_array_is_refused(tmp_path, llama, tiny_weights) -> None:
    without = {name: tiny_weights[name] for name in tiny_weights if name != "final_norm"}
    weights.save(tmp_path / "weights.npz", llama, without)
    with pytest.raises(configs.InvalidRunError, match=r"odd: \['final_norm\.scale'\]"):
        weights.load(tmp_path / "weights.npz", llama)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive"], ids=str)
def test_a_file_that_is_no_archive_is_refused(tmp_path, llama, content: bytes) -> None:
    (tmp_path / "weights.npz").write_bytes(content)
    with pytest.raises(configs.InvalidRunError, match="holds no weights that a run wrote"):
        weights.load(tmp_path / "weights.npz", llama)


def test_another_archive_is_refused(tmp_path, llama) -> None:
    np.savez(tmp_path / "weights.npz", table=np.ones(3))
    with pytest.raises(configs.InvalidRunError, match="holds no weights that a run wrote"):
        weights.load(tmp_path / "weights.npz", llama)
