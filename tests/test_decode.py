"""Sparse decode against the formulas: which pages are chosen, and what attends to them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax import PageBounds, QuestPages, UnsupportedError, sparse_decode_attention
from sparseattn_jax.kernels.decode_attention import decode_attention
from sparseattn_jax.synthetic import structured_qkv
from tests.drawing import block_matrix
from tests.oracles import attention, decode, pages

PAGE, S, H = 4, 42, 8
LENGTHS = (42, 17, 3, 0)  # all, odd, less than a page, none
ALL_PAGES = QuestPages(top_k=None)


def as_lengths(*lengths: int) -> jax.Array:
    return jnp.array(lengths, jnp.int32)


def draw(dtype="float32", T=1, N=4, K=2, B=4, *, seed=0):
    """A cache whose pages differ, so that their shares do."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, *rest, H)) for rest in ((T, N), (S, K), (S, K)))
    k += 2 * np.repeat(rng.normal(size=(B, -(-S // PAGE), K, H)), PAGE, axis=1)[:, :S]
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


bound = jax.jit(functools.partial(PageBounds.of, page_size=PAGE))
select = jax.jit(lambda quest, q, bounds, lengths: quest.select(q, bounds, kv_lengths=lengths))
attend = jax.jit(
    lambda *args, kv_lengths: sparse_decode_attention(*args, kv_lengths=kv_lengths, return_lse=True)
)
attend_to_all = jax.jit(decode_attention)


def kept_by(quest: QuestPages, q, k, lengths=LENGTHS):
    """Which pages each kv head lists, [B, K, P], and how many it dropped."""
    lengths = as_lengths(*lengths)
    bounds = bound(k, kv_lengths=lengths)
    lists = select(quest, q, bounds, lengths)
    return listed(lists, bounds), np.asarray(lists.num_dropped)


def listed(lists, bounds: PageBounds) -> np.ndarray:
    """The lists as a matrix, after a look at their form."""
    indices, counts, _ = (np.asarray(x) for x in lists)
    assert indices.dtype == counts.dtype == np.int32
    keep = np.zeros((*counts.shape, bounds.key_min.shape[1]), bool)
    for row, count in np.ndenumerate(counts):
        pages_of_row, padding = np.split(indices[row], [count])
        assert np.all(np.diff(pages_of_row) > 0)
        assert np.all(padding == (pages_of_row[0] if count else 0))
        keep[row][pages_of_row] = True
    return keep


def shares_of(q, k, lengths=LENGTHS):
    scores = pages.page_scores(q, *pages.page_bounds(k, lengths, PAGE))
    return pages.page_shares(scores, lengths, PAGE, k.shape[2], H**-0.5)


def assert_right(quest: QuestPages, q, k, lengths=LENGTHS) -> None:
    """The pages and the number of dropped ones are those of the formula."""
    keep, num_dropped = kept_by(quest, q, k, lengths)
    shares = shares_of(q, k, lengths)
    top_p = None if quest.top_p is None else np.broadcast_to(quest.top_p, k.shape[2])
    for b, h in np.ndindex(*num_dropped.shape):
        forced = pages.forced_pages(lengths[b], q.shape[1], PAGE, quest.num_first, quest.num_recent)
        share = None if top_p is None else float(top_p[h])
        visible = -(-lengths[b] // PAGE)
        expected = pages.kept_pages(shares[b, h], visible, forced, quest.top_k, share)
        assert (set(np.flatnonzero(keep[b, h])), num_dropped[b, h]) == expected


@pytest.mark.parametrize(
    ("quest", "shape"),
    [
        (QuestPages(top_k=4), {}),
        (QuestPages(top_k=3, num_first=0), {"T": 2, "N": 3, "K": 1}),
        (QuestPages(top_k=6, num_first=2, num_recent=2), {"T": 4, "dtype": "bfloat16"}),
        (QuestPages(top_k=None, top_p=0.7), {"T": 3, "dtype": "float16"}),
        (QuestPages(top_k=None, top_p=jnp.array([0.2, 0.95])), {"N": 6}),
        (QuestPages(top_k=3, top_p=0.8), {"N": 2}),
        (QuestPages(top_k=None, top_p=0.0), {}),
        (QuestPages(top_k=None, top_p=1.0), {}),
        (ALL_PAGES, {}),
    ],
    ids=lambda x: "-".join(f"{k}{v}" for k, v in (x if isinstance(x, dict) else vars(x)).items()),
)
def test_pages_are_those_of_the_formula(quest: QuestPages, shape: dict):
    q, k, _ = draw(**shape)
    assert_right(quest, q, k)


FAULTS = {
    "another-query": lambda q, k: (jnp.roll(q, 1, axis=0), k),
    "other-heads": lambda q, k: (q[:, :, [0, 2, 1, 3]], k),
    "opposite-sign": lambda q, k: (-q, k),
    "key-beside": lambda q, k: (q, jnp.roll(k, 1, axis=1)),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_seen(monkeypatch: pytest.MonkeyPatch, fault):
    right = kept_by
    monkeypatch.setitem(
        globals(), "kept_by", lambda quest, q, k, lengths: right(quest, *fault(q, k), lengths)
    )
    q, k, _ = draw()
    with pytest.raises(AssertionError):
        assert_right(QuestPages(top_k=4), q, k)


@given(
    top_p=st.floats(0, 1, width=32),
    lengths=st.tuples(*2 * [st.integers(0, S)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_share_is_reached_by_the_fewest_pages(top_p, lengths, seed):
    """Up to the rounding of sums; a page that is dropped weighs no more than one that is kept."""
    q, k, _ = draw(T=2, B=2, seed=seed)
    keep, num_dropped = kept_by(QuestPages(top_k=None, top_p=jnp.float32(top_p)), q, k, lengths)
    assert not num_dropped.any()
    all_shares = shares_of(q, k, lengths)
    for b, h in np.ndindex(*num_dropped.shape):
        shares, kept = all_shares[b, h], set(np.flatnonzero(keep[b, h]))
        forced = pages.forced_pages(lengths[b], 2, PAGE, 1, 1)
        assert forced <= kept
        mass = shares[list(kept)].sum()
        assert mass >= (top_p - 1e-5) * shares.sum()
        if chosen := kept - forced:
            least = shares[list(chosen)].min()
            assert mass - least < (top_p + 1e-5) * shares.sum()
            others = set(range(-(-lengths[b] // PAGE))) - kept
            assert all(shares[p] <= least + 1e-5 for p in others)


def test_what_is_kept_in_any_case():
    """Three queries end at token 17, 16, 13: the first page, theirs, and one page before."""
    q, k, _ = draw(T=3, N=1, K=1, B=3)
    quest = QuestPages(top_k=None, top_p=0.0, num_recent=2)
    picture = """
        #.###......
        #.##.......
        ####.......
    """
    keep, _ = kept_by(quest, q, k, (18, 16, 13))
    np.testing.assert_array_equal(keep[:, 0], block_matrix(picture))


FIVE = QuestPages(top_k=5, num_first=0)


def test_a_quiet_head_has_its_pages_too():
    """Of two heads of a group one has logits fifty times as large; each looks for a page."""
    q, k = np.zeros((1, 1, 2, H)), np.zeros((1, 10 * PAGE, 1, H))
    q[0, 0] = 30 * np.eye(H)[0], 0.6 * np.eye(H)[1]
    k[0, :, 0, 0] = np.repeat([0, 8, 4, 8, 4, 0, 5, 4, 6, 4], PAGE)
    k[0, 5 * PAGE, 0, 1] = 30
    keep, _ = kept_by(FIVE, jnp.float32(q), jnp.float32(k), (10 * PAGE,))
    assert keep[0, 0, [1, 3, 5]].all()


def test_shares_too_small_for_float32_still_rank():
    q, k = np.zeros((1, 1, 2, H)), np.zeros((1, 10 * PAGE, 1, H))
    q[..., 0] = 1000
    k[0, :, 0, 0] = np.repeat([0, -7, -6, -5, -9, -2, -8, 0, 0, 0], PAGE)
    keep, _ = kept_by(FIVE, jnp.float32(q), jnp.float32(k), (7 * PAGE,))
    np.testing.assert_array_equal(np.flatnonzero(keep), [0, 2, 3, 5, 6])


@pytest.mark.parametrize(
    ("dtype", "q_len"),
    [("float32", 3), ("bfloat16", 1), pytest.param("float16", 2, marks=pytest.mark.full)],
)
def test_with_all_pages_it_is_dense_decode(dtype: str, q_len: int):
    q, k, v = draw(dtype, T=q_len)
    lengths = as_lengths(*LENGTHS)
    bounds = bound(k, kv_lengths=lengths)
    out, lse = attend(q, k, v, ALL_PAGES, bounds, kv_lengths=lengths)
    dense, dense_lse = attend_to_all(q, k, v, kv_lengths=lengths)
    assert out.dtype == q.dtype
    tolerance = 2e-6 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (out, dense)), atol=tolerance)
    np.testing.assert_allclose(lse, dense_lse, atol=2e-6)
    assert not out[-1].any()
    assert jnp.isneginf(lse[-1]).all()


def test_output_is_attention_to_the_chosen_pages():
    q, k, v = draw(T=2, N=6)
    quest = QuestPages(top_k=4)
    keep, _ = kept_by(quest, q, k)
    lengths = as_lengths(*LENGTHS)
    positions = np.broadcast_to(np.arange(S), (len(LENGTHS), S))
    visible = decode.visible_slots(6, 2, positions, np.array(LENGTHS), keep, PAGE)
    expected = attention.attention(q, k, v, visible)
    unlisted = jnp.repeat(~keep.any(axis=1), PAGE, axis=1)[:, :S, None, None]
    poisoned = (jnp.where(unlisted, jnp.nan, x) for x in (k, v))
    results = attend(q, *poisoned, quest, bound(k, kv_lengths=lengths), kv_lengths=lengths)
    for result, formula in zip(results, expected, strict=True):
        np.testing.assert_allclose(result, formula, atol=2e-6)


def test_steps_that_extend_bounds_equal_those_from_scratch():
    """A loop as generation runs it: one token at a time, one compiled step, lengths traced."""
    (_, k, v), quest = draw(), QuestPages(top_k=3)
    queries = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4, 1, 4, H)), jnp.float32)

    @jax.jit
    def step(q, bounds, lengths):
        new_keys = k[jnp.arange(4)[:, None], lengths[:, None]]
        bounds = bounds.extend(new_keys, kv_lengths=lengths)
        out = sparse_decode_attention(q, k, v, quest, bounds, kv_lengths=lengths + 1)
        return out, bounds

    lengths = as_lengths(30, 17, 3, 0)
    bounds = bound(k, kv_lengths=lengths)
    for q in queries:
        out, bounds = step(q, bounds, lengths)
        lengths += 1
        whole = bound(k, kv_lengths=lengths)
        jax.tree.map(np.testing.assert_array_equal, bounds, whole)
        expected, _ = attend(q, k, v, quest, whole, kv_lengths=lengths)
        np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.full
def test_batching_by_vmap_equals_a_loop():
    q, k, _ = draw()
    lengths = as_lengths(*LENGTHS)
    quest = QuestPages(top_k=3, top_p=0.9)

    def one(q, k, length):
        bounds = PageBounds.of(k[None], kv_lengths=length[None], page_size=PAGE)
        return jax.tree.map(lambda x: x[0], quest.select(q[None], bounds, kv_lengths=length[None]))

    batched = jax.jit(jax.vmap(one))(q, k, lengths)
    expected = select(quest, q, bound(k, kv_lengths=lengths), lengths)
    jax.tree.map(np.testing.assert_array_equal, batched, expected)


@functools.cache
def needles() -> tuple:
    """One query per sequence, the four keys that it looks for in 2048, and their pages of 16."""

    @jax.jit
    def structured(key, needle):
        return structured_qkv(
            key,
            batch=8,
            q_len=1,
            kv_len=2048,
            num_heads=4,
            num_kv_heads=2,
            head_dim=128,
            dtype=jnp.float32,
            num_sinks=8,
            local_width=16.0,
            num_needles=1,
            needle_size=4,
            needle=needle,
        )

    q, k, _ = structured(jax.random.key(0), 14.0)
    differs = (k != structured(jax.random.key(0), 0.0)[1]).any(axis=-1)
    pages_of_needles = differs.reshape(8, 128, 16, 2).any(axis=2).swapaxes(1, 2)
    return q, k, np.asarray(pages_of_needles)


def test_a_tenth_of_the_pages_holds_the_needles_and_most_of_the_mass():
    q, k, wanted = needles()
    lengths = jnp.full(8, 2048, jnp.int32)
    bounds = jax.jit(functools.partial(PageBounds.of, page_size=16))(k)
    keep = listed(select(QuestPages(top_k=13), q, bounds, lengths), bounds)
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    logits = np.einsum("bkgh,bskh->bkgs", q.reshape(8, 2, 2, 128), k) * 128**-0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    mass = (weights / weights.sum(axis=-1, keepdims=True)).mean(axis=2)
    mass = mass.reshape(8, 2, 128, 16).sum(axis=-1)
    random = np.random.default_rng(0).random(keep.shape)
    random = random >= np.sort(random, axis=-1)[..., -13:-12]
    best = np.sort(mass, axis=-1)[..., -13:].sum(axis=-1)
    recall, baseline = (np.sum(mass * x, axis=-1) for x in (keep, random))
    assert keep.sum(axis=-1).max() == 13
    assert keep[wanted].all()
    assert recall.min() > 0.98
    assert recall.mean() > best.mean() - 0.002
    assert random[wanted].mean() < 0.3
    assert baseline.mean() < 0.5


BAD = {
    "page_size": (
        lambda q, k, v, bounds, n: PageBounds.of(k, page_size=0),
        "page_size=0 must be at least 1",
    ),
    "keys": (lambda q, k, v, bounds, n: PageBounds.of(k[0]), r"k.shape=\(42, 2, 8\) must be"),
    "keys-dtype": (
        lambda q, k, v, bounds, n: PageBounds.of(k.astype("int32")),
        "k.dtype=int32 must be floating, as that of the queries; cast it",
    ),
    "q-empty": (
        lambda q, k, v, bounds, n: ALL_PAGES.select(q[:, :0], bounds, kv_lengths=n),
        r"q.shape=\(4, 0, 4, 8\) must be .* no axis of size 0",
    ),
    "keys-lengths": (
        lambda q, k, v, bounds, n: PageBounds.of(k, kv_lengths=n + 1),
        r"kv_lengths=\[43, 18, 4, 1\] must lie in \[0, kv_len=42\]",
    ),
    "new-keys": (
        lambda q, k, v, bounds, n: bounds.extend(k[:, :1, :1], kv_lengths=n),
        r"new_keys.shape=\(4, 1, 1, 8\) must be \[4, new tokens, 2, 8\]",
    ),
    "new-dtype": (
        lambda q, k, v, bounds, n: bounds.extend(k[:, :1].astype("bfloat16"), kv_lengths=n),
        "new_keys.dtype=bfloat16 must be that of the bounds, float32; cast it",
    ),
    "no-room": (
        lambda q, k, v, bounds, n: bounds.extend(k[:, :3], kv_lengths=n),
        r"kv_lengths=\[42, 17, 3, 0\] must lie in \[0, 41\]",
    ),
    "lengths": (
        lambda q, k, v, bounds, n: ALL_PAGES.select(q, bounds, kv_lengths=n[:2]),
        r"kv_lengths has shape \(2,\) and dtype int32; pass int32 of shape \(4,\)",
    ),
    "too-long": (
        lambda q, k, v, bounds, n: ALL_PAGES.select(q, bounds, kv_lengths=n + 3),
        r"kv_lengths=\[45, 20, 6, 3\] must lie in \[0, 44\]",
    ),
    "q-axes": (
        lambda q, k, v, bounds, n: ALL_PAGES.select(q[:, 0], bounds, kv_lengths=n),
        r"q.shape=\(4, 4, 8\) must be \[batch, new tokens, heads, head_dim\]",
    ),
    "q-heads": (
        lambda q, k, v, bounds, n: ALL_PAGES.select(q[:, :, :3], bounds, kv_lengths=n),
        r"q.shape=\(4, 1, 3, 8\) does not fit bounds of batch=4, num_kv_heads=2, head_dim=8",
    ),
    "top_k": (
        lambda q, k, v, bounds, n: QuestPages(top_k=1).select(q, bounds, kv_lengths=n),
        "top_k=1 must be at least 2, to hold num_first=1 and num_recent=1 pages and those of 1 ",
    ),
    "top_p": (
        lambda q, k, v, bounds, n: QuestPages(top_p=1.5).select(q, bounds, kv_lengths=n),
        r"top_p=1.5 must lie in \[0, 1\]",
    ),
    "top_p-shape": (
        lambda q, k, v, bounds, n: QuestPages(top_p=jnp.ones(4)).select(q, bounds, kv_lengths=n),
        r"top_p has shape \(4,\); pass a scalar, or one per kv head, of shape \(2,\)",
    ),
    "num_first": (
        lambda q, k, v, bounds, n: QuestPages(num_first=-1).select(q, bounds, kv_lengths=n),
        "num_first=-1 must not be negative; 0 for none",
    ),
    "num_recent": (
        lambda q, k, v, bounds, n: QuestPages(num_recent=0).select(q, bounds, kv_lengths=n),
        "num_recent=0 must be at least 1",
    ),
    "scale": (
        lambda q, k, v, bounds, n: ALL_PAGES.select(q, bounds, kv_lengths=n, scale=-1.0),
        "scale=-1.0 must be positive; negate q instead",
    ),
    "other-bounds": (
        lambda q, k, v, bounds, n: sparse_decode_attention(
            q, k, v, ALL_PAGES, dataclasses.replace(bounds, page_size=8), kv_lengths=n
        ),
        r"bounds of shape \(4, 11, 2, 8\) and dtype float32 are not of k with shape "
        r"\(4, 42, 2, 8\) and dtype float32: pages of 8 tokens give \(4, 6, 2, 8\)",
    ),
    "values": (
        lambda q, k, v, bounds, n: sparse_decode_attention(
            q, k, v[:, 1:], ALL_PAGES, bounds, kv_lengths=n
        ),
        r"v.shape=\(4, 41, 2, 8\) must equal k.shape=\(4, 42, 2, 8\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(call, message: str):
    q, k, v = draw()
    lengths = as_lengths(*LENGTHS)
    with pytest.raises(ValueError, match=message):
        call(q, k, v, bound(k, kv_lengths=lengths), lengths)


def test_a_backend_that_cannot_run_says_why():
    q, k, v = draw()
    lengths = as_lengths(*LENGTHS)
    bounds = bound(k, kv_lengths=lengths)
    call = functools.partial(sparse_decode_attention, kv_lengths=lengths, backend="mosaic_sm90")
    with pytest.raises(UnsupportedError, match="mosaic_sm90: needs "):
        jax.eval_shape(call, q, k, v, ALL_PAGES, bounds)
