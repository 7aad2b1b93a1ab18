"""Adapters of one base, fused into one: in files, without base model or GPU, or on a live model (`tuner/fusion.py`).

    A/  adapter_config.json  adapter_model.safetensors  ┐
    B/  adapter_config.json  adapter_model.safetensors  ┴→  checks → report of overlap → one folder of the same format

One module is in memory at a time beside the result. How deltas are blended: `adapters/blending.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from numbers import Real
from os.path import isdir, samefile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from s2ft.adapters.blending import BLENDINGS, DENSITY, blend
from s2ft.adapters.file import open_adapter
from s2ft.adapters.overlap import Overlap, overlaps
from s2ft.common.errors import S2FTError, raise_together
from s2ft.common.files import new_folder
from s2ft.common.outputs import check_free
from s2ft.format.checksum import checksum
from s2ft.format.digest import agree, bases_differ_knowingly, digest_parts, join_digests
from s2ft.format.folder import WEIGHTS_FILE
from s2ft.format.names import delta_name, indices_name
from s2ft.format.saved import SavedConfig
from s2ft.format.slices import Slice, all_finite

_KNOWN_OR_SAME = ("base_model_name_or_path", "revision", "task_type", "auto_mapping")
_SAME = ("modules_to_save", "trainable_token_indices")


def fuse(
    adapters: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = DENSITY,
    seed: int = 0,
    output: str | Path | None = None,
) -> Fusion:
    """Fuses adapter folders into one adapter. Files are checked at once, deltas read when they are needed.

    Args:
        adapters: Folders of S²FT adapters of one base.
        weights: One number for each; by default 1 for all, which adds disjoint skills unchanged.
        method: What happens on channels that several adapters hold: `sum`, `ties` or `dare`.
        density: The share of those channels' entries that `ties` and `dare` keep.
        seed: Seed of the entries that `dare` drops.
        output: A folder to write the result into at once; else call `Fusion.save`.

    Raises:
        S2FTError: before anything is written, if a folder holds no sound adapter, or the adapters cannot be fused.

    Example:
        >>> fuse(["nowhere"])
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: nowhere holds no adapter: there is no adapter_config.json
    """
    if isinstance(adapters, str | Path):
        raise S2FTError(f"adapters={str(adapters)!r} is one folder; give a list of folders")
    if output is not None:
        check_free(Path(output))
    fusion = plan_fusion([open_adapter(folder) for folder in adapters], weights, method, density, seed)
    if output is not None:
        fusion.save(output)
    return fusion


@dataclass(frozen=True, eq=False)
class Fusion:
    """What adapters come to when they are fused. Deltas are computed when they are asked for, one module at a time."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    method: str
    density: float
    seed: int
    config: SavedConfig
    slices: dict[str, Slice]

    @cached_property
    def overlaps(self) -> list[Overlap]:
        """Where the adapters meet, and the interference to expect: one row for each module and pair."""
        return overlaps(self)

    def delta(self, module: str) -> Tensor:  # [out_features, s] on the input side, [s, in_features] on the output side
        """The fused delta; raises `S2FTError` where a sum is too large for its dtype."""
        parts = [(source, w) for source, w in zip(self.sources, self.weights, strict=True) if module in source.slices]
        result = blend(
            self.slices[module],
            [source.slices[module] for source, _ in parts],
            [source.delta(module).cpu() for source, _ in parts],
            [weight for _, weight in parts],
            *(self.method, self.density, f"{self.seed} {module}"),
        )
        if not all_finite(result):
            raise S2FTError(f"{module}: the fused delta is too large for {result.dtype}; give smaller weights")
        return result

    def tensors(self) -> dict[str, Tensor]:
        """The fused weight file: each module's delta and channels, and what the adapters keep beside, the same in all."""
        tensors = self.sources[0].others()
        for module, trained in self.slices.items():
            tensors[delta_name(module)] = self.delta(module).contiguous()
            tensors[indices_name(module)] = trained.channels
        return tensors

    def save(self, output: str | Path) -> Path:
        """Writes the adapter into the folder `output`, whole or not at all.

        Raises:
            S2FTError: if the folder holds an adapter already, or a fused delta is too large for its dtype.
        """
        output = Path(output)
        check_free(output)
        tensors = self.tensors()
        with new_folder(output) as aside:
            save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
            self.config.note(tensors)
            self.config.save_pretrained(str(aside))
        return output


class Source(Protocol):
    """An adapter to fuse, in a file or on a model."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def config(self) -> SavedConfig:
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


def plan_fusion(
    sources: Sequence[Source],
    weights: Sequence[float] | None = None,
    method: str = "sum",
    density: float = DENSITY,
    seed: int = 0,
) -> Fusion:
    """Checks that adapters can be fused, and returns what they come to; no delta is computed yet.

    Raises:
        S2FTError: with every problem: options out of range, adapters of different bases, a module that one adapter slices on
            the input side and another on the output side, modules to save that differ.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    raise_together(_option_problems(sources, weights, method, density, seed))
    raise_together([*_config_problems(sources), *_module_problems(sources), *_other_problems(sources)])
    modules = dict.fromkeys(module for source in sources for module in source.slices)
    slices = {module: _union([s.slices[module] for s in sources if module in s.slices]) for module in modules}
    config = _fused_config(sources, slices)
    return Fusion(tuple(sources), tuple(map(float, weights)), method, float(density), seed, config, slices)


