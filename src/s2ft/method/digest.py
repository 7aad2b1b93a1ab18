"""A digest of the base weights that an adapter changes: was it made for this base?

The digest of a slice is SHA-256 over its shape and its values rounded to bfloat16, cut to 128 bits. Rounding makes a
float32 and a bfloat16 copy of the same checkpoint agree. What has no values (device meta), is quantised (integers or
float8), or was rounded otherwise (float16) has no digest and is not checked. A fused adapter keeps the digest of each part
of a slice: that of the union cannot be made without the base.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

from s2ft.errors import S2FTError
from s2ft.method.slices import Slice

_COMPARABLE = (torch.bfloat16, torch.float32, torch.float64)
_ANY_BASE = ContextVar("s2ft_any_base", default=False)


def slice_digest(base_slice: Tensor) -> str | None:
    """32 hex digits; None where there is nothing to digest.

    Example:
        >>> weight = torch.arange(6.0).view(2, 3)
        >>> slice_digest(weight) == slice_digest(weight.bfloat16()), slice_digest(weight) == slice_digest(weight.T)
        (True, False)
    """
    if base_slice.is_meta or base_slice.dtype not in _COMPARABLE:
        return None
    values = base_slice.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2")
    return hashlib.sha256(f"{tuple(base_slice.shape)}".encode() + values.tobytes()).hexdigest()[:32]


def digest_parts(text: str, whole: Slice) -> dict[str, str]:
    """A module's digests by slice: one for the `whole` slice, or, in a fused adapter, one for each part of it.

    Example:
        >>> digest_parts("in 3,17=ab; in 4=cd", Slice.parse("in 3-4,17"))
        {'in 3,17': 'ab', 'in 4': 'cd'}
    """
    if "=" not in text:
        return {str(whole): text}
    parts = dict(part.split("=", 1) for part in text.split("; ") if "=" in part)
    for part in parts:
        chosen = Slice.parse(part)
        if chosen.side != whole.side or not np.isin(chosen.indices, whole.indices).all():
            raise S2FTError(
                f"base_digest names the slice {part!r}, which is no part of the adapter's slice {str(whole)!r}"
            )
    return parts


def join_digests(parts: dict[str, str | None], whole: Slice) -> str | None:
    """The text that `digest_parts` reads; None where a part has no digest."""
    if None in parts.values():
        return None
    if list(parts) == [str(whole)]:
        return parts[str(whole)]
    return "; ".join(f"{part}={digest}" for part, digest in parts.items())


def bases_differ_knowingly() -> bool:
    """Whether this runs inside `any_base()`."""
    return _ANY_BASE.get()


@contextmanager
def any_base() -> Iterator[None]:
    """Adapters are put onto whatever base is there, without the check that they were made for it.

    Example:
        >>> with any_base():
        ...     pass  # model = PeftModel.from_pretrained(other_base, "adapter")
    """
    token = _ANY_BASE.set(True)
    try:
        yield
    finally:
        _ANY_BASE.reset(token)


def check_base(expected: dict[str, str], found: dict[str, str | None], base: str | None) -> None:
    """Raises `S2FTError` where a digest of the base differs from the adapter's, unless inside `any_base()`."""
    differing = [path for path, digest in expected.items() if found.get(path) not in (None, digest)]
    if differing and not _ANY_BASE.get():
        raise S2FTError(
            f"this adapter was made for another base{f' ({base})' if base else ''}: {len(differing)} of {len(expected)} "
            f"modules hold other weights than it was trained on, the first is {differing[0]}. Load its own base, or load "
            "inside `with s2ft.any_base():` if you know better."
        )
