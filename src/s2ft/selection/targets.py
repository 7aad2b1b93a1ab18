"""Which projections are trained: those that the config names, in the layers that it names.

    ratios | target_modules | default (o, down)   →   (structure, projection) pairs, in the model's order

Unless `targets` or `target_modules` names them, these are the language model's: a tower beside it (vision, audio) is left as
it is. A named module outside every known structure is a target by itself, sliced by its input channels. Stacked experts are
named by their parameter, as the layers of a dense block (`down_proj`, `mlp.experts.down_proj`), or one by its number
(`experts.3.down_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from peft.tuners.tuners_utils import _ExcludedModule, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.choice import chosen_layers
from s2ft.format.config import S2FTConfig
from s2ft.layer.linears import layer_stack, linear_layer
from s2ft.selection.coverage import coverage
from s2ft.selection.families import ROUTER, looked_for
from s2ft.selection.structure import Reading, read_structures, single_linear
from s2ft.selection.towers import in_part, towers
from s2ft.selection.units import EXPERTS, Projection, Structure, Target

_NUMBERED = re.compile(r"(?P<owner>\S+)\.\d+\.(?P<leaf>\w+)")

DEFAULT_TARGETS = ("o_proj", "out_proj", "down_proj")
"""Where accuracy per parameter is highest (paper, fig. 4), and what feeds a mixer's output back, as o does."""


def find_targets(model: nn.Module, config: S2FTConfig) -> list[Target]:
    """The projections to train, in the model's order."""
    reading = read_structures(model)
    structures = reading.structures
    if not structures and all(linear_layer(module) is None for module in model.modules()):
        raise S2FTError(f"{type(model).__name__} has no linear layer, and s2ft trains slices of linear layers")
    within = in_part(model, config.targets or "all")
    if config.target_modules is None:
        candidates = _default_candidates(reading, config, model)
        names = {projection.module.rpartition(".")[2] for _, projection in candidates}
        config = replace(config, target_modules=names)
    else:
        is_all = config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND
        config = _maybe_include_all_linear_layers(replace(config), model)
        if is_all:  # PEFT looks among modules
            stacked = {p.module for s in structures if s.kind == EXPERTS for p in s.projections}
            config = replace(config, target_modules={*(config.target_modules or ()), *stacked})
        named = _uncoupled(model, config, structures, skip_unrun=is_all)
        candidates = [(s, p) for s in structures + named for p in s.projections]
    _check_numbers(structures, config)
    is_named = _namer(config)
    matched = [(s, p) for s, p in candidates if within(p.module) and is_named(s, p)]
    if isinstance(config.ratios, dict):
        matched = [(s, p) for s, p in matched if p.name in config.ratios]
        idle = [name for name in config.ratios if name not in {p.name for _, p in matched}]
        raise_together(f"ratios names {name}, but target_modules={config.target_modules!r} has none" for name in idle)
    if not matched:
        raise S2FTError(_nothing_found(config, model))
    return _in_layers(matched, config, model)


def by_projection(targets: Sequence[Target]) -> dict[str, list[Target]]:
    """The targets by projection, each group in the model's order."""
    groups: dict[str, list[Target]] = {}
    for target in targets:
        groups.setdefault(target[1].name, []).append(target)
    return groups


def _default_candidates(reading: Reading, config: S2FTConfig, model: nn.Module) -> list[Target]:
    """The projections that `ratios` names, all of which must be there; else those of the default that are."""
    wanted = tuple(config.ratios) if isinstance(config.ratios, dict) else DEFAULT_TARGETS
    structures = _by_default(model, reading.structures, config.targets)
    present = {p.name for s in structures for p in s.projections}
    missing = [name for name in wanted if name not in present]
    if missing and (isinstance(config.ratios, dict) or len(missing) == len(wanted)):
        raise S2FTError(
            f"{type(model).__name__} has no projection {', '.join(missing)} that s2ft can read; it found "
            f"{', '.join(sorted(present)) or 'no attention or MLP block'}. {_why_missing(model, structures)} "
            "Please specify `target_modules`."
        )
    return [(s, p) for s in structures for p in s.projections if p.name in wanted]


def _by_default(model: nn.Module, structures: Sequence[Structure], targets: str | None) -> list[Structure]:
    """Those in the blocks of the part that is trained, not in projectors, routers and heads; all, where that leaves none."""
    beside = tuple(f"{place}." for place in towers(model))
    within = in_part(model, targets) if targets else lambda path: not f"{path}.".startswith(beside)
    inside = [s for s in structures if within(s.path) and not ROUTER.search(s.path)]
    return [s for s in inside if s.layer is not None] or inside or list(structures)


