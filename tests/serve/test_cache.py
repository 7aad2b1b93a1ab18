"""Keys and values of rows that join (`serve/cache.py`)."""

import pytest
import torch
from transformers import DynamicCache

from s2ft.serve.cache import joined


def cache(rows: int, length: int) -> DynamicCache:
    found = DynamicCache()
    for layer in range(3):
        found.update(torch.randn(rows, 2, length, 5), torch.randn(rows, 2, length, 5), layer)
    return found


def parts(found: DynamicCache) -> list[torch.Tensor]:
    return [part.clone() for layer in found.layers for part in (layer.keys, layer.values)]


@pytest.mark.parametrize(("mine", "other"), [(3, 7), (7, 3), (4, 4)])
def test_a_join_without_memory_leaves_the_rows_under_way_as_they_were(
    monkeypatch: pytest.MonkeyPatch, mine: int, other: int
) -> None:
    cat = torch.cat
    for fails in range(6):
        first, second = cache(2, mine), cache(1, other)
        before, calls = parts(first), []

        def scarce(tensors: list[torch.Tensor], fails: int = fails, calls: list[int] = calls) -> torch.Tensor:
            calls.append(1)
            if len(calls) > fails:
                raise torch.OutOfMemoryError("no memory")
            return cat(tensors)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "cat", scarce)
            with pytest.raises(torch.OutOfMemoryError):
                joined(first, second, (mine, other))
        assert all(map(torch.equal, parts(first), before))
        whole = parts(joined(first, second, (mine, other)))
        assert all(torch.equal(part[:2, :, -mine:], old) for part, old in zip(whole, before, strict=True))
