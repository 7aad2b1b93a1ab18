"""What is coupled with what in a transformer block, read off the live model.

    attention heads          q, k, v  |  o         head h: rows of q (and of its group's k, v), columns of o
    FFN channels          gate, up    |  down      channel c: row c of gate and up, column c of down

Both sides of a bar can be permuted together without changing the output (S²FT paper, §3.1); a head or a channel is
therefore a unit that can be chosen by itself. Under grouped-query attention several query heads share a key-value head:
a query head is a unit on q and o, a whole group is the unit on k and v.

A structure is recognised by its projections' names (`selection/families.py`) and confirmed by their shapes; no class of any
model is named. Where q, k and v lie mixed in their layers, the structure has o alone: its heads can be chosen, but not
permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import features, layer_index, linear_layer
from s2ft.selection.families import (
    HEAD_SIZES,
    VALUE_SIZES,
    AttentionNames,
    attention_names,
    dotted_names,
    mlp_names,
)


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

    @property
    def channels(self) -> slice:
        """The channels of all its units, on the module's `side`."""
        return slice(self.offset, self.offset + self.units * self.width)


@dataclass(frozen=True)
class Structure:
    """A coupled structure: the projections whose units are permuted together."""

    kind: str  # "attention" | "mlp" | "linear" (no coupling known)
    path: str  # of the module that holds the projections
    layer: int | None  # index of the block, where the path has one
    units: int  # query heads, or channels
    projections: tuple[Projection, ...]
    partial: str | None = None  # why not all its projections are here: its units cannot be permuted

    @property
    def key(self) -> str:
        """Names it: path and kind, since one module may hold an attention and an MLP."""
        return f"{self.path}:{self.kind}"

    @property
    def groups(self) -> int:
        """Key-value heads, each shared by `units // groups` query heads; `units` where nothing is shared."""
        shared = [p.units for p in self.projections if p.name in ("k_proj", "v_proj")]
        return shared[0] if shared else self.units

    def __getitem__(self, name: str) -> Projection:
        return next(projection for projection in self.projections if projection.name == name)


Target = tuple[Structure, Projection]
"""A projection that is trained, with its structure."""


@dataclass(frozen=True)
class Reading:
    """What `read_structures` found."""

    structures: list[Structure]
    unreadable: dict[str, str]  # path of a module with the projections of a structure → why it is none all the same


def find_structures(model: nn.Module) -> list[Structure]:
    """The attention and MLP structures of `model`, in its own order; adapted layers are seen through to their base.

    Raises:
        S2FTError: where a module has the projections of a structure, but their shapes contradict it; `read_structures` goes on.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
        >>> [(s.kind, s.path, s.units) for s in find_structures(LlamaForCausalLM(config))]
        [('attention', 'model.layers.0.self_attn', 4), ('mlp', 'model.layers.0.mlp', 24)]
    """
    reading = read_structures(model)
    if reading.unreadable:
        raise S2FTError(next(iter(reading.unreadable.values())))
    return reading.structures


def read_structures(model: nn.Module) -> Reading:
    """The structures of `model`, and what looks like one and cannot be read."""
    reading = Reading([], {})
    for path, module in model.named_modules():
        if linear_layer(module) is not None or not (linears := _linears_of(module)):
            continue
        for read in (_attention, _mlp):
            try:
                reading.structures.extend(read(_Block(model, module, path, linears)))
            except S2FTError as error:
                reading.unreadable[path] = str(error)
    return reading


def single_linear(path: str, module: nn.Module) -> Structure:
    """A linear layer without a known partner: its input channels are the units."""
    units = features(module)[0]
    name = path.rpartition(".")[2]
    return Structure("linear", path, layer_index(path), units, (Projection(name, path, "in", units, 1),))


_DOTTED = dotted_names()


@dataclass(frozen=True)
class _Block:
    """A module that holds linear layers, and may hold a structure."""

    model: nn.Module
    module: nn.Module
    path: str
    linears: dict[str, nn.Module]  # by name, see `_linears_of`

    def place(self, name: str) -> str:
        """The path of one of its layers."""
        return f"{self.path}.{name}" if self.path else name

    def inputs(self, name: str) -> int:
        """The input channels of one of its layers."""
        return features(self.linears[name])[0]

    def outputs(self, name: str) -> int:
        """The output channels of one of its layers."""
        return features(self.linears[name])[1]


