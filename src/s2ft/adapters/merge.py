"""A merged checkpoint: the base's own files with the adapter's slices added into them.

    base/      model-00001-of-00002.safetensors ...    config.json  tokenizer.json  chat_template.jinja ...
    output/    the same names, sizes, dtypes and order; in the shards, the bytes of the changed tensors are written over

A shard is copied as a file and patched in place, one tensor at a time. So memory is that of the largest layer, whatever the
model's size, and all that the adapter does not change stays the same, byte for byte. Values equal those of PEFT's
`merge_and_unload` on the loaded model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from s2ft.adapters.answer_end import name_end, noted_end
from s2ft.adapters.architecture import tokenizer_of
from s2ft.adapters.checkpoint import TIED, Checkpoint, open_base, settings_files
from s2ft.adapters.file import AdapterFile, open_adapter
from s2ft.adapters.stored import Place
from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.files import new_folder
from s2ft.common.outputs import Progress, check_free
from s2ft.format.names import bare, is_of_module
from s2ft.format.slices import Slice, all_finite
from s2ft.layer.columns import add_delta


def merge(adapter: str | Path, output: str | Path, base: str | None = None, progress: Progress = iter) -> Path:
    """Writes the base with the adapter merged into it, whole or not at all.

    Args:
        adapter: Folder of an S²FT adapter.
        output: A new folder.
        base: Folder or Hub name of its base, in safetensors; by default the one that the adapter names.
        progress: Wraps the list of steps, as a progress bar does.

    Returns:
        The folder.

    Raises:
        S2FTError: before anything is written, if the adapter is damaged or not for this base, the base is quantised
            or incomplete, a file of the base is a link out of its folder, or `output` exists already.
    """
    output = Path(output)
    check_free(output)
    opened = open_adapter(adapter)
    checkpoint = open_base(opened, base, weights=True)
    whole = _whole_tensors(opened, checkpoint)
    end = noted_end(opened.folder, partial(tokenizer_of, checkpoint.folder))
    shards = {path.name: path for path in sorted(set(checkpoint.files.values()))}
    _check_links(checkpoint, shards.values())
    with new_folder(output) as aside:
        for step in progress([*shards, *opened.slices]):
            if step in shards:
                shutil.copyfile(shards[step], aside / step)
            else:
                _merge_module(opened, checkpoint, step, aside)
        for name, tensor in whole.items():
            _overwrite(aside / checkpoint.files[name].name, name, tensor)
        _copy_settings(checkpoint, aside)
        if end is not None:
            name_end(aside, end)
    return output


def merged_rows(
    place: Place,
    weight: Tensor,  # the base's tensor
    trained: Slice,
    delta: Tensor,  # [out_features, s] on the input side, [s, in_features] on the output side
) -> Tensor:  # [n, across], in the base's dtype
    """The new values of a slice's channels in one tensor: summed in float32 (a float64 base: float64), rounded once.

    Raises:
        S2FTError: if one of them is not finite.
    """
    rows = (delta.T if trained.side == "in" else delta)[place.picked]
    # A live model's deltas are float32
    merged = add_delta(place.read(weight), rows if weight.dtype == torch.float64 else rows.float())
    if not all_finite(merged):
        raise S2FTError(
            f"{place.tensor}: merged values do not fit {weight.dtype}, or the base holds values that are not finite"
        )
    return merged


def _merge_module(adapter: AdapterFile, base: Checkpoint, module: str, aside: Path) -> None:
    trained, delta = adapter.slices[module], adapter.delta(module)
    for place in base.places(module, trained):
        weight = base.tensor(place.tensor)
        place.write(weight, merged_rows(place, weight, trained, delta))
        _overwrite(aside / base.files[place.tensor].name, place.tensor, weight)


def _whole_tensors(adapter: AdapterFile, base: Checkpoint) -> dict[str, Tensor]:
    """The tensors of `modules_to_save`, under the checkpoint's names and in its dtypes."""
    raise_together(_unmergeable(adapter, base))
    found = {}
    for kept, tensor in adapter.others().items():
        name = base.tensor_name(*bare(kept).rsplit(".", 1))
        own = base.tensor(name)
        if own.shape != tensor.shape:
            raise S2FTError(f"{kept} has shape {list(tensor.shape)}; in the base it is {list(own.shape)}")
        found[name] = tensor.to(own.dtype)
    return found


def _unmergeable(adapter: AdapterFile, base: Checkpoint) -> list[str]:
    if not adapter.kept:
        return []
    whole = adapter.config.modules_to_save or []
    problems = []
    for name in adapter.kept:
        module = bare(name).rpartition(".")[0]
        if not is_of_module(name, whole):
            problems.append(f"{name} cannot be merged on files; load the model and use PEFT's merge_and_unload")
        elif module in base.tied:
            problems.append(f"{name}: {TIED}")
    return problems


def _overwrite(file: Path, name: str, tensor: Tensor) -> None:
    """Replaces a tensor's bytes in a safetensors file; shape and dtype stay."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        start, end = json.loads(stream.read(size))[name]["data_offsets"]
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        assert len(data) == end - start  # shape and dtype are the file's own
        stream.seek(8 + size + start)
        stream.write(data)


def _check_links(base: Checkpoint, shards: Iterable[Path]) -> None:
    """Refuses links out of the base's folder, since the result may be published; the Hub's cache may link to its blobs."""
    folder = base.folder.resolve()
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    settings = [file for path in settings_files(base.folder) for file in (path, *path.rglob("*"))]
    copied = {path: path.resolve() for path in (*shards, *settings, *([base.index_file] if base.is_sharded else []))}
    raise_together(
        f"{path} is a link out of its folder, to {target}; a merge copies what lies in the base's folder alone"
        for path, target in copied.items()
        if not any(target.is_relative_to(home) for home in homes)
    )


def _copy_settings(base: Checkpoint, aside: Path) -> None:
    for path in settings_files(base.folder):
        if path.is_dir():
            shutil.copytree(path, aside / path.name)
        else:
            shutil.copyfile(path, aside / path.name)
    if base.is_sharded:
        shutil.copyfile(base.index_file, aside / base.index_file.name)
