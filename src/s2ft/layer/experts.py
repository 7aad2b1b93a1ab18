"""Stacked experts with trained slices: what the slices add to the output, whatever runs the experts.

    y = experts(x) + Σₑ wₑ (V h + D (h - h₀))         h₀ = act(G x, U x)  h = act((G + V) x, (U + V) x)

G, U and D are expert e's gate, up and down on the channels that any slice holds, and V the slices' deltas: a small expert
beside each expert, as wide as its slice, with the same tokens and routing weights wₑ. Where gate and up are not trained,
h = h₀ and V h is all; in place, where D holds V already (`layer/slot.py`), nothing is added, and h is kept for V's gradient.
The base keeps its own code for experts (transformers' eager, batched_mm, grouped_mm, ...); the chosen channels are computed
once more, at their share of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError
from s2ft.layer.adapted import Shared
from s2ft.layer.backprop import BeforeBackward
from s2ft.layer.expert_backprop import Collect, Gate, InWeight, Spread
from s2ft.layer.linear import NO_DATA_PARALLEL, S2FTLinear
from s2ft.layer.linears import NO_VALUES
from s2ft.layer.pack import MixedBatch, find_slice
from s2ft.layer.routing import Routing, Table
from s2ft.layer.stacked import DOWN, Experts, StackedLinear, find_experts, stacked_linear

_NONE = "__base__"  # PEFT's name for no adapter
_MOST_TABLES = 16  # kept, for as many sets of slices


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter's slice of one parameter."""

    name: str  # the parameter's
    held: Any  # S2FTBlock | LooseSlice

    @property
    def mark(self) -> Any:
        """Another object whenever the channels are others; not the slice itself, whose delta tables would keep in memory."""
        return getattr(self.held, "trained", self.held.indices)

    def matrices(
        self,
        places: Tensor,  # [experts, m], int64
        dtype: torch.dtype,
    ) -> Tensor:  # [experts, m, hidden]
        """The delta as a matrix for each expert; zero where the expert has no such channel."""
        delta: Tensor = self.held.weight
        rows = (delta.T if self.held.side == "in" else delta).to(places.device, dtype)  # [s, hidden]
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return padded.index_select(0, places.flatten()).view(*places.shape, -1)


def expert_rows(
    experts: Experts,
    x: Tensor,  # [tokens, hidden]
    routing: Routing,
    rows: Tensor | None = None,  # [experts, m], int64; None: all
) -> Tensor:  # [pairs, m]
    """Rows of `up` for each pair of a token and an expert, before the activation."""
    product: Tensor = Spread.apply(x, experts.matrix(experts.up), rows, routing)
    bias = experts.up_bias
    if bias is None:
        return product
    return product + (bias if rows is None else bias.gather(1, rows))[routing.owners].to(product.dtype)


