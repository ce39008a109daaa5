"""The two-pool cache against one dense simulation of the same policy, and what it writes where."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax import (
    DuoAttention,
    Full,
    KVCache,
    PageBounds,
    QuestPages,
    UnsupportedError,
    decode_attention,
    prefill_attention,
    sparse_decode_attention,
)
from sparseattn_jax.kernels.backends import device_facts, hopper_refusal
from sparseattn_jax.kernels.decode_attention import mosaic_sm90
from sparseattn_jax.kv_pools import Window
from tests.kernels.decode_attention.test_tiling import TAKEN
from tests.oracles import attention as oracle
from tests.oracles import streaming

L, B, N, K, H = 3, 2, 4, 2, 8
CAPACITY = 40
KINDS = np.array([[True, False], [False, False], [True, True]])
SLIDING = np.array([[True, True], [False, False], [True, True]])  # as a layer with a window
TOLERANCE = {"float32": 3e-6, "bfloat16": 2e-2, "float16": 3e-3}


def create(kinds=KINDS, sink_size=3, recent_size=5, *, dtype="float32", **options) -> KVCache:
    return KVCache.create(
        num_layers=len(kinds),
        batch=B,
        capacity=CAPACITY,
        num_kv_heads=K,
        head_dim=H,
        dtype=dtype,
        is_full=kinds,
        sink_size=sink_size,
        recent_size=recent_size,
        **options,
    )


def draw(dtype="float32", num_layers=L, seed=0):
    """Queries, keys and values of as many tokens as fit, for each layer."""
    rng = np.random.default_rng(seed)
    shape = num_layers, B, CAPACITY
    q, k, v = (rng.normal(size=(*shape, heads, H)) for heads in (N, K, K))
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def int32(*numbers: int) -> jax.Array:
    return jnp.array(numbers, jnp.int32)


def per_layer(cache: KVCache) -> tuple:
    return jnp.arange(len(cache.rows)), cache.is_full


@jax.jit
def append(cache: KVCache, k, v, num_new) -> KVCache:
    """A chunk of tokens in all layers."""

    def layer(cache, given):
        index, k, v = given
        return cache.append(index, k, v, num_new), None

    return jax.lax.scan(layer, cache, (per_layer(cache)[0], k, v))[0].advance(num_new)


@jax.jit
def decode(cache: KVCache, q, k, v, num_new, pages=None):
    """One token in all layers: (cache, outputs, log-sum-exps)."""

    def layer(cache, given):
        index, q, k, v = given
        cache = cache.append(index, k, v, num_new)
        return cache, decode_attention(q, cache, index, pages=pages, return_lse=True)

    cache, results = jax.lax.scan(layer, cache, (per_layer(cache)[0], q, k, v))
    return cache.advance(num_new), *results


@functools.partial(jax.jit, static_argnames="length")
def prefill(cache: KVCache, q, k, v, num_new, *, length: int):
    """A chunk of a prompt in all layers: (cache, outputs)."""

    def layer(cache, given):
        index, is_full, q, k, v = given
        cache, keys, values = cache.extend(index, k, v, num_new, length=length)
        strategy = DuoAttention(
            retrieval=Full(block_size=16),
            retrieval_heads=is_full,
            sink_size=cache.sink_size,
            recent_size=cache.recent_size,
        )
        kv_lengths = cache.lengths + num_new
        return cache, prefill_attention(q, keys, values, strategy, kv_lengths=kv_lengths)

    cache, out = jax.lax.scan(layer, cache, (*per_layer(cache), q, k, v))
    return cache.advance(num_new), out


def next_tokens(operands, lengths):
    """The token after so many, of each sequence."""
    return (jnp.stack([x[:, b, [n]] for b, n in enumerate(lengths)], axis=1) for x in operands)


def simulated(cache: KVCache, operands, layer: int, b: int, length: int):
    """Outputs and log-sum-exps of the first tokens of a sequence, by the formula."""
    is_full = np.repeat(np.asarray(cache.is_full)[layer], N // K)
    q, k, v = (np.asarray(x[layer, b, None, :length], np.float64) for x in operands)
    keep = streaming.visible_pairs(
        1,
        length,
        length,
        sink_sizes=np.where(is_full, length, cache.sink_size),
        recent_sizes=np.where(is_full, length, cache.recent_size),
    )
    out, lse = oracle.attention(q, k, v, keep)
    return out[0], lse[0]


def assert_decodes(cache: KVCache, operands) -> KVCache:
    """The next token of every sequence sees what the formula says; returns the cache with it."""
    lengths = np.asarray(cache.lengths)
    following, out, lse = decode(cache, *next_tokens(operands, lengths), int32(*B * [1]))
    tolerance = TOLERANCE[str(out.dtype)]
    for layer, b in np.ndindex(*out.shape[:2]):
        expected = simulated(cache, operands, layer, b, lengths[b] + 1)
        for found, formula in zip((out, lse), expected, strict=True):
            found = np.asarray(found[layer, b, 0], np.float64)
            np.testing.assert_allclose(found, formula[-1], atol=tolerance, err_msg=f"{layer=} {b=}")
    return following


@pytest.mark.parametrize(
    ("cache", "lengths", "starts"),
    [
        pytest.param(create(), (16, 6), (0, 2, 16), id="few-sinks-then-more-than-the-ring"),
        pytest.param(create(), (27, 13), (0, 4, 16, 27), id="four-chunks", marks=pytest.mark.full),
        pytest.param(
            create(dtype="bfloat16"), (20, 16), (0, 2, 20), id="bf16", marks=pytest.mark.full
        ),
        pytest.param(
            create(dtype="float16"), (9, 8), (0, 1, 5, 9), id="fp16", marks=pytest.mark.full
        ),
        pytest.param(
            create(SLIDING, 0, 6),
            (20, 1),
            (0, 4, 20),
            id="a-layer-with-a-sliding-window",
            marks=pytest.mark.full,
        ),
        pytest.param(
            create(np.zeros((L, K), bool)),
            (20, 14),
            (0, 7, 20),
            id="all-stream",
            marks=pytest.mark.full,
        ),
        pytest.param(
            create(np.ones((L, K), bool)),
            (20, 14),
            (0, 7, 20),
            id="none-streams",
            marks=pytest.mark.full,
        ),
    ],
)
def test_chunks_then_tokens(cache: KVCache, lengths: tuple[int, int], starts: tuple[int, ...]):
    """A prompt in chunks, padded to the longest, then tokens, as one dense simulation has it."""
    operands = draw(str(cache.full_k.dtype), len(cache.rows))
    for start, stop in itertools.pairwise(starts):
        num_new = jnp.clip(int32(*lengths) - start, 0, stop - start)
        chunk = (x[:, :, start:stop] for x in operands)
        cache, out = prefill(cache, *chunk, num_new, length=stop)
        tolerance = TOLERANCE[str(out.dtype)]
        for layer, b in np.ndindex(*out.shape[:2]):
            real = num_new[b]
            expected = simulated(cache, operands, layer, b, start + real)[0][start:]
            found = np.asarray(out[layer, b], np.float64)
            np.testing.assert_allclose(found[:real], expected, atol=tolerance, err_msg=f"{start=}")
            assert not found[real:].any()
    for _ in range(8):
        cache = assert_decodes(cache, operands)


APPENDED = 12  # more than the ring holds


@pytest.mark.parametrize(
    "cache",
    [create(), create(SLIDING, 0, 6, dtype="bfloat16")],
    ids=["float32", "sliding-window-bf16"],
)
@given(
    appends=st.lists(st.tuples(*B * [st.integers(0, APPENDED)]), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_appends_then_a_token(cache: KVCache, appends: list[tuple[int, int]], seed: int):
    operands = draw(str(cache.full_k.dtype), seed=seed)
    for num_new in appends:
        cache = append_next(cache, operands, num_new)
    np.testing.assert_array_equal(cache.lengths, np.sum(appends, axis=0) if appends else [0, 0])
    assert_decodes(cache, operands)


def append_next(cache: KVCache, operands, num_new: tuple[int, int]) -> KVCache:
    """Sequences take different numbers of tokens; what is behind those is padding."""
    chunks = []
    for x in operands[1:]:
        chunk = np.full((len(x), B, APPENDED, K, H), 1e3, x.dtype)
        for b, (start, count) in enumerate(zip(cache.lengths, num_new, strict=True)):
            chunk[:, b, :count] = x[:, b, int(start) : int(start) + count]
        chunks.append(jnp.asarray(chunk))
    return append(cache, *chunks, int32(*num_new))


FAULTS = {
    "ring-turned": lambda self, positions: RIGHT_SLOTS(self, positions + 1),
    "ring-one-short": lambda self, positions: RIGHT_SLOTS(
        self._replace(recent_size=self.recent_size - 1), positions
    ),
    "no-sinks": lambda self, positions: positions % (self.sink_size + self.recent_size),
}
RIGHT_SLOTS = Window.slots


@pytest.mark.parametrize(
    "fault",
    [
        "ring-one-short",
        pytest.param("ring-turned", marks=pytest.mark.full),
        pytest.param("no-sinks", marks=pytest.mark.full),
    ],
)
def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch, fault: str):
    monkeypatch.setattr(Window, "slots", FAULTS[fault])
    for name in ("append", "decode"):  # traced anew, with the fault
        monkeypatch.setitem(
            globals(), name, jax.jit(functools.partial(globals()[name].__wrapped__))
        )
    operands = draw()
    cache = append_next(create(), operands, (6, 12))
    with pytest.raises(AssertionError, match="layer=0"):
        assert_decodes(cache, operands)


@pytest.mark.parametrize(
    ("appends", "tokens"),
    [
        ([0], ["-----", "-----"]),
        ([1], ["0----", "0----"]),
        ([4], ["0123-", "0123-"]),
        ([1, 5], ["01534", "01534"]),
        ([6, 2], ["01567", "01567"]),
        ([9], ["01867", "01867"]),
    ],
    ids=str,
)
def test_where_tokens_lie(appends: list[int], tokens: list[str]):
    """Two sinks, then a ring of three, in slots of one digit each."""
    cache = create(np.array([[True, False]]), 2, 3)
    named = jnp.arange(1.0, CAPACITY + 1)[None, None, :, None, None]
    named = jnp.broadcast_to(named, (1, B, CAPACITY, K, H))
    for count in appends:
        cache = append_next(cache, (named, named, named), (count, count))
    held = np.asarray(cache.ring_k[:, :5, 0], int)
    assert ["".join("-" if n == 0 else str(n - 1) for n in row) for row in held] == tokens
    in_order = np.asarray(cache.full_v[:, :, 0], int)
    np.testing.assert_array_equal(in_order[0, : sum(appends)], np.arange(1, sum(appends) + 1))
    assert not in_order[:, sum(appends) :].any()
    assert not cache.ring_k[:, 5:].any()


def test_rows_of_layers_with_unequal_numbers_of_full_heads():
    cache = create()
    assert (cache.full_k.shape, cache.ring_k.shape) == ((6, CAPACITY, H), (6, 8, H))
    np.testing.assert_array_equal(cache.rows, [[0, 0], [2, 4], [2, 4]])


def test_padding_is_not_written():
    cache = append_next(create(page_size=4), draw(), (9, 2))
    unchanged = append(cache, *(2 * [jnp.full((L, B, APPENDED, K, H), jnp.nan)]), int32(0, 0))
    jax.tree.map(np.testing.assert_array_equal, unchanged, cache)


def test_tokens_beyond_the_capacity_are_not_written():
    """A traced call cannot raise: other rows stay as they are, and `room` tells."""
    operands = draw()
    cache = append_next(create(), operands, (APPENDED, 5))
    cache = dataclasses.replace(cache, lengths=int32(CAPACITY - 2, 5))
    new = [x[:, :, :APPENDED] for x in operands[1:]]
    longer = append(cache, *new, int32(4, 0))
    before, after = (np.asarray(x.full_k).reshape(-1, B, CAPACITY, H) for x in (cache, longer))
    of_full_heads = np.moveaxis(np.asarray(new[0]), 3, 1)[KINDS]
    np.testing.assert_array_equal(after[:, 0, -2:], of_full_heads[:, 0, :2])
    np.testing.assert_array_equal(after[:, 0, :-2], before[:, 0, :-2])
    np.testing.assert_array_equal(after[:, 1], before[:, 1])
    np.testing.assert_array_equal(longer.room(), [-2, CAPACITY - 5])


def test_several_tokens_at_once_where_none_streams():
    operands = draw(num_layers=1)
    cache = append_next(create(np.ones((1, K), bool)), operands, (12, 5))
    q, k, v = (jnp.stack([x[0, 0, 12:15], x[0, 1, 5:8]]) for x in operands)
    attend = jax.jit(
        lambda cache, q, k, v, num_new: decode_attention(q, cache.append(0, k, v, num_new), 0)
    )
    out = attend(cache, q, k, v, int32(3, 3))
    for b, length in enumerate((15, 8)):
        expected = simulated(cache, operands, 0, b, length)[0]
        np.testing.assert_allclose(out[b], expected[-3:], atol=TOLERANCE["float32"])


def test_the_next_step_attends_to_all_that_fit():
    operands = draw()
    cache = dataclasses.replace(append_next(create(), operands, (3, 5)), lengths=int32(CAPACITY, 5))
    _, out, _ = decode(cache, *next_tokens(operands, (0, 5)), int32(1, 1))
    assert np.isfinite(out).all()


PAGE = 4


def sparse_decode(q, k, v, pages, lengths):
    """Of a cache in order, which has its heads side by side: (outputs, bounds)."""
    bounds = PageBounds.of(k, kv_lengths=lengths, page_size=PAGE)
    return sparse_decode_attention(q, k, v, pages, bounds, kv_lengths=lengths), bounds


@pytest.mark.parametrize("top_k", [3, pytest.param(None, marks=pytest.mark.full)])
def test_pages_of_full_heads(top_k: int | None):
    """The pages that a cache of one layer, in order, would list; streaming heads as ever."""
    operands, pages = draw(), QuestPages(top_k=top_k)
    cache = create(page_size=PAGE)
    for num_new in ((5, 9), (12, 2), (1, 0), (9, 1)):
        cache = append_next(cache, operands, num_new)
    lengths = np.asarray(cache.lengths)
    new = list(next_tokens(operands, lengths))
    following, out, _ = decode(cache, *new, int32(1, 1), pages)
    _, dense, _ = decode(cache, *new, int32(1, 1))
    whole = jax.jit(jax.vmap(sparse_decode, in_axes=(0, 0, 0, None, None)))
    expected, bounds = whole(new[0], *operands[1:], pages, jnp.asarray(lengths + 1))
    is_full = np.repeat(KINDS, N // K, axis=1)[:, None, None, :, None]
    np.testing.assert_allclose(out, jnp.where(is_full, expected, dense), atol=TOLERANCE["float32"])
    for name in ("key_min", "key_max"):
        of_rows = getattr(following.bounds, name).reshape(-1, B, CAPACITY // PAGE, H)
        of_heads = np.moveaxis(np.asarray(getattr(bounds, name)), 3, 1)[KINDS]
        np.testing.assert_array_equal(of_rows, of_heads)
    assert (np.abs(out - dense).max() > 0.01) == (top_k is not None)


def many_layers() -> KVCache:
    """Shapes of a cache which is large beside what one layer works on."""
    return jax.eval_shape(lambda: create(np.tile(KINDS, (24, 1)), recent_size=805))


def new_arrays_of_pools(function, num_tokens: int) -> tuple[set[str], int]:
    """What makes arrays of the pools' shapes in a compiled program, and its temporary bytes."""
    cache = many_layers()
    layers = len(cache.rows), B, num_tokens
    q, k, v = (jax.ShapeDtypeStruct((*layers, heads, H), jnp.float32) for heads in (N, K, K))
    num_new = jax.ShapeDtypeStruct((B,), jnp.int32)
    program = jax.jit(lambda *given: function(*given), donate_argnums=0)  # traced anew
    compiled = program.lower(cache, q, k, v, num_new).compile()
    pools = "|".join(",".join(map(str, x.shape)) for x in (cache.full_k, cache.ring_k))
    made = re.findall(rf" = f32\[(?:{pools})\]\S* ([\w-]+)\(", compiled.as_text())
    return set(made), compiled.memory_analysis().temp_size_in_bytes


