"""`domicile top` on a terminal: a table that is renewed, sorted by any column, with the details of one domain."""

from __future__ import annotations

import os
from typing import ClassVar, Final

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.coordinate import Coordinate
from textual.events import Resize
from textual.widgets import DataTable, Footer, Static

from toolstack.errors import MachineError
from toolstack.top.model import COLUMNS, Column, Domain, Sample, Source, details, ordered, summary, with_rates

GAP: Final = 1
"""Blanks on the right of a cell."""
MAX_NAME: Final = 24
MIN_NAME: Final = 12
"""Letters of a name that are shown where there is room, and where there is little."""


class Top(App[str]):
    """The application; it returns why it ended, if not by the user's wish."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    #summary { height: 3; padding: 0 1; }
    #table { height: 1fr; padding: 0 1; }
    #details { height: auto; max-height: 50%; padding: 0 1; border-top: solid $primary; display: none; overflow-y: auto; }
    #details.shown { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "Quit"),
        Binding("s", "sort_next", "Sort"),
        Binding("S", "sort_previous", show=False),
        Binding("r", "reverse", "Reverse"),
        Binding("d,enter", "details", "Details"),
        Binding("space", "refresh_now", "Now"),
    ]

    def __init__(self, source: Source, *, delay: float = 3.0) -> None:
        """`delay`: seconds between two samples."""
        super().__init__()
        self._source = source
        self._delay = delay
        self._sample: Sample | None = None
        self._sort = 3
        self._descending = True
        self._rows: list[Domain] = []
        self._shown: list[Column] = []

    def compose(self) -> ComposeResult:
        """Summary, table, details, keys."""
        yield Static(id="summary", markup=False)
        with Vertical():
            table: DataTable[Text] = DataTable(
                id="table", cell_padding=0, cursor_type="row", zebra_stripes=False
            )
            yield table
            yield Static(id="details", markup=False)
        yield Footer()

    def on_mount(self) -> None:
        """Begin."""
        if os.environ.get("NO_COLOR"):
            self.theme = "textual-ansi"
        self.query_one(DataTable).focus()
        self._renew()
        self.set_interval(self._delay, self._renew)

    def on_resize(self, _event: Resize) -> None:
        """Other columns may have room."""
        self._draw()

    # ------------------------------------------------------------------ what the keys do

    def action_sort_next(self) -> None:
        """By the next column that is shown."""
        self._turn(1)

    def action_sort_previous(self) -> None:
        """By the one before."""
        self._turn(-1)

    def _turn(self, step: int) -> None:
        shown = [COLUMNS.index(column) for column in self._shown]
        place = shown.index(self._sort) if self._sort in shown else 0
        self._sort = shown[(place + step) % len(shown)]
        self._descending = COLUMNS[self._sort].title not in ("NAME", "STATE")
        self._draw()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        """A click on a title sorts by it, a second one the other way round."""
        wanted = COLUMNS.index(self._shown[event.column_index])
        self._descending = not self._descending if wanted == self._sort else True
        self._sort = wanted
        self._draw()

    def action_reverse(self) -> None:
        """The other way round."""
        self._descending = not self._descending
        self._draw()

    def action_details(self) -> None:
        """Show or hide the details of the selected domain."""
        self.query_one("#details").toggle_class("shown")
        self._details()

    def action_refresh_now(self) -> None:
        """Take a sample at once."""
        self._renew()

    def on_data_table_row_highlighted(self, _event: DataTable.RowHighlighted) -> None:
        """Details follow the cursor."""
        self._details()

    # ------------------------------------------------------------------ showing

    def _renew(self) -> None:
        try:
            self._sample = with_rates(self._sample, self._source())
        except MachineError as error:
            self.exit(str(error))
            return
        self._draw()

    def _fitting(self, sample: Sample, room: int) -> list[tuple[Column, int]]:
        """The columns for which there is room, with their widths: names are cut first, then what is wanted least goes."""
        widths = {
            column.title: max(
                len(column.title) + (column is COLUMNS[self._sort]),
                *(len(column.text(domain, sample)) for domain in sample.domains),
                0,
            )
            for column in COLUMNS
        }
        shown = list(COLUMNS)

        def excess() -> int:
            return sum(widths[column.title] + GAP for column in shown) - room

        name = COLUMNS[0].title
        widths[name] = min(widths[name], MAX_NAME)
        widths[name] = max(min(widths[name], MIN_NAME), widths[name] - max(0, excess()))
        while len(shown) > 2 and excess() > 0:
            shown.remove(min(shown, key=lambda column: column.keep))
        return [(column, widths[column.title]) for column in shown]

    def _draw(self) -> None:
        sample = self._sample
        if sample is None:
            return
        table = self.query_one(DataTable)
        selected = self._selected()
        fitting = self._fitting(sample, self.size.width - 3)
        self._shown = [column for column, _ in fitting]
        hidden = len(COLUMNS) - len(fitting)
        lines = summary(sample)
        if hidden:
            lines[0] += f"   ({hidden} columns need a wider terminal)"
        self.query_one("#summary", Static).update("\n".join(lines))
        self._rows = ordered(sample, COLUMNS[self._sort], descending=self._descending)
        table.clear(columns=True)
        for column, width in fitting:
            left = column.title in ("NAME", "STATE")
            mark = ("▼" if self._descending else "▲") if COLUMNS[self._sort] is column else ""
            title = f"{column.title}{mark}" if left else f"{mark}{column.title}"
            text = title.ljust(width) if left else title.rjust(width)
            table.add_column(Text(text + " " * GAP), width=width + GAP)
        for domain in self._rows:
            table.add_row(*(self._text(column, width, domain, sample) for column, width in fitting))
        place = next((n for n, domain in enumerate(self._rows) if domain.domid == selected), 0)
        if self._rows:
            table.cursor_coordinate = Coordinate(place, 0)
        self._details()

    @staticmethod
    def _text(column: Column, width: int, domain: Domain, sample: Sample) -> Text:
        text = column.text(domain, sample)
        if len(text) > width:
            text = text[: width - 1] + "…"
        return Text(text.ljust(width) if column.title in ("NAME", "STATE") else text.rjust(width))

    def _selected(self) -> int | None:
        row = self.query_one(DataTable).cursor_row
        return self._rows[row].domid if 0 <= row < len(self._rows) else None

    def _details(self) -> None:
        pane = self.query_one("#details", Static)
        selected = self._selected()
        found = next((domain for domain in self._rows if domain.domid == selected), None)
        if found is not None and pane.has_class("shown"):
            pane.update("\n".join(details(found)))
