"""What of a model s2ft reaches, what it leaves out and why, and how large a share of it is trained.

    experts that are not read | blocks that are not read | towers beside the language model

What is left out does not count where a budget is a share of the model: 1% is 1% of what is reached. Parameters are counted
by the features of their layers, since a quantised or partitioned one stores fewer numbers than it stands for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from s2ft.format.registration import PREFIX
from s2ft.layer.linears import features, layer_stack, linear_layer
from s2ft.selection.structure import read_structures
from s2ft.selection.towers import towers
from s2ft.selection.units import EXPERTS, Target

_WORTH_A_WORD = 0.01  # of the model's parameters: a router or a gate is left out without one
_ADDED = re.compile(rf"{PREFIX}|(^|\.)modules_to_save\.|\.trainable_tokens_|\.lora_")  # by PEFT: not the model's own
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

STACKED = "its weights are stacked in one parameter, and are not those of experts that s2ft knows"
TOWER = "it stands beside the language model; to train it, give targets, or name its layers in target_modules"
UNKNOWN = "its layers are known neither as attention nor as MLP"


@dataclass(frozen=True)
class LeftOut:
    """A kind of module that no slice can be taken from."""

    modules: str  # their paths, `*` for the index of the block
    kind: str  # their class
    count: int
    parameters: int
    why: str

    def __str__(self) -> str:
        return f"{self.modules} ({self.count} {self.kind}, {in_short(self.parameters)} parameters): {self.why}"


@dataclass(frozen=True)
class Coverage:
    """How much of a model is reached."""

    parameters: int  # of the whole model
    experts: int = 0  # of these, those of stacked experts that are read
    left_out: tuple[LeftOut, ...] = ()

    @property
    def reached(self) -> int:
        """Parameters of the model without what is left out."""
        return self.parameters - sum(left.parameters for left in self.left_out)

    @property
    def beside_experts(self) -> int:
        """Those that are reached and are not the experts'."""
        return self.reached - self.experts

    def __str__(self) -> str:
        """What is left out, in words; empty where nothing is."""
        if not self.left_out:
            return ""
        parts = "; ".join(map(str, self.left_out))
        return f"left out: {parts}. A budget is a share of the other {in_short(self.reached)} of {in_short(self.parameters)}"


def coverage(model: nn.Module, targets: Sequence[Target], by_name: bool) -> Coverage:
    """What of `model` these targets leave within reach.

    Args:
        by_name: Whether `target_modules` chose them: any linear layer could then have been one.
    """
    sizes = parameter_counts(model)
    total = sum(sizes.values())
    reading = read_structures(model)
    aimed = {projection.module for _, projection in targets}
    read = {projection.module for structure in reading.structures for projection in structure.projections}
    stacked = {p.module for structure in reading.structures if structure.kind == EXPERTS for p in structure.projections}
    holders = {structure.path for structure in reading.structures} | {name.rpartition(".")[0] for name in read | aimed}
    found: dict[tuple[str, str, str], tuple[set[str], list[int]]] = {}
    for name, owner, why in _unreached(model, read | aimed, holders, reading.unreadable, aimed, by_name):
        kind = (re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", owner), type(model.get_submodule(owner)).__name__, why)
        owners, counts = found.setdefault(kind, (set(), []))
        owners.add(owner)
        counts.append(sizes.get(name, 0))  # 0: the other name of a shared one, or an adapter's own
    groups = [LeftOut(*kind[:2], len(owners), sum(counts), kind[2]) for kind, (owners, counts) in found.items()]
    worth = [group for group in groups if group.parameters >= _WORTH_A_WORD * total]
    in_experts = sum(size for name, size in sizes.items() if name.replace(".base_layer.", ".") in stacked)
    return Coverage(total, in_experts, tuple(sorted(worth, key=lambda group: -group.parameters)))


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Parameter of the model itself → how many numbers it stands for."""
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    counts = {
        name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters() if not _ADDED.search(name)
    }
    for path, module in model.named_modules():
        name = f"{path}.weight".lstrip(".")
        shares = name in shared and name not in counts  # a tied weight counts once
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        is_own = "weight" in dict(own) and not shares and not _ADDED.search(name)
        if is_own and (linear := linear_layer(module)) is module:
            inputs, outputs = features(linear)
            counts[name] = inputs * outputs  # also of a weight that is packed, or a buffer
    return counts


def in_short(count: int) -> str:
    """A number of parameters as people say it.

    Example:
        >>> in_short(46_702_792_704), in_short(1_336_320), in_short(812)
        ('46.7B', '1.34M', '812')
    """
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _unreached(
    model: nn.Module,
    read: set[str],  # linear layers and stacked parameters that are in a structure, or targeted
    holders: set[str],  # the modules that hold those
    unreadable: Mapping[str, str],
    aimed: set[str],  # linear layers that are targeted
    by_name: bool,
) -> Iterator[tuple[str, str, str]]:
    """Parameters out of reach: their name, the module that they are reported under, and why."""
    beside = [path for path in towers(model) if not any(module.startswith(f"{path}.") for module in aimed)]
    for path, module in model.named_modules():
        place = path.partition(".base_layer")[0]
        parent = place.rpartition(".")[0]
        tower = next((start for start in beside if f"{path}.".startswith(f"{start}.")), None)
        for name, parameter in module.named_parameters(path, recurse=False):
            if tower is not None:
                yield name, tower, TOWER
            elif layer_stack(path) is None:
                continue
            elif linear_layer(module) is not None:
                if place not in read and parent not in holders and not by_name and name.endswith("weight"):
                    yield name, parent, UNKNOWN if parent not in unreadable else _of_all(unreadable[parent])
            elif _is_stacked(module, parameter) and f"{place}.{name.rpartition('.')[2]}" not in read:
                yield name, path, unreadable.get(place, STACKED)


def _is_stacked(module: nn.Module, parameter: Tensor) -> bool:  # parameter: of any shape
    """Whether a parameter holds several weights, such as those of all experts, one upon the other."""
    shape = getattr(parameter, "ds_shape", parameter.shape)
    return len(shape) >= 3 and not isinstance(module, _CONVOLUTIONS)


def _of_all(reason: str) -> str:
    """One reason for all blocks of a kind."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", reason)
