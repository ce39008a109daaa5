"""Gates and masks of heads: their files, and which heads are to retrieve."""

import json
import pathlib

import numpy as np
import pytest

from sparseattn_jax.head_gates import (
    HeadGates,
    read_duo_attention,
    read_gates,
    read_head_masks,
    sparsify_by_quantile,
    sparsify_by_threshold,
    write_duo_attention,
    write_head_masks,
)

GATES = np.array([[0.0, 0.25, 1.0], [1 / 3, 1e-17, 0.5]])
TIED = np.array([[0.5, 0.9, 0.5], [0.5, 0.1, 0.5]])


def test_a_folder_of_duo_attention_is_read_back(tmp_path: pathlib.Path) -> None:
    written = HeadGates(gates=GATES, sink_size=64, recent_size=256)
    write_duo_attention(tmp_path / "model", written)
    read = read_duo_attention(str(tmp_path / "model"))
    np.testing.assert_array_equal(read.gates, GATES)
    assert (read.sink_size, read.recent_size) == (64, 256)
    first_line = (tmp_path / "model" / "full_attention_heads.tsv").read_text().splitlines()[0]
    assert first_line == "\t".join(
        ["0.000000000000000000e+00", "2.500000000000000000e-01", "1.000000000000000000e+00"]
    )


def test_a_published_folder_is_read(tmp_path: pathlib.Path) -> None:
    config = {"model_name": "some/model", "sink_size": 128, "recent_size": 256, "lr": 0.02}
    (tmp_path / "config.json").write_text(json.dumps(config))
    text = "-1.0e-02\t9.5e-01\r\n1.02e+00\t0.5\r\n"  # training may leave the range by a step
    (tmp_path / "full_attention_heads.tsv").write_text(text)
    read = read_duo_attention(tmp_path)
    assert read.gates.tolist() == [[0.0, 0.95], [1.0, 0.5]]
    assert (read.sink_size, read.recent_size) == (128, 256)


def test_masks_are_read_back_and_are_gates_too(tmp_path: pathlib.Path) -> None:
    masks = np.array([[True, False, False], [False, True, True]])
    path = tmp_path / "masks.tsv"
    write_head_masks(path, masks)
    assert path.read_text() == "1\t0\t0\n0\t1\t1\n"
    np.testing.assert_array_equal(read_head_masks(path), masks)
    np.testing.assert_array_equal(sparsify_by_threshold(read_gates(path), 0.5), masks)
    path.write_text("1.0\t0.0\n0\t1e0\n")
    assert read_head_masks(path).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "heads.tsv is empty; it must have a line of kv heads for each layer"),
        ("1\t0\n1\n", "heads.tsv, line 2 has 1 kv heads, line 1 has 2; all layers must have"),
        ("1\t0\n1\tx\n", "heads.tsv, line 2: 'x' must be a number"),
        ("1\tnan\n", "heads.tsv, line 1: 'nan' must be a number"),
        ("1,0\n", "heads.tsv, line 1: '1,0' must be a number; lines are numbers between tabs"),
        ("1\t0\n\n", "heads.tsv, line 2: '' must be a number"),
        ("1\t0\n0.5\t1\n", "heads.tsv, line 2: 0.5 must be 0 or 1; read gates with read_gates"),
    ],
    ids=["empty", "ragged", "word", "nan", "commas", "blank", "gate"],
)
def test_other_files_are_refused(tmp_path: pathlib.Path, text: str, message: str) -> None:
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_head_masks(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON: Expecting"),
        ("[]", "config.json must be a JSON object with sink_size and recent_size"),
        ('{"sink_size": 64}', "config.json: recent_size=None must be an integer of at least 1"),
        ('{"sink_size": -1, "recent_size": 1}', "sink_size=-1 must be an integer of at least 0"),
        ('{"sink_size": 1.5, "recent_size": 1}', "sink_size=1.5 must be an integer"),
    ],
)
def test_other_configurations_are_refused(tmp_path: pathlib.Path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "full_attention_heads.tsv").write_text("1\n")
    with pytest.raises(ValueError, match=message):
        read_duo_attention(tmp_path)


@pytest.mark.parametrize(
    ("sparsity", "heads"),
    [
        (0.0, [[1, 1, 1], [1, 1, 1]]),
        (0.2, [[1, 1, 1], [1, 0, 1]]),
        (0.5, [[1, 1, 1], [0, 0, 0]]),
        (0.7, [[1, 1, 0], [0, 0, 0]]),
        (1.0, [[0, 0, 0], [0, 0, 0]]),
    ],
)
def test_of_equal_gates_the_first_are_kept(sparsity: float, heads: list) -> None:
    before = TIED.copy()
    assert sparsify_by_quantile(TIED, sparsity).astype(int).tolist() == heads
    np.testing.assert_array_equal(TIED, before)


@pytest.mark.parametrize("shape", [(32, 8), (7, 3)])
def test_the_heads_are_those_at_or_above_the_quantile(shape: tuple[int, int]) -> None:
    gates = np.random.default_rng(0).random(shape)
    for sparsity in np.linspace(0, 1, 21)[:-1]:
        published = gates >= np.quantile(gates, sparsity)
        found = sparsify_by_quantile(gates, sparsity)
        assert abs(published.sum() - found.sum()) <= 1
        assert (published >= found).all() or (published <= found).all()
    for sparsity in (0.25, 0.5, 0.75):  # 256 heads: as published
        if shape == (32, 8):
            published = gates >= np.quantile(gates, sparsity)
            np.testing.assert_array_equal(sparsify_by_quantile(gates, sparsity), published)


def test_a_threshold_is_reached_by_what_equals_it() -> None:
    assert sparsify_by_threshold(TIED, 0.5).astype(int).tolist() == [[1, 1, 1], [1, 0, 1]]
    assert sparsify_by_threshold(TIED, 0.0).all() and not sparsify_by_threshold(TIED, 1.0).any()


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=rf"sparsity={share} must lie in \[0, 1\]"):
        sparsify_by_quantile(TIED, share)
    with pytest.raises(ValueError, match=rf"threshold={share} must lie in \[0, 1\]"):
        sparsify_by_threshold(TIED, share)


@pytest.mark.parametrize("sparsify", [sparsify_by_quantile, sparsify_by_threshold])
def test_a_gate_that_is_no_number_is_refused(sparsify) -> None:
    with pytest.raises(ValueError, match=r"gates\[1, 0\] is not a number"):
        sparsify(np.array([[0.5, 1.0], [np.nan, 0.0]]), 0.5)
