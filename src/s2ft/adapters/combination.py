"""Several adapters in one: the deltas of their channels, added up or resolved where they meet.

    channels of A        1 2   4
    channels of B          2 3        union 1 2 3 4: taken from A, shared, taken from B, taken from A

    sum    Δ = Σ wᵢ Δᵢ
    ties   shared channels: entries of small magnitude dropped, a sign elected, those that agree averaged (arXiv 2306.01708)
    dare   shared channels: random entries dropped, the others divided by the density, then summed (arXiv 2311.03099)

A channel that one adapter alone holds is never resolved: nothing meets there, wᵢ Δᵢ is exact. Sums run in float32 (float64
for float64 deltas); TIES and DARE are PEFT's own functions. Files (`adapters/fusion.py`) and live models share this module.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from numbers import Real
from os.path import isdir, samefile
from typing import Any, Protocol

import numpy as np
import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, disjoint_merge, prune
from torch import Tensor

from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.config import S2FTConfig
from s2ft.format.digest import agree, bases_differ_knowingly, digest_parts, join_digests
from s2ft.format.slices import Slice, all_finite

METHODS = ("sum", "ties", "dare")
DENSITY = 0.5  # of the shared entries, what TIES and DARE keep unless told otherwise

_KNOWN_OR_SAME = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
_SAME = ("modules_to_save", "trainable_token_indices")


class Source(Protocol):
    """An adapter to combine, in a file or on a model."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def config(self) -> S2FTConfig:
        """Resolved."""

    @property
    def slices(self) -> Mapping[str, Slice]:
        """Module → its trained channels."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Module → shape of its delta."""

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The module's delta."""

    def others(self) -> dict[str, Tensor]:
        """What PEFT keeps beside the slices, by name."""


@dataclass(frozen=True, eq=False)
class Combination:
    """What `combine` found possible: a config, slices, and deltas that are computed one module at a time."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    method: str
    density: float
    seed: int
    config: S2FTConfig
    slices: dict[str, Slice]

    def parts(self, module: str) -> list[tuple[float, Source]]:
        """The adapters that change `module`, with their weights."""
        return [(w, source) for w, source in zip(self.weights, self.sources, strict=True) if module in source.slices]

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The combined delta; raises `S2FTError` where a sum is too large for its dtype."""
        parts = self.parts(module)
        deltas = [source.delta(module).cpu() for _, source in parts]
        result = blend(
            self.slices[module],
            [source.slices[module] for _, source in parts],
            deltas,
            [weight for weight, _ in parts],
            *(self.method, self.density, f"{self.seed} {module}"),
        )
        if not all_finite(result):
            raise S2FTError(f"{module}: the combined delta is too large for {result.dtype}; give smaller weights")
        return result

    def others(self) -> dict[str, Tensor]:
        """What every source keeps beside its slices, the same in all."""
        return self.sources[0].others()


