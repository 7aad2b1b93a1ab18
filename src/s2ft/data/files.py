"""Records of one file, plain or compressed, read one by one, so that it need not fit in memory: JSON, JSON lines, CSV, Parquet.

math.json:12   math.jsonl.gz:12   math.csv:12   math.parquet, row 12

Only an array in a `.json` file is read whole.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from s2ft.common.errors import S2FTError, first_line
from s2ft.data.sources import COMPRESSED, SUFFIXES, kind_of_file

_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_BOM = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_DELIMITERS = ",;\t"  # of a .csv
_LONGEST_CELL = 2**31 - 1  # characters; Python's limit of 131,072 is less than a long conversation has


@dataclass(frozen=True)
class Record:
    """A record and its place, such as `math.json:12` (line 12)."""

    place: str
    value: Any


def read_file(path: Path) -> Iterator[Record]:
    """The records of a file; fields without a value (null) are left out.

    Raises:
        S2FTError: if it is empty, of an unknown kind, malformed, cut short or not UTF-8: with the line.
    """
    kind = kind_of_file(path)
    if kind is None:
        known = f"{', '.join(SUFFIXES)}, all but .parquet also with {', '.join(COMPRESSED)}"
        raise S2FTError(f"data={str(path)!r} ends in {path.suffix!r}; known are {known}")
    return READERS[kind](path)


def given(value: Any) -> Any:
    """A table's value without None: its rows have all columns, and objects in them all fields, given or not."""
    if isinstance(value, list):
        return [given(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: given(item) for key, item in value.items() if item is not None}


def _read_json(path: Path) -> Iterator[Record]:
    """An array of objects, or, as many files called .json hold, an object in each line."""
    start = next((line for _, line in _lines(path) if line.strip()), "")
    if not start.lstrip().startswith("{"):
        yield from _read_array(path)
        return
    records = _read_jsonl(path)
    try:
        yield next(records)
    except S2FTError as error:
        raise S2FTError(f"{path}:1: expected an array of objects, [{{...}}, ...], or an object in each line") from error
    yield from records


def _read_array(path: Path) -> Iterator[Record]:
    """The objects of an array, one by one, so that each has its line."""
    text = _text(path)
    position, line, counted = _skip(text, 0), 1, 0
    if text[position : position + 1] != "[":
        raise S2FTError(f"{path}:{_line(text, position)}: expected an array of objects, [{{...}}, ...]")
    position = _skip(text, position + 1)
    first = True
    while text[position : position + 1] != "]":
        if not first:
            position = _skip(text, _expect(text, position, ",", path))
        value, end = _decode(text, position, path)
        line, counted = line + text.count("\n", counted, position), position
        yield Record(f"{path}:{line}", _without_none(value))
        position, first = _skip(text, end), False
    if _skip(text, position + 1) != len(text):
        raise S2FTError(f"{path}:{_line(text, position + 1)}: malformed JSON: more text after the end of the array")
    if first:
        raise S2FTError(f"data={str(path)!r} holds an empty array; it needs one record at least")


def _read_jsonl(path: Path) -> Iterator[Record]:
    is_empty = True
    for number, line in _lines(path):
        if line.strip():
            is_empty = False
            yield Record(f"{path}:{number}", _without_none(_loaded(line, f"{path}:{number}")))
    if is_empty:
        raise _empty(path)


def _loaded(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise S2FTError(f"{place}: malformed JSON in column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise _beyond_reading(place, error) from None


def _read_csv(path: Path, delimiters: str = _DELIMITERS) -> Iterator[Record]:
    """A table with the names of its columns in the first line, parted by the delimiter that it has most of; cells are text."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = _lines(path)
    header = next((line for _, line in lines if line.strip()), None)
    if header is None:
        raise _empty(path)
    delimiter = max(delimiters, key=header.count)
    try:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
    except csv.Error as error:
        raise S2FTError(f"{path}:1: malformed CSV: {error}") from None
    if "" in names or len(set(names)) < len(names):
        raise S2FTError(f"{path}:1: the columns are {', '.join(map(repr, names))}; each needs a name of its own")
    yield from _rows(path, csv.reader((line for _, line in lines), delimiter=delimiter, strict=True), names)


def _rows(path: Path, rows: Any, names: list[str]) -> Iterator[Record]:  # rows: a csv.reader, below the header
    start, is_empty = 2, True
    try:
        for cells in rows:
            if cells and len(cells) != len(names):
                raise S2FTError(f"{path}:{start}: {len(cells)} cells in a table of {len(names)}: {', '.join(names)}")
            if cells:
                yield Record(f"{path}:{start}", dict(zip(names, cells, strict=True)))
                is_empty = False
            start = rows.line_num + 2
    except csv.Error as error:
        raise S2FTError(f"{path}:{start}: malformed CSV: {error}") from None
    if is_empty:
        raise S2FTError(f"data={str(path)!r} has no rows; it needs one record at least")


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Record(f"{path}, row {number}", given(value))
    except (pyarrow.ArrowException, OSError) as error:
        raise S2FTError(f"data={str(path)!r} is not a readable parquet file: {first_line(error)}") from None
    if not number:
        raise S2FTError(f"data={str(path)!r} has no rows; it needs one record at least")


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiters="\t"),
    ".parquet": _read_parquet,
}


def _opened(path: Path) -> io.BufferedReader:
    """The file's bytes, decompressed as its name says."""
    try:
        return io.BufferedReader(cast(io.RawIOBase, pyarrow.input_stream(str(path), compression="detect")))
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text, each with its number from 1."""
    number = 0
    with _opened(path) as stream:
        while line := _next_line(stream, path):
            number += 1
            line = line.removeprefix(_BOM) if number == 1 else line
            try:
                yield number, line.decode()
            except UnicodeDecodeError as error:
                raise _not_utf8(f"{path}:{number}", line if number == 1 else b"", error) from None


def _next_line(stream: BinaryIO, path: Path) -> bytes:
    try:
        return stream.readline()
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> S2FTError:
    """What lies on a disk and cannot be read, or is no compressed file, or only the beginning of one."""
    packed = " as its name says" if path.suffix in COMPRESSED else ""
    return S2FTError(f"data={str(path)!r} cannot be read{packed}: {first_line(error)}")


def _text(path: Path) -> str:
    with _opened(path) as stream:
        try:
            data = stream.read().removeprefix(_BOM)
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(path, error) from None
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _not_utf8(f"{path}:{line}", data, error) from None
    if not text.strip():
        raise _empty(path)
    return text


def _not_utf8(place: str, start: bytes, error: UnicodeDecodeError) -> S2FTError:
    guess = "it looks like UTF-16" if start.startswith(_UTF_16) else error.reason
    return S2FTError(f"{place}: not UTF-8 text: {guess}; save the file as UTF-8")


def _empty(path: Path) -> S2FTError:
    return S2FTError(f"data={str(path)!r} is an empty file; it needs one record at least")


def _without_none(value: Any) -> Any:
    """Null in a field of a JSON record means the same as no field; deeper down, as in a call's arguments, it says null."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if item is not None}


def _decode(text: str, position: int, path: Path) -> tuple[Any, int]:
    try:
        return _DECODER.raw_decode(text, position)
    except json.JSONDecodeError as error:
        raise S2FTError(f"{path}:{error.lineno}: malformed JSON in column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise _beyond_reading(f"{path}:{_line(text, position)}", error) from None


def _beyond_reading(place: str, error: Exception) -> S2FTError:
    """Sound JSON, but more than Python's reader takes: its limits on digits and on depth."""
    what = "it is nested too deeply" if isinstance(error, RecursionError) else "an integer has too many digits"
    return S2FTError(f"{place}: JSON that cannot be read: {what}")


def _expect(text: str, position: int, wanted: str, path: Path) -> int:
    if text[position : position + 1] == wanted:
        return position + 1
    column = position - text.rfind("\n", 0, position)
    found = repr(text[position]) if position < len(text) else "the end of the file"
    raise S2FTError(
        f"{path}:{_line(text, position)}: malformed JSON in column {column}: expected ',' or ']', found {found}"
    )


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches the empty string too
    return match.end()


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
