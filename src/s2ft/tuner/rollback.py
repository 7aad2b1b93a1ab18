"""All or nothing: undoes what adding or loading an adapter did to a model before it failed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn

_CONTAINERS = (dict, OrderedDict, list, set, WeakSet)


@contextmanager
def rolled_back(model: nn.Module, *others: Any, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """If the block raises, undoes what it did to the structure of `model`, and to the attributes of `others`.

    Structure is modules, hooks, names of adapters, and which parameters train; only references are copied. Values that were
    written into tensors are not undone, so they must be checked before.

    Args:
        model: With all its modules.
        others: Further objects.
        when: Asked when the block has raised; False leaves everything as it is then.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> with rolled_back(model):
        ...     model[0] = nn.ReLU()
        ...     raise ValueError("no")
        Traceback (most recent call last):
            ...
        ValueError: no
        >>> model[0]
        Linear(in_features=2, out_features=2, bias=True)
    """
    before = [_Attributes(holder) for holder in (*model.modules(), *others)]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if when():
            for attributes in before:
                attributes.restore()
            for parameter, requires_grad in trains:
                parameter.requires_grad_(requires_grad)
        raise


class _Attributes:
    """An object's attributes as they were, and what their dictionaries, lists and sets held."""

    def __init__(self, holder: Any) -> None:
        self._holder, self._values = holder, dict(vars(holder))
        self._held = [
            (value, type(value)(value)) for value in self._values.values() if type(value) in _CONTAINERS
        ]  # not of subclasses, which may do more than hold

    def restore(self) -> None:
        attributes = vars(self._holder)
        attributes.clear()
        attributes.update(self._values)
        for container, content in self._held:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
