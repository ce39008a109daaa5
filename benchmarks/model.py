"""Suites model_prefill and model_decode: a whole model, by strategies and by dense attention.

    python -m benchmarks.run --suite model_prefill model_decode --lengths 8K 32K 128K --peers cudnn

The time to the first token is that of a prompt in one chunk, from its tokens to the logits of the
next one, with the cache filled; the time per token that of each of 64 greedy tokens after it.
Weights are random, so that attention by them would have nothing to find: in every layer queries and
keys are replaced, after the rotary embedding, by those of sparseattn_jax.synthetic. The projections
that made them still run. Before a figure is recorded, rows of the strategy's attention over these
queries and keys are judged, over the tokens that its pattern keeps.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, PyTree

from benchmarks import gate
from benchmarks.measure import (
    Measured,
    Options,
    dense_peers,
    each_of,
    measured_with_memory,
    on_rows,
)
from benchmarks.records import Record
from benchmarks.shapes import SHAPES, Shape, format_length
from benchmarks.xattention import structured_operands
from sparseattn_jax import (
    DuoAttention,
    FlexPrefill,
    Full,
    KVCache,
    MInference,
    PageBounds,
    QuestPages,
    SparsePattern,
    XAttention,
    decode_attention,
    sparse_attention,
)
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.models import Llama, LlamaConfig, llama3_8b, tiny
from sparseattn_jax.models.attention import LayerRun
from sparseattn_jax.models.llama import abstract
from sparseattn_jax.models.policy import Policy, decode_runs
from sparseattn_jax.strategies.protocol import Strategy

SINK_SIZE, RECENT_SIZE = 128, 1024
PAGE_SIZE, PAGES = 64, 0.1  # tokens per page, and the share of the pages that are listed
NEW_TOKENS = 64

_MODELS = {
    SHAPES["llama3_8b"]: llama3_8b(),
    SHAPES["toy"]: dataclasses.replace(
        tiny(), num_heads=2, num_kv_heads=1, head_dim=64, dtype="bfloat16", param_dtype="bfloat16"
    ),
}


def run_prefill(options: Options, length: int) -> Iterator[Record | str]:
    """The time to the first token by each strategy."""
    config = _MODELS[options.shape]
    params = _random_params(config, seed=options.seed)
    q, k, v = structured_operands(options.shape, length, seed=options.seed)
    tokens = jnp.zeros((1, length), jnp.int32)
    rows = gate.sample_rows(length, options.shape.block_size, seed=options.seed)
    judge = functools.partial(_judge, q=q, k=k, v=v, rows=rows)
    dense: dict[str, Measured | str] = {}
    every_token = np.ones((1, len(rows), length), bool)
    for peer, attend in dense_peers(options).items():
        dense[peer] = measured_with_memory(
            functools.partial(_prefill, config, Policy.of(config), dense=attend),
            (params, tokens, q, k),
            functools.partial(_finite, verdict=judge(attend(q, k, v), keep=every_token)),
            _awaited(options),
        )
    for name, strategy in _strategies(config, options.shape).items():
        policy = Policy.of(config, Configuration(strategy=strategy))
        pattern = jax.jit(strategy.select)(q, k)
        keep = kept_tokens(pattern, rows, config.num_heads)
        verdict = judge(jax.jit(sparse_attention)(q, k, v, pattern), keep=keep)
        density = float(keep.sum() / (len(keep) * (rows + 1).sum()))
        ours = measured_with_memory(
            functools.partial(_prefill, config, policy),
            (params, tokens, q, k),
            functools.partial(_finite, verdict=verdict),
            _awaited(options),
        )
        for peer, theirs in dense.items():
            yield _record("model_prefill", f"{length} {name}", options, density, ours, peer, theirs)


def run_decode(options: Options, length: int) -> Iterator[Record | str]:
    """The time per token after a prompt; the peer `full` is our attention to all of the cache."""
    config = _MODELS[options.shape]
    params = _random_params(config, seed=options.seed)
    q, k, v = structured_operands(options.shape, length, seed=options.seed)

    def time(policy: Policy) -> tuple[Measured | str, int]:
        """Of one token; and the bytes of the cache."""
        cache = _filled_cache(config, policy, k, v)
        figure = measured_with_memory(
            functools.partial(_decode, config, policy.pages),
            (params, cache, q[:, -1:], k[:, -1:]),
            functools.partial(_finite, verdict=_judge_token(policy, cache, q, k, v)),
            _awaited(options),
        )
        each = figure if isinstance(figure, str) else each_of(figure, NEW_TOKENS)
        return each, cache.memory_usage()

    full, bytes_of_full = time(Policy.of(config))
    half = Configuration(strategy=_half_streaming(config))
    pages = QuestPages(top_k=max(2, round(PAGES * length / PAGE_SIZE)))
    for name, policy in {
        "half of the heads streaming": Policy.of(config, half),
        f"{PAGES:.0%} of the pages": Policy.of(config, pages=pages, page_size=PAGE_SIZE),
    }.items():
        ours, num_bytes = time(policy)
        density = PAGES if policy.pages else num_bytes / bytes_of_full
        yield _record("model_decode", f"{length} {name}", options, density, ours, "full", full)


def _strategies(config: LlamaConfig, shape: Shape) -> Mapping[str, Strategy]:
    return {
        "Full": Full(block_size=shape.block_size),
        "XAttention threshold=0.9 stride=16": XAttention(
            threshold=0.9, stride=16, block_size=shape.block_size
        ),
        "FlexPrefill gamma=0.9": FlexPrefill(gamma=0.9, block_size=shape.block_size),
        "half of the heads streaming": _half_streaming(config),
        "MInference": MInference(block_size=shape.block_size),
    }


def _half_streaming(config: LlamaConfig) -> DuoAttention:
    """Of the kv heads; of a single one none."""
    return DuoAttention(
        retrieval=Full(),
        retrieval_heads=jnp.arange(config.num_kv_heads) < -(-config.num_kv_heads // 2),
        sink_size=SINK_SIZE,
        recent_size=RECENT_SIZE,
    )


def _random_params(config: LlamaConfig, *, seed: int) -> nnx.State:
    return jax.jit(lambda: nnx.split(Llama(config, rngs=nnx.Rngs(seed)))[1])()


def _prefill(
    config: LlamaConfig,
    policy: Policy,
    params: nnx.State,
    tokens: Int32[Array, "1 T"],
    q: Float[Array, "1 T N H"],
    k: Float[Array, "1 T K H"],
    *,
    dense: Callable[[Array, Array, Array], Array] | None = None,
) -> tuple[Float32[Array, "1 1 V"], list[Array]]:
    """Logits of the next token, and what the cache holds at one place.

    A cache that is returned would be there twice, as results of two runs are.
    """
    model, length = nnx.merge(abstract(config)[0], params), tokens.shape[1]
    num_new = jnp.full((1,), length, jnp.int32)
    runs = policy.prefill_runs(num_new, length=length)
    if dense is not None:
        runs = [_dense_run(config, num_new, dense)]
    hidden, cache = model.cached_hidden_states(
        tokens,
        policy.create_cache(config, batch=1, capacity=length),
        runs=[_with_queries_and_keys(run, q, k) for run in runs],
        positions=jnp.arange(length, dtype=jnp.int32)[None],
    )
    return model.logits(hidden[:, -1:]), _samples(cache)


def _samples(cache: KVCache) -> list[Array]:
    return [pool[:, 0] for pool in (cache.full_k, cache.full_v, cache.ring_k, cache.ring_v)]


def _dense_run(
    config: LlamaConfig,
    num_new: Int32[Array, " 1"],
    dense: Callable[[Array, Array, Array], Array],
) -> LayerRun:
    def attend(
        q: Array, k: Array, v: Array, layer_input: None, cache: KVCache, layer: Array, /
    ) -> tuple[Array, KVCache]:
        return dense(q, k, v), cache.append(layer, k, v, num_new)

    return LayerRun(num_layers=config.num_layers, attend=attend)


def _with_queries_and_keys(run: LayerRun, q: Array, k: Array) -> LayerRun:
    """The run's attention over other queries and keys; those of the model are computed all the
    same."""

    def attend(
        own_q: Array, own_k: Array, v: Array, layer_input: PyTree, cache: KVCache, layer: Array, /
    ) -> tuple[Array, KVCache]:
        *_, given_q, given_k = lax.optimization_barrier((own_q, own_k, q, k))
        return run.attend(given_q, given_k, v, layer_input, cache, layer)

    return dataclasses.replace(run, attend=attend)


def _filled_cache(config: LlamaConfig, policy: Policy, k: Array, v: Array) -> KVCache:
    """A cache whose layers all hold these keys and values, with room for the new tokens."""
    length = k.shape[1]
    num_new = jnp.full((1,), length, jnp.int32)

    @jax.jit
    def fill() -> KVCache:
        cache = policy.create_cache(config, batch=1, capacity=length + NEW_TOKENS)
        cache = lax.fori_loop(
            0,
            config.num_layers,
            lambda layer, cache: cache.append(layer, k, v, num_new),
            cache,
        )
        return cache.advance(num_new)

    return fill()


def _decode(
    config: LlamaConfig,
    pages: QuestPages | None,
    params: nnx.State,
    cache: KVCache,
    q: Float[Array, "1 1 N H"],
    k: Float[Array, "1 1 K H"],
) -> tuple[Float32[Array, "1 1 V"], list[Array]]:
    """The logits after so many greedy tokens, and what the cache holds at one place."""
    model, one = nnx.merge(abstract(config)[0], params), jnp.ones((1,), jnp.int32)
    runs = [_with_queries_and_keys(run, q, k) for run in decode_runs(config, one, pages)]

    def step(
        _: int, carry: tuple[Float32[Array, "1 1 V"], KVCache]
    ) -> tuple[Float32[Array, "1 1 V"], KVCache]:
        logits, cache = carry
        hidden, cache = model.cached_hidden_states(
            jnp.argmax(logits, axis=-1).astype(jnp.int32),
            cache,
            runs=runs,
            positions=cache.lengths[:, None],
        )
        return model.logits(hidden), cache.advance(one)

    first = jnp.zeros((1, 1, config.vocab_size), jnp.float32)
    logits, cache = lax.fori_loop(0, NEW_TOKENS, step, (first, cache))
    return logits, _samples(cache)


def _judge(
    out: Float[Array, "1 T N H"],
    *,
    q: Float[Array, "1 T N H"],
    k: Float[Array, "1 T K H"],
    v: Float[Array, "1 T K H"],
    rows: Int[np.ndarray, " rows"],
    keep: Bool[np.ndarray, "#N rows T"],
) -> gate.Verdict:
    """On the sampled rows of attention to the tokens that are kept."""
    judge = functools.partial(gate.judge, q=q, k=k, v=v, rows=rows, keep=keep, block_size=1)
    return on_rows(judge, rows)(out)


def _judge_token(policy: Policy, cache: KVCache, q: Array, k: Array, v: Array) -> gate.Verdict:
    """On the attention of one more token, a copy of the last one, to the first layer's cache."""
    one = jnp.ones((1,), jnp.int32)
    q, k, v = (jnp.concatenate([x, x[:, -1:]], axis=1) for x in (q, k, v))

    @jax.jit
    def attend(cache: KVCache) -> Array:
        cache = cache.append(0, k[:, -1:], v[:, -1:], one)
        return decode_attention(q[:, -1:], cache, 0, pages=policy.pages)

    length, num_heads = q.shape[1:3]
    group = num_heads // len(policy.is_full[0])
    keys = np.arange(length)
    keep = np.ones((num_heads, 1, length), bool)
    if policy.pages is not None:
        bounds = PageBounds.of(k, page_size=PAGE_SIZE)
        listed = policy.pages.select(
            q[:, -1:], bounds, kv_lengths=jnp.full((1,), length, jnp.int32)
        )
        num_pages = bounds.key_min.shape[1]
        pages = np.asarray(block_lists.to_dense(listed[0][0], listed[1][0], num_pages))
        of_heads = np.repeat(pages, PAGE_SIZE, axis=-1)[:, None, :length]
        keep = np.repeat(of_heads, group, axis=0)
    if policy.window is not None:
        sink_size, recent_size = policy.window
        window = (keys < sink_size) | (keys >= length - recent_size)
        keep = keep & (np.repeat(policy.is_full[0], group)[:, None, None] | window)
    rows = np.array([length - 1])
    found = np.asarray(attend(cache)[0], np.float32)
    return gate.judge(found, q, k, v, rows=rows, keep=keep, block_size=1)


