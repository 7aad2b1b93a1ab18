"""`S2FTModel`: S²FT as a PEFT tuner. Everything a PEFT user knows works from here on.

get_peft_model(model, S2FTConfig(...))  →  select  →  S2FTLinear in place of each chosen layer  →  train, save, load,
merge
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftMixedModel, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists, onload_layer
from torch import Tensor, nn

from s2ft.adapters.blending import DENSITY
from s2ft.adapters.compatibility import resolved
from s2ft.common.errors import S2FTError, raise_by_place, raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.names import PREFIX as FILE_PREFIX
from s2ft.format.names import bare, is_base_copy
from s2ft.format.registration import PREFIX, register_tuner
from s2ft.format.slices import Slice
from s2ft.layer.adapted import (
    Shared,
    adapted_layers,
    all_or_nothing,
    end_switch,
    mark_shared,
    not_loaded,
    refuse_inside,
    require_own,
    standing_in_all,
    suspended,
)
from s2ft.layer.dequantise import keep_trainable
from s2ft.layer.experts import wrap_experts
from s2ft.layer.linear import S2FTLinear, refuse_marked
from s2ft.layer.sharding import from_first, is_loaded_once, reshard
from s2ft.layer.split import not_computed
from s2ft.layer.stacked import StackedLinear, linear_at
from s2ft.layer.token_rows import deactivate_idle_rows, hold_rows, peft_layers, rows_anew, rows_as_before
from s2ft.selection.select import seeded
from s2ft.training.depth import confine_nothing, stop_below
from s2ft.tuner.fusion import add_weighted, name_problem
from s2ft.tuner.incoming import auxiliary_tensors, check_and_adopt, check_and_adopt_state, foreign_base
from s2ft.tuner.loaders import INCOMING, guard
from s2ft.tuner.merging import make_plain, refuse_merging
from s2ft.tuner.mixing import BASE, mixed_rows
from s2ft.tuner.outgoing import gather_adapter
from s2ft.tuner.rollback import rolled_back
from s2ft.tuner.unloading import own_modules_back


class S2FTModel(BaseTuner):
    """Puts the trained slices of `config` into `model` and freezes the rest.

    Usually made by `peft.get_peft_model`.

    Raises:
        S2FTError: before anything is changed, if the config cannot be met or an adapter was made for another base.
    """

    prefix = PREFIX
    tuner_layer_cls = S2FTLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 - PEFT's name; targets are read off the model instead
    pool: Any = None  # an AdapterPool, where one is attached: further names for `adapter_names`
    shared: Shared  # of all S²FT layers of the model

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        raise_together(
            filter(None, [_wrapped_already(model)])
        )  # before PEFT enters the config with those of its adapters
        super().__init__(model, *args, **kwargs)
        self.register_load_state_dict_post_hook(rows_anew)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Resolves the config (which channels?), checks the base, and puts the layers in."""
        self.shared = next((layer.shared for layer in adapted_layers(model)), Shared())
        with self.shared.turns.alone():
            self._inject(model, adapter_name, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        refuse_inside(model, f"adding the adapter {adapter_name!r}")
        raise_together(filter(None, [name_problem(adapter_name)]))
        if self.pool is not None and adapter_name in self.pool:
            raise S2FTError(f"adapter_name={adapter_name!r} is a name of the model's AdapterPool; take another")
        config = self.peft_config[adapter_name]
        with suspended(model), rolled_back(self, config, self.shared):
            resolve = partial(resolved, model, seeded(config.reopened()))  # drawn by all, also where one alone chooses
            found = from_first(resolve) if is_loaded_once() else resolve()
            self.peft_config[adapter_name] = config.filled_in(found)
            raise_by_place(not_computed(model, self.peft_config[adapter_name].slices or {}))
            self._wrap_experts(model, self.peft_config[adapter_name])
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            if (incoming := INCOMING.get()) is not None:
                check_and_adopt(model, self.peft_config[adapter_name], adapter_name, incoming)
                raise_together(foreign_base(model, self.peft_config[adapter_name], incoming))
        if not config.inference_mode:
            keep_trainable(model)
        stop_below(model)

    def _wrap_experts(self, model: nn.Module, config: S2FTConfig) -> None:
        """Puts layers around the parameters of stacked experts that the config names; PEFT then finds them as modules."""
        stacked = [path for path in config.slices or {} if isinstance(linear_at(model, path), StackedLinear)]
        if stacked and not adapted_layers(model):
            model.requires_grad_(False)  # as PEFT does with the first adapter that it puts in itself
        for path in stacked:
            wrap_experts(model, path, self.shared, self.training)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, for the blocks that need it (`training/depth.py`)."""
        self.model.activation_checkpointing_enable(*args, **kwargs)
        stop_below(self.model)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)
        stop_below(self.model)

    def enable_input_require_grads(self) -> None:
        """As in transformers, unless backward stops above the input."""
        self.model.enable_input_require_grads()
        stop_below(self.model)

    def train(self, mode: bool = True) -> S2FTModel:
        """As in every module. What trains may have changed, and with it how far backward must go."""
        super().train(mode)
        if mode:
            keep_trainable(self.model)
            stop_below(self.model)
        return self

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT; not inside `in_place`."""
        with self.shared.turns.alone():
            refuse_inside(self.model, f"deleting the adapter {adapter_name!r}")
            with suspended(self.model):
                super().delete_adapter(adapter_name)
                deactivate_idle_rows(self.model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As in PEFT; it ends the switched state (`layer/adapted.py`).

        Raises:
            S2FTError: before anything is changed, if a name is not loaded, or is not the one that `in_place` trains.
        """
        names = list(dict.fromkeys([adapter_name] if isinstance(adapter_name, str) else adapter_name))
        with self.shared.turns.alone():
            layers = adapted_layers(self.model)
            raise_together(not_loaded(names, self.peft_config))
            for layer in layers[:1]:
                layer.refuse_beside_layout(names)
            end_switch(layers)
            super().set_adapter(names, inference_mode=inference_mode)
            hold_rows(self.model, ())
            self.active_adapter = adapter_name if isinstance(adapter_name, str) else names

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | None,
        adapter_name: str,
        combination_type: str = "sum",
        density: float = DENSITY,
        seed: int = 0,
    ) -> None:
        """Adds the adapter `adapter_name`, made of the loaded `adapters`; it is frozen, and active when it is set so.

        Args:
            weights: One number for each adapter; None is 1 for all.
            combination_type: On channels that several adapters hold: `sum`, `ties` or `dare`; others are added exactly.
            density: The share of those entries that `ties` and `dare` keep.
            seed: Seed of the entries that `dare` drops.

        Raises:
            S2FTError: before anything is changed, if a name is not loaded or the adapters cannot be fused.
        """
        with self.shared.turns.alone():
            add_weighted(self, adapters, weights, adapter_name, method=combination_type, density=density, seed=seed)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """As in PEFT, in every layer or in none; while adapters are disabled, it shows when they are enabled again.

        Until it is unmerged, the layer has its own copy of a weight that another module reads too (a tied `lm_head`'s).

        Raises:
            S2FTError: and nothing has changed, if a name is not loaded, a weight is not plain, the model is switched to an
                adapter or inside `in_place`, or (with `safe_merge`) the result is not finite.
        """
        with self.shared.turns.alone():
            layers = adapted_layers(self.model)
            self._refuse_merging(adapter_names, safe_merge)
            reshard(self.model)
            mark_shared(self.model)
            with all_or_nothing(layers), rows_as_before(self.model):
                for layer in peft_layers(self.model):
                    with onload_layer(layer):
                        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                hold_rows(self.model, standing_in_all(layers))

    def unmerge_adapter(self) -> None:
        """As in PEFT: the base weights are what they were, bit for bit."""
        with self.shared.turns.alone():
            reshard(self.model)
            for layer in peft_layers(self.model):
                with onload_layer(layer):
                    layer.unmerge()
            hold_rows(self.model, ())

    def _refuse_merging(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        names = self.active_adapters if adapter_names is None else adapter_names
        refuse_merging(self.model, adapted_layers(self.model), names, self.peft_config, safe_merge)

    def _check_merge_allowed(self) -> None:
        """PEFT warns of tied weights here, which do no harm: the layer gets its own copy."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        with self.shared.turns.alone():
            super()._enable_adapter_layers(enabled)
            hold_rows(self.model, standing_in_all(adapted_layers(self.model)))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As in PEFT, which loads all that is returned here; so what does not belong to the adapter is refused."""
        check_and_adopt(model, config, adapter_name, state_dict)
        state_dict = {  # from a model that adapters were injected into directly, names come without the prefix
            FILE_PREFIX + bare(name): tensor
            for name, tensor in state_dict.items()
            if not is_base_copy(name, config.slices)
        }
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        return remapped

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """As in PEFT, gathered where it is sharded; what is about to be saved is noted for the config's checksums."""
        gather_adapter(model, adapter_name, state_dict)
        found: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        slices = {cls._remove_adapter_name_from_key(name, adapter_name): tensor for name, tensor in found.items()}
        config.note({**slices, **auxiliary_tensors(model, adapter_name, state_dict)})
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Before any module below loads: all slices are checked, and base weights must hold their own values."""
        refuse_marked(state_dict, prefix)
        check_and_adopt_state(self, self.peft_config, state_dict, prefix)
        if any(key.startswith(prefix) and ".base_layer." in key for key in state_dict):
            require_own(self.model, "loading base weights")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        with self.shared.turns.alone():
            refuse_inside(self.model, "unloading")
            layers = adapted_layers(self.model)
            if not merge:
                end_switch(layers)
                with own_modules_back(self.model):
                    base: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)
                confine_nothing(base)
                return base
            names, safe_merge = kwargs.get("adapter_names"), kwargs.get("safe_merge", False)
            self._refuse_merging(names, safe_merge)
            make_plain(self.model, layers, self.active_adapters if names is None else names, safe_merge)
            with all_or_nothing(layers):
                for layer in layers:  # what is merged is to stay, also while adapters are disabled
                    layer.enable_adapters(True)
                self.merge_adapter(names, safe_merge)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "All adapters are already merged")
                base = super()._unload_and_optionally_merge(merge, *args, **{**kwargs, "adapter_names": []})
            confine_nothing(base)
            return base

    @staticmethod
    def _check_target_module_exists(config: S2FTConfig, key: str) -> Any:  # bool, or PEFT's mark of an excluded one
        if key in (config.slices or {}):
            return True
        found = check_target_module_exists(config, key)
        return found if isinstance(found, _ExcludedModule) else False

    def _create_and_replace(
        self,
        peft_config: Any,  # S2FTConfig
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *_: Any,
        **__: Any,
    ) -> None:
        trained = Slice.parse(peft_config.slices[current_key])
        options = {"init_weights": peft_config.init_weights, "inference_mode": peft_config.inference_mode}
        if isinstance(target, S2FTLinear):
            target.update_layer(adapter_name, trained, **options)
            return
        layer = S2FTLinear(target, adapter_name, trained, self.shared, **options)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained by itself
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Deltas are fp32; `autocast_adapter_dtype=False` asks for the base's dtype."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.model.modules():
            if isinstance(layer, S2FTLinear) and not autocast_adapter_dtype:
                layer.take_base_dtype(adapter_name)

    def wrap(self, path: str) -> S2FTLinear:
        """The layer at `path`, wrapped so that adapters can be given to it, as an `AdapterPool` does.

        Raises:
            S2FTError: if it is no linear layer.
        """
        if isinstance(linear_at(self.model, path), StackedLinear):
            return wrap_experts(self.model, path, self.shared, self.training)
        target = self.model.get_submodule(path)
        if isinstance(target, S2FTLinear):
            return target
        layer = S2FTLinear(target, BASE, shared=self.shared).train(self.training)
        parent, _, name = path.rpartition(".")
        self._replace_module(self.model.get_submodule(parent), name, layer, target)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Puts a layer in, or the base layer back, as it is: its tensors stay where they are."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around each call: it takes its turn, and hands `adapter_names` to every adapted layer."""
        names = kwargs.pop("adapter_names", None)
        with ExitStack() as stack:
            if not torch.compiler.is_compiling():
                stack.enter_context(self.shared.turns.together() if names is None else self.shared.turns.alone())
            if names is not None:
                stack.enter_context(mixed_rows(self, names, kwargs.get("num_beams") or 1))
            yield


def _wrapped_already(model: nn.Module) -> str | None:
    if not isinstance(model, PeftModel | PeftMixedModel):
        return None
    held = ", ".join(f"{name} ({PeftType(config.peft_type).value})" for name, config in model.peft_config.items())
    return (
        f"the model is a {type(model).__name__} with adapters already: {held}. S²FT goes onto the model inside: give it after "
        "`model = model.merge_and_unload()` or `model.unload()`; a further S²FT adapter is added by `model.add_adapter`"
    )


register_tuner(S2FTModel)
guard()
