"""A batch whose rows each have an adapter of their own: what do the adapters add to o_proj and down_proj together?

    s2ft    `add_mixed`, as `generate` runs it: the plan and the table are there from the token before
    lora    y.baddbmm_(bmm(x, A), B) with the batch's A and B already gathered, in the layout that was fastest: the least that
            LoRA can do, and less than it has to, as the rows of a batch change
    layer   `S2FTLinear` with `adapter_names`: the same as s2ft, and all that is around it
    peft    PEFT's `LoraLinear` with `adapter_names`
    base    the two base products, which all of them have beside
    floor   the bytes of the adapters in the batch at the speed of a large copy

Decode shape: one token a row, one row for each adapter. Equal parameters: s channels are as many as r (in + out) / out, thus
2 r on o_proj and 4.5 r on down_proj. Where a whole layer runs, its base layer returns zeros, so that its product does not
hide what is measured. All take turns, in an order that is drawn anew each round, and find the caches full of something
else, as between the layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from s2ft.lab.bench.report import Report, measured_devices, take_turns
from s2ft.lab.registry import TellShare
from s2ft.layer.linear import S2FTLinear
from s2ft.layer.mixed import add_mixed
from s2ft.layer.pack import LooseSlice, MixedBatch
from s2ft.runtime.timing import bytes_per_ms, free_bytes, milliseconds, no_spread, spread

COUNTS = (1, 8, 64, 256, 1000, 10_000, 100_000)
SHAPES = {"o_proj": (4096, 4096), "down_proj": (14336, 4096)}  # in, out: LLaMA3-8B and Mistral-7B
RANK = 16
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16,)}
MOST_IN_PEFT = 1000  # the time of PEFT's layer grows with the square
TIMED = ("s2ft", "lora", "layer", "peft", "base")
LARGE = 1 << 28  # bytes of the large copy, and of what fills the caches

Row = dict[str, Any]
Shapes = dict[str, tuple[int, int]]


def bench_parallel(
    counts: Sequence[int] = COUNTS,
    shapes: Shapes = SHAPES,
    rounds: int = 40,
    seconds: float = 20,
    large: int = LARGE,
    device: str | None = None,
    tell: TellShare = lambda done: None,
) -> Report:
    """Times each number of adapters in at most `rounds` rounds or `seconds`.

    On the CPU and, where there is one, on the GPU, unless a `device` is given.

    A number that does not fit into the free memory has a row that says so. `tell` is told the share that is done.
    """
    devices = measured_devices(device)
    cases = [(device, dtype, count) for device in devices for dtype in DTYPES[device] for count in counts]
    rows = []
    for number, (device, dtype, count) in enumerate(cases):
        rows.append(_row(device, dtype, count, shapes, rounds, seconds, large))
        tell((number + 1) / len(cases))
    settings = {
        "shapes": shapes,
        "rank": RANK,
        "channels": {name: channels(*shape) for name, shape in shapes.items()},
        "rounds": rounds,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    return Report(settings=settings, rows=rows)


def channels(inputs: int, outputs: int) -> int:
    """How many input channels have as many parameters as a LoRA of rank `RANK`.

    Example:
        >>> channels(4096, 4096), channels(14336, 4096)
        (32, 72)
    """
    return RANK * (inputs + outputs) // outputs


@torch.no_grad()
def _row(device: str, dtype: torch.dtype, count: int, shapes: Shapes, rounds: int, seconds: float, large: int) -> Row:
    row: Row = {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "dim": shapes["o_proj"][1],
        "adapters": count,
        "batch": count,
    }
    times: dict[str, list[float]] = {}
    needed, free = _bytes_needed(count, shapes, dtype, large), 0.8 * free_bytes(device)
    skipped = None if needed <= free else f"needs {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB"
    if skipped is None:
        turns, flush = contestants(device, dtype, count, shapes), torch.zeros(large // 4, device=device)
        times = take_turns(turns, lambda name: _timed(turns[name], flush, device), rounds, seconds, warm_up=2)
    for name in TIMED:
        row |= spread(times[name], f"{name}_ms") if name in times else no_spread(f"{name}_ms")
    moved = count * sum(shape[1] * channels(*shape) for shape in shapes.values()) * dtype.itemsize
    return {
        **row,
        "floor_ms": None if skipped else moved / bytes_per_ms(device, large),
        "rounds": len(times.get("s2ft", [])),
        "skipped": skipped,
    }


def contestants(device: str, dtype: torch.dtype, count: int, shapes: Shapes) -> dict[str, Callable[[], list[Tensor]]]:
    """Name → a call that gives the output of each projection."""
    layers = [_Projection(device, dtype, count, shape) for shape in shapes.values()]
    calls = {name: [getattr(layer, name)() for layer in layers] for name in TIMED if name != "peft"}
    if count <= MOST_IN_PEFT:
        calls["peft"] = [layer.peft() for layer in layers]
    return {name: lambda own=own: [call() for call in own] for name, own in calls.items()}  # type: ignore[misc]


class _Projection:
    """One projection, its batch, and as many adapters of each kind."""

    def __init__(self, device: str, dtype: torch.dtype, count: int, shape: tuple[int, int]) -> None:
        inputs, outputs = shape
        self.linear = _Silent(inputs, outputs, bias=False, device=device, dtype=dtype).requires_grad_(False)
        self.x = torch.randn(count, 1, inputs, device=device).to(dtype)
        self.y = torch.zeros(count, 1, outputs, device=device, dtype=dtype)
        self.names = [f"a{number}" for number in range(count)]
        self.a = torch.randn(count, RANK, inputs, dtype=dtype, device=device)
        self.b = torch.randn(count, RANK, outputs, dtype=dtype, device=device)

    def s2ft(self) -> Callable[[], Tensor]:
        batch = MixedBatch(self.names)
        return lambda: add_mixed(self.adapted, self.y, self.x, batch)

    def layer(self) -> Callable[[], Tensor]:
        batch = MixedBatch(self.names)
        return lambda: self.adapted(self.x, adapter_names=batch)

    @cached_property
    def adapted(self) -> S2FTLinear:
        inputs, outputs = self.linear.in_features, self.linear.out_features
        number = channels(inputs, outputs)
        layer = S2FTLinear(self.linear, "a0")
        # The layer's table has every adapter's values; what it is made from may be the same for all
        delta = torch.randn(outputs, number, dtype=self.x.dtype, device=self.x.device)
        for name in self.names:
            layer.pooled[name] = LooseSlice("in", torch.randperm(inputs)[:number].sort().values, delta)
        return layer

    def lora(self) -> Callable[[], Tensor]:
        a = self.a.transpose(1, 2)
        return lambda: self.y.baddbmm_(torch.bmm(self.x, a), self.b)

    def peft(self) -> Callable[[], Tensor]:
        config = LoraConfig(r=RANK, lora_alpha=RANK)
        layer = LoraLinear(self.linear, self.names[0], config, r=RANK, lora_alpha=RANK)
        for name in self.names[1:]:
            layer.update_layer(name, r=RANK, lora_alpha=RANK, config=config)
        for number, name in enumerate(self.names):
            layer.lora_A[name].weight.data = self.a[number]
            layer.lora_B[name].weight.data = self.b[number].T.contiguous()
        layer.eval()
        return lambda: layer(self.x, adapter_names=self.names)

    def base(self) -> Callable[[], Tensor]:
        return lambda: nn.functional.linear(self.x, self.linear.weight)


class _Silent(nn.Linear):
    """A base layer without its product."""

    def forward(self, x: Tensor) -> Tensor:  # [*, in_features] → [*, out_features]
        return x.new_zeros(*x.shape[:-1], self.out_features)


def draw_parallel(rows: Sequence[Row], png: Path) -> None:
    """A panel for each device and dtype: time against adapters, both logarithmic."""
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state

    panels = list(dict.fromkeys((row["device"], row["dtype"]) for row in rows))
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    labels = {
        "s2ft": "S²FT",
        "layer": "S²FT: layer",
        "lora": "LoRA: bmm",
        "peft": "LoRA: PEFT's layer",
        "base": "base product",
        "floor": "memory bandwidth",
    }
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        own = [row for row in rows if (row["device"], row["dtype"]) == panel]
        for name, label in labels.items():
            shown = [(row["adapters"], row[f"{name}_ms"]) for row in own if row[f"{name}_ms"] is not None]
            style = "--" if name in ("base", "floor") else "o-"
            axes.plot([count for count, _ in shown], [ms for _, ms in shown], style, label=label, markersize=4)
        axes.set(title=" ".join(panel), xlabel="adapters in the batch, one row each", ylabel="ms, o_proj and down_proj")
        axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(png, dpi=120)


def parallel_line(row: Row) -> dict[str, str]:
    """A row of the table: medians in ms, and ratios. The spread is in the rows themselves."""
    names = (*TIMED, "floor")
    ratios = {"s2ft / lora": ("s2ft", "lora"), "layer / peft": ("layer", "peft"), "s2ft / floor": ("s2ft", "floor")}
    place = f"{row['device']} {row['dtype']} × {row['adapters']}"
    if row["skipped"]:
        return {"adapters": f"{place}: {row['skipped']}", **dict.fromkeys((*names, *ratios), "–")}
    times = {name: "–" if row[f"{name}_ms"] is None else f"{row[f'{name}_ms']:.3g}" for name in names}
    return {
        "adapters": place,
        **times,
        **{
            name: "–" if row[f"{b}_ms"] is None else f"{row[f'{a}_ms'] / row[f'{b}_ms']:.2f}"
            for name, (a, b) in ratios.items()
        },
    }


def _timed(run: Callable[[], Any], flush: Tensor, device: str) -> float:  # ms
    """With the caches full of `flush`, [large / 4]."""
    flush.sum()
    return milliseconds(run, device)


def _bytes_needed(count: int, shapes: Shapes, dtype: torch.dtype, large: int) -> float:
    """S²FT's table, LoRA's factors, PEFT's own copy of one of them, the batch and its results, the weights, the copy."""
    adapters = sum(RANK * sum(shape) * (3 if count <= MOST_IN_PEFT else 2) for shape in shapes.values())
    batch = sum(shape[0] + 3 * shape[1] for shape in shapes.values())
    weights = sum(inputs * outputs for inputs, outputs in shapes.values())
    return (count * (adapters + batch) + weights) * dtype.itemsize + 2 * large
