"""The runner on a CPU: what it draws, what it records, and that a red gate records nothing."""

import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    block_sparse_forward,
    block_sparse_forward_backward,
    gate,
    measure,
    model,
    records,
    rounds,
    run,
    selection_statistics,
    timing,
    xattention,
)
from sparseattn_jax import BlockMask, HeadWindows, SparsePattern, TokenColumns, XAttention
from tests.drawing import block_matrix

TOY = {"lengths": ("128",), "shape": "toy", "backend": "xla", "peers": ("xla",), "runs": 2}


@pytest.fixture(autouse=True)
def no_heating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_HEATING_SECONDS", 0.0)


@pytest.fixture
def one_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse_forward, "PROBABILITIES", (1.0,))


@pytest.fixture
def one_judged_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xattention, "_SAMPLED_BLOCKS", 1)


@pytest.mark.usefixtures("one_probability")
def test_a_run_leaves_records(tmp_path: pathlib.Path) -> None:
    missing = run.run(("block_sparse_forward",), out=tmp_path, commit="abc", **TOY)
    assert missing == 0
    (record,) = records.load(tmp_path / "cpu" / "block_sparse_forward.json")
    assert (record.case, record.peer, record.commit) == ("128 p=1", "xla", "abc")
    assert record.timer == "queued"
    assert 0 < record.ours_ms_min <= record.ours_ms <= record.ours_ms_max
    assert record.density == 1
    assert record.max_error <= record.max_error_allowed
    assert record.peer_ms is not None
    assert record.ratio == pytest.approx(record.ours_ms / record.peer_ms, rel=1e-2)


