"""The README's Python blocks run, and its tables are those of the records."""

import pathlib
import re

import pytest

from benchmarks import tables
from benchmarks.records import RESULTS

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRINTED = {"a mask": "#", "lengths": "[8 8]"}


@pytest.mark.parametrize(
    ("block", "printed"), list(zip(BLOCKS, PRINTED.values(), strict=True)), ids=list(PRINTED)
)
def test_python_block_runs(block: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert printed in capsys.readouterr().out


def test_tables_are_those_of_the_records() -> None:
    assert tables.with_tables(README, tables.recorded(RESULTS)) == README


def test_every_recorded_op_has_a_table() -> None:
    ops = {record.op for record in tables.recorded(RESULTS)}
    assert ops <= set(re.findall(r"<!-- table: (\w+) -->", README))
