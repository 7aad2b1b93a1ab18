"""The coupled structures of a transformer block (`selection/units.py`), read off the live model.

A structure is recognised by its projections' names (`selection/families.py`) and confirmed by their shapes; no class of any
model is named. Where q, k and v cannot be told apart, the structure has o alone: its heads can be chosen, but not
permuted; and so can the channels that a mixer (Mamba, linear attention) feeds into its last layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from s2ft.common.errors import S2FTError
from s2ft.layer.linears import features, layer_index, linear_layer
from s2ft.layer.stacked import DOWN, Experts, find_experts
from s2ft.selection.families import (
    BY_GROUP,
    HEAD_COUNTS,
    HEAD_GATES,
    HEAD_SIZES,
    MIXER,
    VALUE_SIZES,
    AttentionNames,
    MLPNames,
    attention_names,
    dotted_names,
    mixer_names,
    mlp_names,
)
from s2ft.selection.units import EXPERTS, Axes, Projection, Structure


@dataclass(frozen=True)
class Reading:
    """What `read_structures` found."""

    structures: list[Structure]
    unreadable: dict[str, str]  # path of a module with the projections of a structure → why it is none all the same


def find_structures(model: nn.Module) -> list[Structure]:
    """The structures of `model`, in its own order; adapted layers are seen through to their base.

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
        if linear_layer(module) is not None or path.endswith(".base_layer"):
            continue
        try:
            if (experts := find_experts(module)) is not None:
                reading.structures.extend(_experts(path, experts))
                continue
        except S2FTError as error:
            reading.unreadable[path] = str(error)
        if not (linears := _linears_of(module)):
            continue
        for read in (_attention_or_mixer, _mlp):
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


@dataclass(frozen=True)
class _Part:
    """An output-side projection, before its place in its layer is known."""

    name: str  # canonical
    layer: str
    units: int
    width: int


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


# ---- attention -------------------------------------------------------------------------------------------------------


def _attention_or_mixer(block: _Block) -> Iterator[Structure]:
    if (mixer := mixer_names(block.linears)) is not None:
        channels = block.inputs(mixer.out)
        out = Projection("out_proj", block.place(mixer.out), "in", channels, 1)
        yield Structure("mixer", block.path, layer_index(block.path), channels, (out,), MIXER)
    elif (match := attention_names(block.module, block.linears)) is not None:
        yield _attention(block, *match)


def _attention(block: _Block, names: AttentionNames, output: str) -> Structure:
    value_size = _size(block.module, VALUE_SIZES)
    head_dim = value_size if (names.mixed or names.latent) and value_size else _head_dim(block, output)
    value_dim = value_size or head_dim
    if names.paired:
        head_dim, value_dim = 2 * head_dim, 2 * value_dim
    heads = _whole(block.inputs(output), value_dim, f"{block.place(output)}.in_features", block.path)
    projections = [Projection("o_proj", block.place(output), "in", heads, value_dim)]
    if not names.mixed:
        parts = _heads(block, names, heads, head_dim, value_dim)
        groups = next(part.units for part in parts if part.name == "k_proj")
        runs = groups if names.runs == BY_GROUP else int(names.runs)
        gates = _gate(block, names, heads, value_dim)
        projections = [*_stack(block, parts, runs, names.paired), *gates, *projections]
    partial = names.mixed and f"q, k and v are not read off {block.place(names.k or output)}: {names.mixed}"
    return Structure("attention", block.path, layer_index(block.path), heads, tuple(projections), partial)


def _heads(block: _Block, names: AttentionNames, heads: int, head_dim: int, value_dim: int) -> list[_Part]:
    """q, k and v, in the order of a layer that they share.

    A q of twice the size holds each head's gate after its query (Qwen3-Next).
    """
    assert names.q is not None
    assert names.k is not None
    if names.latent:
        groups, query_dim, head_dim = (
            heads,
            block.outputs(names.q) // heads,
            block.outputs(names.k) // heads - value_dim,
        )
    else:
        groups = _groups(block, names, heads, head_dim, value_dim)
        gated = names.q != names.k and block.outputs(names.q) == 2 * heads * head_dim
        query_dim = 2 * head_dim if gated else head_dim
    parts = {
        "q": _Part("q_proj", names.q, heads, query_dim),
        "k": _Part("k_proj", names.k, groups, head_dim),
    }
    if names.v is not None:
        parts["v"] = _Part("v_proj", names.v, groups, value_dim)
    return [parts[letter] for letter in names.order if letter in parts]


