"""Tiny models of each family, every kind of rotary embedding and padding, against transformers."""

import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sparseattn_jax import Full, Streaming, models, prefill_attention
from sparseattn_jax.models import hf_weights
from tests.goldens import llama_cases

FOLDER = pathlib.Path(llama_cases.__file__).parent


def has_transformers():
    """Version 5: before it, rotary settings had other names."""
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return False
    return int(importlib.metadata.version("transformers").partition(".")[0]) >= 5


@functools.cache
def goldens():
    with np.load(FOLDER / "llama.npz") as file:
        return dict(file)


@functools.cache
def loaded(name):
    """The model of a case, by way of a checkpoint as transformers would have written it."""
    case = json.loads((FOLDER / "llama.json").read_text())["cases"][name]
    shapes = {tensor: tuple(map(int, shape.split())) for tensor, shape in case["tensors"].items()}
    tensors = {tensor: llama_cases.draw_weight(tensor, shapes[tensor]) for tensor in shapes}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        safetensors.numpy.save_file(tensors, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(case["config"]))
        return hf_weights.load(path, dtype=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens):
    """Logits, and the residual stream after each layer, the last one normed."""
    model = nnx.merge(graphdef, params)
    x, angles = model.embed(tokens, positions=None)
    layer_graph, stacked = nnx.split(model.layers)
    states = []
    for run in models.dense_runs(model.config):

        def attend(q, k, v, layer_input, run=run):
            return run.attend(q, k, v, layer_input, None, jnp.int32(len(states)))[0]

        for _ in range(run.num_layers):
            layer = nnx.merge(layer_graph, jax.tree.map(lambda leaf: leaf[len(states)], stacked))
            x = layer(x, angles, attend=attend, layer_input=None)
            states.append(x)
    return model(tokens), jnp.stack([*states[:-1], model.final_norm(x)])


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", llama_cases.CASES)
def test_logits_and_hidden_states(name):
    logits, hidden = forward(*nnx.split(loaded(name)), llama_cases.draw_tokens())
    assert_close(logits, goldens()[f"{name}/logits"])
    assert_close(hidden, goldens()[f"{name}/hidden"])


def runs_with_padding(config, **padding):
    """Dense attention, with windows in sliding layers, that does not see the padding."""

    def attend(strategy, q, k, v, layer_input):
        return prefill_attention(q, k, v, strategy, **padding)

    window = config.sliding_window
    sliding = Streaming(sink_size=0, recent_size=window or 1, exact=True)
    strategies = [
        sliding if layer in config.sliding_layers else Full() for layer in range(config.num_layers)
    ]
    return [
        models.LayerRun(num_layers=1, attend=models.stateless(functools.partial(attend, strategy)))
        for strategy in strategies
    ]


@functools.partial(jax.jit, static_argnums=0)
def forward_right(graphdef, params, tokens, mask):
    """Padding after the tokens: the keys have lengths."""
    model = nnx.merge(graphdef, params)
    runs = runs_with_padding(model.config, kv_lengths=mask.sum(axis=1, dtype=jnp.int32))
    positions = jnp.minimum(jnp.arange(tokens.shape[1])[None], mask.sum(axis=1)[:, None] - 1)
    hidden, _ = model.cached_hidden_states(tokens, None, runs=runs, positions=positions)
    return model.logits(hidden)


@functools.partial(jax.jit, static_argnums=0)
def forward_left(graphdef, params, tokens, mask):
    """Padding before the tokens: a packed sequence of its own; positions count from its end."""
    model = nnx.merge(graphdef, params)
    runs = runs_with_padding(model.config, segment_ids=mask)
    positions = jnp.maximum(mask.cumsum(axis=1) - 1, 0)
    hidden, _ = model.cached_hidden_states(tokens, None, runs=runs, positions=positions)
    return model.logits(hidden)


@pytest.mark.parametrize("name", llama_cases.PADDED_CASES)
@pytest.mark.parametrize(
    ("side", "forward_padded"),
    [("left", forward_left), ("right", forward_right)],
    ids=["left", "right"],
)
def test_padding(name, side, forward_padded):
    mask = np.ones((2, llama_cases.LENGTH), np.int32)
    padding = llama_cases.LENGTH - llama_cases.SHORTER
    mask[1, slice(padding) if side == "left" else slice(-padding, None)] = 0
    logits = forward_padded(*nnx.split(loaded(name)), llama_cases.draw_tokens(), mask)
    assert_close(logits[0], goldens()[f"{name}/logits"][0])
    assert_close(logits[1, mask[1] == 1], goldens()[f"{name}/{side}"])


@pytest.mark.skipif(
    not has_transformers(),
    reason="torch and transformers 5 are not installed; the stored values stand in for them",
)
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", llama_cases.CASES)
def test_live(name, tmp_path):
    """A checkpoint that transformers wrote in shards, at another length than the stored one."""
    from tests.goldens import make_llama_goldens  # imports torch

    reference = make_llama_goldens.build(llama_cases.CASES[name])
    reference.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    model = hf_weights.load(tmp_path, dtype=jnp.float32)
    shape = (3, 21)
    tokens = np.random.default_rng(1).integers(model.config.vocab_size, size=shape, dtype=np.int32)
    expected = make_llama_goldens.run(reference, tokens, np.ones_like(tokens))
    for ours, theirs in zip(forward(*nnx.split(model), tokens), expected, strict=True):
        assert_close(ours, theirs)
