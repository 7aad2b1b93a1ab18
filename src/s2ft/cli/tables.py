"""Tables that are shown whole: a value that is cut off would be a wrong one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_AMPLE = 10_000  # characters


def print_table(table: Table, console: Console | None = None) -> None:
    """Prints a table in the width that it needs: on a narrow terminal words are wrapped where they may be, elsewhere not."""
    from rich.console import Console

    console = console or Console()
    for column in table.columns:
        if column.no_wrap:
            column.min_width = max(console.measure(cell).maximum for cell in (column.header, *column.cells))
    needed = console.measure(table, options=console.options.update(width=_AMPLE))
    console.width = max(console.width, needed.minimum if console.is_terminal else needed.maximum)
    console.print(table)


def show(rows: list[dict[str, Any]], title: str | None = None) -> None:
    """Rows with the same keys, as a table; the first column, which names the row, is shown whole."""
    from rich.table import Table

    table = Table(*rows[0], title=title)
    table.columns[0].min_width = max(len(str(next(iter(row.values())))) for row in rows)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    print_table(table)
