"""Clear errors for a lack of memory or disk: what happened and which option to lower."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from s2ft.common.errors import S2FTError, no_space


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that; for a GPU torch has a type of error, for a CPU only a message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


@contextmanager
def clear_failures(advice: str, output: str) -> Iterator[None]:
    """Turns a lack of memory or disk into an `S2FTError` that ends in `advice`."""
    try:
        yield
    except S2FTError:
        raise
    except Exception as error:
        if (reason := no_space(error)) is not None:
            whole = "whole checkpoints are kept, nothing half-written is left"
            raise S2FTError(f"output={output!r}: {reason}; {whole}") from error
        if not is_out_of_memory(error):
            raise
        raise S2FTError(f"out of memory: {advice}") from error
