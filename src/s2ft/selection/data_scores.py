"""Scores that read data: activation, product, gradient, saliency.

The paper leaves open how scores combine over tokens and batches. Taken here: over tokens the root mean square without
padding; over batches the root of the sum of squared batch gradients, which cannot cancel; saliency, whose terms have
signs, is summed over a batch first and is then combined likewise.

An encoder and its decoder have each their own padding: a decoder's is told by `decoder_attention_mask`, else by the labels.

What an expert feeds into its down is counted with its routing weight, over all tokens: one that is sent few of them has a small
score, which is how `allocation="global"` splits a budget by the router's load.

All keep running sums only, and `gradient` frees each weight's gradient as soon as it is summed. The model is in evaluation
mode and no parameter wants a gradient when a score is called (`selection/scores.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.layer.expert_backprop import Gate
from s2ft.layer.experts import expert_rows
from s2ft.layer.linears import as_matrix, features, is_quantised, weight_of
from s2ft.layer.routing import Routing
from s2ft.layer.stacked import Experts, StackedLinear
from s2ft.selection.towers import towers
from s2ft.selection.units import EXPERTS, Projection, Structure
from s2ft.selection.weight_scores import Batch, Scores, by_weight, channel_squares, linear_of, root, unit_sums

_IGNORED = -100  # the label of tokens that the loss leaves out
_INPUT, _DECODER = "input", "decoder"  # whose padding a mask tells


def by_activation(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """The root mean square of each unit's activations on their way into o or down (S²FT-A)."""
    sums = _zeros(structures)
    tokens = dict.fromkeys(sums, 0)
    reads = _readings(structures, model)
    masks: dict[str, Tensor] = {}

    def add(structure: Structure, x: Tensor) -> None:  # x: [*, in_features]
        projection = _fed(structure)
        _check_whole(x, projection, model)
        mask = masks.get(reads[structure.key])
        rows = x.flatten(0, -2)  # some models (OPT) flatten them before the layer
        kept = rows[mask.flatten()] if mask is not None and mask.numel() == len(rows) else rows
        squares = kept.detach().float().square().sum(0, dtype=torch.float64).cpu()
        sums[structure.key] += unit_sums(squares[projection.channels], structure, projection)
        tokens[structure.key] += len(kept)

    def add_experts(own: list[Structure], experts: Experts, inputs: list[Tensor]) -> None:
        squares, count = _expert_squares(experts, inputs, masks.get(reads[own[0].key]))
        for structure in own:
            sums[structure.key] += squares[_number(structure)]
            tokens[structure.key] += count

    with ExitStack() as stack, torch.no_grad():
        for s in _dense(structures):
            hook = linear_of(_fed(s), model).register_forward_pre_hook(lambda _, args, s=s: add(s, args[0]))
            stack.callback(hook.remove)
        for own in _stacks(structures):
            experts = _experts_of(own, model)
            hook = experts.module.register_forward_pre_hook(
                lambda _, args, kwargs, own=own, experts=experts: add_experts(own, experts, [*args, *kwargs.values()]),
                with_kwargs=True,
            )
            stack.callback(hook.remove)
        for batch in _on_device(batches, model):
            masks = _masks(batch)
            model(**batch)
    if not any(tokens.values()):
        raise S2FTError("the calibration data holds no batch with a token")
    _check_reached(name for name, count in tokens.items() if not count)
    return {name: root(total / tokens[name]) for name, total in sums.items()}


def _readings(structures: list[Structure], model: nn.Module) -> dict[str, str]:
    """Structure → whose tokens it sees: the model's own, its decoder's beside an encoder, or those of a tower."""
    decoder = _decoder(model)
    places = {**towers(model), **{path: _DECODER for path, module in model.named_modules() if module is decoder}}

    def reading(path: str) -> str:
        return next((what for place, what in places.items() if path.startswith(f"{place}.")), _INPUT)

    return {structure.key: reading(_fed(structure).module) for structure in structures}


