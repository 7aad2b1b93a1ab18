"""The weight file of an adapter: names, dtypes and shapes are read at once, values when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2ft.common.errors import S2FTError, first_line
from s2ft.common.reading import check_regular
from s2ft.format.folder import WEIGHTS_FILE

MOST_MAPPED = 16 << 20  # bytes read until the file is opened anew: its mapped pages count as the process's memory
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
           "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64"}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What is known of a tensor before its values are read."""

    dtype: str  # as in torch, without "torch."
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"torch.{self.dtype} of shape {list(self.shape)}"

    @staticmethod
    def of(tensor: Any) -> Header:
        """The header of a tensor in memory; for anything else, dtype is the name of its type."""
        if not isinstance(tensor, Tensor):
            return Header(type(tensor).__name__, ())
        return Header(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    Raises:
        S2FTError: if the file is missing, irregular, truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / WEIGHTS_FILE
        check_regular(self.path)
        if not self.path.is_file():
            raise S2FTError(f"{folder} holds no adapter weights: there is no {self.path.name}")
        self._open()
        self._names = dict.fromkeys(self._file.keys())

    def _open(self) -> None:
        self._mapped = 0
        try:
            self._file = safe_open(self.path, framework="pt")
        except (SafetensorError, OSError, ValueError) as error:
            size = self.path.stat().st_size
            raise S2FTError(
                f"{self.path} is truncated or no safetensors file ({size} bytes): {first_line(error)}"
            ) from error

    def headers(self) -> dict[str, Header]:
        """Name → dtype and shape."""
        found = ((name, self._file.get_slice(name)) for name in self._names)
        return {
            name: Header(_DTYPES.get(str(one.get_dtype()), str(one.get_dtype())), tuple(one.get_shape()))
            for name, one in found
        }

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        if self._mapped > MOST_MAPPED:
            self._open()
        tensor: Tensor = self._file.get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
