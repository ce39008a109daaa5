"""The README's Python blocks run, and its tables are those of the records."""

import pathlib
import re

import pytest

from benchmarks import tables
from benchmarks.records import RESULTS

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example() -> None:
    assert BLOCKS


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert "#" in capsys.readouterr().out  # it draws a mask


def test_tables_are_those_of_the_records() -> None:
    assert tables.with_tables(README, tables.recorded(RESULTS)) == README


def test_every_recorded_op_has_a_table() -> None:
    ops = {record.op for record in tables.recorded(RESULTS)}
    assert ops <= set(re.findall(r"<!-- table: (\w+) -->", README))
