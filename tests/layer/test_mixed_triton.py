"""The Triton kernels against plain products in float64 and the PyTorch version.

`make test-kernels` installs Triton and runs them in its interpreter, on the CPU; where Triton and a GPU are there, they run on
the GPU. Elsewhere these tests are skipped.
"""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed; `make test-kernels` installs it")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no GPU; `make test-kernels` uses Triton's interpreter", allow_module_level=True)

from s2ft.common.errors import S2FTError  # noqa: E402
from s2ft.layer import mixed  # noqa: E402 - only where Triton is
from s2ft.layer import mixed_triton as kernels  # noqa: E402 - only where Triton is
from s2ft.layer.pack import LooseSlice, MixedBatch, _pack_side  # noqa: E402

BASE = "__base__"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_table_of_another_width_is_refused(side: str) -> None:
    narrow = LooseSlice(side, torch.tensor([0, 2]), torch.ones((6, 2) if side == "in" else (2, 6), device=DEVICE))
    batch = MixedBatch(["a"])
    pack = _pack_side(side, {"a": narrow}, torch.ones(1, device=DEVICE))
    x, y = torch.ones(1, 7, device=DEVICE), torch.ones(1, 7, device=DEVICE)
    plan = kernels.tiles(pack, batch.of_row, 1, 7, torch.device(DEVICE))
    with pytest.raises(S2FTError, match="6 features on their other side, the layer 7"):
        kernels.add_by_kernel(pack, y, x, plan)


class Layer(nn.Module):
    """No more than `mixed` asks of a layer."""

    def __init__(self, slices: dict[str, LooseSlice]) -> None:
        super().__init__()
        self.s2ft_block = nn.ModuleDict()
        self.pooled = slices


def layer_of(ranks: dict[str, int], side: str, sizes: tuple[int, int]) -> Layer:
    inputs, outputs = sizes
    slices = {}
    for name, rank in ranks.items():
        indices = torch.randperm(inputs if side == "in" else outputs)[:rank].sort().values
        weight = torch.randn((outputs, rank) if side == "in" else (rank, inputs))
        slices[name] = LooseSlice(side, indices, weight)
    return Layer(slices)


