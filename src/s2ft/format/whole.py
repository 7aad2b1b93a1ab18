"""The one check of an adapter's files: PEFT's loader, a live model, the pool, fusion, export, merging and inspection ask it.

    names and shapes    every slice of the config has its delta and its channels; nothing else is there but what the config
                        declares (modules_to_save, trainable_token_indices): under any other name, PEFT would write it into
                        the base model
    values              channels as in the config, numbers that are finite, checksums as saved

Each tensor is looked at once, the cheap questions first: no channel takes memory before a tensor of its size was found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from safetensors import SafetensorError, safe_open
from torch import Tensor

from s2ft.common.errors import S2FTError, first_line, gathered, raise_together
from s2ft.common.reading import check_regular, is_clean, read_json, shown
from s2ft.format.checksum import PREFIX, bare, checksum
from s2ft.format.digest import part_problems
from s2ft.format.registration import NAME
from s2ft.format.slices import Runs, Slice, all_finite

if TYPE_CHECKING:
    from s2ft.format.config import S2FTConfig

BLOCK = ".s2ft_block."
MOST_MAPPED = 16 << 20  # bytes of a file; what was read of it counts as memory until it is opened anew
TOKENS = ".token_adapter.trainable_tokens_delta"
DELTA_DTYPES = ("float32", "float64", "bfloat16", "float16")
_INTERNAL = (".base_layer.", ".original_module.", BLOCK)  # never in a name of what is kept whole
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
        """Of a tensor in memory; what is no tensor has the name of its type as dtype."""
        if not isinstance(tensor, Tensor):
            return Header(type(tensor).__name__, ())
        return Header(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


class WeightFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for.

    Raises:
        S2FTError: if the file is missing, irregular, truncated or no safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / SAFETENSORS_WEIGHTS_NAME
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


def check_whole(folder: Path, config: S2FTConfig) -> WeightFile:
    """The open weight file beside a config; raises `S2FTError` unless it is that config's adapter, and sound."""
    if not config.slices:
        raise S2FTError(f"{folder / CONFIG_NAME} names no slices; was it saved before the adapter was made?")
    weights = WeightFile(folder)
    raise_together(f"{weights.path}: {problem}" for problem in header_problems(config, weights.headers()))
    raise_together(f"{weights.path}: {problem}" for problem in value_problems(config, weights))
    return weights


def header_problems(config: S2FTConfig, headers: Mapping[str, Header]) -> Iterator[str]:
    """What is wrong with a file's names, dtypes and shapes; nothing is read, and no slice expanded."""
    known = set()
    for module, text in (config.slices or {}).items():
        names = [f"{PREFIX}{module}{BLOCK}{part}" for part in ("weight", "indices")]
        known.update(names)
        missing = [name for name in names if name not in headers]
        if missing:
            yield f"has no {missing[0].rpartition('.')[2]} for {module}, which its config names: not the adapter of this config"
        else:
            yield from _slice_problems(Runs.parse(text), text, names, [headers[name] for name in names])
        yield from part_problems((config.base_digest or {}).get(module, ""), text)
    yield from (
        problem for name, one in headers.items() if name not in known and (problem := _foreign(config, name, one))
    )
    if _token_lists(config) and not any(name.endswith(TOKENS) for name in headers):
        yield f"has no {TOKENS[1:]} for trainable_token_indices={shown(config.trainable_token_indices)} of the config"


def _slice_problems(runs: Runs, text: str, names: list[str], headers: list[Header]) -> Iterator[str]:
    (weight, channels), (delta, indices) = names, headers
    sliced = 1 if runs.side == "in" else 0
    if delta.dtype not in DELTA_DTYPES or 0 in delta.shape or not delta.shape:
        yield f"{weight} is {delta}; expected values of one of {', '.join(DELTA_DTYPES)}"
    elif len(delta.shape) != 2 or delta.shape[sliced] != runs.count:
        yield f"{weight} has shape {list(delta.shape)}; the slice {shown(text)} has {runs.count} channels"
    if indices != Header("int64", (runs.count,)):
        yield f"{channels} is {indices}, so it differs from the config's slice {shown(text)}"


def _foreign(config: S2FTConfig, name: str, header: Header) -> str | None:
    """Why a tensor that is no slice's must not be loaded; None where the config declares it."""
    if is_carried(config, name):
        return None
    inner = bare(name)
    tokens = next((rows for end, rows in _token_lists(config) if inner.endswith(f"{end}{TOKENS}")), None)
    whole = any(f"{module}." in inner for module in config.modules_to_save or ())
    if BLOCK in name:
        return f"{shown(name)} is not in the config's slices"
    if inner.endswith(TOKENS) and tokens is not None:
        sound = len(header.shape) == 2 and header.shape[0] == len(tokens) and header.dtype in DELTA_DTYPES
        return None if sound else f"{name} is {header}, for {len(tokens)} trainable tokens"
    if not name.startswith(PREFIX) or not whole or any(part in inner for part in (*_INTERNAL, ".token_adapter.")):
        return (
            f"{shown(name)} is neither a slice nor what the config declares (modules_to_save, trainable_token_indices): it "
            "would overwrite the base model"
        )
    return None if "complex" not in header.dtype else f"{name} is {header}; expected real numbers"


