"""One adapter for each row of a batch: what happens to `adapter_names=` of a call.

Layers are called with [rows, length, features], or [rows, features] of what was pooled. Some code flattens rows to tokens, as
for a shared expert, [rows * length, features]: which token is of which row then follows from the input of the block around it.
Where it does not follow, as for experts that are called with the tokens routed to them, a batch is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2ft.common.errors import S2FTError, raise_by_place
from s2ft.layer.adapted import require_own
from s2ft.layer.experts import S2FTExperts
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.linears import layer_stack
from s2ft.layer.pack import MixedBatch, wrong_count
from s2ft.layer.token_rows import kept_by

if TYPE_CHECKING:
    from s2ft.tuner.model import S2FTModel

BASE = "__base__"  # PEFT's name for a row without an adapter
_UNKNOWN = (
    "is called with tokens that cannot be told to be of this or that row, so `adapter_names` is not possible for adapters "
    "with a slice of it; run each adapter by itself"
)
_TURNED = "is called with [length, rows, features], which `adapter_names` is not made for; run each adapter by itself"
_TIME_FIRST = ("XLNetModel", "FSMTModel", "LongformerSelfAttention", "LEDEncoderSelfAttention")
"""Classes inside which layers are called so; a batch of as many rows as tokens would not show it."""


@contextmanager
def mixed_rows(tuner: S2FTModel, names: Sequence[str], beams: int) -> Iterator[None]:
    """During the block, every adapted layer of the model is told which row has which adapter.

    Args:
        names: Of adapters on the model or in its pool, or `__base__`; one for each row.
        beams: How often beam search repeats each row; an encoder's rows it does not repeat.

    Raises:
        ValueError, TypeError: as PEFT does for its methods, if a name is not loaded, or the model trains.
        S2FTError: if the pool cannot bring an adapter, or a layer's tokens cannot be told to be of this or that row.
    """
    _check(tuner, names)
    pool = tuner.pool
    if pool is not None:
        require_own(tuner.model, "`adapter_names`", allowed=["merged"])
        pool.bring(names)
    _refuse_without_rows(tuner.model, names)
    single, repeated = MixedBatch(names), MixedBatch(name for name in names for _ in range(beams))
    encoder = _encoder(tuner.model) if beams > 1 else set()
    blocks: dict[str, _Block] = {}
    with ExitStack() as stack:
        if {*names} == {BASE}:
            hook = tuner.model.register_forward_pre_hook(_counted(repeated), with_kwargs=True)
            stack.callback(hook.remove)
        for path, module in tuner.model.named_modules():
            rows = single if module in encoder else repeated
            if isinstance(module, S2FTLinear | S2FTExperts):
                hook = _giving_tokens(rows, _block(tuner.model, path, blocks, stack), path)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                hook = _giving([name if name in kept_by(module) else BASE for name in rows])
            else:
                continue
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield


def _counted(rows: Sequence[str]) -> Callable[..., None]:
    """A hook of the base model for names of the base alone: with no slice to add, no layer counts them."""

    def check(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1])
        given = named if isinstance(model, PreTrainedModel) else (*named, *kwargs.values())
        tensor = next((one for one in given if isinstance(one, Tensor) and one.dim()), None)
        if tensor is not None and len(tensor) != len(rows):
            raise S2FTError(wrong_count(len(rows), len(tensor)))

    return check


def _check(tuner: S2FTModel, names: Any) -> None:
    if tuner.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if not isinstance(names, list | tuple):
        raise TypeError(f"Got adapter names of type {type(names)}, expected a list of str.")
    unknown = sorted(set(names) - {BASE} - set(tuner.peft_config) - set(tuner.pool or ()))
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


def _refuse_without_rows(model: nn.Module, names: Sequence[str]) -> None:
    """Raises `S2FTError` for layers whose input does not begin with the batch's rows."""
    raise_by_place(
        (f"{path}.{name}", reason)
        for path, module in model.named_modules()
        if (reason := _without_rows(module)) is not None
        for name, layer in module.named_modules()
        if isinstance(layer, S2FTLinear) and layer.holds_any(names)
    )


def _without_rows(module: nn.Module) -> str | None:
    """Why layers inside cannot be told which row is whose.

    Members of a list that has a forward of its own, such as NLLB-MoE's experts, get what a router sends them.
    """
    if type(module).__name__ in _TIME_FIRST:
        return _TURNED
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)
    return _UNKNOWN if is_list and type(module).forward is not nn.Module.forward else None


def _encoder(model: Any) -> set[nn.Module]:
    """The modules of an encoder-decoder model's encoder."""
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return set(model.get_encoder().modules()) if is_encoder_decoder else set()


@dataclass(eq=False)
class _Block:
    """A block of the model, and the shape that it was last called with."""

    is_list: bool = False  # the layer is in a list inside the block, whose members may get tokens of any row
    shape: tuple[int, ...] = ()

    def note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook ahead of the block's forward."""
        states = args[0] if args else kwargs.get("hidden_states")
        self.shape = tuple(states.shape) if isinstance(states, Tensor) else ()

    def length_of(self, tokens: int, rows: int) -> int | None:
        """How many of so many tokens each row has, if they are the tokens of the block's input."""
        is_known = len(self.shape) == 3 and self.shape[0] == rows and self.shape[1] * rows == tokens
        return self.shape[1] if is_known else None


def _block(model: nn.Module, path: str, blocks: dict[str, _Block], stack: ExitStack) -> _Block:
    """The block that the layer at `path` is in, which is watched from here on."""
    place = layer_stack(path)
    at = "" if place is None else f"{place[0]}.{place[1]}".lstrip(".")
    if not at or _is_listed(model.get_submodule(at), path[len(at) + 1 :]):
        return _Block(is_list=bool(at))
    if at not in blocks:
        blocks[at] = _Block()
        stack.callback(model.get_submodule(at).register_forward_pre_hook(blocks[at].note, with_kwargs=True).remove)
    return blocks[at]


def _is_listed(block: nn.Module, path: str) -> bool:
    """Whether the layer at `path` in the block is in a list there."""
    parts = path.split(".")
    around = (block.get_submodule(".".join(parts[:count])) for count in range(1, len(parts)))
    return any(isinstance(module, nn.ModuleList | nn.ModuleDict) for module in around)


def _giving(names: list[str]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "adapter_names": names}

    return hook


def _giving_tokens(names: MixedBatch, block: _Block, path: str) -> Any:
    """As `_giving`, to a layer that may be called with rows or with their tokens."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        x, batch = args[0], names
        passes = getattr(module, "passes", None)  # of stacked experts, which always get tokens
        if x.dim() == 2 and (passes or block.is_list or len(x) != len(names)):
            length = block.length_of(len(x) // (passes or 1), len(names))
            if length is None and module.holds_any(names.distinct):
                raise S2FTError(f"{path} {_UNKNOWN}")
            batch = names if length is None else names.flattened(length)
        return args, {**kwargs, "adapter_names": batch}

    return hook
