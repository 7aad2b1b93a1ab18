"""How long does a d × d weight take to take an adapter in? S²FT with s = 32 columns against LoRA with r = 16: equal parameters.

    s2ft        take the columns aside, add the delta, put the sums in: what `s2ft.switch` does in a layer
    s2ft_back   put the columns back: the other half of a switch from one adapter to another
    s2ft_call   `s2ft.switch(model, name)` on a model of this one layer: its checks included
    lora        W += B @ A * scale: what PEFT's merge computes
    lora_fused  W.addmm_(B, A, alpha=scale): the least that LoRA can do
    peft        PEFT's own merge of a LoRA layer, its checks included
    floor       one `index_copy_` of the same columns
    bandwidth   the slice's bytes (delta and old values read, new values written) at the speed of a large copy

All take turns on the same weight, in an order that is drawn anew each round; each is timed right after an untimed run of
itself, so that none pays for its predecessor's traces in the caches. LoRA's weight drifts by what it adds, which does not
change its time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import nn

from s2ft.format.slices import Slice
from s2ft.lab.bench.report import Report, measured_devices, take_turns
from s2ft.lab.registry import TellShare
from s2ft.layer.block import S2FTBlock
from s2ft.layer.linear import S2FTLinear
from s2ft.runtime.timing import bytes_per_ms, free_bytes, milliseconds, no_spread, spread
from s2ft.tuner.switching import switch

DIMS = (1024, 2048, 4096, 8192, 16384, 32768)
CHANNELS, RANK = 32, 16
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
TIMED = ("s2ft", "s2ft_back", "s2ft_call", "lora", "lora_fused", "peft", "floor")
LARGE = 1 << 28  # bytes of the copy that measures the bandwidth: more than any cache holds

Turn = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any]]  # prepare, untimed; run, timed; undo, untimed

Row = dict[str, Any]


def bench_switch(
    dims: Sequence[int] = DIMS,
    rounds: int = 40,
    seconds: float = 10,
    device: str | None = None,
    tell: TellShare = lambda done: None,
) -> Report:
    """Times each dimension in at most `rounds` rounds or `seconds`.

    On the CPU and, where there is one, on the GPU, unless a `device` is given.

    A dimension that does not fit into the free memory has a row that says so. `tell` is told the share that is done.
    """
    devices = measured_devices(device)
    rows = []
    for name in devices:
        speed = bytes_per_ms(name, LARGE)
        for dim in dims:
            rows.append(_row(name, dim, rounds, seconds, speed))
            tell(len(rows) / (len(devices) * len(dims)))
    settings = {
        "channels": CHANNELS,
        "rank": RANK,
        "side": "in",
        "dtypes": {name: str(DTYPES[name]) for name in devices},
        "rounds": rounds,
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }
    return Report(settings=settings, rows=rows)


def _row(
    device: str,
    dim: int,
    rounds: int,
    seconds: float,
    speed: float,  # bytes per ms
) -> Row:
    size = DTYPES[device].itemsize
    needed = 4 * dim * dim * size  # the weight; PEFT's product, its scaled copy and their sum
    free = free_bytes(device)
    row: Row = {"device": device, "dim": dim}
    if needed > free:
        nothing = {key: None for name in TIMED for key in no_spread(f"{name}_ms")}
        skipped = f"needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
        return {**row, **nothing, "bandwidth_ms": None, "rounds": 0, "skipped": skipped}
    turns = contestants(device, dim)
    times = take_turns(turns, lambda name: _timed(turns[name], device), rounds, seconds, warm_up=1)
    for name, own in times.items():
        row |= spread(own, f"{name}_ms")
    moved = dim * min(CHANNELS, dim) * (2 * size + torch.float32.itemsize)
    return {**row, "bandwidth_ms": moved / speed, "rounds": len(times["floor"]), "skipped": None}


def contestants(device: str, dim: int) -> dict[str, Turn]:
    """Name → what is prepared, timed and undone. All work on one weight."""
    linear = nn.Linear(dim, dim, bias=False, device=device, dtype=DTYPES[device]).requires_grad_(False)
    weight = linear.weight.data
    at = torch.randperm(dim)[:CHANNELS].sort().values.to(device)
    layer = S2FTLinear(linear, "a", Slice("in", at.cpu().numpy()), init_weights=False)
    model = nn.Sequential(layer)
    values = weight.index_select(1, at)
    lora = LoraLinear(linear, "a", LoraConfig(r=RANK, init_lora_weights=False), r=RANK, lora_alpha=RANK)
    down, up = (0.02 * torch.randn(*shape, device=device).to(weight) for shape in ((RANK, dim), (dim, RANK)))

    def write() -> None:
        layer.base_weight.put(linear, cast(S2FTBlock, layer.s2ft_block["a"]))

    def restore() -> None:
        layer.base_weight.restore(linear)

    def add() -> None:
        weight.add_(up @ down * 0.5)

    return {
        "s2ft": (_nothing, write, restore),
        "s2ft_back": (write, restore, _nothing),
        "s2ft_call": (_nothing, lambda: switch(model, "a"), lambda: switch(model, None)),
        "lora": (_nothing, add, _nothing),
        "lora_fused": (_nothing, lambda: weight.addmm_(up, down, alpha=-0.5), _nothing),
        "peft": (_nothing, lora.merge, lora.unmerge),
        "floor": (_nothing, lambda: weight.index_copy_(1, at, values), _nothing),
    }


def _timed(turn: Turn, device: str) -> float:  # ms
    """Of the second of two runs, which finds in the caches what it left there itself."""
    prepare, run, undo = turn
    for _ in range(2):
        prepare()
        taken = milliseconds(run, device)
        undo()
    return taken


def draw_switch(rows: Sequence[Row], png: Path) -> None:
    """A panel for each device: time against dimension, both logarithmic."""
    from matplotlib.figure import Figure  # a figure of its own: no window, no global state

    devices = list(dict.fromkeys(row["device"] for row in rows))
    figure = Figure(figsize=(6 * len(devices), 4.5), layout="constrained")
    for axes, device in zip(figure.subplots(1, len(devices), squeeze=False)[0], devices, strict=True):
        own = [row for row in rows if row["device"] == device and row["skipped"] is None]
        for name, label in (
            ("s2ft", f"S²FT, s = {CHANNELS}"),
            ("lora", f"LoRA, r = {RANK}: W += B @ A * scale"),
            ("lora_fused", "LoRA: addmm_"),
            ("peft", "LoRA: PEFT's merge"),
            ("floor", "one index_copy_"),
            ("bandwidth", "memory bandwidth"),
        ):
            style = "--" if name in ("floor", "bandwidth") else "o-"
            axes.plot([row["dim"] for row in own], [row[f"{name}_ms"] for row in own], style, label=label, markersize=4)
        axes.set(title=device, xlabel="dimension d of the d × d weight", ylabel="ms", xscale="log", yscale="log")
        axes.set_xticks([row["dim"] for row in own], [str(row["dim"]) for row in own])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(png, dpi=120)


def switch_line(row: Row) -> dict[str, str]:
    """A row of the table: medians in ms, and ratios. The spread is in the rows themselves."""
    names = ("s2ft", "s2ft_back", "lora", "lora_fused", "peft", "floor")
    ratios = {
        "lora / s2ft": ("lora", "s2ft"),
        "fused / s2ft": ("lora_fused", "s2ft"),
        "s2ft / floor": ("s2ft", "floor"),
    }
    place = f"{row['device']} {row['dim']}"
    if row["skipped"]:
        return {"weight": f"{place}: {row['skipped']}", **dict.fromkeys((*names, *ratios), "–")}
    times = {name: f"{row[f'{name}_ms']:.3g}" for name in names}
    return {
        "weight": place,
        **times,
        **{name: f"{row[f'{a}_ms'] / row[f'{b}_ms']:.3g}" for name, (a, b) in ratios.items()},
    }


def _nothing() -> None: ...
