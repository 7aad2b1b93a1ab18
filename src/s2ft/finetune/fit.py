"""What fits on which devices: memory per device of a run of S²FT, computed from a model's configuration alone.

    weights       2 bytes a parameter (bf16), or what quantisation leaves; with FSDP2 and ZeRO-3 the device's share, and what is
                  whole for a while: two blocks, embedding and head
    deltas        4 bytes (fp32), and 2 for the copy in bf16 that a pass computes with
    gradients     4 bytes; DDP holds a second copy in its buckets
    optimizer     8 bytes: Adam's two moments
    activations   what autograd saves in a pass through the model on device meta (`runtime/memory.py`); with checkpointing the
                  inputs of the blocks, and what one block saves
    head          logits of a tile of TRL's fused head, and their gradient, fp32

Deltas, gradients and optimizer are divided as the engine divides them. Activations are those of slices beside their layers; in
place (one process, DDP) saves less. `RESERVED` is set aside for the rest: libraries, buffers of communication, temporaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd import Function
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from s2ft.finetune.machines import Machine
from s2ft.finetune.options import TrainOptions
from s2ft.format.config import S2FTConfig
from s2ft.layer.linears import layer_stack, linear_layer
from s2ft.runtime.memory import own_tensors, saved_bytes
from s2ft.selection.coverage import parameter_counts
from s2ft.tuner.model import S2FTModel  # noqa: F401 - PEFT knows the method from here on

WEIGHT, DELTA, COPY, GRADIENT, MOMENTS = 2, 4, 2, 4, 8  # bytes for each parameter
QUANTISED = {
    "nf4": 0.5 + 4 / 64,
    "int8": 1.0,
}  # bytes for each parameter of the blocks' linear layers; nf4: a scale for 64
RESERVED = 2.5e9  # bytes on each device
HEAD_TILE = 4096  # tokens
_QUANTISES = "quantize" in TrainOptions.model_fields
_COUNTED = "s2ft_counted"  # the attention of the pass on device meta
_BATCHES = [64, 32, 16, 8, 4, 2, 1]  # rows on a device


@dataclass(frozen=True)
class Sizes:
    """Of a model and its adapter, in parameters and bytes."""

    parameters: int
    linear: int  # parameters of the blocks' linear layers, which are quantised
    block: int  # parameters of the largest block
    outside: int  # parameters outside the blocks
    trained: int
    blocks: int
    width: int  # of the blocks' input
    vocabulary: int
    activations: int  # bytes that a row of the batch keeps for backward, head left out


@dataclass(frozen=True)
class Way:
    """An engine and what of a run it changes."""

    engine: str
    name: str
    divides_weights: bool = False
    divides_trained: bool = False
    buckets: bool = False  # a second copy of the gradients


WAYS = (
    Way("one process", "one GPU"),
    Way("ddp", "DDP", buckets=True),
    Way("zero2", "ZeRO-2", divides_trained=True),
    Way("fsdp2", "FSDP2", divides_weights=True, divides_trained=True),
    Way("zero3", "ZeRO-3", divides_weights=True, divides_trained=True),
)


@dataclass(frozen=True)
class Fit:
    """Bytes per device of a run in one way."""

    engine: str
    name: str
    quantised: str | None
    checkpointing: bool
    batch_size: int
    weights: float
    deltas: float
    gradients: float
    optimizer: float
    activations: float
    head: float

    @property
    def total(self) -> float:
        """With `RESERVED`."""
        parts = (self.weights, self.deltas, self.gradients, self.optimizer, self.activations, self.head)
        return sum(parts) + RESERVED

    @property
    def card(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "reserved": RESERVED, "total": self.total}


def measure(model: PreTrainedModel, config: S2FTConfig, length: int) -> Sizes:
    """The sizes of a model on device meta, and of an adapter of this config for it.

    Args:
        model: From `empty_model`; it gets the adapter, and an attention that only counts.
        config: Of a strategy that reads no weights, which are not there: how many channels there are is what counts.
        length: Tokens of a row.
    """
    counts = parameter_counts(model)
    places = {name: layer_stack(name) for name in counts}
    by_block: dict[tuple[str, int], int] = {}
    for name, place in places.items():
        if place is not None:
            by_block[place] = by_block.get(place, 0) + counts[name]
    linear = sum(counts[name] for name in counts if places[name] and _is_linear(model, name))
    text = model.config.get_text_config()
    tuned = get_peft_model(model, config)
    return Sizes(
        parameters=sum(counts.values()),
        linear=linear,
        block=max(by_block.values(), default=0),
        outside=sum(counts[name] for name in counts if places[name] is None),
        trained=sum(parameter.numel() for parameter in tuned.parameters() if parameter.requires_grad),
        blocks=len(by_block),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        activations=_activations(tuned, length),
    )


def fit(
    sizes: Sizes, way: Way, devices: int, batch_size: int, length: int, checkpointing: bool, quantised: str | None
) -> Fit:
    """Memory per device."""
    share = devices if way.divides_trained else 1
    tokens = batch_size * length
    stored = WEIGHT * (sizes.parameters - sizes.linear) + QUANTISED.get(quantised or "", WEIGHT) * sizes.linear
    whole = WEIGHT * (2 * sizes.block + sizes.outside)  # the block that runs and the next one, embedding and head
    tile = sizes.vocabulary * min(tokens, HEAD_TILE)
    return Fit(
        engine=way.engine,
        name=way.name,
        quantised=quantised,
        checkpointing=checkpointing,
        batch_size=batch_size,
        weights=stored / devices + whole if way.divides_weights else stored,
        deltas=sizes.trained * (DELTA / (share if way.divides_weights else 1) + COPY),
        gradients=sizes.trained * GRADIENT * ((2 if way.buckets else 1) / share),
        optimizer=sizes.trained * MOMENTS / share,
        activations=_kept(sizes, batch_size, length, checkpointing),
        head=2 * 4 * tile,
    )


def fits(sizes: Sizes, machine: Machine, length: int, batch_size: int | None = None) -> Iterator[tuple[Fit, bool]]:
    """Each way with the largest batch that it has room for (powers of two, to 64), or with one row; and whether it fits.

    Args:
        batch_size: Take this one.
    """
    tried = [batch_size] if batch_size else _BATCHES
    for way, quantised, checkpointing in _ways(machine.devices):
        for size in tried:
            found = fit(sizes, way, machine.devices, size, length, checkpointing, quantised)
            if found.total <= machine.bytes:
                break
        yield found, found.total <= machine.bytes


def best(found: list[tuple[Fit, bool]]) -> Fit | None:
    """What to take of what fits: whole weights before divided ones, nothing computed twice, then plain weights."""
    order = {way.engine: place for place, way in enumerate(WAYS)}
    fitting = [one for one, is_fitting in found if is_fitting]
    return min(fitting, key=lambda one: (one.checkpointing, one.quantised is not None, order[one.engine]), default=None)


def _ways(devices: int) -> Iterator[tuple[Way, str | None, bool]]:
    for way in WAYS:
        if (way.engine == "one process") != (devices == 1):
            continue
        for quantised in (None, *QUANTISED) if _QUANTISES and not way.divides_trained else (None,):
            for checkpointing in (False, True):
                yield way, quantised, checkpointing


def _kept(sizes: Sizes, batch_size: int, length: int, checkpointing: bool) -> float:
    if not checkpointing:
        return batch_size * sizes.activations
    inputs = WEIGHT * sizes.blocks * sizes.width * length
    return batch_size * (inputs + sizes.activations / max(1, sizes.blocks))


def _is_linear(model: nn.Module, name: str) -> bool:
    return linear_layer(model.get_submodule(name.rpartition(".")[0])) is not None


def _activations(model: Any, length: int) -> int:
    """What a row more keeps for backward until the head; what is kept once, however many there are, is no part of it."""

    def kept(rows: int) -> int:
        ids = torch.zeros((rows, length), dtype=torch.long, device="meta")
        return saved_bytes(lambda: _hidden(model, ids), own_tensors(model))

    with _counted_attention(model.get_base_model()):
        return kept(2) - kept(1)


def _hidden(model: Any, ids: Tensor) -> Tensor:  # [rows, length] → [rows, length, hidden_size]
    backbone = model.get_base_model().base_model
    hidden: Tensor = backbone(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


@contextmanager
def _counted_attention(model: Any) -> Iterator[None]:
    """Inside, attention saves what flash attention does; on device meta torch would take the one that saves all weights."""
    ALL_ATTENTION_FUNCTIONS[_COUNTED] = _counted
    ALL_MASK_ATTENTION_FUNCTIONS[_COUNTED] = lambda *args, **kwargs: None
    model.set_attn_implementation(_COUNTED)
    try:
        yield
    finally:
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            del functions[_COUNTED]


def _counted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    return _Saving.apply(query, key, value).transpose(1, 2).contiguous(), None


class _Saving(Function):
    """Saves what flash attention saves: q, k, v, the output, and one fp32 number for each query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # [rows, heads, length, head_dim]
        """Returns something of the output's shape."""
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output