def _why_missing(model: nn.Module, structures: Sequence[Structure]) -> str:
    """What of the model is not read, and why; where nothing is, the names that are looked for."""
    partial = next((s.partial for s in structures if s.partial), None)
    reasons = [*([partial] if partial else []), *map(str, coverage(model, [], by_name=False).left_out)]
    not_read = [f"Not read: {'; '.join(reasons)}."] if reasons else []
    known = [] if structures else [f"s2ft knows {looked_for()}."]
    return " ".join([*not_read, *known])


def _namer(config: S2FTConfig) -> Callable[[Structure, Projection], bool]:
    """Whether `config` names a projection by its layer, or that of an expert by the expert's number."""
    by_path = cache(partial(check_target_module_exists, config))

    def is_named(structure: Structure, projection: Projection) -> bool:
        found = by_path(projection.module)
        if structure.kind != EXPERTS or found or isinstance(found, _ExcludedModule):
            return bool(found)
        return bool(by_path(_numbered(structure, projection)))

    return is_named


def _numbered(structure: Structure, projection: Projection) -> str:
    """An expert's projection by the expert's number, such as mlp.experts.3.down_proj."""
    return f"{structure.path}.{projection.module.rpartition('.')[2]}"


def _check_numbers(structures: Sequence[Structure], config: S2FTConfig) -> None:
    """Raises `S2FTError` for the number of an expert that is not there."""
    names = dict.fromkeys(f".{_numbered(s, p)}" for s in structures if s.kind == EXPERTS for p in s.projections)
    given = config.target_modules if isinstance(config.target_modules, set | list) else ()
    for match in filter(None, map(_NUMBERED.fullmatch, given)):
        first = next((name for name in names if name.endswith(f".{match['owner']}.0.{match['leaf']}")), None)
        if first is not None and not any(name.endswith(f".{match[0]}") for name in names):
            owner = first.removesuffix(f".0.{match['leaf']}")
            count = sum(name.startswith(f"{owner}.") and name.endswith(f".{match['leaf']}") for name in names)
            raise S2FTError(f"target_modules names {match[0]!r}; the experts of {owner[1:]} are 0 to {count - 1}")


def _uncoupled(model: nn.Module, config: S2FTConfig, structures: list[Structure], skip_unrun: bool) -> list[Structure]:
    """The other modules that `target_modules` names, each by itself.

    Args:
        skip_unrun: Leave out layers whose owner reads their weights without running them, rather than refuse them.
    """
    coupled = {projection.module for structure in structures for projection in structure.projections}
    found = []
    for path, module in model.named_modules():
        inside = path.endswith("base_layer") or ".base_layer." in path or ".s2ft_block" in path
        if path in coupled or inside or not check_target_module_exists(config, path):
            continue
        if linear_layer(module) is None:
            raise S2FTError(f"target_modules matches {path}, a {type(module).__name__}; s2ft slices linear layers")
        owner = model.get_submodule(path.rpartition(".")[0])
        if isinstance(owner, nn.MultiheadAttention):
            if skip_unrun:
                continue
            raise S2FTError(
                f"target_modules matches {path}, whose nn.MultiheadAttention reads its weight without running it: an "
                "adapter there would never be trained. Name it in exclude_modules"
            )
        found.append(single_linear(path, module))
    return found


def _in_layers(targets: list[Target], config: S2FTConfig, model: nn.Module) -> list[Target]:
    """The targets in the layers that `config.layers` names, counted in each stack of the model (encoder, decoder)."""
    if config.layers is None:
        return targets
    depth: dict[str, int] = {}
    for stack, index in filter(None, (layer_stack(path) for path, _ in model.named_modules())):
        depth[stack] = max(depth.get(stack, 0), index + 1)
    placed = [(target, place) for target in targets if (place := layer_stack(target[1].module)) is not None]
    if not placed:
        raise S2FTError(f"layers={config.layers!r} is given, but none of the targets lies in a numbered layer")
    wanted = {
        stack: chosen_layers(config.layers, depth[stack]) for stack in dict.fromkeys(stack for _, (stack, _) in placed)
    }
    return [target for target, (stack, index) in placed if index in wanted[stack]]


def _nothing_found(config: S2FTConfig, model: nn.Module) -> str:
    wanted = {
        name: getattr(config, name)
        for name in ("targets", "target_modules", "exclude_modules", "layers", "layers_to_transform")
    }
    given = ", ".join(f"{name}={value!r}" for name, value in wanted.items() if value is not None)
    names = sorted(
        {path.rpartition(".")[2] for path, module in model.named_modules() if linear_layer(module) is not None}
    )
    return (
        f"Target modules not found in the base model: {given} match none of its linear layers ({', '.join(names[:20])})"
    )
