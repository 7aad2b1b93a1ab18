"""How important a head or an FFN channel is: the scores that selection ranks (S²FT paper, appendix D).

    random      R   a hash of (seed, structure, unit), uniform in [0, 1)
    weight      W   ‖the unit's weights in all projections of its structure‖
    activation  A   ‖what the unit feeds into o or down‖, root mean square over tokens
    product     S   W · A
    gradient    G   ‖∂loss/∂(the unit's weights)‖, squared and summed over the batches
    lift            ‖the unit's part of the best rank-r approximation of each weight‖
    saliency        |Σ h · ∂loss/∂h|, over the tokens, of what the unit feeds into o or down

`lift` is LIFT's score of entries (arXiv 2506.00772), taken to channels: what a weight is mostly made of, without data.
`saliency` is what the loss would change by, to first order, if the unit were silent; no gradient of a weight is needed.

The paper leaves open how scores combine over q, k, v and o, over a head's dimensions, and over tokens. Taken here: the
Frobenius norm over all weights of the unit, in every projection of its structure, trained or not (a key-value head's
weights count for each query head of its group); over tokens the root mean square without padding; over batches the root
of the sum of squared batch gradients, which cannot cancel; saliency, whose terms have signs, is summed over a batch
first and is then combined likewise. LIFT's rank is a 32nd of each weight's smaller side: 128 for a width of 4096. All
that read data keep running sums only, and G frees each weight's gradient as soon as it is summed.

Sums run in float64 and end in float32: what differs in the last digits between machines does not change the ranking.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.layer.linears import as_matrix, features, linear_layer, weight_matrix, why_not_plain
from s2ft.selection.structure import Projection, Structure

Scores = dict[str, NDArray[np.float32]]  # key of the structure → [units]
Batch = Mapping[str, Any]

NEEDS_DATA = ("activation", "product", "gradient", "saliency")
LIFT_RANK = 1 / 32  # of the smaller side of the weight
_CHUNK = 1 << 19  # elements squared at once: small enough to stay in a core's cache


def score_units(
    strategy: str, structures: list[Structure], model: nn.Module, batches: Iterable[Batch] | None = None, seed: int = 0
) -> Scores:
    """Scores every unit of every structure; a structure is looked up by `key(structure)`.

    Args:
        batches: What the model is called with (`model(**batch)`); read once. `labels` default to the input without
            padding.

    Raises:
        S2FTError: if the strategy needs data and there is none, or it needs weights that are not floating point.
    """
    if strategy == "random":
        return {key(s): random_scores(seed, key(s), s.units) for s in structures}
    if strategy == "weight":
        return {key(s): _root(weight_squares(s, model)) for s in structures}
    if strategy == "lift":
        return {key(s): _root(lift_squares(s, model)) for s in structures}
    if batches is None:
        raise S2FTError(
            f"strategy={strategy!r} needs data: call s2ft.select(model, config, batches) and use the config it returns"
        )
    if strategy in ("gradient", "saliency"):
        squares = gradient_squares if strategy == "gradient" else saliency_squares
        return {name: _root(sums) for name, sums in squares(structures, model, batches).items()}
    factors: Scores = {}
    if strategy == "product":  # before any data is read: weights may be refused
        factors = {key(s): _root(weight_squares(s, model)) for s in structures}
    activation = {name: _root(sums) for name, sums in activation_squares(structures, model, batches).items()}
    return {name: activation[name] * factors.get(name, np.float32(1)) for name in activation}


def key(structure: Structure) -> str:
    """Names a structure: path and kind, since one module may hold an attention and an MLP."""
    return f"{structure.path}:{structure.kind}"


def random_scores(seed: int, name: str, units: int) -> NDArray[np.float32]:  # [units] in [0, 1)
    """The same on every machine and under every version of torch and NumPy: SHAKE-128 of the seed and the name.

    Example:
        >>> random_scores(0, "mlp", 3).round(3).tolist() == random_scores(0, "mlp", 5).round(3).tolist()[:3]
        True
    """
    stream = hashlib.shake_128(f"{seed}/{name}".encode()).digest(4 * units)
    return (np.frombuffer(stream, dtype="<u4") >> 8).astype(np.float32) / np.float32(1 << 24)


def weight_squares(structure: Structure, model: nn.Module) -> Tensor:  # [units], float64
    """The squared Frobenius norm of each unit's weights in all projections."""
    total = torch.zeros(structure.units, dtype=torch.float64)
    for projection in structure.projections:
        weight = weight_matrix(_floating(projection, model))
        total += unit_sums(_channel_squares(weight.detach(), projection), projection, structure.units)
    return total


