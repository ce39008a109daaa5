"""Suite decode: one query token over a long cache, whole or by lists of its blocks.

The peers attend to the whole cache, so a list wins by what it does not read. Lists are random, of
equal length. Where one set of lists reads little more than fits the GPU's L2 cache, a timed call
attends by several disjoint sets in turn: a model's other layers would have emptied the cache.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int32

from benchmarks import gate
from benchmarks.measure import Options, each_of, measured
from benchmarks.records import Record
from benchmarks.shapes import Shape, format_length
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.decode_attention import decode_attention

DENSITIES = (0.1, 1.0)
_BATCHES = {8 * 1024: 64, 32 * 1024: 16}  # by length; else one sequence
_READ_BYTES = 100 * 2**20  # twice the L2 cache of an H100
_JUDGED_SEQUENCES = 3

type Lists = tuple[Int32[Array, "B K M"], Int32[Array, "B K"]]


def run(options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    shape, batch = options.shape, _BATCHES.get(length, 1)
    q, k, v = random_cache(shape, batch, length, seed=options.seed)
    every_block = np.ones((1, batch, shape.num_kv_heads, length // shape.block_size), bool)
    judge = functools.partial(judge_outputs, q=q, k=k, v=v, block_size=shape.block_size)
    peers = {
        name: measured(attend, (q, k, v), functools.partial(judge, keeps=every_block), options)
        for name, attend in _peers(options).items()
    }
    lengths = jnp.full((batch,), length, jnp.int32)
    for density in DENSITIES:
        keeps = every_block
        lists: list[Lists | None] = [None]
        if density < 1:
            keeps = draw_disjoint_blocks(every_block.shape[1:], density, seed=options.seed)
            keeps = keeps[: -(-_READ_BYTES // round(2 * k.nbytes * density))]
            width = int(keeps[0].sum(axis=-1).max())
            lists = [block_lists.from_dense(jnp.asarray(keep), width) for keep in keeps]
        attend = functools.partial(
            _attend_in_turn, block_size=shape.block_size, backend=options.backend
        )
        ours = measured(
            jax.jit(attend),
            (q, k, v, lengths, lists),
            functools.partial(judge, keeps=keeps),
            options,
        )
        name = "dense" if density == 1 else f"{density:.0%}"
        for peer, theirs in peers.items():
            yield options.record(
                op="decode",
                case=f"{format_length(length)} b{batch} {name}",
                inputs=_inputs(shape),
                density=float(keeps[0].mean()),
                ours=each_of(ours, len(lists)),
                peer=peer,
                theirs=theirs,
            )


def random_cache(
    shape: Shape, batch: int, length: int, *, seed: int
) -> tuple[Float[Array, "B 1 N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Standard normal q, k and v."""

    @jax.jit
    def draw() -> tuple[Array, Array, Array]:
        keys = jax.random.split(jax.random.key(seed), 3)
        sizes = ((1, shape.num_heads), *[(length, shape.num_kv_heads)] * 2)
        q, k, v = (
            jax.random.normal(key, (batch, *size, shape.head_dim), jnp.dtype(shape.dtype))
            for key, size in zip(keys, sizes, strict=True)
        )
        return q, k, v

    return draw()


