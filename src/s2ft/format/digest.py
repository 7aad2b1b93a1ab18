"""A digest of the base weights that an adapter changes: was it made for this base?

    plain      "9f86d081884c7d65…~AQb3…"         SHA-256 of the slice, and its sketch
    quantised  "Params4bit-nf4-64~AQb3…"         the grid it was rounded to, and the sketch of its dequantised values
    float16    "~AQb3…"                          the sketch

SHA-256 is over the shape and the values rounded to bfloat16, cut to 128 bits. Because of the rounding, a float32 and a
bfloat16 copy of one checkpoint agree. Between two plain slices it decides alone. All else is compared by sketches
(`format/sketch.py`): closely on the same grid, loosely between a quantised base and a plain one. A slice without values (device
meta, a part of a sharded weight) has no digest, and is not checked. A fused adapter keeps the digest of each part of a slice,
since that of the union cannot be computed without the base.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from s2ft.common.errors import S2FTError, gathered, raise_together
from s2ft.common.reading import shown
from s2ft.format.sketch import LIKE, SAME, cosine, sketch
from s2ft.format.slices import Runs, Slice

_COMPARABLE = (torch.bfloat16, torch.float32, torch.float64)
_EXACT = re.compile(r"[0-9a-f]{32}")
MOST_PARTS = 1024  # of one module: adapters that were fused
_ANY_BASE = ContextVar("s2ft_any_base", default=False)


def slice_digest(base_slice: Tensor, grid: str | None = None) -> str | None:
    """The slice's digest as text; None where there is nothing to digest.

    Args:
        base_slice: [out_features, s] or [s, in_features], in a floating-point dtype.
        grid: What the values were rounded to, where they come from a quantised weight (`layer/dequantise.py`).

    Example:
        >>> weight = torch.arange(6.0).view(2, 3)
        >>> slice_digest(weight) == slice_digest(weight.bfloat16()), slice_digest(weight) == slice_digest(weight.T)
        (True, False)
    """
    if base_slice.is_meta or not base_slice.is_floating_point() or base_slice.itemsize < 2:
        return None
    found = sketch(base_slice)
    exact = grid or ("" if base_slice.dtype not in _COMPARABLE else _exact(base_slice))
    return None if found is None and not exact else f"{exact}~{found}" if found else exact


def _exact(values: Tensor) -> str:
    rounded = values.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().astype("<i2")
    return hashlib.sha256(f"{tuple(values.shape)}".encode() + rounded.tobytes()).hexdigest()[:32]


def agree(one: str, other: str) -> bool:
    """Whether two digests of a slice may be of the same weights.

    Example:
        >>> weight = torch.randn(40, 30)
        >>> agree(slice_digest(weight), slice_digest(weight + 0.1 * torch.randn(40, 30), grid="int4"))
        True
        >>> agree(slice_digest(weight), slice_digest(weight + 0.1 * torch.randn(40, 30)))
        False
    """
    (exact, mine), (also, theirs) = (text.partition("~")[::2] for text in (one, other))
    if _EXACT.fullmatch(exact) and _EXACT.fullmatch(also):
        return exact == also
    if not mine or not theirs:  # of an adapter from before there were sketches, or all zero
        return True
    plain = [not kind or bool(_EXACT.fullmatch(kind)) for kind in (exact, also)]
    alike = all(plain) or exact == also
    return cosine(mine, theirs) >= (SAME if alike else LIKE)


def digest_parts(text: str, whole: Slice) -> dict[str, str]:
    """A module's digests by slice: one for the `whole` slice, or, in a fused adapter, one for each part of it.

    Example:
        >>> digest_parts("in 3,17=ab; in 4=cd", Slice.parse("in 3-4,17"))
        {'in 3,17': 'ab', 'in 4': 'cd'}
    """
    if "=" not in text:
        return {str(whole): text}
    raise_together(part_problems(text, str(whole)))
    return _by_part(text)


def part_problems(text: str, whole: str) -> Iterator[str]:
    """What is wrong with the slices that a module's digests name: they must be parts of `whole`. None is expanded."""
    parts, runs = _by_part(text) if "=" in text else {}, Runs.parse(whole)
    if len(parts) > MOST_PARTS:
        yield f"base_digest has {len(parts):,} parts for {shown(whole)}; more than {MOST_PARTS:,} are not read"
        return
    for part in parts:
        if unreadable := gathered(partial(Runs.parse, part)):
            yield from unreadable
        elif not runs.holds(Runs.parse(part)):
            yield f"base_digest names the slice {shown(part)}, which is no part of the adapter's slice {shown(whole)}"


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
    """Inside the block, adapters load onto any base, without the check that they were made for it.

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
    differing = [path for path, digest in expected.items() if _differ(digest, found.get(path))]
    if differing and not _ANY_BASE.get():
        raise S2FTError(
            f"this adapter was made for another base{f' ({base})' if base else ''}: {len(differing)} of {len(expected)} "
            f"modules hold other weights than it was trained on, the first is {differing[0]}. Load its own base, or, if this "
            "is on purpose, load inside `with s2ft.any_base():`"
        )


def proves(expected: str, found: str | None) -> bool:
    """Whether two digests of a slice are of the same weights beyond doubt: the same SHA-256 of each part.

    Example:
        >>> digest = slice_digest(torch.randn(4, 3))
        >>> proves(digest, digest), proves("~AQb3", "~AQb3")
        (True, False)
    """
    theirs, ours = _by_part(expected), _by_part(found or "")
    return theirs.keys() == ours.keys() and all(
        _EXACT.fullmatch(exact := theirs[part].partition("~")[0]) and exact == ours[part].partition("~")[0]
        for part in theirs
    )


def _differ(expected: str, found: str | None) -> bool:
    if found is None:
        return False
    theirs, ours = _by_part(expected), _by_part(found)
    return theirs.keys() != ours.keys() or not all(agree(theirs[part], ours[part]) for part in theirs)


def _by_part(text: str) -> dict[str, str]:
    """Part of the slice → its digest; "" is the whole."""
    pairs = (part.rpartition("=") for part in text.split("; "))
    return {part: digest for part, _, digest in pairs}
