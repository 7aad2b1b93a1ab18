"""`add_weighted_adapter`: adapters of a live model, combined into a new one on the same model.

The arithmetic is `adapters/combination.py`'s, which also fuses files: both give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from s2ft.adapters.combination import Combination, combine
from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Slice, all_finite
from s2ft.layer.adapted import not_loaded
from s2ft.layer.block import S2FTBlock
from s2ft.layer.linear import S2FTLinear


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """One adapter of a live model, to be combined."""

    name: str
    model: nn.Module
    config: S2FTConfig
    blocks: Mapping[str, S2FTBlock]
    slices: Mapping[str, Slice]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Module → shape of its delta."""
        return {module: tuple(block.weight.shape) for module, block in self.blocks.items()}

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The module's delta, as it is now."""
        return self.blocks[module].weight.detach()

    def others(self) -> dict[str, Tensor]:
        """The whole modules and token rows that the adapter keeps beside its slices."""
        return {
            f"{path}.{name}": tensor
            for path, wrapper in _wrappers(self.model)
            if self.name in wrapper._adapters
            for name, tensor in wrapper.adapter_state_dict(self.name, wrapper.state_dict()).items()  # type: ignore[call-arg]
        }


def add_weighted(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float] | None,
    adapter_name: str,
    method: str,
    density: float,
    seed: int,
) -> None:
    """Adds the adapter `adapter_name` to the tuner's model; raises `S2FTError` before anything is changed."""
    raise_together([*_name_problems(tuner, adapters, adapter_name)])
    sources = [_loaded(tuner, name) for name in adapters]
    raise_together(
        f"adapter {source.name!r}: the delta of {module} holds values that are not finite"
        for source in sources
        for module, block in source.blocks.items()
        if not all_finite(block.weight)
    )
    combination = combine(sources, weights, method, density, seed)
    deltas = {module: combination.delta(module) for module in combination.slices}
    tuner.peft_config[adapter_name] = combination.config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except BaseException:
        tuner.peft_config.pop(adapter_name, None)
        raise
    _fill(tuner.model, adapter_name, deltas, combination)


def _loaded(tuner: BaseTuner, name: str) -> LoadedAdapter:
    blocks = {
        path: cast(S2FTBlock, layer.s2ft_block[name])
        for path, layer in tuner.model.named_modules()
        if isinstance(layer, S2FTLinear) and name in layer.s2ft_block
    }
    slices = {path: Slice.parse(block.slice_text) for path, block in blocks.items()}
    config: S2FTConfig = tuner.peft_config[name]
    return LoadedAdapter(name, tuner.model, config, blocks, slices)


def _fill(model: nn.Module, adapter_name: str, deltas: dict[str, Tensor], combination: Combination) -> None:
    for module, delta in deltas.items():
        block = cast(S2FTLinear, model.get_submodule(module)).s2ft_block[adapter_name]
        assert isinstance(block, S2FTBlock)
        block.weight.data = delta.to(block.weight.device)
        block.weight.requires_grad_(False)
    source = combination.sources[0].name
    for _, wrapper in _wrappers(model):
        if source in wrapper._adapters:
            state = wrapper.adapter_state_dict(source, wrapper.state_dict())  # type: ignore[call-arg]
            names = wrapper.adapter_state_dict_load_map(adapter_name)
            wrapper.load_state_dict({names.get(name, name): tensor for name, tensor in state.items()}, strict=False)


def _wrappers(model: nn.Module) -> Iterator[tuple[str, AuxiliaryTrainingWrapper]]:
    return ((path, module) for path, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper))


RESERVED = ("__base__",)  # a row without an adapter, in `adapter_names`


def name_problem(adapter_name: str) -> str | None:
    """What is wrong with the name of a new adapter: it becomes a key of a module, and a folder when it is saved."""
    if adapter_name in RESERVED or (isinstance(adapter_name, str) and hasattr(nn.ModuleDict, adapter_name)):
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
