"""Whether s2ft trains a model exactly: gradients, files, merging and the in-place layout, beside full autograd.

reference   the model itself with the deltas added to its weights, all of whose gradients autograd computes
adapter     slices of half the heads and channels of every projection that is read, with random deltas
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2ft.common.errors import S2FTError
from s2ft.exports.export import export
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice, put
from s2ft.lab.families.tiny import inputs_of, output_of
from s2ft.layer.linear import sliced_layers
from s2ft.layer.linears import as_matrix, weight_matrix, weight_of
from s2ft.layer.stacked import StackedLinear, linear_at
from s2ft.selection.select import select
from s2ft.selection.structure import read_structures
from s2ft.training.in_place import in_place
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

RATIO = 0.5
MOST = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative error of a gradient that counts as none
MOST_ROUTED = 1e-6  # where routers compute in float32 even so: what differs in the last digit, they round another way
MOST_IN_PLACE = 1e-5  # where norms compute in float32 even so, by another formula than the model's


@dataclass(frozen=True)
class Findings:
    """What was found of one model."""

    dtype: torch.dtype
    projections: tuple[str, ...]  # that are read, by canonical name
    experts: int  # slices of stacked experts
    coupled: bool  # heads are read with all of q, k, v and o
    gradient: float  # worst relative error of a slice's gradient
    reached: float  # share of the slices that the input reaches: the others' gradients are zero
    reloaded: bool  # a saved adapter gives the same output, bit for bit
    merged: bool  # merged weights are those of the reference, bit for bit
    lora: bool  # exported as a LoRA and loaded by PEFT, it gives the same output
    contiguous: int  # slices of o and down that lie in one piece in place
    gathered: dict[str, str]  # the others → why
    in_place: float  # worst relative error in place, of the output and of gradients

    @property
    def reasons(self) -> list[str]:
        """Why slices are gathered, once for all blocks."""
        return sorted(
            {re.sub(r"(?<=\.)\d+(?=\.)", "*", why).replace("base_model.model.", "") for why in self.gathered.values()}
        )

    @property
    def is_exact(self) -> bool:
        """Whether all of it is as it should be."""
        return (
            self.gradient <= max(MOST_ROUTED if self.experts else 0.0, MOST[self.dtype])
            and self.in_place <= max(MOST_IN_PLACE, MOST[self.dtype])
            and self.reloaded
            and self.merged
        )


def check(model: PreTrainedModel, seed: int = 0) -> Findings:
    """Trains, saves, reloads, merges and lays out half of all units of `model`, a model in float64.

    Raises:
        S2FTError: if it has nothing that s2ft can train.
    """
    structures = read_structures(model).structures
    config = chosen(model, seed)
    inputs = inputs_of(model)
    tuned = _adapted(model, config)
    deltas = {path: layer.block("default") for path, layer in sliced_layers(tuned.get_base_model(), "default").items()}
    dense = untied(deepcopy(model), deltas)
    for path, block in deltas.items():
        add(layer_at(dense, path), block.trained, block.weight.detach())
    loss_weights = torch.randn_like(output_of(dense, inputs))
    expected = gradients_of(dense, inputs, loss_weights, {path: block.trained for path, block in deltas.items()})
    found = _block_gradients(tuned, inputs, loss_weights)
    heads = [s for s in structures if s.kind == "attention"]
    gathered, contiguous, worst = _laid_out(tuned, inputs, loss_weights)
    return Findings(
        dtype=model.dtype,
        projections=tuple(dict.fromkeys(p.name for s in structures for p in s.projections)),
        experts=sum(isinstance(layer_at(model, path), StackedLinear) for path in deltas),
        coupled=any(not s.partial for s in heads),
        gradient=float(np.max([_error(found[path], expected[path]) for path in expected])),  # NaN, if one is
        reached=sum(bool(gradient.any()) for gradient in expected.values()) / len(expected),
        reloaded=_reloads(tuned, model, inputs),
        contiguous=contiguous,
        gathered=gathered,
        in_place=worst,
        lora=_exports(tuned, model, inputs),
        merged=_merges(tuned, dense),
    )


def chosen(model: PreTrainedModel, seed: int) -> S2FTConfig:
    """Half of the units of every projection that is read; where none is, of the inputs of all linear layers."""
    structures = read_structures(model).structures
    paths = {p.module for s in structures for p in s.projections}
    config = S2FTConfig(ratios=RATIO, target_modules=paths or "all-linear", seed=seed, init_weights=False)
    return select(model, config).config


def _adapted(model: PreTrainedModel, config: S2FTConfig) -> PeftModel:
    return get_peft_model(deepcopy(model), deepcopy(config))


def layer_at(model: nn.Module, path: str) -> nn.Module:
    """The linear layer, or stack of them, at `path`."""
    layer = linear_at(model, path)
    assert layer is not None
    return layer


def untied(model: PreTrainedModel, paths: Iterable[str]) -> PreTrainedModel:
    """Gives linear layers that share a weight one each, since their slices differ."""
    seen: set[int] = set()
    for layer in (layer_at(model, path) for path in paths):
        if id(weight_of(layer)) in seen:
            layer.weight = nn.Parameter(weight_of(layer).detach().clone())
        seen.add(id(weight_of(layer)))
    return model


def add(layer: nn.Module, trained: Slice, delta: Tensor) -> None:
    """Adds a delta to the slice of the layer's weight."""
    weight = weight_matrix(layer)
    with torch.no_grad():
        put(weight, trained.dim, trained.channels, trained.of(weight) + delta.to(weight.dtype))