def _linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """Name → linear layer, for the module's children and those further down that some family's block is made of."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if (linear := linear_layer(child)) is not None:
            found[name] = linear
            continue
        for dotted in _DOTTED.get(name, ()):
            inner = getattr(child, dotted.partition(".")[2], None)
            if isinstance(inner, nn.Module) and (linear := linear_layer(inner)) is not None:
                found[dotted] = linear
    return found


def _attention(block: _Block) -> Iterator[Structure]:
    match = attention_names(block.module, block.linears)
    if match is None:
        return
    names, output = match
    value_size = _size(block.module, VALUE_SIZES)
    head_dim = value_size if names.mixed and value_size else _head_dim(block)
    value_dim = value_size or head_dim
    heads = _whole(block.inputs(output), value_dim, f"{block.place(output)}.in_features", block.path)
    projections = [Projection("o_proj", block.place(output), "in", heads, value_dim)]
    if not names.mixed:
        projections = [*_heads(block, names, heads, head_dim, value_dim), *projections]
    partial = names.mixed and f"q, k and v are not read off {block.place(names.k)}: {names.mixed}"
    yield Structure("attention", block.path, layer_index(block.path), heads, tuple(projections), partial)


def _heads(block: _Block, names: AttentionNames, heads: int, head_dim: int, value_dim: int) -> Iterator[Projection]:
    """q, k and v. A q of twice the size holds each head's gate after its query (Qwen3-Next)."""
    groups = _groups(block, names, heads, head_dim, value_dim)
    gated = names.q != names.k and block.outputs(names.q) == 2 * heads * head_dim
    widths = {"q_proj": 2 * head_dim if gated else head_dim, "k_proj": head_dim, "v_proj": value_dim}
    modules = {"q_proj": names.q, "k_proj": names.k, "v_proj": names.v}
    units = {"q_proj": heads, "k_proj": groups, "v_proj": groups}
    yield from _stack(block, modules, units, widths)


def _groups(block: _Block, names: AttentionNames, heads: int, head_dim: int, value_dim: int) -> int:
    """How many key-value heads there are, by the rows of k's layer, which may hold q before k, and v after it."""
    rows = block.outputs(names.k) - (heads * head_dim if names.q == names.k else 0)
    what = f"{block.place(names.k)}.out_features"
    if names.v == names.k:
        what = f"the key and value part of {what}"
        groups = _whole(rows, head_dim + value_dim, what, block.path, "2 * head_dim")
    else:
        groups = _whole(rows, head_dim, what, block.path)
    _whole(heads, groups, "the number of query heads", block.path, "the number of key-value heads")
    return groups


def _mlp(block: _Block) -> Iterator[Structure]:
    names = mlp_names(block.linears)
    if names is None:
        return
    channels = block.inputs(names.down)
    modules = {"gate_proj": names.gate, "up_proj": names.up} if names.gate else {"up_proj": names.up}
    projections = [
        *_stack(block, modules, dict.fromkeys(modules, channels), dict.fromkeys(modules, 1)),
        Projection("down_proj", block.place(names.down), "in", channels, 1),
    ]
    yield Structure("mlp", block.path, layer_index(block.path), channels, tuple(projections))


def _stack(block: _Block, names: dict[str, str], units: dict[str, int], widths: dict[str, int]) -> Iterator[Projection]:
    """The output-side projections, one after the other where they share a fused layer; they must fill each layer."""
    filled = dict.fromkeys(names.values(), 0)
    for canonical, name in names.items():
        yield Projection(canonical, block.place(name), "out", units[canonical], widths[canonical], filled[name])
        filled[name] += units[canonical] * widths[canonical]
    for name, size in filled.items():
        if block.outputs(name) != size:
            raise S2FTError(
                f"{block.place(name)} has {block.outputs(name)} output channels; looked for {size}, which is what its "
                f"coupled projections in {block.path} imply. s2ft cannot read this structure; name other target_modules."
            )


def _head_dim(block: _Block) -> int:
    """From the attention module itself, else from the config nearest to it."""
    value = _size(block.module, HEAD_SIZES)
    config = _nearest_config(block.model, block.path)
    if value is None and config is not None:
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        value = getattr(config, "head_dim", None)
        if value is None and getattr(config, "num_attention_heads", None):
            value = config.hidden_size // config.num_attention_heads
    if not isinstance(value, int):
        raise S2FTError(
            f"{block.path} has the projections of an attention block, but no size of a head: looked for head_dim on the "
            "module, and for head_dim, or hidden_size and num_attention_heads, in the model's config"
        )
    return value


def _size(module: nn.Module, attributes: tuple[str, ...]) -> int | None:
    """The first of these attributes that the module, or a child of it (BERT's `self`), has as a number."""
    values = (getattr(part, name, None) for part in (module, *module.children()) for name in attributes)
    return next((value for value in values if isinstance(value, int)), None)


def _nearest_config(model: nn.Module, path: str) -> Any:
    """The config of the module, else of the nearest one around it: a vision tower has its own."""
    parts = path.split(".")
    around = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    configs = (getattr(model.get_submodule(place), "config", None) for place in around)
    return next((config for config in configs if config is not None), None)


def _whole(total: int, part: int, what: str, path: str, unit: str = "head_dim") -> int:
    """How many times `part` goes into `total`, which must be a whole number."""
    if part <= 0 or total <= 0 or total % part:
        raise S2FTError(
            f"{path}: {what} is {total}, which is no multiple of {unit} = {part}; s2ft cannot read its heads"
        )
    return total // part