def combine(
    sources: Sequence[Source],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = DENSITY,
    seed: int = 0,
) -> Combination:
    """Checks that the adapters can be combined, and says what comes out; no delta is computed yet.

    Raises:
        S2FTError: with every problem: options out of range, adapters of different bases, a module whose input side one
            adapter slices and whose output side another, whole modules (`modules_to_save`) that differ.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    raise_together(_option_problems(sources, weights, method, density, seed))
    raise_together([*_config_problems(sources), *_module_problems(sources), *_other_problems(sources)])
    modules = dict.fromkeys(module for source in sources for module in source.slices)
    slices = {module: _union([s.slices[module] for s in sources if module in s.slices]) for module in modules}
    config = _combined_config(sources, slices)
    return Combination(tuple(sources), tuple(map(float, weights)), method, float(density), seed, config, slices)


def blend(
    union: Slice,
    slices: Sequence[Slice],
    deltas: Sequence[Tensor],  # each shaped by its slice, on the CPU
    weights: Sequence[float],
    method: str,
    density: float,
    draw: str,  # seeds DARE's choice
) -> Tensor:  # shaped by `union`
    """One module's deltas, combined; in the dtype that holds all of theirs.

    Example:
        >>> a, b = Slice.parse("out 1-2"), Slice.parse("out 2")
        >>> blend(a, [a, b], [torch.ones(2, 3), torch.ones(1, 3)], [1, 10], "sum", 1, "").tolist()
        [[1.0, 1.0, 1.0], [11.0, 11.0, 11.0]]
    """
    dtype = reduce(torch.promote_types, (delta.dtype for delta in deltas))
    wide = [delta.to(torch.promote_types(dtype, torch.float32)) for delta in deltas]
    dim = 1 if union.side == "in" else 0
    places = [torch.from_numpy(np.searchsorted(union.indices, chosen.indices)) for chosen in slices]
    result = _laid_out(wide[0], dim, len(union.indices), -0.0)  # -0.0 + x is x, bit for bit; 0.0 + -0.0 is not
    for place, delta, weight in zip(places, wide, weights, strict=True):
        result.index_add_(dim, place, delta * weight)
    shared = (torch.bincount(torch.cat(places)) > 1).nonzero().flatten()
    if method != "sum" and len(shared):
        tasks = [
            _on_shared(delta, dim, place, shared, method, density, f"{draw} {number}")
            for number, (delta, place) in enumerate(zip(wide, places, strict=True))
        ]
        result.index_copy_(dim, shared, _resolve(torch.stack(tasks), weights, method))
    return result.to(dtype)


def _on_shared(
    delta: Tensor, dim: int, place: Tensor, shared: Tensor, method: str, density: float, draw: str
) -> Tensor:
    """One adapter's entries on the shared channels, thinned to `density`; zero on those that it does not hold."""
    held = torch.isin(place, shared).nonzero().flatten()
    entries = delta.index_select(dim, held)
    if density < 1:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(
                int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "little") >> 1
            )
            kind = "magnitude" if method == "ties" else "random"
            entries = prune(entries, density, kind, rescale=method == "dare")  # type: ignore[arg-type]
    where = torch.searchsorted(shared, place[held])
    return _laid_out(entries, dim, len(shared), 0.0).index_copy_(dim, where, entries)


def _resolve(tasks: Tensor, weights: Sequence[float], method: str) -> Tensor:  # tasks: [adapters, *]
    weighted = tasks * torch.tensor(weights, dtype=tasks.dtype)[:, None, None]
    if method == "dare":
        return weighted.sum(0)
    return disjoint_merge(weighted, calculate_majority_sign_mask(tasks))


def _laid_out(like: Tensor, dim: int, channels: int, value: float) -> Tensor:
    shape = list(like.shape)
    shape[dim] = channels
    return torch.full(shape, value, dtype=like.dtype)


def _union(slices: Sequence[Slice]) -> Slice:
    return Slice(slices[0].side, np.unique(np.concatenate([chosen.indices for chosen in slices])))


def _option_problems(sources: Sequence[Source], weights: Sequence[Any], method: str, density: Any, seed: Any) -> Any:
    if not sources:
        yield "no adapters are given; name at least one"
    if len(weights) != len(sources):
        yield f"{len(weights)} weights ({_list(weights)}) are given for {len(sources)} adapters; give one for each"
    for weight in weights:
        if not _is_number(weight):
            yield f"weight {weight!r} is not a finite number"
    if method not in METHODS:
        yield f"method={method!r} is unknown; choose from {', '.join(METHODS)}"
    if not (_is_number(density) and 0 < density <= 1):
        yield f"density={density!r} is outside (0, 1]"
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        yield f"seed={seed!r} is not an integer from 0 up"


def _config_problems(sources: Sequence[Source]) -> Any:
    for field in _KNOWN_OR_SAME:
        known = [(source.name, value) for source in sources if (value := getattr(source.config, field))]
        differing = next((other for other in known if not _same_value(other[1], known[0][1])), None)
        about_base = field in ("base_model_name_or_path", "revision")
        if differing and not (about_base and bases_differ_knowingly()):
            yield f"{known[0][0]} has {field}={known[0][1]!r}, but {differing[0]} has {differing[1]!r}; they must agree"
    for field in _SAME:
        first, *rest = sources
        for source in rest:
            ours, theirs = getattr(first.config, field), getattr(source.config, field)
            if _comparable(ours) != _comparable(theirs):
                yield f"{first.name} has {field}={ours!r}, but {source.name} has {theirs!r}; whole modules are not summed"


