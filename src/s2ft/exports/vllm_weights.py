"""Runs inside vLLM: takes one adapter into the weights of a running engine, and takes it out again, bit for bit.

`exports/sync.py` sends messages through vLLM's weight update API (`/update_weights`); this is the backend that reads them:

    slices     tensor → which of its rows or columns, and its shape; none: the base alone
    tensors    their numbers, new values, and the base's own values, unless these were sent before

Tensors have the checkpoint's names and coordinates; vLLM's own loaders place them, whatever a model fuses or shards. The base's
values are kept, and copied back before another adapter is put in.

    weights that vLLM keeps as they are        `load_checkpoint_weight_patches`: the changed entries alone
    weights that it packs (a CPU's kernels)    the checkpoint is read from disk once more, with the slices in it
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)
from vllm.model_executor.model_loader.reload.inplace import reload_weights

from s2ft.adapters.stored import Place


@dataclass
class NoInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class SliceInfo(WeightTransferUpdateInfo):
    """A message."""

    tensors: str  # a safetensors file in base64: NAME.at.0 ..., NAME.values and maybe NAME.own
    slices: dict[str, dict[str, Any]]  # name → {"across", "shape"}, as in `Place`


@dataclass(frozen=True, eq=False)
class Held:
    """What an adapter has changed of one tensor."""

    place: Place
    own: Tensor  # [n, across], the base's values there


class SliceEngine(WeightTransferEngine[NoInfo, SliceInfo]):
    """The backend `s2ft` of vLLM's weight transfer."""

    init_info_cls = NoInfo
    update_info_cls = SliceInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._held: dict[str, Held] = {}

    def init_transfer_engine(self, init_info: NoInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: weights stay where they are."""

    def finish_weight_update(self) -> None:
        """Nothing to do, as above."""

    def shutdown(self) -> None:
        """Nothing to do: there is no connection."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """As in vLLM's own, which asks for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: SliceInfo) -> None:
        """Puts the slices of a message in, and takes those out that were there before.

        Raises:
            ValueError: before anything is changed, if the message lacks values.
        """
        held, values = self._read(update_info)
        if any(parameter.numel() == 0 for parameter in self.model.parameters()):
            self._reload(held, values)
        else:
            leaving = {
                name: one
                for name, one in self._held.items()
                if name not in held or not _same_place(one.place, held[name].place)
            }
            self._write({name: (one.place, one.own) for name, one in leaving.items()})
            self._write({name: (one.place, values[name]) for name, one in held.items()})
        self._held = held

    def _read(self, info: SliceInfo) -> tuple[dict[str, Held], dict[str, Tensor]]:
        tensors = load(base64.b64decode(info.tensors)) if info.slices else {}
        found = {}
        for name, where in info.slices.items():
            at = tuple(tensors[f"{name}.at.{number}"].long() for number in range(len(where["shape"]) - 1))
            place = Place(name, where["shape"], where["across"], at, torch.arange(len(at[0])))
            own, before = tensors.get(f"{name}.own"), self._held.get(name)
            if own is None and before is not None and _same_place(place, before.place):
                own = before.own
            if own is None:
                raise ValueError(f"{name}: the base's own values are not here; send them once")
            found[name] = Held(place, own)
        return found, {name: tensors[f"{name}.values"] for name in found}

    def _write(self, rows: dict[str, tuple[Place, Tensor]]) -> None:
        patches = [
            CheckpointWeightPatch(name, tuple(place.shape), values.dtype, values.flatten(), place.positions.flatten())
            for name, (place, values) in rows.items()
        ]
        load_checkpoint_weight_patches(self.model, patches)

    def _reload(self, held: dict[str, Held], values: dict[str, Tensor]) -> None:
        """Loads the checkpoint once more, with the slices in it."""
        loader: Any = get_model_loader(self.vllm_config.load_config)
        missing = dict.fromkeys(held)

        def weights() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in loader.get_all_weights(self.model_config, self.model):
                if name in held:
                    missing.pop(name)
                    tensor = tensor.clone()
                    held[name].place.write(tensor, values[name].to(tensor.dtype))
                yield name, tensor

        reload_weights(self.vllm_config, self.model, weights(), None, True)
        if missing:
            raise ValueError(f"the checkpoint has no {', '.join(missing)}")


def _same_place(one: Place, other: Place) -> bool:
    return one.across == other.across and all(map(torch.equal, one.at, other.at))


def receive(model: Any, vllm_config: Any, update_info: dict[str, Any]) -> None:
    """Takes a message into the model of a vLLM that has no backend for it; what is held is kept with the model."""
    if "s2ft_slices" not in vars(model):
        device = next(model.parameters()).device
        vars(model)["s2ft_slices"] = SliceEngine(None, vllm_config, device, model)
    vars(model)["s2ft_slices"].update_weights(update_info)
