"""More adapters than fit on the device: a pool on three tiers; the least recently used leaves first.

    disk    every adapter, as its folder
    host    deltas in CPU memory (pinned where CUDA is there, so that they travel fast), within `host_bytes`
    device  deltas beside the model's layers, within `device_bytes`: what a batch needs is brought here before it runs

An adapter is in memory once: what leaves the device goes to the host, and what leaves the host is on disk anyway. A pool's
adapters are not part of the PEFT model: `PeftModel.load_adapter` walks over the whole model and all adapters loaded before, so
each takes longer than the last. Here, each costs reading and checking its files.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import nn

from s2ft.adapters.compatibility import check_fits
from s2ft.adapters.file import Adapter, read_adapter
from s2ft.common.errors import S2FTError, raise_together
from s2ft.layer.adapted import require_own
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.pack import LooseSlice, forget
from s2ft.layer.stacked import linear_at
from s2ft.tuner.incoming import warn_of_overflow
from s2ft.tuner.mixing import BASE
from s2ft.tuner.model import S2FTModel

Slices = dict[str, LooseSlice]  # module → the adapter's slice of it


class AdapterPool:
    """Adapters that a live model finds by name in `adapter_names`, however many there are.

    Args:
        model: The `PeftModel` (or its `S2FTModel`) that runs them; it has at most one pool.
        folders: Name → adapter folder, or a folder of adapter folders, whose names are then the adapters'.
        device_bytes: Room beside the model, counted in bytes of the adapters' weight files. Running a batch takes the size of
            its adapters once more, in the model's dtype, for the layers' tables (`layer/mixed.py`).
        host_bytes: Room in CPU memory for adapters that have left the device.

    Raises:
        S2FTError: if the model is not S²FT's, a folder is no adapter's, a name is taken, or there is no room at all.

    Example:
        pool = AdapterPool(model, "adapters/", device_bytes=2 * 2**30, host_bytes=16 * 2**30)
        model.generate(**inputs, adapter_names=["alice", "bob", "__base__"])
    """

    def __init__(
        self, model: nn.Module, folders: str | Path | Mapping[str, str | Path], device_bytes: int, host_bytes: int
    ) -> None:
        self._tuner = _tuner(model)
        self._folders = _folders(folders)
        self.device_bytes, self.host_bytes = device_bytes, host_bytes
        raise_together(self._problems())
        self._sizes = {name: _bytes(path) for name, path in self._folders.items()}
        self._device: OrderedDict[str, Slices] = OrderedDict()  # least recently used first
        self._host: OrderedDict[str, Slices] = OrderedDict()
        self._tuner.pool = self

    def __iter__(self) -> Iterator[str]:
        return iter(self._folders)

    def __contains__(self, name: object) -> bool:
        return name in self._folders

    def tier(self, name: str) -> str:
        """Where the adapter is: `device`, `host` or `disk`."""
        return "device" if name in self._device else "host" if name in self._host else "disk"

    def size(self, names: Iterable[str]) -> int:
        """The bytes that these adapters of the pool take on the device."""
        return self._total(names)

    def used(self) -> tuple[int, int]:
        """Bytes on the device and on the host."""
        return self._total(self._device), self._total(self._host)

    def bring(self, names: Iterable[str]) -> None:
        """Brings the pool's adapters among `names` to the device; the model calls it before each batch.

        Raises:
            S2FTError: if they do not fit together, or one of them is damaged, of another base, or holds more than slices.
        """
        wanted = [name for name in dict.fromkeys(names) if name in self._folders]
        needed = self._total(wanted)
        if needed > self.device_bytes:
            raise S2FTError(
                f"the batch needs {len(wanted)} adapters of together {needed:,} bytes; device_bytes={self.device_bytes:,} "
                "holds less. Split the batch, or give the pool more"
            )
        with self._tuner.shared.turns.alone():
            missing = [name for name in wanted if name not in self._device]
            if missing:  # they are checked against the base's own values
                require_own(self._tuner.model, f"bringing the adapter {missing[0]!r}")
            for name in wanted:
                if name in self._device:
                    self._device.move_to_end(name)
            for name in missing:
                self._promote(name, set(wanted))

    def add(self, name: str, folder: str | Path) -> None:
        """A further adapter; it is read when a batch first needs it.

        Raises:
            S2FTError: if the folder is no adapter's, or the name is taken.
        """
        path = Path(folder)
        raise_together([*self._name_problems(name, path), *([f"the name {name!r} is taken"] if name in self else [])])
        self._sizes[name] = _bytes(path)
        self._folders[name] = path

    def remove(self, name: str) -> None:
        """Takes an adapter out of the pool and from memory.

        Raises:
            S2FTError: if the pool does not know it.
        """
        if name not in self:
            raise S2FTError(f"the pool has no adapter {name!r}; it has {', '.join(self) or 'none'}")
        with self._tuner.shared.turns.alone():
            if name in self._device:
                self._detach(name)
            self._host.pop(name, None)
            del self._folders[name], self._sizes[name]

    def close(self) -> None:
        """Takes every adapter of the pool from the model and from memory."""
        with self._tuner.shared.turns.alone():
            for name in list(self._device):
                self._detach(name)
            self._host.clear()
            self._tuner.pool = None

    def _promote(self, name: str, keep: set[str]) -> None:
        slices = self._host.pop(name, None) or self._load(name)
        while self._total(self._device) + self._sizes[name] > self.device_bytes:
            self._demote(next(used for used in self._device if used not in keep))
        layers = {module: self._tuner.wrap(module) for module in slices}
        there = {module: _on_device(one, layers[module].weight.device) for module, one in slices.items()}
        for module, layer in layers.items():
            layer.pooled[name] = there[module]
        self._device[name] = there

    def _demote(self, name: str) -> None:
        slices, size = self._detach(name), self._sizes[name]
        if size > self.host_bytes:
            return
        while self._total(self._host) + size > self.host_bytes:
            self._host.popitem(last=False)
        self._host[name] = {module: _on_host(one) for module, one in slices.items()}

    def _detach(self, name: str) -> Slices:
        slices = self._device.pop(name)
        for module in slices:
            parent, _, child = module.rpartition(".")
            layer = getattr(self._tuner.model.get_submodule(parent), child)
            if isinstance(layer, S2FTLinear):  # not after unload()
                layer.pooled.pop(name, None)
                forget(layer)  # whose table holds the slices once more
        return slices

    def _load(self, name: str) -> Slices:
        adapter = read_adapter(self._folders[name])
        check_fits(self._tuner.model, adapter.config, {module: delta.shape for module, delta in adapter.deltas.items()})
        raise_together(_beside(adapter))
        warn_of_overflow({linear_at(self._tuner.model, module): delta for module, delta in adapter.deltas.items()})
        return {
            module: _on_host(LooseSlice(trained.side, trained.channels, adapter.deltas[module]))
            for module, trained in adapter.slices.items()
        }

    def _total(self, names: Iterable[str]) -> int:
        return sum(self._sizes[name] for name in names)

    def _problems(self) -> Iterator[str]:
        if self._tuner.pool is not None:
            yield "the model has a pool already; close() it first"
        for what, value in (("device_bytes", self.device_bytes), ("host_bytes", self.host_bytes)):
            least = 1 if what == "device_bytes" else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                yield f"{what}={value!r} is no number of bytes; expected a whole number from {least}"
        for name, path in self._folders.items():
            yield from self._name_problems(name, path)

    def _name_problems(self, name: str, path: Path) -> Iterator[str]:
        if name == BASE or name in self._tuner.peft_config:
            yield f"the name {name!r} is taken: {'it means no adapter' if name == BASE else 'the model has it loaded'}"
        missing = [file for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME) if not (path / file).is_file()]
        if missing:
            yield f"{path} holds no adapter: there is no {missing[0]}"


def _tuner(model: nn.Module) -> S2FTModel:
    tuner: Any = model if isinstance(model, S2FTModel) else getattr(model, "base_model", None)
    if not isinstance(tuner, S2FTModel):
        raise S2FTError(f"an adapter pool needs a PEFT model with an S2FT adapter; got {type(model).__name__}")
    return tuner


def _folders(folders: str | Path | Mapping[str, str | Path]) -> dict[str, Path]:
    if isinstance(folders, Mapping):
        return {name: Path(path) for name, path in folders.items()}
    root = Path(folders)
    found = {path.name: path for path in sorted(root.glob("*")) if (path / CONFIG_NAME).is_file()}
    if not found:
        raise S2FTError(f"{root} holds no adapter folders; expected folders with {CONFIG_NAME} in it")
    return found


def _bytes(folder: Path) -> int:
    return (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size


def _beside(adapter: Adapter) -> Iterator[str]:
    if adapter.others:
        yield (
            f"{adapter.folder} keeps {next(iter(adapter.others))} whole beside its slices; a pool holds slices only. "
            "Load it with load_adapter"
        )


def _on_device(one: LooseSlice, device: torch.device) -> LooseSlice:
    return LooseSlice(one.side, one.indices, one.weight.to(device, non_blocking=True))


def _on_host(one: LooseSlice) -> LooseSlice:
    weight = one.weight.cpu()
    return LooseSlice(one.side, one.indices, weight.pin_memory() if torch.cuda.is_available() else weight)