def decode_loop(cache: KVCache, q, k, v, num_new):
    def step(carry):
        cache, out, count = carry
        cache, out, _ = decode(cache, out, k, v, num_new)
        return cache, out, count + 1

    return jax.lax.while_loop(lambda carry: carry[2] < 5, step, (cache, q, 0))


def extend_layers(cache: KVCache, q, k, v, num_new):
    def layer(cache, given):
        index, k, v = given
        cache, keys, values = cache.extend(index, k, v, num_new, length=24)
        return cache, (keys, values)

    return jax.lax.scan(layer, cache, (per_layer(cache)[0], k, v))


IN_PLACE = {"parameter", "get-tuple-element", "bitcast", "scatter", "fusion"}


@pytest.mark.parametrize(("function", "num_tokens"), [(decode_loop, 1), (extend_layers, 8)])
def test_the_pools_are_updated_in_place(function, num_tokens: int):
    """A program that is given the cache has nothing else as large as a pool."""
    made, temporary = new_arrays_of_pools(function, num_tokens)
    assert "scatter" in made
    assert made <= IN_PLACE
    assert temporary < many_layers().memory_usage() / 2


def test_a_copy_of_a_pool_is_seen(monkeypatch: pytest.MonkeyPatch):
    """Without an order between the ring's reading and its writing, the compiler copies it."""
    monkeypatch.setattr(jax.lax, "optimization_barrier", lambda x: x)
    made, _ = new_arrays_of_pools(extend_layers, 8)
    assert "copy" in made


