"""Backward stops at the lowest block that trains anything, with activation checkpointing too.

    blocks     0 1 2 3 | 4 5 6 7        layers="last:50%": autograd stops below block 4 by itself,
    trained            | * * * *        unless the model's input was made to require gradients

With checkpointing, transformers, PEFT and TRL make the input require gradients and checkpoint every block: backward then runs
every block forward again, and goes through to the embeddings. `stop_below(model)` undoes that: only the blocks from the lowest
trained one up are checkpointed. Reentrant checkpoints need an input with gradients; there, the output of the block below gets
them: before transformers 5.23, a hook of the block itself would run inside its checkpoint. Once the lowest block trains, as
another adapter may ask, the model's input requires gradients again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from s2ft.layer.linears import layer_stack

Blocks = list[tuple[str, Any]]  # path and module, which carries checkpointing's attributes and ours
_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")  # the names in transformers and in PEFT


def stop_below(model: nn.Module) -> int | None:
    """Confines checkpointing and gradients to the blocks from the lowest trained one up.

    Confines nothing if the blocks are in several lists, if the first block trains, or if something outside the blocks trains,
    which may be below them; what was confined before is given back where something trains.

    Returns:
        The lowest trained block, if anything was confined to the blocks from it up.
    """
    blocks = _blocks(model)
    lowest, is_checkpointed = lowest_trained(model, blocks) or 0, _is_checkpointed(model)
    for index, (_, block) in enumerate(blocks):
        if index < lowest and getattr(block, "gradient_checkpointing", False):
            block.gradient_checkpointing, block.s2ft_confined = False, True
        elif index >= lowest and getattr(block, "s2ft_confined", False):  # it trains again
            block.gradient_checkpointing, block.s2ft_confined = is_checkpointed, False
    if not lowest:
        if any(parameter.requires_grad for parameter in model.parameters()):
            _give_input_back(model, is_checkpointed)
        return None
    if any(getattr(block, "gradient_checkpointing", False) for _, block in blocks):
        _release_input(model)
        _mark_output(blocks[lowest - 1][1], blocks[lowest][1])
    return lowest


def confine_nothing(model: nn.Module) -> None:
    """Undoes what `stop_below` did, but for checkpointing that has been turned off meanwhile."""
    is_checkpointed = _is_checkpointed(model)
    for _, block in _blocks(model):
        if getattr(block, "s2ft_confined", False):
            block.gradient_checkpointing, block.s2ft_confined = is_checkpointed, False
        if getattr(block, "s2ft_marks_output", False):
            _remove_hooks(block, lambda hook: isinstance(hook, partial) and hook.func is _needs_grad)
            block.s2ft_marks_output = False
    _give_input_back(model, is_checkpointed)


def _is_checkpointed(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def lowest_trained(model: nn.Module, blocks: Blocks) -> int | None:
    """The index of the lowest block that trains a parameter; None if nothing trains, or something outside the blocks."""
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    places = [
        next((index for index, (prefix, _) in enumerate(blocks) if path.startswith(f"{prefix}.")), None)
        for path in trained
    ]
    return min(place for place in places if place is not None) if places and None not in places else None


def _blocks(model: nn.Module) -> Blocks:
    """The model's one list of blocks; empty where it has several (an encoder and a decoder)."""
    lists: dict[str, Blocks] = {}
    for path, module in model.named_modules():
        stack = layer_stack(path)
        if stack is not None and path == f"{stack[0]}.{stack[1]}".lstrip("."):
            lists.setdefault(stack[0], []).append((path, module))
    return next(iter(lists.values())) if len(lists) == 1 else []


def _release_input(model: nn.Module) -> None:
    """Removes the hooks that make the embeddings' output require gradients, however many were added, and notes where."""
    for module in model.modules():
        if _remove_hooks(module, lambda hook: getattr(hook, "__name__", "") in _HOOKS):
            module.s2ft_released = True  # type: ignore[assignment]


def _remove_hooks(module: nn.Module, is_one: Callable[[Any], bool]) -> int:
    """Removes such forward hooks; how many they were."""
    hooks = module._forward_hooks  # noqa: SLF001 - PEFT keeps no handle, by which hooks are removed otherwise
    found = [key for key, hook in hooks.items() if is_one(hook)]
    for key in found:
        hooks.pop(key)
    return len(found)


def _give_input_back(model: nn.Module, is_checkpointed: bool) -> None:
    """Undoes `_release_input`, where checkpointing still asks for it."""
    for module in model.modules():
        if getattr(module, "s2ft_released", False):
            if is_checkpointed:
                module.register_forward_hook(make_inputs_require_grads)
            module.s2ft_released = False  # type: ignore[assignment]


def make_inputs_require_grads(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
    """As transformers' hook, by whose name it is found when the input is released again."""
    output.requires_grad_(True)


def _mark_output(below: Any, block: Any) -> None:
    if not getattr(below, "s2ft_marks_output", False):
        below.register_forward_hook(partial(_needs_grad, block))
        below.s2ft_marks_output = True


def _needs_grad(block: Any, below: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Gives a reentrant checkpoint of `block` an input that requires gradients; any other needs none."""
    function = getattr(block, "_gradient_checkpointing_func", None)
    reentrant = getattr(function, "keywords", {}).get("use_reentrant") is not False  # torch takes None as True
    hidden, *others = output if isinstance(output, tuple) else (output,)
    active = getattr(block, "gradient_checkpointing", False) and block.training and reentrant
    if not active or not isinstance(hidden, Tensor) or hidden.requires_grad:
        return None
    marked = hidden.detach().requires_grad_()
    return (marked, *others) if isinstance(output, tuple) else marked