def reference(layer: Layer, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
    result = y.double().clone()
    for row, name in enumerate(names):
        if name in layer.pooled:
            one = layer.pooled[name]
            delta = one.weight.to(x.dtype).double()
            if one.side == "in":
                result[row] += x[row].double()[..., one.indices] @ delta.T
            else:
                result[row][..., one.indices] += x[row].double() @ delta.T
    return result


def by_kernel(layer: Layer, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
    batch, x, y = MixedBatch(names), x.to(DEVICE), y.to(DEVICE, copy=True)
    tokens = y.numel() // (len(batch) * y.shape[-1])
    for pack in mixed.pack_slices(layer, batch, y):
        y = kernels.add_by_kernel(pack, y, x, kernels.tiles(pack, batch.of_row, tokens, 0, y.device))
    return y.cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize(
    ("sizes", "ranks", "names", "leading"),
    [
        ((24, 40), {"a": 3}, ["a"], ()),
        ((131, 145), {"a": 1, "b": 17, "c": 40, "unused": 9}, ["c", BASE, "a", "b", "c", "nobody"], (1,)),
        ((130, 260), {"a": 33, "b": 2}, ["b", "a", "b"], (19,)),
        ((50, 50), {"a": 50, "b": 16}, ["b"] * 18 + ["a"] * 2, (2, 1)),
    ],
    ids=["one", "odd", "many tokens", "many rows"],
)
def test_kernels_add_what_each_row_adds(
    dtype: torch.dtype, side: str, sizes: tuple[int, int], ranks: dict[str, int], names: list[str], leading: Any
) -> None:
    layer = layer_of(ranks, side, sizes)
    x, y = torch.randn(len(names), *leading, sizes[0]).to(dtype), torch.randn(len(names), *leading, sizes[1]).to(dtype)
    found, wanted = by_kernel(layer, y, x, names), reference(layer, y, x, names)
    assert found.dtype == dtype
    scale = wanted.abs().max()
    rounding = torch.finfo(dtype).eps * scale * (32 if dtype == torch.float32 else 2)  # sums are in float32
    assert (found.double() - wanted).abs().max() <= rounding
    assert (y.double() - wanted).abs().max() > 0.1 * scale
    with torch.no_grad():
        plain = mixed.add_mixed(layer, y.clone(), x, MixedBatch(names))
    assert (found.double() - plain.double()).abs().max() <= 2 * rounding


@torch.no_grad()
def test_a_mixed_batch_runs_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of({"a": 3, "b": 20}, "in", (24, 40))
    layer.pooled |= {f"out {name}": one for name, one in layer_of({"a": 5, "b": 1}, "out", (24, 40)).pooled.items()}
    batch = MixedBatch(["out a", "b", BASE, "a", "out b"])

    def by_kernels(pack: Any, batch: MixedBatch, y: Tensor, x: Tensor, tokens: int) -> list[Any]:
        plan = kernels.tiles(
            pack, batch.places(pack.names), tokens, (x if pack.side == "in" else y).shape[-1], y.device
        )
        return [(kernels.add_by_kernel, pack, plan)]

    monkeypatch.setattr(mixed, "_of_pack", by_kernels)
    for tokens in (4, 1, 1):
        x, y = torch.randn(5, tokens, 24), torch.randn(5, tokens, 40)
        found = mixed.add_mixed(layer, y.to(DEVICE, copy=True), x.to(DEVICE), batch).cpu()
        torch.testing.assert_close(found, reference(layer, y, x, list(batch)).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_batch_without_adapters_is_left_alone(side: str) -> None:
    layer = layer_of({"a": 3}, side, (8, 8))
    batch, y = MixedBatch([BASE, "a"]), torch.randn(2, 8)
    (pack,) = mixed.pack_slices(layer, batch, y)
    plan = kernels.tiles(pack, torch.zeros(2, dtype=torch.int64), 1, 0, y.device)  # both rows use the base
    assert not len(plan.tiles)
    assert torch.equal(kernels.add_by_kernel(pack, y.clone(), torch.randn(2, 8), plan), y)


def test_tiles_hold_every_token_with_an_adapter_once() -> None:
    layer = layer_of({"a": 3, "b": 5}, "in", (8, 8))
    batch = MixedBatch(["b", "a", BASE, "b", "a", "a"])
    (pack,) = mixed.pack_slices(layer, batch, torch.zeros(0))
    plan = kernels.tiles(pack, batch.of_row, 7, 0, torch.device("cpu"))
    seen = []
    for first, count, start, rows in plan.tiles.tolist():
        assert 0 < count <= kernels.TOKENS
        for token in plan.order[first : first + count].tolist():
            adapter = batch.of_row[token // 7]
            assert (int(pack.starts[adapter]), int(pack.counts[adapter])) == (start, rows)
            seen.append(token)
    assert sorted(seen) == [token for token in range(42) if token // 7 != 2]


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from s2ft.layer import mixed_triton as kernels

constants = {"TOKENS": kernels.TOKENS, "CHANNELS": kernels.CHANNELS, "COLUMNS": kernels.COLUMNS, "WIDE": False}
for kernel in (kernels._input_side, kernels._output_side):
    for dtype in ("fp32", "bf16", "fp16"):
        kinds = {"x": dtype, "y": dtype, "table": dtype, "channels": "i64", "order": "i64", "tiles": "i64"}
        types = {name: "*" + kinds[name] if name in kinds else "i32" for name in kernel.arg_names}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=types, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
print("compiled")
"""


def test_kernels_compile_for_a_gpu_that_is_not_there() -> None:
    """The interpreter takes more than the compiler does."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "compiled", done.stderr
