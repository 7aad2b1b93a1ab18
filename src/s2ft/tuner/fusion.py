"""Fusion on a live model: adapters of it are blended into a new one (PEFT's `add_weighted_adapter`).

Checks and arithmetic are those of files (`adapters/fusion.py`): both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from s2ft.adapters.fusion import Fusion, plan_fusion
from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice, all_finite
from s2ft.layer.adapted import not_loaded
from s2ft.layer.linear import S2FTLinear, sliced_layers
from s2ft.tuner.mixing import BASE


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One adapter of a live model, to be fused."""

    name: str
    model: nn.Module
    config: S2FTConfig
    layers: dict[str, S2FTLinear]
    slices: dict[str, Slice]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Module → shape of its delta."""
        return {module: tuple(self.delta(module).shape) for module in self.layers}

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The module's delta, as it is now."""
        return self.layers[module].block(self.name).weight.detach()

    def others(self) -> dict[str, Tensor]:
        """Modules to save and token rows, by their paths on the model."""
        return {
            f"{path}.{name}": tensor
            for path, wrapper in _wrappers(self.model, self.name)
            for name, tensor in _state(wrapper, self.name).items()
        }


def add_weighted(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    **how: Any,  # method, density, seed
) -> None:
    """Adds the adapter `adapter_name` to the tuner's model; raises `S2FTError` before anything is changed."""
    raise_together([*_name_problems(tuner, adapters, adapter_name)])
    sources = [_loaded(tuner, name) for name in adapters]
    raise_together(
        f"adapter {source.name!r}: the delta of {module} holds values that are not finite"
        for source in sources
        for module in source.slices
        if not all_finite(source.delta(module))
    )
    fusion = plan_fusion(sources, weights, **how)
    deltas = {module: fusion.delta(module) for module in fusion.slices}
    assert isinstance(fusion.config, S2FTConfig)  # as those of the sources
    tuner.peft_config[adapter_name] = fusion.config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise
    _fill(tuner.model, adapter_name, deltas, fusion)


def _loaded(tuner: BaseTuner, name: str) -> LoadedAdapter:
    layers = sliced_layers(tuner.model, name)
    slices = {path: layer.block(name).trained for path, layer in layers.items()}
    config: S2FTConfig = tuner.peft_config[name]
    return LoadedAdapter(name, tuner.model, config, layers, slices)


def _fill(model: nn.Module, adapter_name: str, deltas: dict[str, Tensor], fusion: Fusion) -> None:
    for module, layer in sliced_layers(model, adapter_name).items():
        block = layer.block(adapter_name)
        block.weight.data = deltas[module].to(block.weight.device)
        block.weight.requires_grad_(False)
    source = fusion.sources[0].name
    for _, wrapper in _wrappers(model, source):
        names = wrapper.adapter_state_dict_load_map(adapter_name)
        state = {names.get(name, name): tensor for name, tensor in _state(wrapper, source).items()}
        wrapper.load_state_dict(state, strict=False)


def _wrappers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    """PEFT's modules to save and token rows that an adapter has."""
    for path, module in model.named_modules():
        adapters = module._adapters if isinstance(module, AuxiliaryTrainingWrapper) else ()  # noqa: SLF001 - no public list
        if adapter_name in adapters:
            yield path, module


def _state(wrapper: Any, adapter_name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = wrapper.adapter_state_dict(adapter_name, wrapper.state_dict())
    return state


def name_problem(adapter_name: str) -> str | None:
    """Why a new adapter cannot have this name, which becomes a key of a module, and a folder when it is saved."""
    if adapter_name == BASE or (isinstance(adapter_name, str) and hasattr(nn.ModuleDict, adapter_name)):
        return f"adapter_name={adapter_name!r} has another meaning in PEFT or torch; take another name"
    if isinstance(adapter_name, str) and adapter_name and not set(adapter_name) & set("./\\"):
        return None
    return (
        f"adapter_name={adapter_name!r} is no name: it becomes a folder when it is saved; leave out '.', '/' and '\\'"
    )


def _name_problems(tuner: BaseTuner, adapters: Sequence[str], adapter_name: str) -> Iterator[str]:
    if isinstance(adapters, str):
        raise S2FTError(f"adapters={adapters!r} is one name; give a list of names")
    yield from not_loaded(adapters, tuner.peft_config)
    if adapter_name in tuner.peft_config:
        yield f"adapter_name={adapter_name!r} is taken; choose another name, or delete that adapter first"
    if problem := name_problem(adapter_name):
        yield problem