def lift_squares(structure: Structure, model: nn.Module) -> Tensor:  # [units], float64
    """The squared Frobenius norm of each unit's part of the low-rank approximations of its projections' weights."""
    total = torch.zeros(structure.units, dtype=torch.float64)
    for projection in structure.projections:
        weight = weight_matrix(_floating(projection, model)).detach()
        channels = _channels(projection)
        own = weight[channels] if projection.side == "out" else weight[:, channels]
        squares = _low_rank_squares(own.double(), over="in" if projection.side == "out" else "out")
        total += unit_sums(squares.cpu(), projection, structure.units)
    return total


def _low_rank_squares(weight: Tensor, over: str) -> Tensor:  # [out, in] → [in] or [out], float64
    """Sums of squares of the best approximation of rank `LIFT_RANK`; its factors come from the smaller Gram matrix."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    rank = max(1, round(LIFT_RANK * wide.shape[0]))
    _, vectors = torch.linalg.eigh(wide @ wide.T)  # ascending: the largest are last
    basis = vectors[:, -rank:]  # [smaller, rank]
    loads = basis.T @ wide  # [rank, larger]: the approximation is basis @ loads
    sum_over_larger = (over == "in") == (wide is weight)
    return (basis * loads.norm(dim=1)).square().sum(1) if sum_over_larger else loads.square().sum(0)


def activation_squares(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The mean square of each unit's activations on their way into o or down, or into an uncoupled linear layer."""
    inputs = _fed(structures)
    sums = {key(s): torch.zeros(s.units, dtype=torch.float64) for s in structures}
    units = {key(s): s.units for s in structures}
    tokens = dict.fromkeys(sums, 0)
    mask: Tensor | None = None

    def add(name: str, x: Tensor) -> None:  # x: [*, in_features]
        _check_whole(x, inputs[name], model)
        rows = x.flatten(0, -2)  # some models (OPT) flatten them before the layer
        kept = rows[mask.flatten()] if mask is not None and mask.numel() == len(rows) else rows
        squares = kept.detach().float().square().sum(0, dtype=torch.float64).cpu()
        sums[name] += unit_sums(squares[_channels(inputs[name])], inputs[name], units[name])
        tokens[name] += len(kept)

    with ExitStack() as stack:
        for name, projection in inputs.items():
            layer = _linear(projection, model)
            hook = layer.register_forward_pre_hook(lambda _, args, name=name: add(name, args[0]))
            stack.callback(hook.remove)
        stack.enter_context(_frozen_eval(model))
        stack.enter_context(torch.no_grad())
        for batch in _on_device(batches, model):
            padding = batch.get("attention_mask")
            mask = padding.bool() if padding is not None and padding.dim() == 2 else None
            model(**batch)
    if not any(tokens.values()):
        raise S2FTError("the calibration data holds no batch with a token")
    _check_reached(name for name, count in tokens.items() if not count)
    return {name: total / tokens[name] for name, total in sums.items()}