def gradients_of(
    dense: PreTrainedModel, inputs: dict[str, Any], loss_weights: Tensor, slices: Mapping[str, Slice]
) -> dict[str, Tensor]:
    """Full autograd's, cut to the slices; zero where the output does not depend on a layer."""
    dense.zero_grad()
    dense.requires_grad_(True)
    (output_of(dense, inputs) * loss_weights).sum().backward()
    found = {}
    for path, trained in slices.items():
        layer = layer_at(dense, path)
        weight = weight_of(layer)
        grad = weight.grad if weight.grad is not None else torch.zeros_like(weight)
        found[path] = trained.of(as_matrix(layer, grad))
    dense.requires_grad_(False)
    return found


def _block_gradients(tuned: PeftModel, inputs: dict[str, Any], loss_weights: Tensor) -> dict[str, Tensor]:
    tuned.zero_grad()
    (output_of(tuned, inputs) * loss_weights).sum().backward()
    blocks = {
        path: layer.block("default").weight for path, layer in sliced_layers(tuned.get_base_model(), "default").items()
    }
    return {path: torch.zeros_like(w) if w.grad is None else w.grad.clone() for path, w in blocks.items()}


def _reloads(tuned: PeftModel, model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        tuned.save_pretrained(folder)
        again = PeftModel.from_pretrained(deepcopy(model), folder).eval()
        return torch.equal(output_of(again, inputs), output_of(tuned, inputs))


def _exports(tuned: PeftModel, model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Whether PEFT computes the same with the exported LoRA; not where it, or the export, refuses that."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        model.save_pretrained(folder / "base")
        tuned.save_pretrained(str(folder / "adapter"))
        try:
            export(folder / "adapter", "lora", folder / "lora", base=str(folder / "base"))
            again = PeftModel.from_pretrained(deepcopy(model), str(folder / "lora")).eval()
        except (S2FTError, ValueError):  # PEFT's: some modules of Mamba take no LoRA
            return False
        return _error(output_of(again, inputs), output_of(tuned, inputs)) <= MOST[torch.float32]


def _laid_out(tuned: PeftModel, inputs: dict[str, Any], loss_weights: Tensor) -> tuple[dict[str, str], int, float]:
    """(gathered slices → why, contiguous ones, worst relative error) in place."""
    before = output_of(tuned, inputs).detach()
    gradients = _block_gradients(tuned, inputs, loss_weights)
    with in_place(tuned) as layout:
        error = _error(output_of(tuned, inputs).detach(), before)
        inside = _block_gradients(tuned, inputs, loss_weights)
        places = list(layout.placements)
    error = float(np.max([error, *(_error(inside[path], gradients[path]) for path in gradients)]))
    gathered = {
        place.module.removeprefix("base_model.model."): place.reason for place in places if place.how != "contiguous"
    }
    return gathered, len(places) - len(gathered), error


def _merges(tuned: PeftModel, dense: PreTrainedModel) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = tuned.merge_and_unload()
    expected = dense.state_dict()
    return all(torch.equal(tensor, expected[name]) for name, tensor in merged.state_dict().items())


def _error(ours: Any, expected: Any) -> float:
    """Relative, by norms; of what should be zero, absolute."""
    size = float(expected.double().norm())
    return float((ours.double() - expected.double()).norm()) / (size or 1.0)