def is_carried(config: S2FTConfig, name: str) -> bool:
    """Whether PEFT puts a base weight into the file by itself: that of an output layer or embedding which is sliced.

    It is the base's own, never loaded.
    """
    module, _, parameter = bare(name).rpartition(".base_layer.")
    known = parameter in ("weight", "bias") and module in (config.slices or {})
    return known and module.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _token_lists(config: S2FTConfig) -> list[tuple[str, list[int]]]:
    """End of the embedding's path → its trained rows; PEFT finds the input embedding by itself where there is only a list."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        return [(name, rows) for name, rows in tokens.items() if rows]
    return [("", tokens)] if tokens else []


def value_problems(config: S2FTConfig, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with a file's values, where `header_problems` found nothing."""
    written, noted = {}, config.checksums or {}
    for module, text in (config.slices or {}).items():
        written[f"{PREFIX}{module}{BLOCK}indices"] = text
    for name, tensor in tensors.items():
        if name in written:
            if not torch.equal(tensor, torch.from_numpy(Slice.parse(written[name]).indices)):
                yield f"{name} differs from the config's slice {shown(written[name])}"
        elif tensor.is_floating_point() and not finite(tensor):
            yield f"{name} holds values that are not finite"
        elif (expected := noted.get(bare(name))) is not None and checksum(tensor) != expected:
            yield (
                f"{name} is not what was saved: its checksum differs from the config's. If it was changed on purpose, remove "
                "checksums from the config"
            )
    missing = noted.keys() - {bare(name) for name in tensors}
    yield from (f"the config has a checksum of {shown(name)}, which is not in the file" for name in sorted(missing))


def finite(tensor: Tensor) -> bool:
    """As `all_finite`, for the dtypes that have no minimum too (float8)."""
    return all_finite(tensor if tensor.element_size() > 1 else tensor.float())


def method_of(folder: Path) -> Any:
    """What the adapter config in `folder` calls its method; raises `S2FTError` if there is no readable one."""
    path = folder / CONFIG_NAME
    check_regular(path)
    if not path.is_file():
        raise S2FTError(f"{folder} holds no adapter: there is no {CONFIG_NAME}")
    return read_json(path).get("peft_type")


def check_method(folder: Path) -> None:
    """Raises `S2FTError` unless the config in `folder` is of this method."""
    if (method := method_of(folder)) != NAME:
        raise S2FTError(f"{folder / CONFIG_NAME} is not an S2FT adapter: its peft_type is {shown(method)}")


def name_problems(config: S2FTConfig) -> Iterator[str]:
    """Names that must not reach a terminal or another file, and slices that are none."""
    for field in ("slices", "base_digest", "checksums"):
        for name in getattr(config, field) or {}:
            if not name or not is_clean(name):
                yield f"{field} names {shown(name)}, which is empty or holds control characters"
    yield from gathered(*(partial(Runs.parse, text) for text in (config.slices or {}).values()))
    for name in (config.base_digest or {}).keys() - config.slices.keys() if config.slices else ():
        yield f"base_digest names {shown(name)}, which is not in the config's slices"


_TEXT, _NAMES, _RANGE = (str, type(None)), (list, set, str, type(None)), (list, int, type(None))
_KINDS: dict[str, tuple[type, ...]] = {  # of fields that PEFT takes as they come
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "task_type": _TEXT,
    "peft_version": _TEXT,
    "auto_mapping": (dict, type(None)),
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "layers_to_transform": _RANGE,
    "layers_pattern": (list, str, type(None)),
    "modules_to_save": (list, type(None)),
    "trainable_token_indices": (list, dict, type(None)),
    "how_to_load": (str,),
    "inference_mode": (bool,),
    "init_weights": (bool,),
}


def kind_problems(config: S2FTConfig) -> Iterator[str]:
    """Fields of a config from a file that hold another kind of value than theirs."""
    for name, kinds in _KINDS.items():
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            allowed = ", ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            yield f"{name}={shown(value)} is not one of: {allowed}"
        elif isinstance(value, str) and not is_clean(value):
            yield f"{name}={shown(value)} holds control characters"
        elif isinstance(value, list | set) and not all(map(_is_item(name), value)):
            yield f"{name}={shown(value)} holds what is no {'number' if _is_item(name) is _is_count else 'name'}"
        elif isinstance(value, str) and name in ("target_modules", "exclude_modules") and not _is_pattern(value):
            yield f"{name}={shown(value)} is no regular expression"
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict) and not all(
        _is_name(name) and isinstance(rows, list) and all(map(_is_count, rows)) for name, rows in tokens.items()
    ):
        yield f"trainable_token_indices={shown(tokens)} is no mapping from embeddings to lists of rows"


def _is_item(field: str) -> Callable[[Any], bool]:
    return _is_count if field in ("layers_to_transform", "trainable_token_indices") else _is_name


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and is_clean(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_pattern(value: str) -> bool:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True
