"""What is coupled with what in a transformer block, read off the live model.

    attention heads          q, k, v  |  o         head h: rows of q (and of its group's k, v), columns of o
    FFN channels          gate, up    |  down      channel c: row c of gate and up, column c of down

Both sides of a bar can be permuted together without changing the output (S²FT paper, §3.1); a head or a channel is
therefore a unit that can be chosen by itself. Under grouped-query attention several query heads share a key-value head:
a query head is a unit on q and o, a whole group is the unit on k and v.

A structure is recognised by its projections' names (below) and confirmed by their shapes; no class of any model is
named. Fused projections (`qkv_proj`, `c_attn`, `gate_up_proj`) hold theirs one after the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from s2ft.errors import S2FTError

ALIASES = {
    "q_proj": ("q_proj", "q_lin", "wq"),
    "k_proj": ("k_proj", "k_lin", "wk"),
    "v_proj": ("v_proj", "v_lin", "wv"),
    "o_proj": ("o_proj", "out_proj", "c_proj", "out_lin", "wo", "dense"),
    "gate_proj": ("gate_proj", "w1"),
    "up_proj": ("up_proj", "w3", "c_fc", "fc1", "fc_in"),
    "down_proj": ("down_proj", "w2", "c_proj", "fc2", "fc_out"),
}
"""Canonical projection → the names it goes by in model code."""

FUSED_QKV = ("qkv_proj", "c_attn")
FUSED_GATE_UP = ("gate_up_proj",)


@dataclass(frozen=True)
class Projection:
    """One side of a structure inside one linear layer.

    Unit u owns the channels `offset + u * width` up to `offset + (u + 1) * width` of the module's `side`.
    """

    name: str  # canonical, or the module's own name where no coupling is known
    module: str  # path of the linear layer in the model
    side: str  # "in": columns of the weight (o, down); "out": rows (q, k, v, gate, up)
    units: int  # heads, key-value groups, or channels
    width: int  # channels of a unit: head_dim, or 1
    offset: int = 0  # where the projection starts in a fused layer


@dataclass(frozen=True)
class Structure:
    """A coupled structure: the projections whose units are permuted together."""

    kind: str  # "attention" | "mlp" | "linear" (no coupling known)
    path: str  # of the module that holds the projections
    layer: int | None  # index of the block, where the path has one
    units: int  # query heads, or channels
    projections: tuple[Projection, ...]

    @property
    def groups(self) -> int:
        """Key-value heads, each shared by `units // groups` query heads; `units` where nothing is shared."""
        shared = [p.units for p in self.projections if p.name in ("k_proj", "v_proj")]
        return shared[0] if shared else self.units

    def __getitem__(self, name: str) -> Projection:
        return next(projection for projection in self.projections if projection.name == name)


def find_structures(model: nn.Module, skip_unreadable: bool = False) -> list[Structure]:
    """The attention and MLP structures of `model`, in its own order; adapted layers are seen through to their base.

    Raises:
        S2FTError: where a module has the projections of a structure, but their shapes contradict it
            (with `skip_unreadable`, such a module counts as having no structure).

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> [(s.kind, s.path, s.units) for s in find_structures(LlamaForCausalLM(config))]
        [('attention', 'model.layers.0.self_attn', 4), ('mlp', 'model.layers.0.mlp', 24)]
    """
    found: list[Structure] = []
    for path, module in model.named_modules():
        linears = {name: base for name, child in module.named_children() if (base := linear_layer(child)) is not None}
        if not linears or linear_layer(module) is not None:
            continue
        try:
            found += [*_attention(model, module, path, linears), *_mlp(path, linears)]
        except S2FTError:
            if not skip_unreadable:
                raise
    return found


def single_linear(path: str, module: nn.Module) -> Structure:
    """A linear layer without a known partner: its input channels are the units."""
    units = features(module)[0]
    name = path.rpartition(".")[2]
    return Structure("linear", path, layer_index(path), units, (Projection(name, path, "in", units, 1),))


def linear_layer(module: nn.Module) -> nn.Module | None:
    """The linear layer that `module` is, or that it wraps as a PEFT layer; None where there is none."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    is_linear = isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and isinstance(getattr(module, "weight", None), Tensor)
    )
    return module if is_linear else None


def features(module: nn.Module) -> tuple[int, int]:
    """`(in_features, out_features)` of a linear layer; a Conv1D (GPT-2) keeps its weight as [in, out]."""
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]


def is_plain(module: nn.Module) -> bool:
    """Whether the layer's weight holds its values as they are, not packed or scaled by a quantisation."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    full = weight.shape.numel() == features(module)[0] * features(module)[1]
    return full and weight.is_floating_point() and weight.dtype.itemsize > 1


def weight_matrix(module: nn.Module) -> Tensor:  # [out_features, in_features], a view
    """The weight of a linear layer in the orientation of `nn.Linear`, sharing storage with the module's own."""
    return as_matrix(module, module.weight)  # type: ignore[arg-type]