def _module_problems(sources: Sequence[Source]) -> Any:
    """One line for each module on which two adapters contradict each other."""
    firsts: dict[str, Source] = {}
    for source in sources:
        for module, chosen in source.slices.items():
            first = firsts.setdefault(module, source)
            other = first.slices[module]
            if other.side != chosen.side:
                yield (
                    f"{module}: {first.name} changes channels of its {other.side}put side, {source.name} of its "
                    f"{chosen.side}put side; one slice cannot hold both"
                )
            elif (across := first.shapes[module][chosen.side == "out"]) != source.shapes[module][chosen.side == "out"]:
                yield (
                    f"{module}: {first.name} was made for {across} features, {source.name} for "
                    f"{source.shapes[module][chosen.side == 'out']}; these are adapters of different bases"
                )
    yield from _digest_problems(sources)


def _digest_problems(sources: Sequence[Source]) -> Any:
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for source in [] if bases_differ_knowingly() else sources:
        for module, text in (source.config.base_digest or {}).items():
            if module not in source.slices:
                continue
            for part, digest in digest_parts(text, source.slices[module]).items():
                name, first = seen.setdefault((module, part), (source.name, digest))
                if not agree(first, digest):
                    yield f"{module}: {name} and {source.name} were made for different bases: the slice {part!r} differs"


def _other_problems(sources: Sequence[Source]) -> Any:
    first, *rest = sources
    ours = first.others() if rest else {}
    for source in rest:
        theirs = source.others()
        for name in sorted({*ours, *theirs}):
            if name not in ours or name not in theirs:
                holder = first if name in ours else source
                yield f"{name} is kept whole by {holder.name} alone; whole modules are not summed"
            elif not _same_bits(ours[name], theirs[name]):
                yield f"{name} is kept whole by {first.name} and {source.name}, and differs; whole modules are not summed"


def _combined_config(sources: Sequence[Source], slices: dict[str, Slice]) -> S2FTConfig:
    """What all configs agree on; elsewhere the default, as for a config that does not say."""
    configs = [source.config for source in sources]
    values: dict[str, Any] = {}
    for field in fields(S2FTConfig):
        given = [getattr(config, field.name) for config in configs]
        if field.name in _KNOWN_OR_SAME:
            values[field.name] = next((value for value in given if value), given[0])
        elif field.init and any(value != given[0] for value in given):
            values[field.name] = field.default
    targets = [config.target_modules for config in configs]
    values["target_modules"] = targets[0] if all(target == targets[0] for target in targets) else set(slices)
    values["slices"] = {module: str(chosen) for module, chosen in slices.items()}
    values["base_digest"] = _combined_digests(sources, slices) or None
    return replace(configs[0], **values)


def _combined_digests(sources: Sequence[Source], slices: dict[str, Slice]) -> dict[str, str]:
    """Each part keeps its digest: that of the union would need the base."""
    parts: dict[str, dict[str, str | None]] = {}
    for source in sources:
        for module, text in (source.config.base_digest or {}).items():
            if module in source.slices:
                parts.setdefault(module, {}).update(digest_parts(text, source.slices[module]))
    return {module: joined for module, found in parts.items() if (joined := join_digests(found, slices[module]))}


def _same_bits(a: Tensor, b: Tensor) -> bool:
    raw = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*raw)


def _same_value(ours: Any, theirs: Any) -> bool:
    """A base may be spelled in several ways: with a slash at the end, from here or from the root, by a link."""
    if ours == theirs:
        return True
    paths = isinstance(ours, str) and isinstance(theirs, str)
    return paths and (
        ours.rstrip("/") == theirs.rstrip("/") or (isdir(ours) and isdir(theirs) and samefile(ours, theirs))
    )


def _comparable(value: Any) -> Any:
    return sorted(value) if isinstance(value, list | set | tuple) else value or None


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def _list(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))
