"""Records from files, folders and the Hub, each with the place where it stands, for error messages.

math.json:12   math.jsonl:12   math.parquet, row 12   tatsu-lab/alpaca, row 12
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from s2ft.common.errors import S2FTError, first_line
from s2ft.data.sources import SUFFIXES, check_hub_name, check_source

_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Record:
    """A record and its place, such as `math.json:12` (line 12)."""

    place: str
    value: Any


def read_records(source: str) -> Iterator[Record]:
    """The records of a file, a folder or a Hub data set.

    Raises:
        S2FTError: if the source is missing, empty, of an unknown kind, or malformed.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    check_source(source)
    return _rows(_from_hub(source), source)


def _read_file(path: Path) -> Iterator[Record]:
    if path.suffix not in READERS:
        raise S2FTError(f"data={str(path)!r} ends in {path.suffix!r}; known are {', '.join(READERS)}")
    return READERS[path.suffix](path)


def _read_folder(folder: Path) -> Iterator[Record]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _rows(_from_disk(folder), str(folder))
        return
    files = sorted(path for path in folder.iterdir() if path.suffix in READERS)
    files = [path for path in files if path.name.startswith("train")] or files
    if not files:
        raise S2FTError(f"data={str(folder)!r} is a folder without {', '.join(READERS)} files")
    for path in files:
        yield from _read_file(path)


def _read_json(path: Path) -> Iterator[Record]:
    """An array of objects, read one by one, so that each has its line."""
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
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            try:
                yield Record(f"{path}:{number}", _without_none(json.loads(line)))
            except json.JSONDecodeError as error:
                raise S2FTError(f"{path}:{number}: malformed JSON in column {error.colno}: {error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise _beyond_reading(f"{path}:{number}", error) from None


def _read_parquet(path: Path) -> Iterator[Record]:
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise S2FTError(f"data={str(path)!r} is not a readable parquet file: {first_line(error)}") from None
    if not len(table):
        raise S2FTError(f"data={str(path)!r} has no rows; it needs one record at least")
    for number, value in enumerate(table.to_pylist(), start=1):
        yield Record(f"{path}, row {number}", _given(value))


READERS: dict[str, Callable[[Path], Iterator[Record]]] = dict(
    zip(SUFFIXES, (_read_json, _read_jsonl, _read_parquet), strict=True)
)


def _from_hub(name: str) -> Dataset:
    check_hub_name(name)
    try:
        found = load_dataset(name)
    except Exception as error:  # the library raises a dozen kinds here, from HTTP errors to plain ValueErrors
        raise S2FTError(
            f"data={name!r} is no file or folder here, and could not be loaded from the Hub: {first_line(error)}"
        ) from error
    return _train_split(found, name)


def _from_disk(folder: Path) -> Dataset:
    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # as many kinds as from the Hub
        raise S2FTError(
            f"data={str(folder)!r} has a state.json or dataset_dict.json, but is no data set saved by `save_to_disk`: "
            f"{first_line(error)}"
        ) from error
    return _train_split(found, str(folder))


def _train_split(found: Dataset | DatasetDict | IterableDataset, name: str) -> Dataset:
    if not isinstance(found, dict):
        return found
    if "train" not in found:
        raise S2FTError(f"data={name!r} has no split 'train'; it has {', '.join(found)}")
    return found["train"]


def _rows(dataset: Dataset, name: str) -> Iterator[Record]:
    for number, value in enumerate(dataset, start=1):
        yield Record(f"{name}, row {number}", _given(value))


def _given(value: Any) -> Any:
    """A table's value without None: its rows have all columns, and objects in them all fields, given or not."""
    if isinstance(value, list):
        return [_given(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _given(item) for key, item in value.items() if item is not None}


def _without_none(value: Any) -> Any:
    """Null in a field of a JSON record means the same as no field; deeper down, as in a call's arguments, it says null."""
    if not isinstance(value, dict):
        return value
    return {key: item for key, item in value.items() if item is not None}


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise S2FTError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None
    except OSError as error:
        raise S2FTError(f"data={str(path)!r} cannot be read: {error.strerror}") from None
    if not text.strip():
        raise S2FTError(f"data={str(path)!r} is an empty file; it needs one record at least")
    return text


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
