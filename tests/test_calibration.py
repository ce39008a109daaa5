"""Thresholds for a recall, the published rule, the dynamic programme, and tables in files."""

import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import Full, XAttention, calibration, configuration
from sparseattn_jax.measures import attention_recall
from tests.oracles import attention, selection
from tests.oracles import calibration as oracle
from tests.oracles import xattention as scoring

STRATEGY = XAttention(stride=4, block_size=8)
every_call = pytest.mark.parametrize(
    "call",
    [
        pytest.param({"kv_lengths": (61, 34)}, id="lengths"),
        pytest.param({"T": 29}, id="T<S"),
        pytest.param({"is_causal": False}, id="non-causal", marks=pytest.mark.full),
        pytest.param({}, id="causal", marks=pytest.mark.full),
    ],
)

recall_thresholds = jax.jit(calibration.recall_thresholds, static_argnames="is_causal")
coverage_thresholds = jax.jit(calibration.coverage_thresholds, static_argnames="is_causal")
recall_in_jit = jax.jit(attention_recall)


@jax.jit
def select_causal(strategy, q, k, kv_lengths):
    return strategy.select(q, k, kv_lengths=kv_lengths)


def draw(B=2, T=61, S=61, N=4, K=2, H=8):
    rng = np.random.default_rng(0)
    shapes = [(B, T, N, H), (B, S, K, H)]
    return [jnp.array(1.5 * rng.normal(size=shape), jnp.float32) for shape in shapes]


@functools.cache
def exact_blocks(T=61, *, is_causal=True, kv_lengths=None):
    """True mass, scores, forced and visible blocks [B, N, Tb, Sb] of what `draw` gives."""
    q, k = (np.asarray(x, np.float64) for x in draw(T=T))
    call = {"is_causal": is_causal, "kv_lengths": kv_lengths}
    (B, _, N, H), S = q.shape, k.shape[1]
    keys = np.repeat(k, N // k.shape[2], axis=2)
    logits = np.einsum("btnh,bsnh->bnts", q, keys) / H**0.5
    weights = np.exp(logits) * attention.visible_pairs(B, T, S, **call)[:, None]
    totals = weights.sum(axis=-1, keepdims=True)
    weights /= np.where(totals == 0.0, 1.0, totals)
    scores = scoring.antidiagonal_scores(q, k, stride=4, block_size=8, **call)
    mass = oracle.block_mass(weights, *scores.shape[2:], 8)
    visible, forced = selection.visible_and_forced(B, T, S, 8, **call)
    return mass, scores, *(np.broadcast_to(x, scores.shape) for x in (forced, visible))


def thresholds_of(rule, recall, *, T=61, kv_lengths=(61, 61), **call):
    lengths = jnp.array(kv_lengths, jnp.int32)
    recall = jnp.full(4, recall, jnp.float32)
    out = rule(*draw(T=T), recall=recall, strategy=STRATEGY, kv_lengths=lengths, **call)
    assert out.shape == (4,) and out.dtype == jnp.float32
    return np.asarray(out)


@every_call
@pytest.mark.parametrize("recall", [0.4, 0.9])
def test_the_recall_is_reached_by_the_lowest_threshold(call: dict, recall: float) -> None:
    found = thresholds_of(recall_thresholds, recall, **call)
    blocks = exact_blocks(**call)
    for head, threshold in enumerate(found):
        of_texts = list(zip(*(x[:, head] for x in blocks), strict=True))
        reached = [oracle.recall_of(*text, threshold) for text in of_texts]
        assert min(reached) >= recall - 1e-5
        lowest = oracle.lowest_threshold(of_texts, recall)
        assert threshold >= lowest - 1e-5
        at_lowest = [oracle.recall_of(*text, lowest) for text in of_texts]
        np.testing.assert_allclose(reached, at_lowest, atol=1e-6)


def test_the_recall_is_reached_by_the_kernels_too() -> None:
    q, k = draw()
    lengths = jnp.array([61, 34], jnp.int32)
    found = thresholds_of(recall_thresholds, 0.8, kv_lengths=(61, 34))
    strategy = dataclasses.replace(STRATEGY, threshold=jnp.asarray(found))
    pattern = select_causal(strategy, q, k, lengths)
    assert (recall_in_jit(q, k, pattern, kv_lengths=lengths) >= 0.8 - 1e-5).all()


@every_call
def test_the_published_rule(call: dict) -> None:
    found = thresholds_of(coverage_thresholds, 0.8, **call)
    mass, scores, _, visible = exact_blocks(**call)
    expected = [
        max(
            oracle.coverage_threshold(mass[b, n], scores[b, n], visible[b, n], 0.8)
            for b in range(2)
        )
        for n in range(4)
    ]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rule", [recall_thresholds, coverage_thresholds], ids=["recall", "cover"])
def test_a_higher_recall_needs_a_higher_threshold(rule) -> None:
    found = np.stack([thresholds_of(rule, recall) for recall in (0.0, 0.3, 0.6, 0.9, 0.99, 1.0)])
    assert (np.diff(found, axis=0) >= 0).all()
    assert (found[1] < found[4]).all()
    np.testing.assert_allclose(found[0], 0.0, atol=1e-6)
    np.testing.assert_allclose(found[-1], 1.0, atol=1e-6)


def test_each_head_may_have_its_own_recall() -> None:
    low, high = (thresholds_of(recall_thresholds, recall) for recall in (0.3, 0.9))
    mixed = thresholds_of(recall_thresholds, np.array([0.3, 0.9, 0.9, 0.3]))
    np.testing.assert_array_equal(mixed, [low[0], high[1], high[2], low[3]])


def test_texts_without_tokens_need_nothing() -> None:
    found = thresholds_of(recall_thresholds, 0.9, kv_lengths=(0, 0))
    np.testing.assert_array_equal(found, 0.0)


def test_nothing_of_all_pairs_is_held() -> None:
    q, k = (jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32) for _ in range(2))
    strategy = XAttention(stride=16, block_size=64)
    program = jax.jit(functools.partial(calibration.recall_thresholds, strategy=strategy))
    memory = program.lower(q, k).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4096 * 4096


