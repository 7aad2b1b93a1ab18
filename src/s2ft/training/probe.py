"""Does a structure still compute the same after its channels have changed places? Asked of the live model itself.

    before the moves    run the base once, on transformers' dummy input, and keep what each structure was given and gave
    after the moves     give each structure the same again: another result means that something knows the old order

So heads that are paired or gated by what no shape tells are found before anything trains on a wrong order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2ft.layer.linear import S2FTLinear

_MOST = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative error of a structure that rounding explains; else 1e-4
_WHOLE = 4  # times as much for the model as a whole


class Probe:
    """The base's own calls of the modules at `paths`.

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
        """The paths whose modules the dummy input never gets to, as a vision tower that is given text."""
        return {path for path, call in self.calls.items() if call is None}

    def differing(self) -> set[str]:
        """The paths whose modules give something else now. What cannot be asked again is not known to be right."""
        with _base_alone(self.model):
            return {path for path in self.calls if path not in self.unreached and self._differs(path)}

    def whole_differs(self) -> bool:
        """Whether the model as a whole gives something else now."""
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
        except Exception:  # a state that one call uses up, as a cache does
            return True

    def _run(self) -> Tensor:
        base = next(module for module in self.model.modules() if isinstance(module, PreTrainedModel))
        inputs = {name: value.to(base.device) for name, value in base.dummy_inputs.items() if isinstance(value, Tensor)}
        with _base_alone(self.model):
            if base.can_generate():
                inputs["use_cache"] = False  # type: ignore[assignment]  # a cache would be filled again by the second call
            return _first(base(**inputs)[0]).clone()


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Without adapters, dropout, gradients, or a trace in the stream of random numbers."""
    modes: dict[nn.Module, bool] = {module: module.training for module in model.modules()}
    layers = {module: module._disable_adapters for module in model.modules() if isinstance(module, S2FTLinear)}
    try:
        for module in modes:
            module.training = False  # not by eval(), which modules may answer to
        for layer in layers:
            layer._disable_adapters = True
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for layer, disabled in layers.items():
            layer._disable_adapters = disabled


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output


def _close(ours: Tensor, expected: Tensor, slack: float = 1.0) -> bool:
    error = (ours.double() - expected.double()).norm() / expected.double().norm()
    return bool(error <= slack * _MOST.get(expected.dtype, 1e-4))
