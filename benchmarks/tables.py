"""Writes the README's tables of measured numbers from the records, between their markers.

    python -m benchmarks.tables

A table stands between `<!-- table: OP -->` and `<!-- end -->`; `losses` in place of an op lists
every case in which a peer was faster.
"""

import itertools
import pathlib
import re
from collections.abc import Sequence

from benchmarks import records
from benchmarks.records import Record

README = records.ROOT / "README.md"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_NONE = "No figures recorded yet.\n"


def main() -> None:
    """Rewrites the README in place."""
    README.write_text(with_tables(README.read_text(), recorded(records.RESULTS)))


def recorded(results: pathlib.Path) -> list[Record]:
    """All records of all devices and suites."""
    files = sorted(results.glob("*/*.json"))
    return [record for path in files for record in records.load(path)]


def with_tables(text: str, found: Sequence[Record]) -> str:
    """The text with every marked table generated anew."""

    def fill(match: re.Match[str]) -> str:
        start, op, end = match.groups()
        return f"{start}{_losses(found) if op == 'losses' else _tables(op, found)}{end}"

    return _TABLE.sub(fill, text)


def _tables(op: str, found: Sequence[Record]) -> str:
    """One table per device and set of inputs, below a line that says how it was measured."""
    chosen = sorted(
        (record for record in found if record.op == op), key=lambda r: (r.device, r.inputs)
    )
    groups = itertools.groupby(chosen, key=lambda r: (r.device, r.inputs))
    parts = [_table(records.in_order(group)) for _, group in groups]
    return "\n".join(parts) or _NONE


def _table(rows: Sequence[Record]) -> str:
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer))
    header = ["case", "density", "ours, ms", *(f"{peer}, ms" for peer in peers)]
    header += [f"ours / {peer}" for peer in peers]
    has_memory = any(row.ours_peak_gib is not None for row in rows)
    if has_memory:
        header += ["ours, GiB", *(f"{peer}, GiB" for peer in peers)]
    lines = [_line(header), _line(["---"] * len(header))]
    # Peers that were timed in another run than their case's other peers get a line of their own.
    for (case, _), same_run in itertools.groupby(rows, key=lambda row: (row.case, row.ours_ms)):
        by_peer = {row.peer: row for row in same_run}
        ours = next(iter(by_peer.values()))
        beside = [by_peer.get(peer) for peer in peers]
        cells = [
            case,
            f"{ours.density:.3f}",
            _spread(ours.ours_ms, ours.ours_ms_min, ours.ours_ms_max),
            *(_peer_time(row) for row in beside),
            *(_ratio(row) for row in beside),
        ]
        if has_memory:
            peaks = [ours.ours_peak_gib, *(row and row.peer_peak_gib for row in beside)]
            cells += ["-" if peak is None else f"{peak:.1f}" for peak in peaks]
        lines.append(_line(cells))
    return "\n".join([_how(rows), "", *lines, ""])


def _losses(found: Sequence[Record]) -> str:
    slower = [row for row in records.in_order(found) if row.ratio is not None and row.ratio > 1]
    if not found:
        return _NONE
    if not slower:
        return "In no recorded case was a peer faster.\n"
    lines = [_line(["op", "case", "device", "peer", "ours / peer"]), _line(["---"] * 5)]
    for row in slower:
        lines.append(_line([row.op, row.case, row.device, str(row.peer), _ratio(row)]))
    return "\n".join([*lines, ""])


def _how(rows: Sequence[Record]) -> str:
    """What every number of a table shares: device, inputs, versions, commits and dates."""
    first = rows[0]
    versions = ", ".join(
        f"{name} {version}"
        for name, version in sorted({item for row in rows for item in row.versions.items()})
    )
    commits = ", ".join(sorted({row.commit[:12] for row in rows}))
    dates = ", ".join(sorted({row.date for row in rows}))
    timers = ", ".join(sorted({row.timer for row in rows}))
    backends = ", ".join(sorted({row.backend for row in rows}))
    return (
        f"{first.device}; {first.inputs}; backend {backends}. Median (min-max) of the runs, "
        f"timer `{timers}`. {versions}; commit {commits}; {dates}."
    )


def _spread(median: float, least: float, most: float) -> str:
    return f"{median:.4g} ({least:.4g}-{most:.4g})"


def _peer_time(row: Record | None) -> str:
    if row is None or row.peer_ms is None or row.peer_ms_min is None or row.peer_ms_max is None:
        return "-"
    return _spread(row.peer_ms, row.peer_ms_min, row.peer_ms_max)


def _ratio(row: Record | None) -> str:
    return "-" if row is None or row.ratio is None else f"{row.ratio:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