def _groups(block: _Block, names: AttentionNames, heads: int, head_dim: int, value_dim: int) -> int:
    """How many key-value heads there are, by the rows of k's layer, which may hold q before k, and v after it."""
    assert names.k is not None
    rows = block.outputs(names.k) - (heads * head_dim if names.q == names.k else 0)
    what = f"{block.place(names.k)}.out_features"
    if names.v == names.k:
        what = f"the key and value part of {what}"
        groups = _whole(rows, head_dim + value_dim, what, block.path, "2 * head_dim")
    else:
        groups = _whole(rows, head_dim, what, block.path)
    _whole(heads, groups, "the number of query heads", block.path, "the number of key-value heads")
    return groups


def _gate(block: _Block, names: AttentionNames, heads: int, value_dim: int) -> Iterator[Projection]:
    """What scales each head on its way into o, by one number for the head or for each of its channels."""
    for name in HEAD_GATES:
        if name in block.linears and name not in names.needed:
            width, rest = divmod(block.outputs(name), heads)
            if not rest and width in (1, value_dim):
                yield Projection("head_gate", block.place(name), "out", heads, width)


# ---- MLP -------------------------------------------------------------------------------------------------------------


def _mlp(block: _Block) -> Iterator[Structure]:
    rows = list(mlp_names(block.linears))
    if not rows or mixer_names(block.linears):
        return
    names = next((row for row in rows if _fills(block, row)), rows[0])
    channels = block.inputs(names.down)
    parts = [_Part("gate_proj", names.gate, channels, 1)] if names.gate else []
    parts.append(_Part("up_proj", names.up, channels, 1))
    down = Projection("down_proj", block.place(names.down), "in", channels, 1)
    yield Structure("mlp", block.path, layer_index(block.path), channels, (*_stack(block, parts), down))


def _fills(block: _Block, names: MLPNames) -> bool:
    """Whether down reads as many channels as up gives: half of them, where the gate is in the same layer."""
    return block.outputs(names.up) == block.inputs(names.down) * (2 if names.gate == names.up else 1)


# ---- stacked experts -------------------------------------------------------------------------------------------------


def _experts(path: str, experts: Experts) -> Iterator[Structure]:
    """A structure for each expert, named by its number; its projections are parts of the parameters of all."""
    size = experts.channels
    for number in range(experts.count):
        start = number * experts.rows
        if not experts.is_gated:
            ups = [Projection("up_proj", f"{path}.{experts.up}", "out", size, 1, start)]
        else:
            axes = ((size, 2), (1, 1)) if experts.is_interleaved else ()
            second = start + (1 if experts.is_interleaved else size)
            places = (("gate_proj", start), ("up_proj", second))
            ups = [Projection(name, f"{path}.{experts.up}", "out", size, 1, at, axes) for name, at in places]
        down = Projection("down_proj", f"{path}.{DOWN}", "in", size, 1, number * size)
        yield Structure(EXPERTS, f"{path}.{number}", layer_index(path), size, (*ups, down))


# ---- layers ----------------------------------------------------------------------------------------------------------


def _stack(block: _Block, parts: list[_Part], runs: int = 1, paired: bool = False) -> Iterator[Projection]:
    """The output-side projections; those that share a layer one after the other, in each of its runs. They must fill it."""
    sizes: dict[str, int] = {}
    for part in parts:
        sizes[part.layer] = sizes.get(part.layer, 0) + part.units * part.width
    filled = dict.fromkeys(sizes, 0)
    for part in parts:
        axes = _halves(part) if paired else _runs(part, runs, sizes[part.layer])
        offset = filled[part.layer]
        yield Projection(part.name, block.place(part.layer), "out", part.units, part.width, offset, axes)
        filled[part.layer] += part.units // runs * part.width
    for name, size in sizes.items():
        if block.outputs(name) != size:
            raise S2FTError(
                f"{block.place(name)} has {block.outputs(name)} output channels; looked for {size}, which is what its "
                f"coupled projections in {block.path} imply. s2ft cannot read this structure; name other target_modules."
            )


def _runs(part: _Part, runs: int, size: int) -> Axes:
    """How the part lies in a layer of `size` channels that holds a share of it in each run; () if in one piece."""
    share = part.units // runs
    return () if size == part.units * part.width else ((runs, size // runs), (share, part.width), (part.width, 1))


def _halves(part: _Part) -> Axes:
    """A unit has its first half among the first half of the rows, and its second among the second."""
    half = part.width // 2
    return ((part.units, half), (2, part.units * half), (half, 1))


def _head_dim(block: _Block, output: str) -> int:
    """From the attention module itself, else from the config nearest to it."""
    value = _size(block.module, HEAD_SIZES)
    if value is None and (count := _size(block.module, HEAD_COUNTS)):
        value = block.inputs(output) // count
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
