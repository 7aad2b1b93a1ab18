"""Reasons why a structure cannot be permuted, or a weight cannot be written to.

Read off modules and shapes. What these do not show (heads that are paired, keys that a later layer reuses) shows when the
permuted structure is run: `training/probe.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from s2ft.layer.linears import linear_layer, weight_of, why_not_plain
from s2ft.selection.families import BEFORE_HEADS, HEAD_NORMS, POSITIONS, SHARED_NORM
from s2ft.selection.units import EXPERTS, Projection, Structure

_ROWS_OF_EXPERTS = "gate and up of stacked experts are added around them"
_ORDER_OF_EXPERTS = "each expert has chosen channels of its own"
Norms = dict[str, list[nn.Module]]  # module → the norms over its output, which are permuted with it


def find_obstacles(
    model: nn.Module,
    structures: list[Structure],
    live: bool = True,  # False: a stand-in for the model, without values and not frozen
) -> tuple[dict[str, str], dict[str, str], Norms]:
    """`(unmovable, unwritable, norms)`: module → reason, module → reason, and the norms that are permuted with modules."""
    counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    unwritable = {
        path: reason
        for path, module in model.named_modules()
        if (linear := linear_layer(module)) is not None and (reason := _why_unwritable(linear, counts, live))
    }
    stacked = {p.module: p.side for s in structures if s.kind == EXPERTS for p in s.projections}
    unwritable |= {path: _ROWS_OF_EXPERTS for path, side in stacked.items() if side == "out"}
    unmovable = {**dict.fromkeys(stacked, _ORDER_OF_EXPERTS), **unwritable}
    norms: Norms = {}
    for structure in structures:
        if structure.kind == EXPERTS:
            continue
        reason = next((unwritable[p.module] for p in structure.projections if p.module in unwritable), None)
        reason = reason or structure.partial
        reason = (
            reason or (_trained_bias(model, structure) if live else None) or _own_order(model, structure, norms, live)
        )
        if reason is not None:
            unmovable.update({p.module: unmovable.get(p.module, reason) for p in structure.projections})
    return unmovable, unwritable, norms


def _why_unwritable(linear: nn.Module, counts: Mapping[int, int], live: bool) -> str | None:
    weight = weight_of(linear)
    if reason := why_not_plain(linear):
        return f"its weight {reason}"
    if counts[id(weight)] > 1:
        return "its weight is shared with another layer"
    if live and weight.is_meta:
        return "its weight has no values here (device meta)"
    return "its base weight is trained itself" if live and weight.requires_grad else None


def _trained_bias(model: nn.Module, structure: Structure) -> str | None:
    for p in structure.projections:
        bias = getattr(linear_layer(model.get_submodule(p.module)), "bias", None)
        if p.side == "out" and isinstance(bias, Tensor) and bias.requires_grad:
            return f"the bias of {p.module} is trained itself"
    return None


def _own_order(model: nn.Module, structure: Structure, norms: Norms, live: bool) -> str | None:
    """Why the structure's units must keep their order: something besides its projections has an entry for each of them."""
    sizes = {size for p in structure.projections for size in (p.units, p.units * p.width)}
    widths = {(p.width,) for p in structure.projections}
    for name, tensor in _others(model, structure):
        shared = tuple(tensor.shape) in widths and SHARED_NORM.search(name)
        if shared or not sizes & set(tensor.shape) or _moves_along(model, structure, name, norms, live):
            continue
        return (
            f"{structure.path}.{name} has the size of its heads or channels, and s2ft does not know their order in it"
        )
    return None


def _moves_along(model: nn.Module, structure: Structure, name: str, norms: Norms, live: bool) -> bool:
    child = name.partition(".")[0]
    projections: dict[str, Projection] = {p.name: p for p in structure.projections}
    if structure.kind != "attention" or HEAD_NORMS.get(child) not in projections:
        return False
    projection = projections[HEAD_NORMS[child]]
    norm = model.get_submodule(f"{structure.path}.{child}")
    weight = getattr(norm, "weight", None)
    if isinstance(norm, AuxiliaryTrainingWrapper) or not isinstance(weight, Tensor) or (live and weight.requires_grad):
        return False
    if tuple(weight.shape) != (projection.units * projection.width,) or projection.offset or projection.axes:
        return False
    if norm not in norms.setdefault(projection.module, []):
        norms[projection.module].append(norm)
    return True


def _others(model: nn.Module, structure: Structure) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the structure's module that may hold something for each head or channel.

    Those of its projections are left out, what comes before a latent or after o (BERT keeps a norm there), masks over
    positions, and, around an MLP, modules that have linear layers of their own.
    """
    root = model.get_submodule(structure.path)
    paths = {p.module: p.module.removeprefix(f"{structure.path}.") for p in structure.projections}
    inner = {*paths.values(), *BEFORE_HEADS}
    inner |= {paths[p.module].rpartition(".")[0] for p in structure.projections if p.side == "in"}
    if structure.kind == "mlp":
        inner |= {n for n, m in root.named_children() if any(linear_layer(part) is not None for part in m.modules())}
    masks = {name for name, _ in root.named_buffers() if POSITIONS.search(name)}
    for name, tensor in [*root.named_parameters(), *root.named_buffers()]:
        if name not in masks and not any(name.startswith(f"{path}.") for path in inner if path):
            yield name, tensor
