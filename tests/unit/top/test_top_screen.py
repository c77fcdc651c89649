"""`domicile top` on a terminal, as pictures (pytest-textual-snapshot), and its keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from textual.widgets import DataTable

from tests.unit.top.top_samples import later_sample, sample
from toolstack.errors import MachineGone
from toolstack.top.app import Top
from toolstack.top.model import COLUMNS, Sample


def app() -> Top:
    """With both samples, the second again and again."""
    samples = [sample()]

    def source() -> Sample:
        return samples.pop() if samples else later_sample()

    return Top(source, delay=3600)


@pytest.mark.parametrize("width", [80, 160, 200])
def test_the_table_at_usual_widths(snap_compare: Callable[..., bool], width: int) -> None:
    """All columns where they fit; at 80 those that matter most."""
    assert snap_compare(app(), press=["space"], terminal_size=(width, 24))


@pytest.mark.parametrize("width", [80, 160])
def test_details_of_a_domain(snap_compare: Callable[..., bool], width: int) -> None:
    """vCPUs and disks of the domain under the cursor."""
    assert snap_compare(app(), press=["space", "up", "up", "d"], terminal_size=(width, 24))


def test_sorted_by_name(snap_compare: Callable[..., bool]) -> None:
    """Keys: the column before, three times, is NAME."""
    assert snap_compare(app(), press=["S", "S", "S"], terminal_size=(80, 24))


def plain(table: DataTable[Any]) -> list[list[str]]:
    return [[str(cell) for cell in table.get_row_at(row)] for row in range(table.row_count)]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 160, 200])
def test_nothing_is_cut_at_any_width(width: int) -> None:
    """Titles and cells are whole, and the table is no wider than the screen."""

    async def look() -> None:
        top = app()
        async with top.run_test(size=(width, 24)) as pilot:
            await pilot.press("space")
            table = top.query_one(DataTable)
            columns = list(table.columns.values())
            assert sum(column.width for column in columns) <= width - 2
            for place, column in enumerate(columns):
                assert len(str(column.label)) <= column.width
                assert all(len(row[place]) <= column.width for row in plain(table))
            titles = [str(column.label).strip(" ▼▲") for column in columns]
            assert titles == [column.title for column in COLUMNS if column.title in titles]
            assert {"NAME", "STATE"} <= set(titles)
            assert width < 160 or len(titles) == len(COLUMNS)

    asyncio.run(look())


def test_the_cursor_stays_with_its_domain_and_the_end_of_the_machine_ends_it() -> None:
    """Sorting moves rows, not the choice; a machine that goes down ends the program with a word."""

    async def look() -> None:
        top = app()
        async with top.run_test(size=(80, 24)) as pilot:
            await pilot.press("space", "down", "down")
            chosen = top._selected()
            await pilot.press("r", "s")
            assert top._selected() == chosen

            def gone() -> Sample:
                raise MachineGone("the machine went down")

            top._source = gone
            await pilot.press("space")
        assert top.return_value == "the machine went down"

    asyncio.run(look())