def contributions(shape: tuple[int, ...], seed: int = 0):
    """A score that is a sum of an arbitrary function of each head's threshold."""
    weights = np.random.default_rng(seed).normal(size=(3, *shape))

    def score(thresholds: np.ndarray) -> float:
        powers = np.stack([thresholds, thresholds**3, np.sin(20.0 * thresholds)])
        return float((weights * powers).sum())

    return score


@pytest.mark.parametrize(("shape", "most"), [((5,), 1), ((3,), 3), ((2, 2), 2)], ids=str)
def test_the_programme_finds_the_best_choice(shape: tuple[int, ...], most: int) -> None:
    initial = np.linspace(0.5, 0.9, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    total = initial.size * most
    for seed in range(3):
        score = contributions(shape, seed)
        found = calibration.reduce_thresholds(
            score, initial, num_reductions=total, factor=0.8, max_per_head=most
        )
        assert found.thresholds.shape == (total + 1, *shape)
        assert found.thresholds.dtype == np.float32
        for number in range(total + 1):
            best, value = oracle.best_reductions(score, initial, number, 0.8, most)
            np.testing.assert_allclose(found.thresholds[number], best, rtol=1e-6)
            np.testing.assert_allclose(found.scores[number], value, rtol=1e-5, atol=1e-5)


def test_the_programme_asks_as_often_as_it_says() -> None:
    asked = []

    def score(thresholds: np.ndarray) -> float:
        asked.append(thresholds)
        return 0.0

    found = calibration.reduce_thresholds(score, np.full(6, 0.9, np.float32), num_reductions=4)
    assert len(asked) == 1 + sum(min(4, head + 1) for head in range(6))
    # Equal scores: the earlier heads.
    np.testing.assert_allclose(found.thresholds[4], [0.81] * 4 + [0.9] * 2, rtol=1e-6)


def test_most_reduced_goes_as_far_as_the_score_allows() -> None:
    scores = np.array([-1.0, -1.5, -1.2, -3.0])
    found = calibration.Reductions(
        thresholds=np.arange(8, dtype=np.float32).reshape(4, 2), scores=scores
    )
    np.testing.assert_array_equal(found.most_reduced(-1.3), [4, 5])
    np.testing.assert_array_equal(found.most_reduced(-1.1), [0, 1])
    with pytest.raises(ValueError, match=r"least_score=0.0 is above every score, .* is -1.0"):
        found.most_reduced(0.0)


TABLE = np.array([[0.25, 0.5], [0.75, 1.0], [0.0, 0.125]], np.float32)


def test_a_table_survives_its_file_and_is_stacked_for_a_scan(tmp_path: pathlib.Path) -> None:
    made = calibration.to_configuration(TABLE, STRATEGY)
    configuration.save(made, tmp_path / "thresholds.json")
    loaded = configuration.load(tmp_path / "thresholds.json")
    stacked = calibration.stack(loaded, 3)
    assert stacked == dataclasses.replace(STRATEGY, threshold=stacked.threshold)
    np.testing.assert_array_equal(stacked.threshold, TABLE)
    assert loaded.of_layer(3) == STRATEGY


def test_layers_without_a_row_are_stacked_with_the_common_threshold() -> None:
    stacked = calibration.stack(calibration.to_configuration(TABLE, STRATEGY), 4)
    np.testing.assert_array_equal(stacked.threshold, [*TABLE, [np.float32(0.95)] * 2])
    alone = calibration.stack(configuration.Configuration(strategy=STRATEGY), 2)
    np.testing.assert_array_equal(alone.threshold, [np.float32(0.95)] * 2)


def test_a_scan_over_layers_selects_like_each_layer_alone() -> None:
    q, k = draw(B=1, N=2, K=1)
    strategy = dataclasses.replace(STRATEGY, threshold=jnp.asarray(TABLE))

    @jax.jit
    def counts_of_layers(strategy):
        def step(_, layer):
            return None, layer.select(q, k).blocks.kv_num_blocks

        return jax.lax.scan(step, None, strategy)[1]

    counts = counts_of_layers(strategy)
    for layer, row in enumerate(TABLE):
        alone = dataclasses.replace(STRATEGY, threshold=jnp.asarray(row))
        expected = select_causal(alone, q, k, None).blocks.kv_num_blocks
        np.testing.assert_array_equal(counts[layer], expected)


TABLES_IN_PYTHON = """
import torch
print("never run")
SIZE = 2
first = [[0.25, 0.5], [0.75, 1.0]]
second = torch.tensor([[0.5, 0.5]], dtype=torch.float32)
made = [[0.1] * 2 for _ in range(2)]
"""


def test_published_tables_are_read_from_a_file(tmp_path: pathlib.Path, capsys) -> None:
    (tmp_path / "tables.py").write_text(TABLES_IN_PYTHON)
    (tmp_path / "list.json").write_text(json.dumps(TABLE.tolist()))
    (tmp_path / "object.json").write_text(json.dumps({"s16": TABLE.tolist(), "s8": [[1]]}))
    for (name, table), file in itertools.product(
        [("first", [[0.25, 0.5], [0.75, 1.0]]), ("second", [[0.5, 0.5]])], ["tables.py"]
    ):
        np.testing.assert_array_equal(calibration.read_table(tmp_path / file, name=name), table)
    np.testing.assert_array_equal(calibration.read_table(tmp_path / "list.json"), TABLE)
    np.testing.assert_array_equal(calibration.read_table(tmp_path / "object.json", name="s8"), 1.0)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("file", "text", "name", "message"),
    [
        ("a.py", TABLES_IN_PYTHON, None, "holds 2 tables; name one of first, second"),
        ("a.py", TABLES_IN_PYTHON, "made", "has no table 'made'; it has first, second"),
        ("a.py", "a = [[", None, "a.py can be read neither as JSON nor as Python"),
        ("a.json", "[[", None, "a.json can be read neither as JSON nor as Python"),
        ("a.json", "[[1, 0.5], [1]]", None, "'' is no table of numbers"),
        ("a.json", '"text"', None, "'' is no table of numbers"),
        ("a.json", "[0.5, 0.5]", None, r"thresholds has shape \(2,\); pass \[layers, heads\]"),
        ("a.json", "[[0.5, 1.5]]", None, r"from 0.5 to 1.5; they must lie in \[0, 1\]"),
    ],
    ids=["unnamed", "computed", "python", "json", "ragged", "text", "axes", "range"],
)
def test_files_without_a_table_are_refused(tmp_path, file, text, name, message) -> None:
    (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        calibration.read_table(tmp_path / file, name=name)


@pytest.mark.parametrize(
    ("rule", "settings", "message"),
    [
        (calibration.recall_thresholds, {"recall": 1.5}, r"recall=1.5 must lie in \[0, 1\]"),
        (calibration.coverage_thresholds, {"recall": -0.1}, r"recall=-0.1 must lie in \[0, 1\]"),
        (
            calibration.recall_thresholds,
            {"recall": jnp.ones(3)},
            r"recall has shape \(3,\); .* of shape \(4,\)",
        ),
        (
            calibration.recall_thresholds,
            {"strategy": XAttention(stride=6, block_size=8)},
            "stride=6 must divide block_size=8",
        ),
        (
            calibration.coverage_thresholds,
            {"kv_lengths": jnp.array([99, 3], jnp.int32)},
            r"kv_lengths=\[99, 3\] must lie in \[0, kv_len=61\]",
        ),
    ],
    ids=["above", "below", "heads", "stride", "lengths"],
)
def test_bad_arguments_are_refused(rule, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule(*draw(), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_reductions": 0}, r"num_reductions=0 must lie in \[1, 2\]"),
        ({"num_reductions": 5, "max_per_head": 2}, r"num_reductions=5 must lie in \[1, 4\]"),
        ({"factor": 1.0}, "factor=1.0 must lie between 0 and 1"),
        ({"max_per_head": 0}, "max_per_head=0 must be at least 1"),
        ({"initial": np.ones((1, 1, 1))}, r"initial has shape \(1, 1, 1\)"),
        ({"initial": np.array([0.5, 1.5])}, r"initial=\[0.5, 1.5\] must lie in \[0, 1\]"),
        ({"score": lambda thresholds: float("nan")}, "score returned nan; it must return a finite"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_programme_is_refused(settings: dict, message: str) -> None:
    settings = {"score": lambda _: 0.0, "initial": np.ones(2), "num_reductions": 1} | settings
    with pytest.raises(ValueError, match=message):
        calibration.reduce_thresholds(settings.pop("score"), settings.pop("initial"), **settings)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({1: Full()}, "layer 1 has the strategy Full; only layers of XAttention can be stacked"),
        ({1: XAttention(stride=8)}, "layers 0 and 1 differ in more than their thresholds"),
    ],
    ids=["strategy", "stride"],
)
def test_unlike_layers_are_not_stacked(layers: dict, message: str) -> None:
    made = configuration.Configuration(strategy=XAttention(), layers=layers)
    with pytest.raises(ValueError, match=message):
        calibration.stack(made, 2)


def test_a_table_out_of_range_makes_no_configuration() -> None:
    with pytest.raises(ValueError, match=r"thresholds are from 0\.0 to 2\.0"):
        calibration.to_configuration(2.0 * TABLE)
