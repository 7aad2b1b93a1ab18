"""A sketch of a weight's slice: 64 small numbers that recognise its values even after quantisation.

    values x₀ x₁ x₂ ...  →  bucket b: Σ ± x_i over i ≡ b (mod 64)  →  scaled to bytes  →  86 characters

This is a count sketch: the angle between two sketches is nearly that between the two slices, and the cosine of unrelated
weights is 0 ± 1/8. The signs come from a hash of the shape. 4-bit weights keep a cosine with the plain ones of 0.87 at worst,
and mostly above 0.99; a model that was fine-tuned from the base may be as close.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIZE = 64
_CHUNK = 1 << 18  # values at once: a multiple of 8 and of SIZE
LIKE = 0.5  # the least cosine between a quantised slice and a plain one: 4σ from 0
SAME = 0.995  # between two that were stored alike, so that only the rounding of arithmetic differs


def sketch(values: Tensor) -> str | None:
    """86 characters; None where the values are zero or not finite.

    Example:
        >>> weight = torch.arange(600.0).view(20, 30) - 300
        >>> cosine(sketch(weight), sketch(weight + 5 * torch.rand_like(weight))) > 0.99
        True
    """
    flat = values.detach().to("cpu", torch.bfloat16).flatten()  # a copy in bfloat16 gives the same
    signs, buckets = _signs(tuple(values.shape)), np.zeros(SIZE)
    for start in range(0, len(flat), _CHUNK):
        part = flat[start : start + _CHUNK].double().numpy()
        part *= np.unpackbits(signs[start // 8 : (start + _CHUNK) // 8], count=len(part)) * 2.0 - 1.0
        buckets += np.pad(part, (0, -len(part) % SIZE)).reshape(-1, SIZE).sum(0)
    largest = np.abs(buckets).max(initial=0)
    if not np.isfinite(largest) or largest == 0:
        return None
    return base64.urlsafe_b64encode(np.rint(buckets / largest * 127).astype(np.int8).tobytes()).decode().rstrip("=")


def cosine(one: str, other: str) -> float:
    """Of the angle between two sketches; 0 where one is no sketch."""
    a, b = _numbers(one), _numbers(other)
    return float(a @ b / np.sqrt((a @ a) * (b @ b))) if a.any() and b.any() else 0.0


def _numbers(text: str) -> NDArray[np.float64]:  # [SIZE]
    try:
        read = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        return np.zeros(SIZE)
    return np.frombuffer(read, dtype=np.int8).astype(np.float64) if len(read) == SIZE else np.zeros(SIZE)


def _signs(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A bit for each value."""
    stream = hashlib.shake_128(f"{tuple(map(int, shape))}".encode()).digest(-(-math.prod(shape) // 8))
    return np.frombuffer(stream, dtype=np.uint8)
