"""Tests on the live model that a permuted structure computes the same as before.

    before the moves    run the base once on a dummy input (`training/dummy.py`), and by themselves those of its parts that this
                        does not reach, such as a vision tower; keep each structure's input and output
    after the moves     run each structure on the same input: another output means that something depends on the old order

This finds heads that are paired or gated in ways that no shape shows, before anything trains in a wrong order. A weight
that is still zero would hide all that; it is tried with random values instead (`filled`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from s2ft.layer.adapted import adapted_layers
from s2ft.layer.linears import is_plain, layer_stack, linear_layer, weight_of
from s2ft.training.dummy import dummy_inputs, parts

_MOST = {torch.bfloat16: 3e-2, torch.float16: 5e-3}  # the relative error that rounding explains; other dtypes: 1e-4
_WHOLE = 4  # times as much is allowed for the model as a whole


class Probe:
    """The inputs and outputs of the modules at `paths` in a run of the base model.

    Args:
        paths: The modules that are looked at.
        alone: Of those that can be run by themselves, on one tensor: path → its channels.

    Raises:
        Exception: whatever the model raises, if neither it nor any of its parts can be run on a dummy input.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str], alone: Mapping[str, int] | None = None) -> None:
        self.model = model
        self.calls: dict[str, Any] = dict.fromkeys(paths)  # path → arguments and output of its first call
        self.runs: list[tuple[PreTrainedModel, Tensor]] = []  # the models that were run, and what they gave
        hooks = [model.get_submodule(p).register_forward_hook(self._keeper(p), with_kwargs=True) for p in self.calls]
        try:
            self._run_parts()
            for path in self.unreached & set(alone or {}):
                self._run_alone(path, (alone or {})[path])
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def unreached(self) -> set[str]:
        """The paths whose modules no dummy input reaches."""
        return {path for path, call in self.calls.items() if call is None}

    def differing(self) -> set[str]:
        """The paths whose modules now give another output, or cannot be run again."""
        with _base_alone(self.model):
            return {path for path in self.calls if path not in self.unreached and self._differs(path)}

    def whole_differs(self) -> bool:
        """Whether the model as a whole, or a part that was run by itself, now gives another output."""
        return any(not _close(self._run(part), output, _WHOLE) for part, output in self.runs)

    def _run_parts(self) -> None:
        """Runs the model, then the outermost parts that hold something unreached, as long as there is any."""
        failure: Exception | None = None
        for path, part in parts(self.model):
            if not any(f"{name}.".startswith(f"{path}." if path else "") for name in self.unreached):
                continue
            try:
                self.runs.append((part, self._run(part)))
            except Exception as error:
                failure = failure or error
        if failure is not None and not self.runs:
            raise failure

    def _run_alone(self, path: str, channels: int) -> None:
        """Such as a projector between a tower and the language model."""
        module = self.model.get_submodule(path)
        like = next(module.parameters())
        x = torch.randn(1, 5, channels, generator=torch.Generator().manual_seed(0), device="cpu")
        with _base_alone(self.model), suppress(Exception):  # it wants more than one tensor: it stays unreached
            module(x.to(like.device, like.dtype))

    def _keeper(self, path: str) -> Any:
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

    def _run(self, part: PreTrainedModel) -> Tensor:
        with _base_alone(self.model):
            return _first(part(**dummy_inputs(part))[0]).clone()


@contextmanager
def filled(model: nn.Module, paths: Collection[str]) -> Iterator[bool]:
    """Layers at `paths`, and heads, whose weights are all zero hold small random values; yields whether there are any.

    Afterwards they are zero again, bit for bit; by then, all moves made inside must have been undone.
    """
    layers = [
        linear
        for path, module in model.named_modules()
        if (path in paths or layer_stack(path) is None) and (linear := linear_layer(module)) is module
    ]
    layers += [linear for path in paths if (linear := linear_layer(model.get_submodule(path))) is not None]
    weights = {id(layer.weight): weight_of(layer) for layer in layers if is_plain(layer)}
    zeros = [weight.data for weight in weights.values() if not weight.is_meta and not weight.any()]
    kept = [weight.clone() for weight in zeros]
    generator = torch.Generator().manual_seed(0)
    try:
        for weight in zeros:
            values = torch.randn(weight.shape, generator=generator, device="cpu") / weight.shape[-1] ** 0.5
            weight.copy_(values)
        yield bool(zeros)
    finally:
        for weight, before in zip(zeros, kept, strict=True):
            weight.copy_(before)


@contextmanager
def unnoticed(model: nn.Module, training: bool) -> Iterator[None]:
    """All modules in training or evaluation mode, for a look at what they compute: no gradients, no random numbers used up."""
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:
            module.training = training  # not by train() or eval(), which modules may answer to
        devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
        with torch.no_grad(), torch.random.fork_rng(devices):
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
    error, size = (ours.double() - expected.double()).norm(), expected.double().norm()
    return bool(error <= slack * _MOST.get(expected.dtype, 1e-4) * size)