def kept_tokens(
    pattern: SparsePattern, rows: Int[np.ndarray, " rows"], num_heads: int
) -> Bool[np.ndarray, "N rows S"]:
    """The keys, up to its own, that each of some queries of the first sequence attends to."""
    blocks = pattern.blocks
    listed = block_lists.to_dense(
        blocks.kv_indices[0][:, rows // blocks.block_q],
        blocks.kv_num_blocks[0][:, rows // blocks.block_q],
        blocks.num_kv_blocks,
    )
    keep = np.repeat(np.asarray(listed), blocks.block_kv, axis=-1)[..., : blocks.kv_len]
    keep = np.broadcast_to(keep, (num_heads, *keep.shape[1:]))
    keys = np.arange(blocks.kv_len)
    if pattern.windows is not None:
        sinks, recents = (np.asarray(x)[:, None, None] for x in jax.tree.leaves(pattern.windows))
        keep = keep & ((keys < sinks) | (keys > rows[:, None] - recents))
    if pattern.columns is not None:
        indices, counts = pattern.columns.indices[0], pattern.columns.counts[0]
        columns = np.zeros((num_heads, blocks.kv_len), bool)
        for head, (of_head, count) in enumerate(zip(indices, counts, strict=True)):
            columns[head, np.asarray(of_head)[: int(count)]] = True
        keep = keep | columns[:, None]
    return keep & (keys <= rows[:, None])


def _finite(
    out: tuple[Float32[Array, "1 1 V"], list[Array]],
    *,
    verdict: gate.Verdict,
) -> gate.Verdict:
    """The verdict, unless the logits are not finite."""
    if bool(jnp.isfinite(out[0]).all()):
        return verdict
    return gate.Verdict(max_error=float("nan"), max_error_allowed=verdict.max_error_allowed)


def _awaited(options: Options) -> Options:
    """A user waits for the whole call: its wall time counts."""
    return dataclasses.replace(options, timer="single")


def _record(
    op: str,
    case: str,
    options: Options,
    density: float,
    ours: Measured | str,
    peer: str,
    theirs: Measured | str,
) -> Record | str:
    length, _, name = case.partition(" ")
    case = f"{format_length(int(length))} {name}"
    if isinstance(ours, str):
        return f"{op} {case}: not recorded, we failed: {ours}"
    return dataclasses.replace(_awaited(options), backend=None).record(
        op=op,
        case=case,
        inputs=(
            f"model of {options.shape}; random weights, structured q/k; density of "
            "tokens, in decode of bytes kept or pages listed"
        ),
        density=density,
        ours=ours,
        peer=peer,
        theirs=theirs,
    )
