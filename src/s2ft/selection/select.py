"""Which heads and channels are trained.

    structures ─ scores ─→ one ranking per structure ─ counts ─→ its first units, on each targeted projection ─→ slices

Every projection of a structure takes a prefix of the same ranking, so that its choices nest: the fewer heads of o_proj
lie among those of v_proj. Where key-value groups are shared and k or v is targeted, groups are ranked by the mean score
of their heads and query heads within them, so that the query heads chosen belong to the groups chosen. What `avoid`
holds on one projection comes last on all, and is never chosen where it is held itself.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from s2ft.common.errors import S2FTError, raise_together
from s2ft.format.choice import order_problems
from s2ft.format.config import S2FTConfig
from s2ft.format.slices import Indices, Slice
from s2ft.format.terms import OWN
from s2ft.layer.adapted import adapted_layers, refuse_inside, suspended, turns_of
from s2ft.selection.budget import count_units, trained_in_words
from s2ft.selection.coverage import coverage
from s2ft.selection.scores import Scorer, run_scorer, score_units
from s2ft.selection.targets import by_projection, find_targets
from s2ft.selection.units import Projection, Structure, Target
from s2ft.selection.weight_scores import Batch, Scores

Held = Mapping[tuple[str, str], Indices]  # module and side → the channels that adapters hold which are to be avoided


@dataclass(frozen=True)
class Selection:
    """What `select` chose."""

    slices: dict[str, Slice]  # path of the linear layer → its trained slice
    config: S2FTConfig  # the config with the slices filled in: give it to `get_peft_model`
    trained: str = ""  # how many heads and channels of which projections, in words
    left_out: str = ""  # what of the model no slice can be taken from, and why


def select(
    model: nn.Module, config: S2FTConfig, batches: Iterable[Batch] | None = None, scores: Scorer | None = None
) -> Selection:
    """Chooses the heads and channels that `config` asks for.

    Args:
        model: Any model with linear layers, adapted or not; nothing in it is changed.
        config: How much to train, and where; its strategy says which. A config whose channels are chosen already is
            returned as it is.
        batches: Calibration data, for strategies that read data such as activation or gradient (the paper takes 1% of the
            training data): an iterable of what the model is called with, such as a DataLoader. It is read once, and only
            running sums are kept.
        scores: A score of your own, in place of `config.strategy`: a function of `(structures, model, batches)` that returns,
            for the key of each structure, one score for each of its units (`s2ft.selection.scores.Scorer`). The
            config that comes back holds the chosen channels, and `strategy="own"`: it loads without the function.

    Raises:
        S2FTError: if a target is not found, a budget rounds to zero, `avoid` leaves too few, data is missing, an order is
            asked for where no strategy is, `scores` returns other than one finite number for each unit, or inside `in_place`,
            where the base weights are permuted.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
        >>> selection = select(model, S2FTConfig(ratios=0.25, strategy="weight"))
        >>> {path: len(chosen.indices) for path, chosen in selection.slices.items()}
        {'model.layers.0.self_attn.o_proj': 4, 'model.layers.0.mlp.down_proj': 6}
        >>> def last_first(structures, model, batches):
        ...     return {structure.key: range(structure.units) for structure in structures}
        >>> select(model, S2FTConfig(ratios=0.25), scores=last_first).config.slices["model.layers.0.mlp.down_proj"]
        'in 18-23'
    """
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if scores is not None:
        _check_own(config, scores)
    if config.is_resolved:
        slices = {path: Slice.parse(text) for path, text in (config.slices or {}).items()}
        return Selection(slices, config)
    with turns_of(model).alone():
        refuse_inside(model, "choosing channels")
        with _base_alone(model):
            return _select(model, config, batches, scores)


@contextmanager
def _base_alone(model: nn.Module) -> Iterator[None]:
    """Scores are those of the base, whatever is merged into its weights, or runs beside them or in place of a module."""
    with suspended(model), ExitStack() as stack:
        for layer in adapted_layers(model):
            stack.enter_context(layer.base_alone())
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                stack.enter_context(_original(module))
        yield


@contextmanager
def _original(wrapper: AuxiliaryTrainingWrapper) -> Iterator[None]:
    """Runs the base's own module; unlike PEFT's `enable_adapters`, leaves alone what trains."""
    held: list[Any] = [wrapper, *(child for child in wrapper.children() if isinstance(child, BaseTunerLayer))]
    held = [one for one in held if not getattr(one, "merged", False)]  # which PEFT would unmerge for good
    before = [one.disable_adapters for one in held]
    try:
        for one in held:
            one._disable_adapters = True  # noqa: SLF001 - PEFT has no other way that leaves `requires_grad` alone
        yield
    finally:
        for one, disabled in zip(held, before, strict=True):
            one._disable_adapters = disabled  # noqa: SLF001 - as it was


def _check_own(config: S2FTConfig, scores: Scorer) -> None:
    if not callable(scores):
        raise S2FTError(f"scores={scores!r} is not callable; give a function of structures, model and batches")
    if config.is_resolved:
        raise S2FTError("scores= is given with a config whose channels are chosen already; give one with slices=None")
    if config.strategy is not None:
        raise S2FTError(f"strategy={config.strategy!r} and scores= are both given; give one")


def _select(model: nn.Module, config: S2FTConfig, batches: Iterable[Batch] | None, own: Scorer | None) -> Selection:
    config = config if own is not None else seeded(config)
    targets = find_targets(model, config)
    if compiled := next((projection.module for _, projection in targets if "_orig_mod" in projection.module), None):
        raise S2FTError(f"{compiled} is compiled: add adapters, and choose channels, first; then compile")
    covered = coverage(model, targets, by_name=config.target_modules is not None)
    counts = count_units(targets, config, model, covered)
    structures = list({structure.key: structure for structure, _ in targets}.values())
    scores, filled_in = _score(structures, model, config, batches, own)
    slices = _to_slices(_choose(targets, counts, scores, config, held_channels(model, config.avoid or [])))
    texts = {path: str(chosen) for path, chosen in slices.items()}
    modules = set(slices) if config.target_modules is None else config.target_modules
    resolved = replace(config, slices=texts, target_modules=modules, **filled_in)
    selection = Selection(slices, resolved, trained_in_words(targets, counts), str(covered))
    if selection.left_out:
        warnings.warn(f"S²FT trains {selection.trained}; {selection.left_out}", stacklevel=3)
    return selection


def _score(
    structures: list[Structure],
    model: nn.Module,
    config: S2FTConfig,
    batches: Iterable[Batch] | None,
    own: Scorer | None,
) -> tuple[Scores, dict[str, Any]]:
    """The scores, and what the config says of them: the strategy, or that they are the user's own."""
    if own is not None:
        name = f"scores={getattr(own, '__name__', repr(own))}"
        return run_scorer(own, structures, model, batches, name), {"strategy": OWN}
    strategy = config.strategy or "random"
    return score_units(strategy, structures, model, batches, config.seed or 0), {"strategy": strategy}


