"""The table of assumptions: every file and every test that it names is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "fedsq_plugin"
GROUPS = ["Model", "Batch", "Label", "Output", "Loader", "State", "Update", "Image", "Recipe", "Process"]


class Row(NamedTuple):
    """One assumption of the table."""

    assumption: str
    outcome: str
    decided: str
    tried: str


def read_rows() -> list[Row]:
    lines = (TESTS / "ASSUMPTIONS.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return [Row(*row) for row in cells if row[0] not in ("assumption", "---")]


ROWS = read_rows()


def test_the_table_has_its_groups_and_no_row_twice() -> None:
    text = (TESTS / "ASSUMPTIONS.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == GROUPS
    assert len({row.assumption for row in ROWS}) == len(ROWS) >= 40


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.assumption)
def test_files_and_tests_of_a_row_exist(row: Row) -> None:
    assert (PACKAGE / row.decided.strip("`")).is_file()
    file, _, name = row.tried.strip("`").partition("::")
    found = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in ast.walk(found) if isinstance(node, ast.FunctionDef)}
    assert row.outcome
