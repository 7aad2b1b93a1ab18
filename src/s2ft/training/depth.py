"""Backward stops at the lowest block that trains anything, with activation checkpointing too.

    blocks     0 1 2 3 | 4 5 6 7        layers="last:50%": autograd stops below block 4 by itself,
    trained            | * * * *        unless the model's input was made to require gradients

transformers, PEFT and TRL make it so whenever checkpointing is on, and checkpoint every block: backward then runs every block
forward again and through to the embeddings. `stop_below(model)` undoes that: only the blocks from the lowest trained one up are
checkpointed, and where checkpoints are reentrant, which needs inputs with gradients, that block's input gets them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from s2ft.layer.linears import layer_stack

_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")  # as transformers and PEFT call theirs


def stop_below(model: nn.Module) -> int | None:
    """Confines checkpointing and gradients to the blocks from the lowest trained one up.

    Does nothing where the blocks are no single list, where the lowest trained one is the first, or where something
    outside the blocks trains that may lie below them.

    Returns:
        The lowest trained block, if anything was confined to the blocks from it up.
    """
    blocks = _blocks(model)
    lowest = lowest_trained(model, blocks) or 0
    for index, (_, block) in enumerate(blocks):
        if index < lowest and getattr(block, "gradient_checkpointing", False):
            block.gradient_checkpointing, block.s2ft_confined = False, True  # type: ignore[assignment]
        elif index >= lowest and getattr(block, "s2ft_confined", False):  # it trains again
            block.gradient_checkpointing, block.s2ft_confined = True, False  # type: ignore[assignment]
    if not lowest:
        return None
    if any(getattr(block, "gradient_checkpointing", False) for _, block in blocks):
        _release_input(model)
        _mark_input(blocks[lowest][1])
    return lowest


def lowest_trained(model: nn.Module, blocks: list[tuple[str, nn.Module]]) -> int | None:
    """The index of the lowest block that trains a parameter; None without blocks or if others train too."""
    trained = [path for path, parameter in model.named_parameters() if parameter.requires_grad]
    places = [
        next((index for index, (prefix, _) in enumerate(blocks) if path.startswith(f"{prefix}.")), None)
        for path in trained
    ]
    return min(place for place in places if place is not None) if places and None not in places else None


def _blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model's one list of blocks; empty where it has several (an encoder and a decoder)."""
    lists: dict[str, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        stack = layer_stack(path)
        if stack is not None and path == f"{stack[0]}.{stack[1]}".lstrip("."):
            lists.setdefault(stack[0], []).append((path, module))
    return next(iter(lists.values())) if len(lists) == 1 else []


def _release_input(model: nn.Module) -> None:
    """Removes the hooks that make the embeddings' output require gradients, however many were added."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _HOOKS:
                module._forward_hooks.pop(key)


def _mark_input(block: nn.Module) -> None:
    if _needs_input_grad not in block._forward_pre_hooks.values():
        block.register_forward_pre_hook(_needs_input_grad, with_kwargs=True)


def _needs_input_grad(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Gives a reentrant checkpoint an input that requires gradients; any other needs none."""
    function = getattr(block, "_gradient_checkpointing_func", None)
    reentrant = getattr(function, "keywords", {}).get("use_reentrant", False)
    active = getattr(block, "gradient_checkpointing", False) and block.training and reentrant
    if not active or not args or not isinstance(args[0], Tensor) or args[0].requires_grad:
        return None
    return (args[0].detach().requires_grad_(), *args[1:]), kwargs