def llama_8b(is_full: np.ndarray | None) -> int:
    """Bytes of a cache of Llama-3-8B at 128K tokens; nothing is allocated."""
    shape = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "batch": 1}
    make = functools.partial(
        KVCache.create, **shape, capacity=2**17, dtype=jnp.bfloat16, is_full=is_full
    )
    return jax.eval_shape(make).memory_usage()


def test_half_of_the_heads_streaming_takes_about_half_of_the_bytes():
    full = llama_8b(None)
    assert full == 2 * 32 * 8 * 2**17 * 128 * 2
    random = np.random.default_rng(0).permutation(256).reshape(32, 8)
    assert llama_8b(random < 128) <= 0.52 * full
    assert llama_8b(np.zeros((32, 8), bool)) == full * (128 + 1024) // 2**17


@pytest.mark.parametrize("page_size", [None, 64])
def test_the_hopper_kernel_takes_any_cache(page_size: int | None):
    """Slots are rounded up to what it takes; only the device may refuse."""
    cache = jax.eval_shape(
        lambda: KVCache.create(
            num_layers=1,
            batch=1,
            capacity=1001,
            num_kv_heads=2,
            head_dim=128,
            dtype=jnp.bfloat16,
            is_full=np.array([[True, False]]),
            sink_size=5,
            recent_size=30,
            page_size=page_size,
        )
    )
    for pool in (cache.full_k, cache.ring_k):
        facts = dataclasses.replace(TAKEN, capacity=pool.shape[1], block_kv=page_size)
        assert mosaic_sm90.refusal(facts) is None
    q = jnp.zeros((1, 1, 8, 128), jnp.bfloat16)
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs compute capability 9"):
        jax.eval_shape(lambda cache: decode_attention(q, cache, 0, backend="mosaic_sm90"), cache)