def _decoder(model: Any) -> nn.Module | None:
    """The decoder of a model that has an encoder too; transformers' `get_decoder` may give what holds both, or no decoder."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = model.get_encoder()
    decoder: nn.Module = model.get_decoder()
    if all(module is not encoder for module in decoder.modules()):
        return decoder
    return None if decoder is model else _decoder(decoder)


def _masks(batch: dict[str, Any]) -> dict[str, Tensor]:  # [rows, tokens of a row] each
    """What of each reading is no padding, as far as the batch says."""
    given = {"attention_mask": _INPUT, "decoder_attention_mask": _DECODER}
    masks = {what: batch[name].bool() for name, what in given.items() if _is_table(batch.get(name))}
    if _DECODER in masks:
        return masks
    if _is_table(batch.get("labels")):
        masks[_DECODER] = batch["labels"] != _IGNORED
    elif _INPUT in masks and not {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys():
        masks[_DECODER] = masks[_INPUT]  # the model makes the decoder's input of its own
    return masks


def _is_table(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2


def by_product(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """Weight times activation (S²FT-S)."""
    activation = by_activation(structures, model, batches)
    return {name: activation[name] * weight for name, weight in by_weight(structures, model).items()}


def by_gradient(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """The norm of the loss's gradient to each unit's weights, squared and summed over batches (S²FT-G)."""
    sums = _zeros(structures)
    idle = set(sums)

    def add(uses: list[tuple[Structure, Projection]], gradient: Tensor) -> None:  # [out_features, in_features]
        for structure, projection in uses:
            idle.discard(structure.key)
            sums[structure.key] += unit_sums(channel_squares(gradient, projection), structure, projection)

    with ExitStack() as stack:
        for layer, uses in _by_weight_of(model, ((s, p) for s in structures for p in s.projections)):
            _on_weight_gradient(layer, partial(add, uses), stack)
        _backward(model, batches)
    _check_reached(name for name in sums if name in idle)
    return {name: root(total) for name, total in sums.items()}


def _on_weight_gradient(layer: nn.Module, add: Callable[[Tensor], None], stack: ExitStack) -> None:
    """Calls `add` with each gradient of the layer's weight, [out_features, in_features], which is then freed.

    A quantised weight can have none: it is made of the layer's input and of the gradient of its output.
    """

    def take(parameter: Tensor) -> None:  # the layer's weight, as it lies there
        assert parameter.grad is not None
        gradient, parameter.grad = as_matrix(layer, parameter.grad), None
        add(gradient)

    def watch(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        x = args[0].detach().flatten(0, -2)
        y = y if y.requires_grad else y.detach().requires_grad_()  # nothing below it wants a gradient
        y.register_hook(lambda grad: add(grad.flatten(0, -2).T @ x.to(grad.dtype)))
        return y

    if is_quantised(layer):
        stack.callback(layer.register_forward_hook(watch).remove)
    else:
        _on_gradient(layer, take, stack)


def by_saliency(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> Scores:
    """What the loss would change by, to first order, if the unit were silent: |Σ h · ∂loss/∂h| over the tokens of a batch."""
    sums = _zeros(structures)
    idle = set(sums)

    def watch(structure: Structure, args: tuple[Any, ...]) -> tuple[Any, ...]:
        projection = _fed(structure)
        _check_whole(args[0], projection, model)
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # nothing below it wants a gradient
        values = x.detach()

        def add(gradient: Tensor) -> None:  # [*, in_features]
            idle.discard(structure.key)
            effects = (values.float() * gradient.float()).flatten(0, -2).sum(0, dtype=torch.float64).cpu()
            sums[structure.key] += unit_sums(effects[projection.channels], structure, projection).square()

        x.register_hook(add)
        return (x, *args[1:])

    def collect(layer: nn.Module, own: list[Structure]) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:  # [experts, hidden, channels], as it lies there
            assert parameter.grad is not None
            effects = as_matrix(layer, parameter.detach()).float() * as_matrix(layer, parameter.grad).float()
            parameter.grad = None
            by_channel = effects.sum(1, dtype=torch.float64).cpu()  # [experts, channels]
            for structure in own:
                idle.discard(structure.key)
                sums[structure.key] += by_channel[_number(structure)].square()

        return add

    with ExitStack() as stack:
        for s in _dense(structures):
            hook = linear_of(_fed(s), model).register_forward_pre_hook(lambda _, args, s=s: watch(s, args))
            stack.callback(hook.remove)
        stacked = ((s, _fed(s)) for s in structures if s.kind == EXPERTS)
        # Of these, h · ∂loss/∂h, summed over tokens, is W · ∂loss/∂W, summed over the outputs
        for layer, uses in _by_weight_of(model, stacked):
            _on_gradient(layer, collect(layer, [s for s, _ in uses]), stack)
        _backward(model, batches)
    _check_reached(name for name in sums if name in idle)
    return {name: root(total) for name, total in sums.items()}


def _zeros(structures: list[Structure]) -> dict[str, Tensor]:  # each [units], float64
    return {s.key: torch.zeros(s.units, dtype=torch.float64) for s in structures}


def _dense(structures: list[Structure]) -> list[Structure]:
    return [structure for structure in structures if structure.kind != EXPERTS]


def _stacks(structures: list[Structure]) -> list[list[Structure]]:
    """The structures of each stack of experts."""
    stacks: dict[str, list[Structure]] = {}
    for structure in structures:
        if structure.kind == EXPERTS:
            stacks.setdefault(_fed(structure).module, []).append(structure)
    return list(stacks.values())


def _number(structure: Structure) -> int:
    """Which of its stack's experts it is."""
    return int(structure.path.rpartition(".")[2])


