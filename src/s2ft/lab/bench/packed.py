"""Models as GPTQ, AWQ and float8 checkpoints hold them, rounded to the nearest: what is needed to load and train on one.

    gptq    qweight [in / 8, out]    qzeros [in / group, out / 8]    scales [in / group, out]    g_idx [in]
    awq     qweight [in, out / 8]    qzeros [in / group, out / 8]    scales [in / group, out]
    fp8     weight  [out, in]        weight_scale_inv [out / block, in / block]

Eight codes of 4 bits lie in an int32. Real checkpoints choose their codes on data; their layers are the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

GROUP = 32  # inputs that share a scale
BLOCK = 128  # outputs and inputs that share a scale, of float8
ZERO = 8  # the code of zero
PER_INT = 8  # codes in an int32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output each 4 bits of an int32 are of
FP8_MAX = 448.0


def write_packed(model: PreTrainedModel, folder: Path, method: str) -> None:
    """Saves the model with its linear layers packed, but for the head, as `method`, one of `METHODS`, has it."""
    pack, config = METHODS[method]
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        parts = pack(tensors.pop(name).float())
        tensors |= {f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": method, **config}
    (folder / "config.json").write_text(json.dumps(settings))


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:  # [out, in] → [in, out] from 0 to 15, and scales [in / GROUP, out]
    groups = weight.T.reshape(-1, GROUP, len(weight))
    scales = (groups.abs().amax(1) / (ZERO - 1)).half()
    codes = (groups / scales.float()[:, None] + ZERO).round().clamp(0, 2 * ZERO - 1)
    return codes.reshape(weight.T.shape).int(), scales


def _packed(
    codes: Tensor, order: tuple[int, ...] = tuple(range(PER_INT))
) -> Tensor:  # [rows, n] → [rows, n / 8], int32
    parts = codes.reshape(len(codes), -1, PER_INT).to(torch.int64)
    whole = sum(parts[..., column] << (4 * place) for place, column in enumerate(order))
    assert isinstance(whole, Tensor)
    return (whole & 0xFFFFFFFF).to(torch.uint32).view(torch.int32)


def _gptq(weight: Tensor) -> dict[str, Tensor]:
    codes, scales = _codes(weight)
    zeros = torch.full(scales.shape, ZERO - 1)  # the format's first version stores one less
    return {
        "qweight": _packed(codes.T.contiguous()).T,
        "qzeros": _packed(zeros),
        "scales": scales,
        "g_idx": torch.arange(len(codes), dtype=torch.int32) // GROUP,
    }


def _awq(weight: Tensor) -> dict[str, Tensor]:
    codes, scales = _codes(weight)
    zeros = torch.full(scales.shape, ZERO)
    return {"qweight": _packed(codes, AWQ_ORDER), "qzeros": _packed(zeros, AWQ_ORDER), "scales": scales}


def _fp8(weight: Tensor) -> dict[str, Tensor]:
    scales = torch.empty([-(-size // BLOCK) for size in weight.shape])
    values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row, column in torch.cartesian_prod(*map(torch.arange, scales.shape)).tolist():
        part = (slice(BLOCK * row, BLOCK * (row + 1)), slice(BLOCK * column, BLOCK * (column + 1)))
        scales[row, column] = weight[part].abs().max() / FP8_MAX
        values[part] = (weight[part] / scales[row, column]).to(torch.float8_e4m3fn)
    return {"weight": values, "weight_scale_inv": scales}


_INT4: dict[str, object] = {"bits": 4, "group_size": GROUP}

METHODS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, object]]] = {  # kernels that need no compiler
    "gptq": (_gptq, {**_INT4, "sym": True, "desc_act": False, "checkpoint_format": "gptq", "backend": "torch"}),
    "awq": (_awq, {**_INT4, "zero_point": True, "version": "gemm", "backend": "torch_awq"}),
    "fp8": (_fp8, {"weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}),
}
"""transformers' name → how a weight is packed, and what config.json says beside the name."""
