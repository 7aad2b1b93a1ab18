"""The head of TRL's loss in tiles that suit a CPU.

TRL projects hidden states onto the vocabulary tile by tile, forward and backward, so that all logits are never there at once:

    4,096 tokens × 32,768 of the vocabulary    TRL's tiles, which a GPU's kernel reads and writes in place
      256        ×  4,096                      on a CPU, where each operation makes a copy of a tile
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

TOKENS, VOCABULARY = 256, 4096  # `s2ft bench training --chunked`
_NAMES = ((chunked_logprob, "TOKEN_CHUNK_SIZE", TOKENS), (utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", VOCABULARY))


@contextmanager
def small_tiles() -> Iterator[None]:
    """Inside, TRL's losses are computed in small tiles, unless there is an accelerator.

    Example:
        >>> with small_tiles():
        ...     chunked_logprob.TOKEN_CHUNK_SIZE <= 4096
        True
    """
    names = [] if torch.accelerator.is_available() else [one for one in _NAMES if hasattr(*one[:2])]
    before = [getattr(module, name) for module, name, _ in names]
    for module, name, size in names:
        setattr(module, name, size)
    try:
        yield
    finally:
        for (module, name, _), size in zip(names, before, strict=True):
            setattr(module, name, size)
