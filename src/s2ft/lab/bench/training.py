"""What does a training step cost, in time and memory, beside the frozen floor and beside other methods?

    step = forward, loss, backward, optimizer.      ratio = median step of the method / median step of the floor

On a CPU all methods take turns, one step each in an order drawn anew every round, so that a machine that slows down slows them
all. On a GPU one method after the other uses the same base, so that the largest fits; memory is then the method's own.
"""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from s2ft.common.errors import gathered
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions
from s2ft.lab.bench.bases import frozen_base, settle_dtype
from s2ft.lab.bench.contestants import (
    ABLATION,
    AS_TRAINED,
    BESIDE_EXPERTS,
    CONTESTANTS,
    ON_EXPERTS,
    ON_QUANTISED,
    UPPER_HALF,
    Contestant,
    Prepare,
    chunked_head,
)
from s2ft.lab.bench.presets import PRESETS, Cell, Preset, adjusted, check, quantised, usual_preset
from s2ft.lab.bench.report import Report
from s2ft.lab.bench.training_plot import draw_training as draw_training
from s2ft.lab.registry import TellShare, TrainingDtype
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.memory import own_tensors, peak_of, saved_bytes
from s2ft.runtime.timing import milliseconds, no_spread, spread

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A contestant before it is set up, and what its rows are called."""

    labels: Row  # method, maybe variant
    prepare: Prepare
    budget: float  # the share of the parameters that it trains, where it has a choice


@dataclass(frozen=True)
class Group:
    """Runs that take turns, and where. A group of one uses the base itself, larger ones a copy for each run."""

    runs: Sequence[Run]
    cells: Sequence[Cell]
    chunked: bool = False  # the loss is computed without all logits at once
    hidden: frozenset[str] = frozenset()  # methods that are measured for the ratio only and get no row

    @property
    def tokens(self) -> int:
        """What the group costs, roughly."""
        return sum(len(self.runs) * cell.tokens * (cell.warm_up + cell.rounds) for cell in self.cells)


def bench_training(  # noqa: PLR0913 - one for each option of the command
    preset: Preset | str | None = None,
    model: str | None = None,
    dtype: str = "auto",
    length: str | None = None,
    batch: str | None = None,
    methods: str | None = None,
    budget: str | None = None,
    quantize: str | None = None,
    liger: bool = False,
    chunked: bool = False,
    contestants: Mapping[str, Prepare] | None = None,
    tell: TellShare = lambda done: None,
) -> Report:
    """Measures every method at every cell of a preset, or of the one of that name in `PRESETS`.

    A row has the keys method, batch_size, seq_len, trainable, step_ms, step_ms_p20, step_ms_p80, floor_ratio, saved_bytes,
    peak_bytes (None without a GPU, or where methods take turns), step_bytes (what a step takes at its peak, beside what is
    held before it; None where the system does not tell), and model; variants of S²FT have the method "s2ft" and the
    key variant. Where memory does not suffice, step_ms is None and out_of_memory is true.

    Args:
        preset: None: `cpu`, or for a model of your own the GPU where there is one.
        model: A folder, a GGUF file or a name on the Hub, instead of the preset's models.
        dtype: Of the weights: `bf16`, `fp32`, or `auto`: the preset's if it has one, else bf16 where the device multiplies it.
        length: Tokens in a sequence; several with commas, "512,1024".
        batch: Sequences in a batch, likewise; every length is measured at every batch.
        methods: Names with commas, out of those of `contestants`; None: all, and variants.
        budget: Shares of the parameters, likewise: a row of S²FT for each. The others train as many as it does at 0.01, or, if
            that is not among them, at the first.
        quantize: Quantises the frozen base, as `s2ft train --quantize` does; floor, qlora and s2ft train on it.
        liger: Gives every method Liger's kernels.
        chunked: Computes the loss as `s2ft train` does, by TRL's head, which never holds all logits at once.
        contestants: Name → what sets the method up; None: all that there are on such a base.
        tell: Is told the share that is done.

    Raises:
        S2FTError: for an option that cannot be met, or without the GPU or the package that is asked for, before anything is
            loaded.
    """
    preset = usual_preset(model) if preset is None else PRESETS[preset] if isinstance(preset, str) else preset
    preset = quantised(adjusted(preset, model, length, batch, methods, budget), quantize)
    preset = preset if dtype == TrainingDtype.auto else replace(preset, dtype=str(dtype))
    if contestants is None:
        contestants = ON_EXPERTS if preset.experts else CONTESTANTS if quantize is None else ON_QUANTISED
    check(preset, liger, contestants)
    there, left_out = _installed(
        {name: run for name, run in contestants.items() if name in (preset.methods or contestants)}
    )
    settled = settle_dtype(preset.dtype, preset.device)
    groups = [replace(group, chunked=chunked) for group in _plan(preset, there, settled[0])]
    bar = _Bar(tell, len(preset.models) * sum(group.tokens for group in groups))
    rows: list[Row] = []
    for name, source in preset.models.items():
        base = frozen_base(source, preset.device, settled[0], liger, quantize)
        rows += [{**row, "model": name} for row in _bench_model(base, groups, bar)]
        del base
        _free()
    return Report(settings=_settings(preset, liger, chunked, left_out, settled), rows=rows)


def _bench_model(base: PreTrainedModel, groups: Sequence[Group], bar: _Bar) -> Iterator[Row]:
    """The rows of one model, with their ratios to the floor that was measured last at the same cell."""
    floors: dict[Cell, float | None] = {}
    for group in groups:
        for cell, row in _bench_group(base, group, bar):
            if row["method"] == "floor":
                floors[cell] = row["step_ms"]
            if row["method"] not in group.hidden:
                yield {**row, "floor_ratio": _ratio(row["step_ms"], floors.get(cell))}
        _free()


def training_line(row: Row) -> dict[str, str]:
    """A row of the table, in units for people."""

    def shown(key: str, form: str, scale: float = 1) -> str:
        return "–" if row[key] is None else format(row[key] / scale, form)

    spread = f"{shown('step_ms_p20', '.0f')}–{shown('step_ms_p80', '.0f')}"
    return {
        "method": " ".join(filter(None, (row["method"], row.get("variant")))),
        "batch": f"{row['batch_size']} × {row['seq_len']}",
        "trainable": shown("trainable", ",.0f"),
        "ms": "no memory" if row.get("out_of_memory") else f"{row['step_ms']:.0f} ({spread})",
        "/ floor": shown("floor_ratio", ".3f"),
        "saved MB": shown("saved_bytes", ".1f", 1e6),
        "step MB": shown("step_bytes", ".0f", 1e6),
        "peak GB": shown("peak_bytes", ".1f", 1e9),
    }


def _plan(preset: Preset, methods: Mapping[str, Prepare], dtype: torch.dtype) -> list[Group]:
    def runs(variants: Mapping[str, Prepare]) -> list[Run]:
        return [Run({"method": "s2ft", "variant": name}, prepare, preset.budget) for name, prepare in variants.items()]

    named = [Run({"method": name}, prepare, preset.budget) for name, prepare in methods.items()]
    floor = [run for run in named if run.labels["method"] == "floor"]
    for budget in preset.other_budgets:
        named.append(Run({"method": "s2ft", "variant": f"{100 * budget:g}%"}, methods["s2ft"], budget))
    if preset.methods is None:
        named += runs(BESIDE_EXPERTS if preset.experts else UPPER_HALF)
    if not preset.take_turns:
        return [Group([run], preset.cells) for run in named]
    groups = [Group(named, preset.cells)]
    if preset.ablation:
        usual = AS_TRAINED if dtype == torch.bfloat16 else {}  # fp32 is what they are in already
        autocast = [
            Run({"method": name, "variant": "fp32, autocast"}, prepare, preset.budget)
            for name, prepare in usual.items()
        ]
        groups.append(Group([*floor, *autocast, *runs(ABLATION)], preset.cells[:1], hidden=frozenset({"floor"})))
    return groups


def _bench_group(base: PreTrainedModel, group: Group, bar: _Bar) -> Iterator[tuple[Cell, Row]]:
    alone = len(group.runs) == 1
    with ExitStack() as stack:
        contestants = [_enter(stack, run, base if alone else copy.deepcopy(base), group.chunked) for run in group.runs]
        for cell in group.cells:
            words = base.config.get_text_config().vocab_size
            ids = torch.randint(words, (cell.batch_size, cell.seq_len), device=base.device)
            taken = _take_turns(contestants, ids, cell, bar)
            peak = torch.cuda.max_memory_allocated() if alone and base.device.type == "cuda" else None
            for run, contestant, times in zip(group.runs, contestants, taken, strict=True):
                yield cell, {**run.labels, **_row(cell, contestant, times, ids, peak)}


def _enter(stack: ExitStack, run: Run, base: PreTrainedModel, chunked: bool) -> Contestant | None:
    """The contestant, until `stack` closes; None if there is too little memory to set it up."""
    if chunked:
        stack.enter_context(chunked_head(base))
    try:
        contestant = stack.enter_context(run.prepare(base, round(run.budget * base.num_parameters())))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    contestant.chunked = chunked
    return contestant


def _take_turns(
    contestants: Sequence[Contestant | None],
    ids: Tensor,  # [batch, length]
    cell: Cell,
    bar: _Bar,
) -> list[list[float] | None]:
    """The times of each contestant's steps, in ms; None for those that ran out of memory."""
    times: list[list[float] | None] = [None if contestant is None else [] for contestant in contestants]
    for number in range(cell.warm_up + cell.rounds):
        if number == cell.warm_up and ids.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        for index in random.Random(number).sample(range(len(contestants)), len(contestants)):
            contestant, own = contestants[index], times[index]
            if contestant is None or own is None:
                continue
            took = _timed_step(contestant, ids)
            if took is None:
                times[index] = None
            elif number >= cell.warm_up:
                own.append(took)
        bar.add(len(contestants) * cell.tokens)
    return times


