"""What a name of data stands for (a file, a folder, a data set on the Hub); checked before anything slow is loaded.

math.jsonl   math.csv.gz   folder/   org/name   org/name:config   org/name:config:split   org/name::split
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pkgutil import iter_modules

from s2ft.common.errors import S2FTError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")


def kind_of_file(path: Path) -> str | None:
    """The suffix that says what a file holds, whether it is compressed or not; None if it is an unknown one.

    Example:
        >>> kind_of_file(Path("math.v2.jsonl.gz")), kind_of_file(Path("math.parquet.gz")), kind_of_file(Path("math.txt"))
        ('.jsonl', None, None)
    """
    packed = path.suffix in COMPRESSED
    kind = Path(path.stem).suffix if packed else path.suffix
    return kind if kind in SUFFIXES and not (packed and kind == ".parquet") else None  # Parquet packs by itself


@dataclass(frozen=True)
class HubName:
    """A data set on the Hub, with the config and the split that are meant."""

    name: str
    config: str | None
    split: str

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Reads `org/name`, maybe with `:config` and `:split`; the split is `train` unless given.

        Example:
            >>> HubName.parse("openai/gsm8k:main"), HubName.parse("tatsu-lab/alpaca::train[:10%]").split
            (HubName(name='openai/gsm8k', config='main', split='train'), 'train[:10%]')
        """
        scheme = "hf://" if text.startswith("hf://") else ""
        name, config, split = [*text.removeprefix(scheme).split(":", 2), "", ""][:3]
        return cls(scheme + name, config or None, split or "train")

    @property
    def is_slice(self) -> bool:
        """Whether the split is cut, as in `train[:10%]`; `datasets` does not stream such ones."""
        return "[" in self.split


def check_source(source: str) -> None:
    """Raises `S2FTError` for a path where nothing is, and for what is neither a path nor a name on the Hub."""
    path = Path(source)
    if path.exists():
        return
    if kind_of_file(path) or path.suffix in COMPRESSED or source.startswith((".", "/", "~")):
        raise S2FTError(f"data={source!r}: there is no such file")
    check_hub_name(HubName.parse(source).name)


def check_hub_name(name: str) -> None:
    """Raises `S2FTError` for a name that `datasets` takes for a format, reading such files from the current folder."""
    bare = name.removeprefix("hf://datasets/")
    if "/" not in bare and bare in _formats():
        raise S2FTError(
            f"data={name!r} names no data set, but a format, and `datasets` would read the current folder's files of it; "
            "name a file, a folder or a data set on the Hub"
        )


def _formats() -> frozenset[str]:
    """The formats that `datasets` loads by name, such as "text" and "json": one module each, found without importing it."""
    found = find_spec("datasets")
    folders = [f"{folder}/packaged_modules" for folder in (found.submodule_search_locations or () if found else ())]
    return frozenset(module.name for module in iter_modules(folders))
