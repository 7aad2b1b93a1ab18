"""What is saved of an adapter, with all its values: each process of a sharded model holds a part of them."""

from __future__ import annotations

from collections.abc import MutableMapping

from torch import Tensor, nn

from s2ft.format.names import part_name
from s2ft.layer.linear import sliced_layers
from s2ft.layer.sharding import gathered
from s2ft.tuner.incoming import auxiliary_names


def gather_adapter(model: nn.Module, adapter_name: str, state_dict: MutableMapping[str, Tensor]) -> None:
    """Replaces an adapter's parts in a state of the model by the whole tensors; the base's weights stay as they are.

    All processes must call this, unless the state is gathered already, as Trainer's is.
    """
    blocks = sliced_layers(model, adapter_name).items()
    parameters = {f"{part_name(path, adapter_name)}.weight": layer.block(adapter_name).weight for path, layer in blocks}
    for name in [*parameters, *auxiliary_names(model, adapter_name)]:
        if name in state_dict:
            is_empty = name in parameters and not state_dict[name].numel()  # ZeRO-3 leaves nothing in a state
            state_dict[name] = gathered(parameters[name] if is_empty else state_dict[name])
