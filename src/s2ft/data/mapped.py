"""Tables that need not fit in memory: their rows are written piece by piece into a file without a name, which is mapped.

The file is gone with the table, or with the process, however that ends.
"""

from __future__ import annotations

import mmap
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, config
from datasets.table import InMemoryTable

Row = dict[str, Any]

PIECE = 1_000  # rows in memory at a time


def cache_folder() -> Path:
    """Where what is too much for memory lies: HF_DATASETS_CACHE/s2ft."""
    folder = Path(config.HF_DATASETS_CACHE, "s2ft")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def mapped(rows: Iterable[Row]) -> Dataset:
    """A table of rows, all with the columns of the first, and with types as in the first piece; few are kept in memory."""
    rows = iter(rows)
    few = list(islice(rows, PIECE))
    later = next(rows, None)
    return Dataset.from_list(few) if later is None else _in_file(few, chain([later], rows))


def _in_file(few: list[Row], later: Iterator[Row]) -> Dataset:
    first = pyarrow.Table.from_pylist(few)
    while _lacks_types(first.schema) and (more := list(islice(later, PIECE))):
        few = [*few, *more]
        first = pyarrow.Table.from_pylist(few)
    with tempfile.TemporaryFile(dir=cache_folder()) as file:
        with pyarrow.ipc.new_stream(file, first.schema) as stream:
            for piece in chain([first], _pieces(later, first.schema)):
                stream.write_table(piece)
        file.flush()
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pyarrow.ipc.open_stream(pyarrow.py_buffer(content)).read_all()
    return Dataset(InMemoryTable(table), fingerprint=uuid.uuid4().hex)  # or its content would be pickled for one


def _lacks_types(schema: pyarrow.Schema) -> bool:
    """Whether lists were empty in all rows, which tells no type of what they hold."""
    return "null" in str(schema.types)


def _pieces(rows: Iterator[Row], schema: pyarrow.Schema) -> Iterator[pyarrow.Table]:
    while piece := list(islice(rows, PIECE)):
        yield pyarrow.Table.from_pylist(piece, schema=schema)


def values(table: Dataset, column: str) -> Iterator[Any]:
    """The values of a column, of which a piece is in memory at a time."""
    for piece in table.select_columns([column]).iter(PIECE):
        yield from piece[column]
