"""A Trainer callback that keeps a vLLM engine at the weights of the adapter that trains: for GRPO and its like.

    trainer = GRPOTrainer(..., args=GRPOConfig(use_vllm=True, vllm_mode="colocate", ...))
    trainer.add_callback(SliceSync.of(trainer))                    in place of TRL's own way, which merges and sends the model
    GRPOTrainer(..., rollout_func=mine, callbacks=[SliceSync("http://localhost:8000")])        a server of one's own

The base's values go along once; each further step sends the new values of the slices and their channels' numbers, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from s2ft.adapters.stored import Place
from s2ft.common.errors import S2FTError, raise_together
from s2ft.exports.sync import Engine, Sent, Synced, send
from s2ft.format.names import PREFIX
from s2ft.layer.adapted import adapted_layers
from s2ft.layer.columns import add_delta, take_slice
from s2ft.layer.linear import S2FTLinear, sliced_layers
from s2ft.layer.linears import weight_matrix, weight_of, why_not_plain


class SliceSync(TrainerCallback):
    """Sends the active adapter's slices before the first step and after each.

    Args:
        engine: As for `s2ft.sync`.
        key: The server's key, if it has one.

    Attributes:
        last: What was sent last.
    """

    def __init__(self, engine: str | Engine, key: str | None = None) -> None:
        self._engine, self._key = engine, key
        self._told: str | None = None  # the adapter whose base values the engine has
        self.last: Synced | None = None

    @classmethod
    def of(cls, trainer: Any) -> SliceSync:
        """For a trainer of TRL with `use_vllm=True, vllm_mode="colocate"`, whose `sync_weights` it replaces.

        Raises:
            S2FTError: if the trainer has no vLLM of its own in this process, or puts it to sleep.
        """
        generation = getattr(trainer, "vllm_generation", None)
        if generation is None or getattr(generation, "llm", None) is None:
            raise S2FTError(
                'the trainer runs no vLLM in this process: use_vllm=True, vllm_mode="colocate"; for a server of your own, '
                "SliceSync(URL)"
            )
        if getattr(generation, "enable_sleep_mode", False):
            raise S2FTError(
                "vllm_enable_sleep_mode=True: vLLM drops its weights when it sleeps, and slices alone do not bring them back; "
                "leave it False, or keep TRL's own way"
            )
        found = cls(_Colocated(generation.llm))
        generation.sync_weights = lambda: found.push(trainer.accelerator.unwrap_model(trainer.model))
        found._is_asked = True
        return found

    _is_asked = False  # the trainer itself says when

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The engine takes the adapter as it is."""
        if not self._is_asked and state.is_world_process_zero:
            self.push(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """The engine takes the step."""
        self.on_train_begin(args, state, control, model=model)

    def push(self, model: nn.Module) -> Synced:
        """Sends the slices of the model's active adapter.

        Raises:
            S2FTError: if not one adapter is active, it trains more than slices, or the engine does not take them.
        """
        adapter = _active(model)
        raise_together(_kept_whole(model, adapter))
        layers = sliced_layers(model, adapter)
        slices = [_slice(path, layer, adapter, adapter == self._told) for path, layer in layers.items()]
        self.last = send(self._engine, slices, self._key)
        self._told = adapter
        return self.last


@torch.no_grad()
def _slice(path: str, layer: S2FTLinear, adapter: str, is_known: bool) -> Sent:
    """The adapter's slice of a layer as it is now; the base's values go along unless the engine knows them."""
    linear, block = layer.get_base_layer(), layer.block(adapter)
    weight = weight_of(linear)
    reason = "is a stack of experts" if weight.ndim > 2 else why_not_plain(linear)
    if reason:
        raise S2FTError(f"the weight of {path} {reason}; its slices cannot be sent to an engine")
    if layer.slot is not None:  # in place: the weight is permuted, and holds the delta
        own = layer.slot.stash.own
    else:
        layer.require_own("sending an adapter to an engine")
        own = take_slice(weight_matrix(linear).data, block.dim, block.indices)
    values = add_delta(own, block.weight.detach())
    own, values = (own.T.cpu(), values.T.cpu()) if block.dim == 1 else (own.cpu(), values.cpu())  # [s, across]
    across = block.dim if isinstance(linear, Conv1D) else 1 - block.dim  # Conv1D stores [in, out]
    at = block.indices.cpu()
    place = Place(f"{path.removeprefix(PREFIX)}.weight", list(weight.shape), across, (at,), torch.arange(len(at)))
    return Sent(place, values, None if is_known else own)


def _active(model: nn.Module) -> str:
    names = sorted(
        {name for layer in adapted_layers(model) for name in layer.active_adapters if name in layer.s2ft_block}
    )
    if len(names) != 1:
        raise S2FTError(f"one active S²FT adapter is sent to an engine; active are: {', '.join(names) or 'none'}")
    return str(names[0])


def _kept_whole(model: nn.Module, adapter: str) -> Iterator[str]:
    """What the adapter trains beside slices; read off the modules, since a wrapped model has no config."""
    for path, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module.active_adapters:
            yield (
                f"{path.removeprefix(PREFIX)} is trained beside the slices (modules_to_save, trainable_token_indices), and "
                "slices alone are sent to an engine; leave these out, or let TRL send the merged model"
            )


class _Colocated:
    """A vLLM in this process that was not told of our backend: the message goes to its model directly."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def start_weight_update(self) -> None:
        """Nothing to do."""

    def update_weights(self, request: dict[str, Any]) -> None:
        """Takes the message."""
        from s2ft.exports.vllm_weights import receive  # deferred: needs vLLM

        config = self._llm.llm_engine.vllm_config
        self._llm.apply_model(lambda model: receive(model, config, request["update_info"]))

    def finish_weight_update(self) -> None:
        """Nothing to do."""

    def reset_prefix_cache(self) -> None:
        """Forgets what other weights computed."""
        self._llm.reset_prefix_cache()