@pytest.mark.gpu
@pytest.mark.parametrize("pages", [None, QuestPages(top_k=5)], ids=["all", "pages"])
@pytest.mark.parametrize("group", [3, 4])
def test_the_hopper_kernel_equals_xla(group: int, pages: QuestPages | None):
    if reason := hopper_refusal(device_facts()):
        pytest.skip(f"mosaic_sm90 {reason}")
    make = functools.partial(
        KVCache.create,
        num_layers=L,
        batch=B,
        capacity=1001,
        num_kv_heads=K,
        head_dim=64,
        dtype=jnp.bfloat16,
        is_full=KINDS,
        sink_size=5,
        recent_size=300,
        page_size=64,
    )
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(B, length, heads, 64)), jnp.bfloat16)
        for length, heads in ((1, K * group), (900, K), (900, K))
    )
    for layer in range(L):
        cache = make().append(layer, k, v, int32(900, 77)).advance(int32(899, 76))
        attend = functools.partial(decode_attention, q, cache, layer, pages=pages)
        ours, xla = (
            attend(backend=backend).astype("float32") for backend in ("mosaic_sm90", "xla")
        )
        np.testing.assert_allclose(ours, xla, atol=2e-2)


NEW = jnp.zeros((B, 3, K, H))
CREATE = {
    "num_layers": 1,
    "batch": 1,
    "capacity": 8,
    "num_kv_heads": 1,
    "head_dim": 8,
    "dtype": "float32",
}