def draw_disjoint_blocks(
    blocks_shape: tuple[int, int, int], density: float, *, seed: int
) -> Bool[np.ndarray, "sets B K Sb"]:
    """As many sets of blocks as are disjoint, each with that share of every row."""
    num_blocks = blocks_shape[-1]
    width = max(1, int(num_blocks * density))
    place = np.random.default_rng(seed).random(blocks_shape).argsort(axis=-1)
    return np.stack([place // width == i for i in range(num_blocks // width)])


def judge_outputs(
    outs: Sequence[Float[Array, "B 1 N H"]],
    *,
    q: Float[Array, "B 1 N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    keeps: Bool[np.ndarray, "sets B K Sb"],
    block_size: int,
) -> gate.Verdict:
    """Compares some sequences' outputs with dense masked attention in float32, head by head.

    The same in the operands' precision sets each head's allowance.
    """
    worst = gate.Verdict(max_error=0.0, max_error_allowed=1.0)
    sequences = np.unique(np.linspace(0, len(q) - 1, _JUDGED_SEQUENCES, dtype=int))
    for out, keep in zip(outs, keeps, strict=True):
        for b in sequences:
            exact, rounded = _references(
                q[b, 0], k[b], v[b], jnp.asarray(keep[b]), block_size=block_size
            )
            exact, rounded = np.asarray(exact), np.asarray(rounded, np.float32)
            errors = np.abs(np.asarray(out[b, 0], np.float32) - exact).max(axis=-1)
            half_unit = np.abs(exact).max(axis=-1) * (float(jnp.finfo(q.dtype).eps) / 2)
            allowed = np.maximum(np.abs(rounded - exact).max(axis=-1), half_unit)
            shares = np.nan_to_num(errors / (gate.ALLOWED_TIMES * allowed), nan=np.inf)
            head = int(shares.argmax())
            if shares[head] > worst.max_error / worst.max_error_allowed:
                worst = gate.Verdict(
                    max_error=float(errors[head]),
                    max_error_allowed=float(gate.ALLOWED_TIMES * allowed[head]),
                )
    return worst


@functools.partial(jax.jit, static_argnames="block_size")
def _references(
    q: Float[Array, "N H"],
    k: Float[Array, "S K H"],
    v: Float[Array, "S K H"],
    keep: Bool[Array, "K Sb"],
    *,
    block_size: int,
) -> tuple[Float[Array, "N H"], Float[Array, "N H"]]:
    """Dense masked attention in float32, and in the operands' dtype with float32 sums."""
    num_kv_heads = k.shape[1]
    queries = q.reshape(num_kv_heads, -1, q.shape[-1])

    def attend(dtype: jnp.dtype) -> Array:
        product = functools.partial(
            jnp.einsum, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST
        )
        logits = product("kgh,skh->kgs", queries.astype(dtype), k.astype(dtype))
        visible = jnp.repeat(keep, block_size, axis=-1)[:, None]
        logits = jnp.where(visible, logits * q.shape[-1] ** -0.5, -jnp.inf)
        weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
        out = product("kgs,skh->kgh", weights.astype(dtype), v.astype(dtype))
        return (out / weights.sum(axis=-1, keepdims=True)).astype(dtype).reshape(q.shape)

    return attend(jnp.dtype(jnp.float32)), attend(q.dtype)


def _attend_in_turn(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    lists: Sequence[Lists | None],
    *,
    block_size: int,
    backend: Backend | None,
) -> list[Array]:
    attend = functools.partial(decode_attention, q, k, v, kv_lengths=lengths, backend=backend)
    return [
        attend()[0]
        if listed is None
        else attend(kv_indices=listed[0], kv_num_blocks=listed[1], block_kv=block_size)[0]
        for listed in lists
    ]


def _peers(options: Options) -> dict[str, Callable[[Array, Array, Array], list[Array]]]:
    """jax.nn's attention to the whole cache, by those implementations that were asked for."""

    def attend(
        q: Array, k: Array, v: Array, *, implementation: Literal["cudnn", "xla"]
    ) -> list[Array]:
        return [jax.nn.dot_product_attention(q, k, v, implementation=implementation)]

    return {
        name: jax.jit(functools.partial(attend, implementation=name))
        for name in ("cudnn", "xla")
        if name in options.peers
    }


def _inputs(shape: Shape) -> str:
    return (
        f"{shape.dtype}, {shape.num_heads} query heads, {shape.num_kv_heads} KV heads, "
        f"head_dim {shape.head_dim}, one query token, random normal q/k/v, random lists of "
        f"{shape.block_size}-key blocks; the peers read the whole cache"
    )