def as_matrix(module: nn.Module, weight_like: Tensor) -> Tensor:  # [out_features, in_features], a view
    """A tensor shaped like the module's weight (itself, its gradient) in the orientation of `nn.Linear`."""
    return weight_like.T if isinstance(module, Conv1D) else weight_like


def layer_stack(path: str) -> tuple[str, int] | None:
    """The list of blocks that `path` lies in, and the index of its block there; None outside of any.

    Example:
        >>> layer_stack("model.layers.3.mlp.down_proj")
        ('model.layers', 3)
    """
    match = re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", path)
    return (match[1], int(match[2])) if match else None


def layer_index(path: str) -> int | None:
    """The index of the block that `path` lies in."""
    place = layer_stack(path)
    return place[1] if place else None


def _attention(model: nn.Module, module: nn.Module, path: str, linears: dict[str, nn.Module]) -> Iterator[Structure]:
    output = _first(linears, ALIASES["o_proj"])
    fused = _first(linears, FUSED_QKV)
    separate = [_first(linears, ALIASES[name]) for name in ("q_proj", "k_proj", "v_proj")]
    if output is None or (fused is None and None in separate):
        return
    head_dim = _head_dim(model, module, path)
    heads = _whole(features(linears[output])[0], head_dim, f"{_join(path, output)}.in_features", path)
    if fused is not None:
        rest = features(linears[fused])[1] - heads * head_dim
        groups = _whole(rest, 2 * head_dim, f"the key and value part of {_join(path, fused)}.out_features", path)
        names = {"q_proj": fused, "k_proj": fused, "v_proj": fused}
    else:
        names = dict(zip(("q_proj", "k_proj", "v_proj"), map(str, separate), strict=True))
        groups = _whole(
            features(linears[names["k_proj"]])[1], head_dim, f"{_join(path, names['k_proj'])}.out_features", path
        )
    _whole(heads, groups, "the number of query heads", path, "the number of key-value heads")
    units = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    projections = [
        *_stack(path, linears, names, units, head_dim),
        Projection("o_proj", _join(path, output), "in", heads, head_dim),
    ]
    yield Structure("attention", path, layer_index(path), heads, tuple(projections))


def _mlp(path: str, linears: dict[str, nn.Module]) -> Iterator[Structure]:
    output = _first(linears, ALIASES["down_proj"])
    fused = _first(linears, FUSED_GATE_UP)
    up, gate = _first(linears, ALIASES["up_proj"]), _first(linears, ALIASES["gate_proj"])
    if output is None or (fused is None and up is None):
        return
    channels = features(linears[output])[0]
    if fused is not None:
        names = {"gate_proj": fused, "up_proj": fused}
    else:
        names = {"gate_proj": str(gate)} if gate is not None else {}
        names["up_proj"] = str(up)
    units = dict.fromkeys(names, channels)
    projections = [
        *_stack(path, linears, names, units, 1),
        Projection("down_proj", _join(path, output), "in", channels, 1),
    ]
    yield Structure("mlp", path, layer_index(path), channels, tuple(projections))


def _stack(
    path: str, linears: dict[str, nn.Module], names: dict[str, str], units: dict[str, int], width: int
) -> Iterator[Projection]:
    """The output-side projections, one after the other where they share a fused layer; checks that they fill each
    layer.
    """
    filled = dict.fromkeys(names.values(), 0)
    for canonical, name in names.items():
        yield Projection(canonical, _join(path, name), "out", units[canonical], width, filled[name])
        filled[name] += units[canonical] * width
    for name, size in filled.items():
        if features(linears[name])[1] != size:
            raise S2FTError(
                f"{_join(path, name)} has {features(linears[name])[1]} output channels; looked for {size}, which is what "
                f"its coupled projections in {path} imply. s2ft cannot read this structure; name other target_modules."
            )


def _head_dim(model: nn.Module, module: nn.Module, path: str) -> int:
    """From the attention module itself, else from the model's config."""
    value = getattr(module, "head_dim", None)
    config = getattr(module, "config", None) or getattr(model, "config", None)
    if value is None and config is not None:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        value = getattr(config, "head_dim", None)
        if value is None and getattr(config, "num_attention_heads", None):
            value = config.hidden_size // config.num_attention_heads
    if not isinstance(value, int):
        raise S2FTError(
            f"{path} has the projections of an attention block, but no size of a head: looked for head_dim on the module, "
            "and for head_dim, or hidden_size and num_attention_heads, in the model's config"
        )
    return value


def _whole(total: int, part: int, what: str, path: str, unit: str = "head_dim") -> int:
    if part <= 0 or total <= 0 or total % part:
        raise S2FTError(
            f"{path}: {what} is {total}, which is no multiple of {unit} = {part}; s2ft cannot read its heads"
        )
    return total // part


def _first(linears: dict[str, nn.Module], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in linears), None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
