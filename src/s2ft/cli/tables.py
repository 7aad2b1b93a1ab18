"""Tables that are shown whole: a value that is cut off would be a wrong one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from s2ft.format.names import name_in_layer

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


def layer_table(numbers: Sequence[str], words: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A row for each module; a blank layer repeats the one above.

    Args:
        numbers: Names of the columns after layer, module and side.
        words: Names of the columns after those.
        rows: Begin with layer, module (of whose path the last two names are shown) and side.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("layer", "module", "side", *numbers, *words):
        table.add_column(name, justify="right" if name in numbers else "left", no_wrap=True)
    above = ""
    for layer, module, *rest in rows:
        shown = ("" if layer == above else layer, name_in_layer(module), *rest)
        table.add_row(*map(Text, shown))  # names may hold brackets
        above = layer
    return table


def show(rows: list[dict[str, Any]], title: str | None = None, wraps_first: bool = False) -> None:
    """Rows with the same keys, as a table; nothing without rows.

    On a narrow terminal the first column, which names the row, is shown whole and the others wrap; or, by `wraps_first`, the
    other way round.
    """
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=title)
    for number, name in enumerate(rows[0]):
        table.add_column(name, no_wrap=(number > 0) == wraps_first)
    for row in rows:
        values = ("–" if value is None else value for value in row.values())
        table.add_row(*(Text(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in values))
    print_table(table)
