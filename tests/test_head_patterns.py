"""Per-head patterns and their files."""

import json
import pathlib

import numpy as np
import pytest

from sparseattn_jax.head_patterns import (
    KINDS,
    HeadPatterns,
    read_head_patterns,
    stack_layers,
    write_head_patterns,
)

# In the published format: a score may be a count or a share, a head may be missing.
FILE = [
    {"0": ["vertical_and_slash", 1000, 6096, 336706], "2": ["stream_llm", 100, 800, 0.97]},
    {"1": ["block_sparse", 100, 1, 0.5], "0": ["vertical_and_slash", 3500, 100, 1]},
]


def test_a_published_file_is_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(FILE))
    patterns = read_head_patterns(path, num_heads=3)
    kinds = [[KINDS[kind] for kind in layer] for layer in np.asarray(patterns.kinds)]
    assert kinds == [
        ["vertical_and_slash", "vertical_and_slash", "stream_llm"],
        ["vertical_and_slash", "block_sparse", "vertical_and_slash"],
    ]
    assert patterns.sizes.tolist() == [
        [[1000, 6096], [1000, 6096], [100, 800]],
        [[3500, 100], [100, 1], [1000, 6096]],
    ]
    assert patterns.max_columns == 3500
    layer = patterns.layer(1)
    assert (layer.sizes.tolist()[1], layer.max_columns) == ([100, 1], 3500)


def test_a_written_file_is_read_back(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "patterns.json"
    layers = [
        HeadPatterns.of([("tri_shape", 8, 512), ("vertical_and_slash", 30, 800)]),
        HeadPatterns.of([("vertical_and_slash", 500, 700), ("block_sparse", 100, 1)]),
    ]
    patterns = stack_layers(layers)
    write_head_patterns(path, patterns, np.array([[0.5, 0.25], [1.0, 0.0]]))
    written = json.loads(path.read_text())
    assert written[0] == {
        "0": ["tri_shape", 8, 512, 0.5],
        "1": ["vertical_and_slash", 30, 800, 0.25],
    }
    again = read_head_patterns(path, num_heads=2)
    np.testing.assert_array_equal(again.kinds, patterns.kinds)
    np.testing.assert_array_equal(again.sizes, patterns.sizes)
    assert again.max_columns == patterns.max_columns == 500
    write_head_patterns(path, again)
    assert json.loads(path.read_text())[1]["1"] == ["block_sparse", 100, 1, 0.0]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ({}, "must be a JSON list with a dictionary of heads for each layer"),
        ([], "must be a JSON list with a dictionary of heads for each layer"),
        ([{}, []], "must be a JSON list with a dictionary of heads for each layer"),
        ([{"3": FILE[0]["0"]}], r"layer 0: head '3' must be a number below num_heads=3"),
        ([{"x": FILE[0]["0"]}], r"layer 0: head 'x' must be a number below num_heads=3"),
        ([{}, {"1": ["stream_llm", 1]}], r"layer 1, head 1: \['stream_llm', 1\] must be \[kind,"),
        ([{"1": ["dilated", 1, 1, 0]}], "layer 0, head 1: kind 'dilated' must be one of vertical"),
        ([{"1": ["stream_llm", 1, 0, 0]}], "the sizes of stream_llm, 1 and 0, must be integers"),
        ([{"1": ["block_sparse", 0, 1, 0]}], "must be integers of at least 1 and 0"),
        ([{"1": ["stream_llm", 1.5, 2, 0]}], "1.5 and 2, must be integers of at least 0 and 1"),
    ],
)
def test_a_file_of_another_format_is_refused(
    tmp_path: pathlib.Path, file: object, message: str
) -> None:
    path = tmp_path / "patterns.json"
    path.write_text(json.dumps(file))
    with pytest.raises(ValueError, match=message):
        read_head_patterns(path, num_heads=3)


def test_bad_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="head 1: the sizes of vertical_and_slash, -1 and 2"):
        HeadPatterns.of([("tri_shape", 1, 2), ("vertical_and_slash", -1, 2)])


def test_a_file_needs_all_layers(tmp_path: pathlib.Path) -> None:
    patterns = HeadPatterns.of([("tri_shape", 1, 2)])
    with pytest.raises(ValueError, match=r"patterns.kinds has shape \(1,\), a file needs"):
        write_head_patterns(tmp_path / "patterns.json", patterns)