def _timed_step(contestant: Contestant, ids: Tensor) -> float | None:  # [batch, length]
    """Milliseconds; None if there is too little memory, all of which is then free again."""
    try:
        return milliseconds(lambda: contestant.step(ids), ids.device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    contestant.model.zero_grad(set_to_none=True)
    _free()
    return None


def _row(
    cell: Cell,
    contestant: Contestant | None,
    times: list[float] | None,
    ids: Tensor,  # [batch, length]
    peak: int | None,
) -> Row:
    trainable = None if contestant is None else contestant.trainable
    row: Row = {"batch_size": cell.batch_size, "seq_len": cell.seq_len, "trainable": trainable}
    if contestant is None or times is None:
        nothing = dict.fromkeys(("floor_ratio", "saved_bytes", "peak_bytes", "step_bytes"))
        return {**row, **no_spread("step_ms"), **nothing, "out_of_memory": True}
    row |= {**spread(times, "step_ms"), "floor_ratio": None}
    needed = peak_of(lambda: contestant.step(ids), ids.device)
    saved = saved_bytes(lambda: contestant.body(ids), own_tensors(contestant.model))
    return {**row, "saved_bytes": saved, "peak_bytes": peak, "step_bytes": needed}


def _ratio(own: float | None, floor: float | None) -> float | None:
    return None if own is None or floor is None else own / floor


def _installed(methods: Mapping[str, Prepare]) -> tuple[dict[str, Prepare], dict[str, str]]:
    """The methods whose packages are there, and why the others are left out."""
    left_out = {name: problem for name in methods if name in METHODS for problem in gathered(METHODS[name].check)}
    return {name: prepare for name, prepare in methods.items() if name not in left_out}, left_out


def _settings(
    preset: Preset, liger: bool, chunked: bool, left_out: dict[str, str], settled: tuple[torch.dtype, str]
) -> Row:
    defaults = TrainOptions.model_fields
    dtype = "bf16" if settled[0] == torch.bfloat16 else "fp32"
    autocast = "; in the variants fp32, autocast: what is trained and its states fp32, computed in bf16"
    return {
        **asdict(preset),
        "models": {name: "own" if isinstance(source, str) else source for name, source in preset.models.items()},
        "dtype": dtype,
        "dtype_reason": settled[1],
        "budget": preset.budget,
        "main": asdict(preset.cells[0]),
        "liger": liger,
        "chunked": chunked,
        "left_out": left_out,
        "loss": "next token; saved_bytes without the head",
        "dtypes": f"weights, gradients and optimizer states {dtype}; deltas of S²FT and their states fp32; no dropout"
        + (autocast if dtype == "bf16" else ""),
        "optimizer": "torch's fused AdamW; galore: galore-torch's AdamW, its SVD every 200 steps falls in the warm-up",
        "lora": "on the experts' down, by target_parameters; the rank that trains as many parameters"
        if preset.experts
        else "on all linear layers; the rank that trains as many parameters, dora likewise",
        "galore_rank": defaults["galore_rank"].default,
        "lisa": {"layers": defaults["lisa_layers"].default, "interval": defaults["lisa_interval"].default},
    }


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class _Bar:
    """Adds up the work that is done, and tells its share of the whole."""

    tell: TellShare
    total: int
    done: int = 0

    def add(self, amount: int) -> None:
        self.done += amount
        self.tell(self.done / self.total)
