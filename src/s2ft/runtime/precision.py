"""The precision of the frozen base: bf16 when the machine has it. The trained deltas are fp32 in any case.

Deltas start at zero and move in small steps, which bf16 would lose; the base never moves.
"""

import torch

from s2ft.format.terms import PURE

BF16_CAPABILITY = 8  # the first NVIDIA generation (Ampere) that multiplies bf16 in hardware


def choose_precision(wanted: str, device: str | None = None) -> tuple[torch.dtype, str]:
    """The dtype for `auto`, `bf16` or `fp32`, and the reason in words.

    Args:
        wanted: One of these, or `pure-bf16`.
        device: `cpu` or `cuda`; None: the best that the machine has.

    Example:
        >>> choose_precision("fp32")
        (torch.float32, 'fp32, as asked')
    """
    if wanted == "bf16":
        return torch.bfloat16, "bf16, as asked"
    if wanted == PURE:
        return torch.bfloat16, "bf16 alone, as asked: deltas, gradients and states too, steps rounded stochastically"
    if wanted == "fp32":
        return torch.float32, "fp32, as asked"
    has_bf16, machine = _cpu() if device == "cpu" else _has_bf16()
    if has_bf16:
        return torch.bfloat16, f"auto-detected: {machine} (bf16 supported)"
    return torch.float32, f"auto-detected: {machine} (no bf16; fp32 is used)"


def _has_bf16() -> tuple[bool, str]:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return major >= BF16_CAPABILITY, f"CUDA SM {major}{minor}"
    if torch.backends.mps.is_available():
        return False, "Apple GPU"
    return _cpu()


def _cpu() -> tuple[bool, str]:
    # Private, but the only question that torch 2.11 to 2.13 answers on every platform; without an answer: fp32
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return supported, f"CPU with{'' if supported else 'out'} AVX512-BF16"
