"""Records: what they are called, where they are kept, how runs are merged, and their tables."""

import dataclasses
import json
import pathlib
import subprocess

import pytest

from benchmarks import records, tables
from benchmarks.records import Record
from benchmarks.shapes import format_length, parse_length

RECORD = Record(
    op="block_sparse_forward",
    case="8K p=0.05",
    backend="mosaic_sm90",
    timer="kernel",
    ours_ms=0.25,
    ours_ms_min=0.24,
    ours_ms_max=0.26,
    ours_queued_ms=0.27,
    peer="cudnn",
    peer_ms=1.0,
    peer_ms_min=0.9,
    peer_ms_max=1.1,
    peer_queued_ms=1.05,
    ratio=0.25,
    density=0.09,
    max_error=0.001,
    max_error_allowed=0.004,
    device="NVIDIA H100 80GB HBM3",
    versions={"jax": "0.11.2"},
    commit="0123456789abcdef",
    inputs="bfloat16, random normal",
    date="2026-01-31",
)
PATH = pathlib.Path("h100-80gb-hbm3", "suite.json")


@pytest.mark.parametrize(("text", "tokens"), [("512", 512), ("8K", 8192), ("1000", 1000)])
def test_lengths(text: str, tokens: int) -> None:
    assert parse_length(text) == tokens
    assert format_length(tokens) == text


@pytest.mark.parametrize("text", ["", "K", "-8K", "8k", "0", "1.5K"])
def test_what_is_no_length(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of tokens"):
        parse_length(text)


@pytest.mark.parametrize(
    ("device", "folder"),
    [("NVIDIA H100 80GB HBM3", "h100-80gb-hbm3"), ("NVIDIA H200", "h200"), ("cpu", "cpu")],
)
def test_folder_of_a_device(device: str, folder: str) -> None:
    assert records.folder_of(device) == folder


def test_a_newer_record_replaces_its_elder(tmp_path: pathlib.Path) -> None:
    other = dataclasses.replace(RECORD, peer="fa4")
    newer = dataclasses.replace(RECORD, ours_ms=0.2)
    records.save(tmp_path, "suite", [RECORD, other])
    records.save(tmp_path, "suite", [newer])
    assert records.load(tmp_path / PATH) == [newer, other]


def test_records_lie_in_order_of_length(tmp_path: pathlib.Path) -> None:
    cases = ["8K p=0.05", "8K p=1", "32K p=0.05", "128K p=0.05"]
    shuffled = [dataclasses.replace(RECORD, case=cases[index]) for index in (3, 1, 0, 2)]
    records.save(tmp_path, "suite", shuffled)
    assert [record.case for record in records.load(tmp_path / PATH)] == cases


def test_a_tree_without_git_needs_its_commit(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="pass it with --commit"):
        records.origin(None)
    assert records.origin("abc").commit == "abc"


def test_git_tells_the_commit(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "ROOT", tmp_path)
    for command in ("init -q", "commit -q --allow-empty -m first"):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", *identity, *command.split()], cwd=tmp_path, check=True)
    assert len(records.origin(None).commit) == 40


def test_a_table() -> None:
    rows = [
        RECORD,
        dataclasses.replace(RECORD, peer="fa4", peer_ms=0.2, ratio=1.25),
        dataclasses.replace(RECORD, case="32K p=0.05"),
    ]
    text = tables.with_tables(
        "<!-- table: block_sparse_forward -->\nold\n<!-- end -->\n\n"
        "<!-- table: losses -->\n<!-- end -->\n",
        rows,
    )
    assert text.splitlines() == [
        "<!-- table: block_sparse_forward -->",
        "NVIDIA H100 80GB HBM3; bfloat16, random normal; backend mosaic_sm90. Median (min-max) "
        "of the runs, timer `kernel`. jax 0.11.2; commit 0123456789ab; 2026-01-31.",
        "",
        "| case | density | ours, ms | cudnn, ms | fa4, ms | ours / cudnn | ours / fa4 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 8K p=0.05 | 0.090 | 0.25 (0.24-0.26) | 1 (0.9-1.1) | 0.2 (0.9-1.1) | 0.25 | 1.25 |",
        "| 32K p=0.05 | 0.090 | 0.25 (0.24-0.26) | 1 (0.9-1.1) | - | 0.25 | - |",
        "<!-- end -->",
        "",
        "<!-- table: losses -->",
        "| op | case | device | peer | ours / peer |",
        "| --- | --- | --- | --- | --- |",
        "| block_sparse_forward | 8K p=0.05 | NVIDIA H100 80GB HBM3 | fa4 | 1.25 |",
        "<!-- end -->",
    ]


def test_peers_of_another_run_have_a_line_of_their_own() -> None:
    rows = [RECORD, dataclasses.replace(RECORD, peer="fa4", ours_ms=0.3)]
    marker = "<!-- table: block_sparse_forward -->\n<!-- end -->\n"
    assert tables.with_tables(marker, rows).count("| 8K p=0.05 |") == 2


def test_memory_has_columns_where_it_was_measured() -> None:
    rows = [
        dataclasses.replace(RECORD, case="256K", ours_peak_gib=5.571, peer_peak_gib=5.0),
        dataclasses.replace(RECORD, case="1024K", ours_peak_gib=21.98, peer=None, peer_ms=None),
    ]
    marker = "<!-- table: block_sparse_forward -->\n<!-- end -->\n"
    cells = [line.split(" | ") for line in tables.with_tables(marker, rows).splitlines()[3:6]]
    assert cells[0][-2:] == ["ours, GiB", "cudnn, GiB |"]
    assert [row[-2:] for row in cells[2:]] == [["5.6", "5.0 |"]]
    assert "| 22.0 | - |" in tables.with_tables(marker, rows)


def test_a_record_from_before_memory_was_measured_still_loads(tmp_path: pathlib.Path) -> None:
    records.save(tmp_path, "suite", [RECORD])
    (entry,) = json.loads((tmp_path / PATH).read_text())
    del entry["ours_peak_gib"], entry["peer_peak_gib"]
    (tmp_path / PATH).write_text(json.dumps([entry]))
    assert records.load(tmp_path / PATH) == [RECORD]


def test_no_figures_yet() -> None:
    text = tables.with_tables("<!-- table: losses -->\n<!-- end -->\n", [])
    assert "No figures recorded yet." in text