def _union(slices: Sequence[Slice]) -> Slice:
    return Slice(slices[0].side, np.unique(np.concatenate([trained.indices for trained in slices])))


def _option_problems(
    sources: Sequence[Source], weights: Sequence[Any], method: str, density: Any, seed: Any
) -> Iterator[str]:
    if not sources:
        yield "no adapters are given; name at least one"
    if len(weights) != len(sources):
        listed = ", ".join(map(str, weights))
        yield f"{len(weights)} weights ({listed}) are given for {len(sources)} adapters; give one for each"
    for weight in weights:
        if not _is_number(weight):
            yield f"weight {weight!r} is not a finite number"
    if method not in BLENDINGS:
        yield f"method={method!r} is unknown; choose from {', '.join(BLENDINGS)}"
    if not (_is_number(density) and 0 < density <= 1):
        yield f"density={density!r} is outside (0, 1]"
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        yield f"seed={seed!r} is not an integer from 0 up"


def _config_problems(sources: Sequence[Source]) -> Iterator[str]:
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


def _module_problems(sources: Sequence[Source]) -> Iterator[str]:
    """Modules on which two adapters contradict each other."""
    firsts: dict[str, Source] = {}
    for source in sources:
        for module, trained in source.slices.items():
            first = firsts.setdefault(module, source)
            other = first.slices[module]
            if other.side != trained.side:
                yield (
                    f"{module}: {first.name} changes channels of its {other.side}put side, {source.name} of its "
                    f"{trained.side}put side; one slice cannot hold both"
                )
                continue
            ours, theirs = first.shapes[module][1 - trained.dim], source.shapes[module][1 - trained.dim]
            if ours != theirs:
                yield (
                    f"{module}: {first.name} was made for {ours} features, {source.name} for {theirs}; these are adapters of "
                    "different bases"
                )
    yield from _digest_problems(sources)


def _digest_problems(sources: Sequence[Source]) -> Iterator[str]:
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for source in [] if bases_differ_knowingly() else sources:
        for module, part, digest in _digests(source):
            name, first = seen.setdefault((module, part), (source.name, digest))
            if not agree(first, digest):
                yield f"{module}: {name} and {source.name} were made for different bases: the slice {part!r} differs"


def _digests(source: Source) -> Iterator[tuple[str, str, str]]:
    """Module, part of its slice, and the digest of the base there."""
    for module, text in (source.config.base_digest or {}).items():
        if module in source.slices:
            yield from ((module, part, digest) for part, digest in digest_parts(text, source.slices[module]).items())


def _other_problems(sources: Sequence[Source]) -> Iterator[str]:
    first, *rest = sources
    ours = first.others() if rest else {}
    for source in rest:
        theirs = source.others()
        for name in sorted({*ours, *theirs}):
            if name not in ours or name not in theirs:
                holder = first if name in ours else source
                yield f"{name} is kept whole by {holder.name} alone; whole modules are not summed"
            elif checksum(ours[name]) != checksum(theirs[name]):
                yield f"{name} is kept whole by {first.name} and {source.name}, and differs; whole modules are not summed"


def _fused_config(sources: Sequence[Source], slices: dict[str, Slice]) -> SavedConfig:
    """What all configs agree on, and elsewhere the field's default."""
    configs = [source.config for source in sources]
    values: dict[str, Any] = {}
    for field in fields(configs[0]):
        given = [getattr(config, field.name) for config in configs]
        if field.name in _KNOWN_OR_SAME:
            values[field.name] = next((value for value in given if value), given[0])
        elif field.init and any(value != given[0] for value in given):
            values[field.name] = field.default
    if "layers_to_transform" in values:
        values["layers_pattern"] = None  # which is refused without them
    targets = [config.target_modules for config in configs]
    values["target_modules"] = targets[0] if all(target == targets[0] for target in targets) else set(slices)
    values["slices"] = {module: str(trained) for module, trained in slices.items()}
    values["base_digest"] = _fused_digests(sources, slices) or None
    return replace(configs[0], **values)


def _fused_digests(sources: Sequence[Source], slices: dict[str, Slice]) -> dict[str, str]:
    """Each part keeps its digest, since that of the union cannot be computed without the base."""
    parts: dict[str, dict[str, str | None]] = {}
    for source in sources:
        for module, part, digest in _digests(source):
            parts.setdefault(module, {})[part] = digest
    return {module: joined for module, found in parts.items() if (joined := join_digests(found, slices[module]))}


def _same_value(ours: Any, theirs: Any) -> bool:
    """Whether two values mean the same: a folder can be written with a slash at the end, as a relative path, or as a link."""
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