def gradient_squares(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The squared norm of the loss's gradient to each unit's weights, summed over batches. No weight is changed."""
    sums = {key(s): torch.zeros(s.units, dtype=torch.float64) for s in structures}
    idle = set(sums)

    def collect(layer: nn.Module, uses: list[tuple[Structure, Projection]]) -> Callable[[Tensor], None]:
        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            gradient = as_matrix(layer, parameter.grad)
            parameter.grad = None
            for structure, projection in uses:
                idle.discard(key(structure))
                sums[key(structure)] += unit_sums(_channel_squares(gradient, projection), projection, structure.units)

        return add

    with ExitStack() as stack:
        stack.enter_context(_frozen_eval(model))
        for layer, uses in _uses_by_layer(structures, model):
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.requires_grad_(True)
            stack.callback(weight.register_post_accumulate_grad_hook(collect(layer, uses)).remove)
        _backward(model, batches)
    _check_reached(name for name in sums if name in idle)
    return sums


def saliency_squares(structures: list[Structure], model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The squared first-order effect of each unit's activations on the loss, summed over batches."""
    inputs = _fed(structures)
    units = {key(s): s.units for s in structures}
    sums = {name: torch.zeros(count, dtype=torch.float64) for name, count in units.items()}
    idle = set(sums)

    def watch(name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        _check_whole(args[0], inputs[name], model)
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # nothing below it wants a gradient
        values = x.detach()

        def add(gradient: Tensor) -> None:  # [*, in_features]
            idle.discard(name)
            effects = (values.float() * gradient.float()).flatten(0, -2).sum(0, dtype=torch.float64).cpu()
            sums[name] += unit_sums(effects[_channels(inputs[name])], inputs[name], units[name]).square()

        x.register_hook(add)
        return (x, *args[1:])

    with ExitStack() as stack:
        for name, projection in inputs.items():
            layer = _linear(projection, model)
            stack.callback(layer.register_forward_pre_hook(lambda _, args, name=name: watch(name, args)).remove)
        stack.enter_context(_frozen_eval(model))
        _backward(model, batches)
    _check_reached(name for name in sums if name in idle)
    return sums


def _check_reached(idle: Iterable[str]) -> None:
    """All units of a structure that never ran would score alike, and the lowest be chosen."""
    raise_together(
        f"{name.rpartition(':')[0]} never runs on the calibration data (a cross-attention without what it attends to, an "
        "expert that no token is sent to); leave it out by target_modules or exclude_modules, or choose strategy='random'"
        for name in idle
    )


def _backward(model: nn.Module, batches: Iterable[Batch]) -> None:
    """The loss of every batch, backwards; what it leaves is taken by hooks."""
    seen = 0
    with torch.enable_grad():
        for batch in _on_device(batches, model):
            _loss(model, batch).backward()
            seen += 1
    if not seen:
        raise S2FTError("the calibration data holds no batch")


def _fed(structures: list[Structure]) -> dict[str, Projection]:
    """Structure → the projection that its units feed into: o or down, or an uncoupled linear layer."""
    return {key(s): next(p for p in s.projections if p.side == "in") for s in structures}


def _check_whole(x: Tensor, projection: Projection, model: nn.Module) -> None:
    """The units are counted in the whole input; under tensor parallelism each process has a part of it."""
    expected = features(_linear(projection, model))[0]
    if x.shape[-1] != expected:
        raise S2FTError(
            f"{projection.module} gets {x.shape[-1]} of its {expected} input channels in this process (tensor parallelism); "
            "choose channels before the model is split, or strategy='random'"
        )


def unit_sums(channels: Tensor, projection: Projection, units: int) -> Tensor:  # [units * width] → [units]
    """Sums over each unit's channels; a key-value head's sum goes to every query head of its group."""
    return channels.view(projection.units, projection.width).sum(1).repeat_interleave(units // projection.units)


def _channel_squares(weight: Tensor, projection: Projection) -> Tensor:  # [out, in] → [units * width], float64
    channels = _channels(projection)
    weight = weight[channels] if projection.side == "out" else weight[:, channels]
    return _square_sums(weight, over="in" if projection.side == "out" else "out").cpu()


def _square_sums(weight: Tensor, over: str) -> Tensor:  # [out, in] → [in] or [out], float64
    """Chunked by rows, so that the float32 copies stay in cache: 7B weights take about two seconds on two cores."""
    chunks = weight.split(max(1, _CHUNK // max(1, weight.shape[1])))
    if over == "in":
        return torch.cat([chunk.float().square().sum(1, dtype=torch.float64) for chunk in chunks])
    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for chunk in chunks:
        total += chunk.float().square().sum(0, dtype=torch.float64)
    return total


def _channels(projection: Projection) -> slice:
    return slice(projection.offset, projection.offset + projection.units * projection.width)


def _root(squares: Tensor) -> NDArray[np.float32]:
    root: NDArray[np.float32] = squares.sqrt().float().numpy()
    if not np.isfinite(root).all():
        raise S2FTError("a score is not finite: the model's weights, activations or gradients overflow or hold NaN")
    return root


def _linear(projection: Projection, model: nn.Module) -> nn.Module:
    layer = linear_layer(model.get_submodule(projection.module))
    assert layer is not None
    return layer


def _floating(projection: Projection, model: nn.Module) -> nn.Module:
    layer = _linear(projection, model)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if reason := why_not_plain(layer):
        raise S2FTError(
            f"the weight of {projection.module} {reason}; the strategies weight, product, gradient and lift read "
            "plain weights. Choose strategy='random', 'activation' or 'saliency'."
        )
    if weight.is_meta:
        raise S2FTError(f"{projection.module} has no values (device meta); only strategy='random' works without them")
    return layer


def _uses_by_layer(
    structures: list[Structure], model: nn.Module
) -> Iterator[tuple[nn.Module, list[tuple[Structure, Projection]]]]:
    uses: dict[str, list[tuple[Structure, Projection]]] = {}
    for structure in structures:
        for projection in structure.projections:
            uses.setdefault(projection.module, []).append((structure, projection))
    for parts in uses.values():
        yield _floating(parts[0][1], model), parts


def _loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    if "labels" not in batch:
        if "input_ids" not in batch:
            raise S2FTError(f"the strategy needs a loss: a batch with {sorted(batch)} has neither labels nor input_ids")
        labels = batch["input_ids"]
        if batch.get("attention_mask") is not None:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
        batch = {**batch, "labels": labels}
    loss: Tensor = model(**batch).loss
    return loss


def _on_device(batches: Iterable[Batch], model: nn.Module) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    for batch in batches:
        if not isinstance(batch, Mapping):
            raise S2FTError(f"a batch is a {type(batch).__name__}; batches are mappings that the model is called with")
        yield {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


@contextmanager
def _frozen_eval(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no parameter that wants a gradient; both, and any gradients held, are put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    model.eval()
    for parameter, _, _ in wanted:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad, gradient in wanted:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
