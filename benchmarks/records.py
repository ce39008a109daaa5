"""Benchmark records: one object per figure, kept as JSON under results/<device>/<suite>.json."""

import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import re
import subprocess
from collections.abc import Iterable, Sequence

import jax

from benchmarks.shapes import parse_length

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_VERSIONS_OF = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cuda-runtime",
    "nvidia-cudnn-cu13",
    "torch",
    "triton",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One figure: our time for a case beside a peer's, on equal inputs in the same run.

    Attributes:
        op: what was timed, such as block_sparse_forward.
        case: which instance of it, such as "128K p=0.05"; starts with the length.
        backend: ours.
        timer: "kernel": device time of the kernels; "queued": wall time of queued calls.
        ours_ms: median over runs by `timer`; `ours_ms_min` and `ours_ms_max` are its spread.
        ours_queued_ms: wall time per call of queued calls, whatever the timer.
        peer: who else was timed, None if nobody.
        ratio: ours_ms / peer_ms.
        density: listed blocks over causally visible ones.
        max_error: largest error on the sampled rows, as benchmarks/gate.py has it.
        max_error_allowed: what the gate allowed.
        ours_peak_gib: memory of our call's arguments, results and temporaries together, as
            XLA's compiled program allocates them; None where it was not asked for.
        peer_peak_gib: the same of the peer's call.
        inputs: shape, dtype and distribution of the operands.
    """

    op: str
    case: str
    backend: str
    timer: str
    ours_ms: float
    ours_ms_min: float
    ours_ms_max: float
    ours_queued_ms: float
    peer: str | None
    peer_ms: float | None
    peer_ms_min: float | None
    peer_ms_max: float | None
    peer_queued_ms: float | None
    ratio: float | None
    density: float
    max_error: float
    max_error_allowed: float
    device: str
    versions: dict[str, str]
    commit: str
    inputs: str
    date: str
    ours_peak_gib: float | None = None
    peer_peak_gib: float | None = None

    @property
    def key(self) -> tuple[str, str, str | None]:
        """What a newer record must share with this one to replace it."""
        return self.op, self.case, self.peer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """The fields that all records of a run share."""

    device: str
    versions: dict[str, str]
    commit: str
    date: str


def origin(commit: str | None) -> Origin:
    """This run's device, versions, commit and date.

    Args:
        commit: the commit of the tree, for a tree without git; by default git is asked.
    """
    return Origin(
        device=jax.devices()[0].device_kind,
        versions=_versions(),
        commit=_commit() if commit is None else commit,
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def folder_of(device: str) -> str:
    """The device's folder: "NVIDIA H100 80GB HBM3" is h100-80gb-hbm3."""
    name = device.lower().removeprefix("nvidia ")
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def load(path: pathlib.Path) -> list[Record]:
    """The records of a suite, none where the file does not exist."""
    if not path.exists():
        return []
    return [Record(**entry) for entry in json.loads(path.read_text())]


def save(results: pathlib.Path, suite: str, records: Sequence[Record]) -> None:
    """Adds records to their suite's file; each replaces the older one of its op, case and peer."""
    for device in {record.device for record in records}:
        path = results / folder_of(device) / f"{suite}.json"
        new = {record.key: record for record in records if record.device == device}
        merged = {record.key: record for record in load(path)} | new
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = [dataclasses.asdict(record) for record in in_order(merged.values())]
        path.write_text(json.dumps(entries, indent=1) + "\n")


def in_order(records: Iterable[Record]) -> list[Record]:
    """By op, length, rest of the case and peer."""

    def position(record: Record) -> tuple[str, int, str, str]:
        length, _, rest = record.case.partition(" ")
        return record.op, parse_length(length), rest, record.peer or ""

    return sorted(records, key=position)


def _versions() -> dict[str, str]:
    installed = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
    }
    found = {name: installed[name] for name in _VERSIONS_OF if name in installed}
    runtime = jax.devices()[0].client.platform_version
    return found | {"runtime": " ".join(runtime.split())}


def _commit() -> str:
    answer = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise ValueError(
            f"the commit of {ROOT} is unknown ({answer.stderr.strip()}); pass it with --commit"
        )
    return answer.stdout.strip()