def _experts_of(own: list[Structure], model: nn.Module) -> Experts:
    layer = linear_of(_fed(own[0]), model)
    assert isinstance(layer, StackedLinear)
    return layer.experts


def _expert_squares(
    experts: Experts,
    inputs: list[Tensor],  # what the experts' module is called with
    mask: Tensor | None,  # [rows, tokens of a row]: what is no padding
) -> tuple[Tensor, int]:  # [experts, channels], float64, on the CPU; how many tokens there were
    """The sums over tokens of what each channel feeds into down, squared."""
    x, *routed = inputs
    routing = Routing.of(experts, x, *routed)
    channels = Gate.apply(expert_rows(experts, x, routing), routing.weights, experts.activation).float().square()
    tokens = len(x) // experts.count if experts.is_sorted else len(x)
    kept = tokens
    if mask is not None and mask.numel() == tokens:
        channels = channels * mask.flatten()[routing.tokens % tokens, None]
        kept = int(mask.sum())
    sums = channels.new_zeros(experts.count, experts.channels, dtype=torch.float64)
    return sums.index_add_(0, routing.owners, channels.double()).cpu(), kept


def _on_gradient(layer: nn.Module, collect: Callable[[Tensor], None], stack: ExitStack) -> None:
    """Calls `collect` with the layer's weight whenever it has got its gradient."""
    weight = weight_of(layer)
    weight.requires_grad_(True)
    stack.callback(weight.register_post_accumulate_grad_hook(collect).remove)


def _fed(structure: Structure) -> Projection:
    """The projection that the structure's units feed into: o or down, or an uncoupled linear layer."""
    return next(p for p in structure.projections if p.side == "in")


def _by_weight_of(
    model: nn.Module, projections: Iterable[tuple[Structure, Projection]]
) -> Iterator[tuple[nn.Module, list[tuple[Structure, Projection]]]]:
    """A layer of each weight, with the projections in it: a fused layer holds several, and layers may share one (Zamba)."""
    uses: dict[Any, list[tuple[Structure, Projection]]] = {}
    for structure, projection in projections:
        layer = linear_of(projection, model)
        weight = projection.module if is_quantised(layer) else weight_of(layer)  # no gradient of its own, or one
        uses.setdefault(weight, []).append((structure, projection))
    for parts in uses.values():
        yield linear_of(parts[0][1], model), parts


def _check_reached(idle: Iterable[str]) -> None:
    """All units of a structure that never ran would score alike, and the lowest be chosen."""
    raise_together(
        f"{name.rpartition(':')[0]} never runs on the calibration data (a cross-attention without what it attends to, an "
        "expert that no token is sent to); leave it out by target_modules or exclude_modules, or choose strategy='random'"
        for name in idle
    )


def _check_whole(x: Tensor, projection: Projection, model: nn.Module) -> None:  # x: [*, in_features]
    """The units are counted in the whole input; under tensor parallelism each process has a part of it."""
    expected = features(linear_of(projection, model))[0]
    if x.shape[-1] != expected:
        raise S2FTError(
            f"{projection.module} gets {x.shape[-1]} of its {expected} input channels in this process (tensor parallelism); "
            "choose channels before the model is split, or strategy='random'"
        )


def _backward(model: nn.Module, batches: Iterable[Batch]) -> None:
    """The loss of every batch, backwards; hooks take what it leaves."""
    seen = 0
    with torch.enable_grad():
        for batch in _on_device(batches, model):
            _loss(model, batch).backward()
            seen += 1
    if not seen:
        raise S2FTError("the calibration data holds no batch")


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:  # scalar
    """The model's own loss; labels that are not given are the input without padding."""
    if "labels" not in batch:
        if "input_ids" not in batch:
            raise S2FTError(f"the strategy needs a loss: a batch with {sorted(batch)} has neither labels nor input_ids")
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, _IGNORED)
        batch = {**batch, "labels": labels}
    loss: Tensor = model(**batch).loss
    return loss


def _on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise S2FTError(f"a batch is a {type(batch).__name__}; batches are mappings that the model is called with")
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