def test_gradients_leave_records(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse_forward_backward, "PROBABILITIES", (0.25, 1.0))
    suite = "block_sparse_forward_backward"
    assert run.run((suite,), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 0
    found = records.load(tmp_path / "cpu" / f"{suite}.json")
    assert [(record.case, record.peer) for record in found] == [
        ("256 p=0.25", "xla"),
        ("256 p=1", "xla"),
    ]
    assert all(0 < record.max_error <= record.max_error_allowed for record in found)


def test_both_arms_leave_a_record_beside_the_full_one(tmp_path: pathlib.Path) -> None:
    suite = "two_arm_step"
    assert run.run((suite,), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 0
    (record,) = records.load(tmp_path / "cpu" / f"{suite}.json")
    assert (record.case, record.peer) == ("256 sink=64 recent=512", "full_arm")
    assert 0 < record.max_error <= record.max_error_allowed
    assert record.peer_ms is not None and record.density == 1


def test_statistics_leave_records(tmp_path: pathlib.Path) -> None:
    suite = "selection_statistics"
    assert run.run((suite,), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 0
    found = records.load(tmp_path / "cpu" / f"{suite}.json")
    assert [record.case for record in found] == [
        "256 all of FlexPrefill",
        "256 pooled scores",
        "256 vertical and slash of 64 queries",
    ]
    assert all(record.max_error <= record.max_error_allowed for record in found)


@pytest.mark.parametrize(("count", "is_right"), [(2, False), (3, True), (4, False)])
def test_a_wrong_coverage_count_is_seen(count: int, is_right: bool) -> None:
    mass = np.array([[4.0, 3.0, 2.5, 0.3, 0.2]])
    error = selection_statistics.uncovered(mass, np.array([count]))
    assert (error < 1e-6) == is_right


def test_streaming_leaves_a_record_beside_dense_attention(tmp_path: pathlib.Path) -> None:
    suite = "streaming_prefill"
    assert run.run((suite,), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 0
    (record,) = records.load(tmp_path / "cpu" / f"{suite}.json")
    assert (record.case, record.peer) == ("256 sink=128 recent=1024", "xla")
    assert 0 < record.max_error <= record.max_error_allowed


def test_a_model_leaves_times_and_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "NEW_TOKENS", 2)
    strategies = {"XAttention": XAttention(block_size=64)}
    monkeypatch.setattr(model, "_strategies", lambda *_: strategies)
    suites = ("model_prefill", "model_decode")
    assert run.run(suites, out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 0
    for suite, peer, num_records in zip(suites, ("xla", "full"), (1, 2), strict=True):
        found = records.load(tmp_path / "cpu" / f"{suite}.json")
        assert [(record.peer, record.timer) for record in found] == [(peer, "single")] * num_records
        assert all(0 < record.max_error <= record.max_error_allowed for record in found)
        assert all(record.ours_peak_gib for record in found)


def test_the_tokens_that_a_pattern_keeps() -> None:
    blocks = BlockMask.from_dense(
        jnp.array([[[[True, False], [False, True]]]]), q_len=6, kv_len=6, block_q=4, block_kv=4
    )
    columns = TokenColumns(indices=jnp.array([[[2]]]), counts=jnp.array([[1]]), kv_len=6)
    windows = HeadWindows(sinks=jnp.array([1]), recents=jnp.array([1]))
    pattern = SparsePattern(
        blocks=blocks, num_dropped=jnp.zeros((1, 1), int), columns=columns, windows=windows
    )
    kept = model.kept_tokens(pattern, np.array([3, 5]), num_heads=1)
    assert kept[0].astype(int).tolist() == [[1, 0, 1, 1, 0, 0], [0, 0, 1, 0, 0, 1]]


@pytest.mark.usefixtures("one_judged_block")
def test_scale_leaves_times_and_memory(tmp_path: pathlib.Path) -> None:
    assert run.run(("scale",), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 0
    (record,) = records.load(tmp_path / "cpu" / "scale.json")
    assert record.case == "256 stride=16 threshold=0.9 max_blocks=1024"
    assert (record.peer, record.timer) == ("xla", "single")
    operands_gib = 256 * 64 * 2 * (2 + 1 + 1 + 2) / 2**30  # q, k, v and out
    assert record.ours_peak_gib is not None and record.ours_peak_gib > operands_gib
    assert record.peer_peak_gib is not None and record.peer_peak_gib > operands_gib


def play_prefill(
    monkeypatch: pytest.MonkeyPatch, *, num_dropped: int = 0, dense: str | None = None
) -> None:
    """Prefill calls take 2 ms each and drop so many blocks; dense ones do or fail with a reason."""
    operands = tuple(jnp.zeros((1, 256, heads, 64), jnp.bfloat16) for heads in (2, 1, 1))
    monkeypatch.setattr(xattention, "structured_operands", lambda *_, **__: operands)

    def measured(_function: object, _operands: object, judge: object, _options: object) -> object:
        if isinstance(judge, xattention._PrefillJudge):
            judge.num_dropped = num_dropped
        elif dense is not None:
            return dense
        return measure.Measured(
            timing=timing.Timing(runs_ms=[2.0, 2.0], queued_ms=2.0),
            verdict=gate.Verdict(max_error=0.0, max_error_allowed=1.0),
        )

    monkeypatch.setattr(xattention, "measured_with_memory", measured)


def test_scale_records_nothing_that_lost_blocks(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play_prefill(monkeypatch, num_dropped=3)
    assert run.run(("scale",), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 1
    assert not list(tmp_path.rglob("*.json"))
    assert "max_blocks=1024 dropped 3 blocks; raise it" in capsys.readouterr().out


def test_a_failed_peer_leaves_our_figure_alone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    play_prefill(monkeypatch, dense="RuntimeError: out of memory")
    assert run.run(("scale",), out=tmp_path, commit="abc", **TOY | {"lengths": ("256",)}) == 1
    (record,) = records.load(tmp_path / "cpu" / "scale.json")
    assert (record.peer, record.ours_ms) == (None, 2.0)
    assert "xla failed: RuntimeError: out of memory" in capsys.readouterr().out


@pytest.mark.usefixtures("one_probability")
def test_a_red_gate_leaves_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = gate.Verdict(max_error=2.0, max_error_allowed=1.0)
    monkeypatch.setattr(gate, "judge", lambda *_, **__: wrong)
    missing = run.run(("block_sparse_forward",), out=tmp_path, commit="abc", **TOY)
    assert missing == 1
    assert not list(tmp_path.rglob("*.json"))
    assert "128 p=1: not recorded, our output is wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"runs": 1}, "runs=1 must be at least 2"),
        ({"lengths": ("128", "100")}, "lengths 128, 100 must be multiples of .* block_size=64"),
    ],
    ids=["runs", "lengths"],
)
def test_wrong_arguments_are_refused(
    tmp_path: pathlib.Path, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run.run(("block_sparse_forward",), out=tmp_path, commit="abc", **(TOY | wrong))


def test_dense_fa4_stands_beside_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [("fa4", "p=1"), ("fa4_block_sparse", "p=0.5"), ("fa4_block_sparse", "p=1")]

    def answer(asked: list[tuple[str, str]], *_: object) -> dict[tuple[str, str], str]:
        assert asked == calls
        return {call: " ".join(call) for call in asked}

    monkeypatch.setattr(block_sparse_forward, "torch_peers", answer)
    options = types.SimpleNamespace(peers=("cudnn", "fa4", "fa4_block_sparse"))
    keeps = {"p=0.5": np.ones(1), "p=1": np.ones(1)}
    assert block_sparse_forward._torch_figures(options, (), np.ones(1), keeps, {}) == {
        "fa4": {"p=0.5": "fa4 p=1", "p=1": "fa4 p=1"},
        "fa4_block_sparse": {"p=0.5": "fa4_block_sparse p=0.5", "p=1": "fa4_block_sparse p=1"},
    }


def test_peers_that_are_not_installed_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(run._NEEDS, "fa4", ("no_such_module",))
    assert not run._is_installed("fa4")
    assert "fa4: left out, no_such_module cannot be imported" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("probability", "picture"),
    [
        (
            0.0,
            """
            #...
            ##..
            #.#.
            #..#
            """,
        ),
        (
            1.0,
            """
            #...
            ##..
            ###.
            ####
            """,
        ),
    ],
)
def test_drawn_blocks(probability: float, picture: str) -> None:
    drawn = block_sparse_forward.draw_blocks(2, 8, probability, block_q=2, block_kv=2, seed=0)
    np.testing.assert_array_equal(drawn, np.stack([block_matrix(picture)] * 2))


def test_blocks_are_drawn_with_their_probability() -> None:
    drawn = block_sparse_forward.draw_blocks(8, 128, 0.25, block_q=2, block_kv=2, seed=0)
    inside = np.tri(64, k=-1, dtype=bool)
    inside[:, 0] = False
    assert drawn[:, inside].mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("call_ms", "calls", "queues"), [(0.1, 50, 3), (10.0, 20, 3), (30.0, 10, 1), (250.0, 10, 1)]
)
def test_long_calls_are_queued_less_often(call_ms: float, calls: int, queues: int) -> None:
    assert rounds.calls_per_queue(call_ms) == calls
    assert rounds.queued_rounds(call_ms) == queues


@pytest.mark.parametrize(("call_ms", "runs"), [(60.0, 10), (1000.0, 10), (4000.0, 5), (16000.0, 2)])
def test_long_calls_are_timed_less_often(call_ms: float, runs: int) -> None:
    assert rounds.single_runs(call_ms, 10) == runs


def test_operands_that_fit_the_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="operands of 4 MiB fit the L2 cache of 50 MiB"):
        timing.check_exceeds_cache((jnp.zeros(2**20, jnp.float32), 0.9))
    timing.check_exceeds_cache((jnp.zeros(2**24, jnp.float32), 0.9))