def _choose(
    targets: Sequence[Target],
    counts: Mapping[str, list[int]],
    scores: Scores,
    config: S2FTConfig,
    avoided: Held,
) -> list[tuple[Projection, Indices]]:
    """Each targeted projection with its chosen units, ascending."""
    grouped = {s.key for s, p in targets if p.name in ("k_proj", "v_proj")}
    chosen: list[tuple[Projection, Indices]] = []
    for name, group in by_projection(targets).items():
        signed = {s.key: -scores[s.key] if config.subset == "largest" else scores[s.key] for s, _ in group}
        ranks = [_rank_keys(signed[s.key], _held_units(s, avoided), s, p, s.key in grouped) for s, p in group]
        free = [_free_units(p, avoided) for _, p in group]
        picks = _pick_global if config.allocation == "global" else _pick_uniform
        units = picks(name, ranks, free, counts[name])
        chosen += [(p, picked) for (_, p), picked in zip(group, units, strict=True)]
    return chosen


def _rank_keys(
    signed: NDArray[np.float32],  # [units of the structure], the lower the better
    held: NDArray[np.bool_],  # [units of the structure]: held by an adapter that is to be avoided
    structure: Structure,
    projection: Projection,
    by_group: bool,
) -> NDArray[np.float32]:  # [4, units of the projection]
    """Sort keys of a projection's units, the first key first; what is held on any projection comes last on all.

    First those of a unit's group, then its own; as many where there are no groups, since blocks are ranked together.
    """
    size = structure.units // structure.groups
    by_head = np.stack([held.astype(np.float32), signed])
    groups = by_head.reshape(2, structure.groups, size)
    per_group = np.stack([groups[0].max(1), groups[1].mean(1, dtype=np.float64).astype(np.float32)])
    if projection.units < structure.units:
        return np.concatenate([per_group, per_group])
    return np.concatenate([per_group.repeat(size, axis=1) if by_group else by_head, by_head])


