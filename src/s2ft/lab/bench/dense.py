"""A slice on an NF4 layer: is it faster or leaner held dense, beside a quantised rest, than as a delta beside the whole layer?

    floor     y = Q(W) x                                    the frozen layer, gradients for its input
    beside    y = Q(W) x + Δ x[channels]                    what S²FT does on a quantised base
    dense     y = Q(W without channels) x₁ + (W + Δ) x₂     the chosen channels come last in x = [x₁, x₂], as if the layers
                                                            before had been permuted for it: free here, work elsewhere

One layer forward and backward. Each keeps what a step keeps: values (the quantised weight, and the fp32 slice) and activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.format.slices import Slice
from s2ft.lab.bench.report import Report, measured_devices, take_turns
from s2ft.lab.registry import TellShare
from s2ft.layer.frozen import through_frozen
from s2ft.layer.linear import S2FTLinear
from s2ft.runtime.memory import own_tensors, saved_bytes
from s2ft.runtime.quantisation import check_quantisation
from s2ft.runtime.timing import milliseconds, spread

SHAPES = {"o_proj": (2048, 2048), "down_proj": (8192, 2048)}  # in, out: Llama-3.2-1B
SHARES = (1 / 32, 1 / 8)  # of a layer's input channels
TOKENS = 512
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}

Row = dict[str, Any]


class Rest(nn.Module):
    """The quantised layer without its last channels, which are dense and trained."""

    def __init__(self, rest: nn.Module, own: Tensor) -> None:  # own: [out_features, channels]
        super().__init__()
        self.rest = rest
        self.own = nn.Parameter(own.float().clone(memory_format=torch.contiguous_format))

    def forward(self, x: Tensor) -> Tensor:  # [tokens, in_features] → [tokens, out_features]
        """The rest by its library, the slice by torch, which keeps a copy of its share of x, not all of it."""
        others, chosen = x.split([x.shape[-1] - self.own.shape[1], self.own.shape[1]], dim=-1)
        y = through_frozen(self.rest, self.rest, others)
        return y + nn.functional.linear(chosen.contiguous(), self.own.to(x.dtype))


def bench_dense(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    tokens: int = TOKENS,
    rounds: int = 30,
    seconds: float = 60,
    device: str | None = None,
    tell: TellShare = lambda done: None,
) -> Report:
    """Rows: projection, channels, and for each way step_ms, saved_bytes, held_bytes.

    Raises:
        S2FTError: if bitsandbytes is not installed.
    """
    check_quantisation("nf4", "a layer")
    cases = [(own, name, share) for own in measured_devices(device) for name in shapes for share in SHARES]
    rows = []
    for number, (own, name, share) in enumerate(cases):
        ways = contestants(own, shapes[name], int(share * shapes[name][0]))
        rows.append(
            {"device": own, "projection": name, "share": share, **_measured(ways, own, tokens, rounds, seconds)}
        )
        tell((number + 1) / len(cases))
    settings = {"shapes": dict(shapes), "tokens": tokens, "threads": torch.get_num_threads()}
    return Report(settings=settings, rows=rows)


def contestants(
    device: str,
    shape: tuple[int, int],  # in, out
    channels: int,
) -> dict[str, nn.Module]:
    """Name → a layer. All stand for one weight, but for its quantisation."""
    weight = torch.randn(shape[1], shape[0]) / shape[0] ** 0.5
    last = Slice("in", torch.arange(shape[0] - channels, shape[0]).numpy())
    beside = S2FTLinear(_quantised(weight, device), "a", last, init_weights=False).to(device)
    dense = Rest(_quantised(weight[:, :-channels], device), weight[:, -channels:].to(device))
    return {"floor": _quantised(weight, device), "beside": beside, "dense": dense}


def _quantised(weight: Tensor, device: str) -> nn.Module:  # weight: [out_features, in_features]
    from bitsandbytes.nn import Linear4bit, Params4bit  # deferred: an extra of its own

    layer: nn.Module = Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, quant_type="nf4", compute_dtype=DTYPES[device]
    )
    layer.weight = Params4bit(weight.contiguous(), requires_grad=False, quant_type="nf4")
    return layer.to(device).train()


def _measured(ways: Mapping[str, nn.Module], device: str, tokens: int, rounds: int, seconds: float) -> Row:
    beside, dense = ways["beside"], ways["dense"]
    assert isinstance(beside, S2FTLinear)
    assert isinstance(dense, Rest)
    x = torch.randn(tokens, beside.in_features, device=device, dtype=DTYPES[device], requires_grad=True)

    def step(name: str) -> float:
        return milliseconds(lambda: run(ways[name], x).sum().backward(), device)

    times = take_turns(ways, step, rounds, seconds, warm_up=2)
    row: Row = {"channels": dense.own.shape[1], "rounds": len(times["floor"])}
    for name, layer in ways.items():
        row |= spread(times[name], f"{name}_ms")
        row[f"{name}_saved_bytes"] = saved_bytes(partial(run, layer, x), [x, *own_tensors(layer)])
        row[f"{name}_held_bytes"] = sum(part.untyped_storage().nbytes() for part in own_tensors(layer))
    return row


def run(layer: nn.Module, x: Tensor) -> Tensor:  # [tokens, in_features] → [tokens, out_features]
    """The layer as it is trained: one that is quantised and frozen by `through_frozen`."""
    is_floor = not isinstance(layer, (S2FTLinear, Rest))
    y: Tensor = through_frozen(layer, layer, x) if is_floor else layer(x)
    return y


def dense_line(row: Row) -> dict[str, str]:
    """A row of the table."""
    line = {"layer": f"{row['device']} {row['projection']}, {row['channels']} channels"}
    for name in ("floor", "beside", "dense"):
        line[f"{name} ms"] = f"{row[f'{name}_ms']:.3g} ({row[f'{name}_ms_p20']:.3g}–{row[f'{name}_ms_p80']:.3g})"
    line["dense / beside"] = f"{row['dense_ms'] / row['beside_ms']:.2f}"
    for what in ("saved", "held"):
        ratio = row[f"dense_{what}_bytes"] / row[f"beside_{what}_bytes"]
        line[f"{what} bytes"] = f"{ratio:.2f}"
    return line