class ExpertSlice(S2FTLinear):
    """The slices of one parameter of stacked experts; `S2FTExperts` runs them."""

    @property
    def experts(self) -> int:  # type: ignore[override]
        """How many experts the parameter stacks."""
        linear = self.get_base_layer()
        assert isinstance(linear, StackedLinear)
        return linear.experts.count

    def forward(self, *_: Any, **__: Any) -> Tensor:
        """Is never called: the experts' module reads its parameters without running them."""
        raise S2FTError("a slice of stacked experts is run by the module around them")

    def running(self, adapter_names: Sequence[str] | None) -> list[str]:
        """The adapters whose slices a pass adds to the base's output, as the layer's state has it.

        Args:
            adapter_names: Of a mixed batch, the adapter of each row.
        """
        if self.layout is not None:
            return self.running_in_place(adapter_names)
        if self.runs_base_alone(adapter_names):
            return self.standing_beside()
        if adapter_names is not None:
            self.refuse_mixed_on_merged()
            return list(adapter_names)
        return list(self.active_adapters)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT decomposes ΔW as one matrix; this is one for each expert."""
        return False


class S2FTExperts(nn.Module):
    """Stacked experts with a trained slice for each adapter, of one parameter or of both."""

    def __init__(self, base_layer: nn.Module, shared: Shared) -> None:
        super().__init__()
        experts = find_experts(base_layer)
        if experts is None:
            raise S2FTError(f"{type(base_layer).__name__} holds no stacked experts")
        self.base_layer, self.experts, self.shared = base_layer, experts, shared
        self._tables: dict[Any, tuple[list[Any], Table]] = {}  # by their slices, which are kept beside

    def slice_layer(self, name: str) -> ExpertSlice:
        """The layer of the parameter `name`, which is made if it is not there yet."""
        if name not in self.slice_layers:
            linear = stacked_linear(self.base_layer, name)
            if linear is None:
                raise S2FTError(f"{type(self.base_layer).__name__} has no stacked experts in {name}")
            self.add_module(name, ExpertSlice(linear, _NONE, shared=self.shared).train(self.training))
        return self.slice_layers[name]

    @property
    def slice_layers(self) -> dict[str, ExpertSlice]:
        """Parameter → its slices."""
        return {name: layer for name, layer in self.named_children() if isinstance(layer, ExpertSlice)}

    def _replicate_for_data_parallel(self) -> S2FTExperts:
        raise S2FTError(NO_DATA_PARALLEL.format("a slice of stacked experts"))

    def holds_any(self, names: Iterable[str]) -> bool:
        """Whether any of these adapters has a slice here."""
        return any(layer.holds_any(names) for layer in self.slice_layers.values())

    @property
    def passes(self) -> int:
        """How often the module is called with each token, one after the other: for every expert in Llama 4."""
        return self.experts.count if self.experts.is_sorted else 1

    def forward(
        self,
        x: Tensor,  # [tokens, hidden]
        *args: Tensor,  # [tokens, top] each: the experts of each token, and their routing weights
        adapter_names: Sequence[str] | None = None,
        **kwargs: Tensor,
    ) -> Tensor:  # [tokens, hidden]
        """The experts' output plus what the active adapters add, or what stands for that in the layers' state.

        Raises:
            S2FTError: if the state does not allow it, such as training while the model is switched, or if the slices that run
                are computed from weights that are offloaded.
        """
        running = next(iter(self.slice_layers.values())).running(adapter_names)
        before = self._hold(running, x)
        y: Tensor = self.base_layer(x, *args, **kwargs)
        routed = (*args, *kwargs.values())
        if running and adapter_names is not None:
            batch = adapter_names if isinstance(adapter_names, MixedBatch) else MixedBatch(adapter_names)
            return self._add_by_row(y, x, routed, batch) if self.holds_any(batch.distinct) else y
        y = self._add(y, x, routed, dict.fromkeys(running))
        if before is not None and torch.is_grad_enabled() and y.requires_grad:
            y = BeforeBackward.apply(y, before)
        return y

    def _hold(self, running: Sequence[str], x: Tensor) -> Callable[[], None] | None:
        """Inside `in_place`, makes down hold what it should; what must be called ahead of backward."""
        layer = self.slice_layers.get(DOWN)
        if layer is None or layer.slot is None:
            return None
        linear, own = layer.get_base_layer(), [name for name in running if name in layer.s2ft_block]
        delta = layer.block(own[0]).weight if own else None
        layer.slot.hold(linear, delta, anew=True)
        return partial(layer.slot.before_backward, linear, delta)

    def _add(
        self,
        y: Tensor,  # [tokens, hidden]
        x: Tensor,  # [tokens, hidden]
        routed: Sequence[Tensor],  # [tokens, top] each
        adapters: Sequence[str] | dict[str, None],
    ) -> Tensor:  # [tokens, hidden]
        """Returns y plus what these adapters' slices add, but for those that stand in the weights."""
        layers = self.slice_layers
        found = [(name, find_slice(layer, one)) for name, layer in layers.items() for one in adapters]
        parts = [Part(name, held) for name, held in found if held is not None]
        in_weight = DOWN in layers and layers[DOWN].slot is not None
        beside = [part for part in parts if part.name != DOWN or not in_weight]
        if not parts or not (beside or torch.is_grad_enabled()):
            return y
        if not x.is_meta:
            self._refuse_offloaded(parts)
        x = x.to(next(iter(layers.values())).compute_dtype(x))
        routing, table = Routing.of(self.experts, x, *routed), self._table(parts, x.device)
        ups, downs = self._deltas(parts, table, x.dtype)
        with torch.set_grad_enabled(bool(beside) and torch.is_grad_enabled()):
            rows = expert_rows(self.experts, x, routing, table.rows)
            frozen = channels = Gate.apply(rows, routing.weights, self.experts.activation)
            if ups is not None:
                rows = rows + Spread.apply(x, ups, None, routing)
                channels = Gate.apply(rows, routing.weights, self.experts.activation)
        if ups is not None:
            down = self.experts.matrix(DOWN).mT  # [experts, channels, hidden]
            y = Collect.apply(y, channels - frozen, down, table.channels, routing)
        if downs is not None and in_weight:
            (held,) = (part.held.weight for part in parts if part.name == DOWN)
            y = InWeight.apply(y, channels.detach(), downs, routing, held)
        elif downs is not None:
            y = Collect.apply(y, channels, downs, None, routing)
        return y

    def _refuse_offloaded(self, parts: Sequence[Part]) -> None:
        """Raises `S2FTError` for weights on device meta, which accelerate brings for the base's own pass alone."""
        module = self.experts.module
        own = [(name, module.get_parameter(name)) for name in (self.experts.up, DOWN)]
        away = [name for name, tensor in (*own, *((part.name, part.held.weight) for part in parts)) if tensor.is_meta]
        if away:
            raise S2FTError(
                f"{away[0]} of {type(module).__name__} {NO_VALUES}, and its slices are computed from it; keep the experts "
                "on a device, whole (`device_map`)"
            )

    def _add_by_row(
        self,
        y: Tensor,  # [tokens, hidden]
        x: Tensor,  # [tokens, hidden]
        routed: Sequence[Tensor],
        batch: MixedBatch,
    ) -> Tensor:  # [tokens, hidden]
        """Returns y plus what each row's own adapter adds to its tokens: one pass of products for each adapter of the batch."""
        place = torch.arange(len(x), device=x.device).view(self.passes, len(batch), -1)  # a row's tokens, in each pass
        for number, adapter in enumerate(batch.distinct):
            own = place[:, (batch.of_row == number).to(x.device)].flatten()
            added = self._add(y[own], x[own], [part[own] for part in routed], [adapter])
            y = y.index_copy(0, own, added)
        return y

    def _deltas(self, parts: Sequence[Part], table: Table, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """The sums of the deltas of gate and up, and of down: [experts, rows of up, hidden], [experts, k, hidden]."""
        sums: dict[str, Tensor] = {}
        for part, places in zip(parts, table.places, strict=True):
            matrices = part.matrices(places, dtype)
            sums[part.name] = sums[part.name] + matrices if part.name in sums else matrices
        return sums.get(self.experts.up), sums.get(DOWN)

    def _table(self, parts: Sequence[Part], device: torch.device) -> Table:
        """The table of these slices, kept as long as their channels are the same."""
        marks = [part.mark for part in parts]
        key = (device, *((part.name, id(part.mark)) for part in parts))
        kept = self._tables.get(key)
        if kept is None or any(one is not other for one, other in zip(kept[0], marks, strict=True)):
            if len(self._tables) >= _MOST_TABLES:
                self._tables.clear()
            kept = (marks, Table.of(self.experts, [(part.name, part.held.indices) for part in parts], device))
            self._tables[key] = kept
        return kept[1]

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """PEFT's call: the experts' own module, with the adapters in its parameters if they are to be merged."""
        for layer in self.slice_layers.values():
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        """As in every layer with slices; the parameters that theirs stand in are below this module, not below them."""
        if any(key.startswith(f"{prefix}base_layer.") for key in state_dict):
            for layer in self.slice_layers.values():
                layer.require_own("loading base weights")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}


def wrap_experts(model: nn.Module, path: str, shared: Shared, training: bool) -> ExpertSlice:
    """The layer around the parameter of stacked experts at `path`, so that adapters can be given to it.

    Args:
        model: The model.
        path: As in the base: the module's path and the parameter's name.
        shared: Of all S²FT layers of the model.
        training: The mode of a new layer.
    """
    owner, _, name = path.rpartition(".")
    parent, _, child = owner.rpartition(".")
    module = model.get_submodule(owner)
    if not isinstance(module, S2FTExperts):
        module = S2FTExperts(module, shared).train(training)
        setattr(model.get_submodule(parent), child, module)
    return module.slice_layer(name)
