"""A model small enough to be simulated token by token, with weights that all weigh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseattn_jax import Full, XAttention, models
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.models.policy import Policy
from tests.oracles import generation as oracle

CONFIG = models.LlamaConfig(
    vocab_size=29,
    num_layers=3,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=24,
    rope_theta=100.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    dtype=jnp.float32,
    param_dtype=jnp.float32,
)

EVERYTHING = Policy.of(CONFIG, Configuration(strategy=Full(block_size=8)))
# A layer with one head of each kind, one of streaming heads alone, one of full heads that keep all
# blocks. The windows are shorter than the texts, and than a chunk.
MASKS = np.array([[True, False], [False, False], [True, True]])
WINDOW = {"sink_size": 2, "recent_size": 5}
STREAMING = Policy.of(
    CONFIG,
    Configuration(
        strategy=Full(block_size=8),
        layers={2: XAttention(threshold=1.0, stride=4, block_size=8)},
    ),
    head_masks=MASKS,
    **WINDOW,
)
SLIDING_CONFIG = dataclasses.replace(CONFIG, sliding_window=6, sliding_layers=(1, 2))
SLIDING = Policy.of(SLIDING_CONFIG, Configuration(strategy=Full(block_size=8)))
POLICIES = {"everything": EVERYTHING, "streaming": STREAMING, "sliding": SLIDING}
# Of every cache and prompt that tests read, so that they share programs.
CAPACITY, CHUNK_SIZE = 40, 16


@functools.cache
def drawn(config: models.LlamaConfig = CONFIG) -> tuple[models.Llama, dict]:
    """The model and its parameters in float64, by name."""
    abstract = nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        values = rng.normal(size=leaf.shape)
        if "scale" in jax.tree_util.keystr(path):
            return 1 + 0.3 * values
        return values * (1.0 if len(leaf.shape) == 2 else leaf.shape[-2] ** -0.5)

    weights = jax.tree.map_with_path(draw, params)
    on_device = jax.tree.map(lambda weight: jnp.asarray(weight, config.param_dtype), weights)
    return nnx.merge(graphdef, on_device), nnx.to_pure_dict(weights)


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Drawn tokens of so many each."""
    rng = np.random.default_rng(seed)
    return [rng.integers(CONFIG.vocab_size, size=length).tolist() for length in lengths]


def simulated(name: str, prompt: list[int], num_new: int) -> tuple[list[int], np.ndarray]:
    """What follows a prompt by the policy of that name, simulated densely; see the oracle."""
    is_full, sink, recent = {
        "everything": (np.full((3, 2), True), 0, 1),
        "streaming": (MASKS, WINDOW["sink_size"], WINDOW["recent_size"]),
        "sliding": (np.array([[True] * 2, [False] * 2, [False] * 2]), 0, 6),
    }[name]
    is_full = np.repeat(is_full, CONFIG.num_heads // CONFIG.num_kv_heads, axis=1)
    return oracle.greedy(
        drawn()[1],
        dataclasses.asdict(CONFIG),
        np.array(prompt),
        num_new,
        sinks=np.where(is_full, 0, sink),
        recents=np.where(is_full, len(prompt) + num_new, recent),
    )
