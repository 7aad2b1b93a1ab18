"""Tests on the live model that a permuted structure computes the same as before.

    before the moves    run the base once, on transformers' dummy input, and keep each structure's input and output
    after the moves     run each structure on the same input: another output means that something depends on the old order

This finds heads that are paired or gated in ways that no shape shows, before anything trains in a wrong order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2ft.layer.adapted import adapted_layers

_MOST = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # the relative error that rounding explains; other dtypes: 1e-4
_WHOLE = 4  # times as much is allowed for the model as a whole


class Probe:
    """The inputs and outputs of the modules at `paths` in a run of the base model.

    Raises:
        Exception: whatever the model raises, if it cannot be run on its dummy input.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.model = model
        self.calls: dict[str, Any] = {}  # path → arguments and output of its first call
        hooks = [
            model.get_submodule(path).register_forward_hook(self._keeper(path), with_kwargs=True) for path in paths
        ]
        try:
            self.output = self._run()
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def unreached(self) -> set[str]:
        """The paths whose modules the dummy input does not reach, such as a vision tower when the input is text."""
        return {path for path, call in self.calls.items() if call is None}

    def differing(self) -> set[str]:
        """The paths whose modules now give another output, or cannot be run again."""
        with _base_alone(self.model):
            return {path for path in self.calls if path not in self.unreached and self._differs(path)}

    def whole_differs(self) -> bool:
        """Whether the model as a whole now gives another output."""
        return not _close(self._run(), self.output, _WHOLE)

    def _keeper(self, path: str) -> Any:
        self.calls[path] = None

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self.calls[path] is None:
                self.calls[path] = (args, kwargs, _first(output).clone())

        return keep

    def _differs(self, path: str) -> bool:
        args, kwargs, expected = self.calls[path]
        try:
            return not _close(_first(self.model.get_submodule(path)(*args, **kwargs)), expected)
        except Exception:  # its input holds something that a call uses up, such as a cache
            return True

    def _run(self) -> Tensor:
        base = next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        inputs: dict[str, Any] = {
            name: value.to(base.device) for name, value in base.dummy_inputs.items() if isinstance(value, Tensor)
        }
        with _base_alone(self.model):
            if base.can_generate():
                inputs["use_cache"] = False  # a cache would be filled again by the second call
            return _first(base(**inputs)[0]).clone()


@contextmanager
def unnoticed(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or evaluation mode, for a look at what they compute: no gradients, no random numbers used up."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training  # not by train() or eval(), which modules may answer to
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Without adapters and without dropout."""
    with unnoticed(model, training=False), ExitStack() as stack:
        for layer in adapted_layers(model):
            stack.enter_context(layer.base_alone())
        yield


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _close(ours: Tensor, expected: Tensor, slack: float = 1.0) -> bool:
    error = (ours.double() - expected.double()).norm() / expected.double().norm()
    return bool(error <= slack * _MOST.get(expected.dtype, 1e-4))
