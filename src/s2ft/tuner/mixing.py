"""One adapter for each row of a batch: what happens to `adapter_names=` of a call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from s2ft.layer.adapted import require_own
from s2ft.layer.experts import S2FTExperts
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.pack import MixedBatch

if TYPE_CHECKING:
    from s2ft.tuner.model import S2FTModel

BASE = "__base__"  # PEFT's name for a row without an adapter


@contextmanager
def mixed_rows(tuner: S2FTModel, names: Sequence[str], beams: int) -> Iterator[None]:
    """During the block, every adapted layer of the model is told which row has which adapter.

    Args:
        names: Of adapters on the model or in its pool, or `__base__`; one for each row.
        beams: How often beam search repeats each row; an encoder's rows it does not repeat.

    Raises:
        ValueError, TypeError: as PEFT does for its methods, if a name is not loaded, or the model trains.
        S2FTError: if the pool cannot bring an adapter.
    """
    _check(tuner, names)
    pool = tuner.pool
    if pool is not None:
        require_own(tuner.model, "`adapter_names`", allowed=["merged"])
        pool.bring(names)
    single, repeated = MixedBatch(names), MixedBatch(name for name in names for _ in range(beams))
    encoder = _encoder(tuner.model) if beams > 1 else set()
    with ExitStack() as stack:
        for module in tuner.modules():
            if isinstance(module, S2FTLinear | S2FTExperts | AuxiliaryTrainingWrapper):
                rows = single if module in encoder else repeated
                if pool is not None and isinstance(module, AuxiliaryTrainingWrapper):  # its adapters have slices alone
                    rows = MixedBatch(BASE if name in pool else name for name in rows)
                stack.callback(module.register_forward_pre_hook(_giving(rows), with_kwargs=True).remove)
        yield


def _check(tuner: S2FTModel, names: Any) -> None:
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    unknown = sorted(set(names) - {BASE} - set(tuner.peft_config) - set(tuner.pool or ()))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _encoder(model: Any) -> set[nn.Module]:
    """The modules of an encoder-decoder model's encoder."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return set(model.get_encoder().modules()) if is_encoder_decoder else set()


def _giving(names: list[str]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return hook
