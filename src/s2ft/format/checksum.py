"""Checksums of an adapter's tensors, by which a reader knows that they are the ones that were saved.

    adapter_config.json    "checksums": {"model.layers.0.mlp.down_proj.s2ft_block.weight": "3f…", ...}

A checksum is SHA-256 over dtype, shape and bytes, cut to 128 bits. PEFT takes the tensors from the model first and saves the
config afterwards: they are noted in between (`S2FTConfig.note`). A file without them is read
unchecked; a tool that changes tensors on purpose removes the field.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from s2ft.format.names import bare


def checksum(tensor: Tensor) -> str:
    """32 hex digits.

    Example:
        >>> checksum(torch.ones(2)) == checksum(torch.ones(2)), checksum(torch.ones(2)) == checksum(torch.ones(2, 1))
        (True, False)
    """
    values = tensor.detach().cpu().contiguous().reshape(-1)
    head = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    digest = hashlib.sha256(head)
    if values.numel():
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Bare name → checksum, of every tensor that a file is to hold."""
    return {bare(name): checksum(tensor) for name, tensor in tensors.items() if not tensor.is_meta}


class Noted(dict[str, "ref[Tensor]"]):
    """Tensors that are about to be saved, by their bare names; held weakly, and left out of copies and pickles."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Noted:
        """Notes tensors, for as long as something else holds them."""
        return cls((bare(name), ref(tensor)) for name, tensor in tensors.items())

    def checksums(self) -> dict[str, str] | None:
        """The checksums of those that still exist; None where none do."""
        held = {name: tensor for name, where in self.items() if (tensor := where()) is not None}
        return checksums(held) or None

    def __reduce__(self) -> tuple[Any, ...]:
        return Noted, ()