def _held_units(structure: Structure, avoided: Held) -> NDArray[np.bool_]:  # [units of the structure]
    """The units that another adapter holds on any projection; a held group holds all its heads."""
    held = np.zeros(structure.units, dtype=bool)
    for projection in structure.projections:
        own = np.ones(projection.units, dtype=bool)
        own[_free_units(projection, avoided)] = False
        held |= own.repeat(structure.units // projection.units)
    return held


def _pick_uniform(name: str, ranks: list[NDArray[np.float32]], free: list[Indices], counts: list[int]) -> list[Indices]:
    for units, wanted in zip(free, counts, strict=True):
        if len(units) < wanted:
            raise S2FTError(f"avoid leaves {len(units)} units of {name} in a layer that is to train {wanted}")
    return [_first(rank, units, wanted) for rank, units, wanted in zip(ranks, free, counts, strict=True)]


def _pick_global(name: str, ranks: list[NDArray[np.float32]], free: list[Indices], counts: list[int]) -> list[Indices]:
    total, left = sum(counts), sum(map(len, free))
    if left < total:
        raise S2FTError(f"avoid leaves {left} units of {name} in the whole model, which is to train {total}")
    layer = np.repeat(np.arange(len(free)), [len(units) for units in free])
    unit = np.concatenate(free)
    rank = np.concatenate([keys[:, units] for keys, units in zip(ranks, free, strict=True)], axis=1)
    first = _first(rank, np.arange(left), total)
    return [np.sort(unit[first[layer[first] == index]]) for index in range(len(free))]


def _first(rank: NDArray[np.float32], units: Indices, count: int) -> Indices:
    """The `count` best of `units`, ascending; ties go to the lower index."""
    order = np.lexsort((units, *rank[::-1, units]))
    return np.sort(units[order[:count]])


def _free_units(projection: Projection, avoided: Held) -> Indices:
    """The units none of whose channels another adapter holds on the same side."""
    units, held = np.arange(projection.units), avoided.get((projection.module, projection.side))
    return units if held is None else np.setdiff1d(units, projection.units_of(held))


def held_channels(model: nn.Module, adapters: Sequence[str]) -> dict[tuple[str, str], Indices]:
    """What any of `adapters` holds: names of adapters on the model, folders, or Hub names.

    Returns:
        Module and side → channels, ascending.
    """
    loaded = getattr(model, "peft_config", {})
    held: dict[tuple[str, str], Indices] = {}
    for adapter in adapters:
        config = loaded.get(adapter) or _load_config(adapter)
        if not isinstance(config, S2FTConfig) or not config.is_resolved:
            raise S2FTError(f"avoid names {adapter!r}, which is not a trained S2FT adapter")
        for path, text in (config.slices or {}).items():
            new = Slice.parse(text)
            held[path, new.side] = np.union1d(held.get((path, new.side), new.indices), new.indices)
    return held


def _load_config(adapter: str) -> PeftConfig:
    try:
        config = S2FTConfig.from_pretrained(adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise S2FTError(
            f"avoid names {adapter!r}, which is no folder or Hub name of an S2FT adapter: {error}"
        ) from error
    return config


def _to_slices(chosen: Iterable[tuple[Projection, Indices]]) -> dict[str, Slice]:
    """Units → channels; the projections of a fused layer share one slice. Layers without a unit are left out."""
    sides: dict[str, str] = {}
    channels: dict[str, list[Indices]] = {}
    for projection, units in chosen:
        if len(units):
            sides[projection.module] = projection.side
            channels.setdefault(projection.module, []).append(projection.channels_of(units))
    return {module: Slice(side, np.unique(np.concatenate(channels[module]))) for module, side in sides.items()}


def seeded(config: S2FTConfig) -> S2FTConfig:
    """The config with the seed of what it draws; processes that train together get the same one, if each calls this.

    Raises:
        S2FTError: if it asks for an order, and names no strategy.
    """
    if config.is_resolved or config.seed is not None or config.strategy not in (None, "random"):
        return config
    raise_together(order_problems(config))
    return replace(config, seed=_draw_seed())


def _draw_seed() -> int:
    """From torch's global generator; rank 0's where several processes train together. Before they can communicate it is 0."""
    seed = int(torch.randint(2**31, (1,)))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        drawn = [seed]
        torch.distributed.broadcast_object_list(drawn)
        return drawn[0]
    is_launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return 0 if is_launched else seed
