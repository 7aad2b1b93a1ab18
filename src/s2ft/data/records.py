"""Records from files, folders and the Hub, each with the place where it stands, for error messages.

math.json:12   math.csv.gz:12   math.parquet, row 12   tatsu-lab/alpaca, row 12
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk

from s2ft.common.errors import S2FTError, first_line
from s2ft.data.files import Record as Record
from s2ft.data.files import given, read_file
from s2ft.data.sources import SUFFIXES, HubName, check_hub_name, check_source, kind_of_file


def read_records(source: str, is_part: bool = False) -> Iterator[Record]:
    """The records of a file, a folder or a Hub data set, read one by one.

    Args:
        source: Its name (`sources.py`).
        is_part: Not all will be read, so a data set on the Hub is downloaded as far as it is, unless a slice of it is meant.

    Raises:
        S2FTError: if the source is missing, empty, of an unknown kind, or malformed.
    """
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return read_file(path)
    check_source(source)
    return _rows(_from_hub(source, is_part), source)


def _read_folder(folder: Path) -> Iterator[Record]:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        yield from _rows(_from_disk(folder), str(folder))
        return
    files = sorted(path for path in folder.iterdir() if kind_of_file(path))
    files = [path for path in files if path.name.startswith("train")] or files
    if not files:
        raise S2FTError(f"data={str(folder)!r} is a folder without {', '.join(SUFFIXES)} files")
    for path in files:
        yield from read_file(path)


def _from_hub(source: str, is_part: bool) -> Dataset | IterableDataset:
    hub = HubName.parse(source)
    check_hub_name(hub.name)
    try:
        return load_dataset(hub.name, hub.config, split=hub.split, streaming=is_part and not hub.is_slice)
    except Exception as error:  # the library raises a dozen kinds here, from HTTP errors to plain ValueErrors
        raise S2FTError(
            f"data={source!r} is no file or folder here, and could not be loaded from the Hub: {first_line(error)}"
        ) from error


def _from_disk(folder: Path) -> Dataset:
    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # as many kinds as from the Hub
        raise S2FTError(
            f"data={str(folder)!r} has a state.json or dataset_dict.json, but is no data set saved by `save_to_disk`: "
            f"{first_line(error)}"
        ) from error
    return _train_split(found, str(folder))


def _train_split(found: Dataset | DatasetDict, name: str) -> Dataset:
    if not isinstance(found, dict):
        return found
    if "train" not in found:
        raise S2FTError(f"data={name!r} has no split 'train'; it has {', '.join(found)}")
    return found["train"]


def _rows(dataset: Dataset | IterableDataset, name: str) -> Iterator[Record]:
    number = 0
    for value in _told(dataset, name):
        number += 1
        yield Record(f"{name}, row {number}", given(value))
    if not number:
        raise S2FTError(f"data={name!r} has no rows; it needs one record at least")


def _told(dataset: Dataset | IterableDataset, name: str) -> Iterator[Any]:
    """Its rows; a data set that is streamed may break off on the way."""
    try:
        yield from dataset
    except Exception as error:
        raise S2FTError(f"data={name!r} could not be read to its end: {first_line(error)}") from error