BAD = {
    "capacity": (
        lambda: KVCache.create(**CREATE | {"capacity": 0}),
        "capacity=0 must be at least 1",
    ),
    "sink_size": (
        lambda: KVCache.create(**CREATE, sink_size=-1),
        "sink_size=-1 must not be negative; 0 keeps no sinks",
    ),
    "recent_size": (
        lambda: KVCache.create(**CREATE, recent_size=0),
        "recent_size=0 must be at least 1",
    ),
    "page_size": (
        lambda: KVCache.create(**CREATE, page_size=0),
        "page_size=0 must be at least 1",
    ),
    "dtype": (
        lambda: KVCache.create(**CREATE | {"dtype": "int8"}),
        r"dtype=int8 must be one of \('bfloat16', 'float16', 'float32'\)",
    ),
    "is_full": (
        lambda: KVCache.create(**CREATE, is_full=np.ones((1, 2), bool)),
        r"is_full has shape \(1, 2\) and dtype bool; pass bool of shape \(1, 1\)",
    ),
    "is_full-traced": (
        lambda: jax.eval_shape(
            lambda x: KVCache.create(**CREATE, is_full=x), np.ones((1, 1), bool)
        ),
        "is_full must not be traced: it sizes the pools; pass a NumPy array",
    ),
    "layer": (
        lambda: create().append(3, NEW, NEW, int32(3, 3)),
        r"layer=3 must be one index in \[0, 3\)",
    ),
    "k": (
        lambda: create().append(0, NEW[..., :4], NEW[..., :4], int32(3, 3)),
        r"k.shape=\(2, 3, 2, 4\) must be \[2, new tokens, 2, 8\], as the cache was created",
    ),
    "k-dtype": (
        lambda: create(dtype="bfloat16").append(0, NEW, NEW, int32(3, 3)),
        "k.dtype=float32 must be that of the cache, bfloat16; cast",
    ),
    "v": (
        lambda: create().append(0, NEW, NEW[:, :2], int32(2, 2)),
        r"v.shape=\(2, 2, 2, 8\) must equal k.shape=\(2, 3, 2, 8\)",
    ),
    "num_new-shape": (
        lambda: create().advance(int32(1)),
        r"num_new has shape \(1,\) and dtype int32; pass int32 of shape \(2,\)",
    ),
    "num_new-negative": (
        lambda: create().advance(int32(1, -1)),
        r"num_new=\[1, -1\] must not be negative; 0 for none",
    ),
    "num_new-more-than-k": (
        lambda: create().append(0, NEW, NEW, int32(1, 4)),
        r"num_new=\[1, 4\] must not exceed the 3 new tokens of k",
    ),
    "no-room": (
        lambda: create().advance(int32(39, 2)).append(1, NEW, NEW, int32(2, 2)),
        r"num_new=\[2, 2\] tokens after lengths=\[39, 2\] exceed capacity=40; create a larger",
    ),
    "no-room-to-advance": (lambda: create().advance(int32(1, 41)), "exceed capacity=40"),
    "check_room": (
        lambda: create().check_room(int32(41, 0)),
        r"num_new=\[41, 0\] tokens after lengths=\[0, 0\] exceed capacity=40",
    ),
    "length-short": (
        lambda: create().extend(0, NEW, NEW, int32(3, 3), length=2),
        r"length=2 must lie in \[3, capacity=40\]: the chunk's 3 tokens are its last",
    ),
    "length-long": (
        lambda: create().extend(0, NEW, NEW, int32(3, 3), length=41),
        r"length=41 must lie in \[3, capacity=40\]",
    ),
    "length-of-another-start": (
        lambda: create().advance(int32(4, 2)).extend(0, NEW, NEW, int32(3, 1), length=7),
        r"lengths=\[4, 2\] must be length - 3 = 4 wherever num_new=\[3, 1\] is not 0",
    ),
    "q": (
        lambda: decode_attention(jnp.zeros((B, 1, 3, H)), create(), 0),
        r"q.shape=\(2, 1, 3, 8\) must be \[2, new tokens, a multiple of 2, 8\], as the cache",
    ),
    "q-dtype": (
        lambda: decode_attention(jnp.zeros((B, 1, N, H), "float16"), create(), 0),
        "q.dtype=float16 must be that of the cache, float32; cast",
    ),
    "q-of-several-tokens": (
        lambda: decode_attention(jnp.zeros((B, 2, N, H)), create(), 0),
        "q has 2 tokens, but a streaming head's ring holds the window of exactly 1; decode token",
    ),
    "decode-layer": (
        lambda: decode_attention(jnp.zeros((B, 1, N, H)), create(), -1),
        r"layer=-1 must be one index in \[0, 3\)",
    ),
    "scale": (
        lambda: decode_attention(jnp.zeros((B, 1, N, H)), create(), 0, scale=0.0),
        "scale=0.0 must be positive",
    ),
    "pages": (
        lambda: decode_attention(jnp.zeros((B, 1, N, H)), create(), 0, pages=QuestPages(top_k=4)),
        r"pages=QuestPages\(top_k=4, .* need bounds of the cache's pages; create it with a page_s",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_streams_alone_has_no_end():
    """Without full heads there is always room: a ring forgets."""
    cache = create(np.zeros((1, K), bool))
    cache.advance(int32(CAPACITY + 1, 3)).check_room(int32(3, 3))
