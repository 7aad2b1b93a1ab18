"""The one check of an adapter's files, which every reader makes: PEFT's loader, the pool, fusion, export, merging, inspection.

    names and shapes    every slice of the config has its delta and its channels; nothing else is there but what the config
                        declares (modules_to_save, trainable_token_indices): under any other name, PEFT would write it into
                        the base model
    values              channels as in the config, numbers that are finite, checksums as saved

Each tensor is read once, and cheap checks come first: no slice is expanded before a tensor of its size was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.reading import shown
from s2ft.format.checksum import checksum
from s2ft.format.digest import part_problems
from s2ft.format.folder import CONFIG_FILE
from s2ft.format.names import (
    PREFIX,
    TOKEN_ROWS,
    bare,
    delta_name,
    indices_name,
    is_base_copy,
    is_of_module,
    is_slice_part,
)
from s2ft.format.slices import Runs, Slice, all_finite
from s2ft.format.weight_file import Header, WeightFile

if TYPE_CHECKING:
    from s2ft.format.saved import SavedConfig

DELTA_DTYPES = ("float32", "float64", "bfloat16", "float16")


def check_adapter(folder: Path, config: SavedConfig) -> WeightFile:
    """The opened weight file beside a config; raises `S2FTError` with all that is wrong with it."""
    if not config.slices:
        raise S2FTError(f"{folder / CONFIG_FILE} names no slices; it was saved before the adapter was made")
    weights = WeightFile(folder)
    raise_together(f"{weights.path}: {problem}" for problem in header_problems(config, weights.headers()))
    raise_together(f"{weights.path}: {problem}" for problem in value_problems(config, weights))
    return weights


def header_problems(config: SavedConfig, headers: Mapping[str, Header]) -> Iterator[str]:
    """What is wrong with a file's names, dtypes and shapes; nothing is read, and no slice expanded."""
    known = set()
    for module, text in (config.slices or {}).items():
        names = [delta_name(module), indices_name(module)]
        known.update(names)
        missing = [name for name in names if name not in headers]
        if missing:
            yield f"has no {missing[0].rpartition('.')[2]} for {module}, which its config names: not the adapter of this config"
        else:
            yield from _slice_problems(Runs.parse(text), text, names, [headers[name] for name in names])
        yield from part_problems((config.base_digest or {}).get(module, ""), text)
    yield from (
        problem for name, one in headers.items() if name not in known and (problem := _undeclared(config, name, one))
    )
    if _token_lists(config) and not any(name.endswith(TOKEN_ROWS) for name in headers):
        yield f"has no {TOKEN_ROWS[1:]} for trainable_token_indices={shown(config.trainable_token_indices)} of the config"


def _slice_problems(runs: Runs, text: str, names: list[str], headers: list[Header]) -> Iterator[str]:
    (weight, channels), (delta, indices) = names, headers
    sliced = 1 if runs.side == "in" else 0
    if delta.dtype not in DELTA_DTYPES or 0 in delta.shape or not delta.shape:
        yield f"{weight} is {delta}; expected values of one of {', '.join(DELTA_DTYPES)}"
    elif len(delta.shape) != 2 or delta.shape[sliced] != runs.count:
        yield f"{weight} has shape {list(delta.shape)}; the slice {shown(text)} has {runs.count} channels"
    if indices != Header("int64", (runs.count,)):
        yield f"{channels} is {indices}, so it differs from the config's slice {shown(text)}"


def _undeclared(config: SavedConfig, name: str, header: Header) -> str | None:
    """Why a tensor that belongs to no slice must not be loaded; None where the config declares it."""
    if is_base_copy(name, config.slices):
        return None
    if is_slice_part(name):
        return f"{shown(name)} is not in the config's slices"
    inner = bare(name)
    tokens = next((rows for end, rows in _token_lists(config) if inner.endswith(f"{end}{TOKEN_ROWS}")), None)
    if inner.endswith(TOKEN_ROWS) and tokens is not None:
        sound = len(header.shape) == 2 and header.shape[0] == len(tokens) and header.dtype in DELTA_DTYPES
        return None if sound else f"{name} is {header}, for {len(tokens)} trainable tokens"
    if not name.startswith(PREFIX) or not is_of_module(name, config.modules_to_save or ()):
        return (
            f"{shown(name)} is neither a slice nor what the config declares (modules_to_save, trainable_token_indices): it "
            "would overwrite the base model"
        )
    return None if "complex" not in header.dtype else f"{name} is {header}; expected real numbers"


def _token_lists(config: SavedConfig) -> list[tuple[str, list[int]]]:
    """End of an embedding's path → its trained rows; of a mere list, PEFT finds the input embedding by itself."""
    tokens = config.trainable_token_indices
    if isinstance(tokens, dict):
        return [(name, rows) for name, rows in tokens.items() if rows]
    return [("", tokens)] if tokens else []


def value_problems(config: SavedConfig, tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """What is wrong with a file's values, where `header_problems` found nothing."""
    written, noted = {}, config.checksums or {}
    for module, text in (config.slices or {}).items():
        written[indices_name(module)] = text
    for name, tensor in tensors.items():
        if name in written:
            if not torch.equal(tensor, torch.from_numpy(Slice.parse(written[name]).indices)):
                yield f"{name} differs from the config's slice {shown(written[name])}"
        elif tensor.is_floating_point() and not all_finite(tensor):
            yield f"{name} holds values that are not finite"
        elif (expected := noted.get(bare(name))) is not None and checksum(tensor) != expected:
            yield (
                f"{name} is not what was saved: its checksum differs from the config's. If it was changed on purpose, remove "
                "checksums from the config"
            )
    missing = noted.keys() - {bare(name) for name in tensors}
    yield from (f"the config has a checksum of {shown(name)}, which is not in the file" for name in sorted(missing))
