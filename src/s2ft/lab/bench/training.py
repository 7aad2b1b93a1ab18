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
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from s2ft.common.errors import gathered, raise_together
from s2ft.finetune.methods import METHODS
from s2ft.finetune.options import TrainOptions
from s2ft.lab.bench.contestants import (
    ABLATION,
    AS_TRAINED,
    CONTESTANTS,
    UPPER_HALF,
    Contestant,
    Prepare,
)
from s2ft.lab.bench.report import Report
from s2ft.lab.bench.saved import own_tensors, saved_bytes
from s2ft.lab.bench.training_plot import draw_training as draw_training
from s2ft.lab.registry import TellShare
from s2ft.lab.shapes import LLAMA2_7B, LLAMA3_8B, SMALL
from s2ft.runtime.failures import is_out_of_memory
from s2ft.runtime.timing import milliseconds, no_spread, spread

Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One size of batch, and how often it is measured."""

    batch_size: int
    seq_len: int
    rounds: int
    warm_up: int


@dataclass(frozen=True)
class Preset:
    """Models, sizes of batches, and whether the methods take turns."""

    models: Mapping[str, Mapping[str, int]]  # name → arguments of LlamaConfig
    cells: Sequence[Cell]  # the first is the main one
    take_turns: bool
    device: str
    share: float = 0.01  # of the parameters that is trained, by the methods that have a choice
    ablation: bool = False  # variants of S²FT and of the others, at the main cell


PRESETS = {
    "cpu": Preset(
        models={"llama-6-blocks": SMALL},
        cells=[Cell(4, 256, 9, 2), Cell(4, 64, 3, 1), Cell(4, 128, 3, 1), Cell(1, 256, 3, 1), Cell(2, 256, 3, 1)],
        take_turns=True,
        device="cpu",
        ablation=True,
    ),
    "7b": Preset(
        models={"llama2-7b": LLAMA2_7B, "llama3-8b": LLAMA3_8B},
        cells=[Cell(batch, length, 10, 3) for batch in (1, 2, 4, 8) for length in (512, 1024)],
        take_turns=False,
        device="cuda",
    ),
}


@dataclass(frozen=True)
class Run:
    """A contestant before it is set up, and what its rows are called."""

    labels: Row  # method, maybe variant
    prepare: Prepare


@dataclass(frozen=True)
class Group:
    """Runs that take turns, and where. A group of one uses the base itself, larger ones a copy for each run."""

    runs: Sequence[Run]
    cells: Sequence[Cell]
    hidden: frozenset[str] = frozenset()  # methods that are measured for the ratio only and get no row

    @property
    def tokens(self) -> int:
        """What the group costs, roughly."""
        return sum(len(self.runs) * _tokens(cell) * (cell.warm_up + cell.rounds) for cell in self.cells)


def bench_training(
    preset: Preset | str = "cpu",
    liger: bool = False,
    methods: Mapping[str, Prepare] = CONTESTANTS,
    tell: TellShare = lambda done: None,
) -> Report:
    """Measures every method at every cell of a preset, or of the one of that name in `PRESETS`.

    A row has the keys method, batch_size, seq_len, trainable, step_ms, step_ms_p20, step_ms_p80, floor_ratio, saved_bytes,
    peak_bytes (None without a GPU, or where methods take turns), and model; variants of S²FT have the method "s2ft" and the
    key variant. Where memory does not suffice, step_ms is None and out_of_memory is true.

    Raises:
        S2FTError: without the GPU or the package that is asked for, before anything is measured.
    """
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    _check_machine(preset, liger)
    methods, left_out = _installed(methods)
    groups = _plan(preset, methods)
    bar = _Bar(tell, len(preset.models) * sum(group.tokens for group in groups))
    rows: list[Row] = []
    for name, shape in preset.models.items():
        base = _base(shape, preset.device, liger)
        floors: dict[Cell, float | None] = {}
        for group in groups:
            for cell, row in _bench_group(preset, base, group, bar):
                if row["method"] == "floor":
                    floors[cell] = row["step_ms"]
                if row["method"] not in group.hidden:
                    rows.append({**row, "floor_ratio": _ratio(row["step_ms"], floors.get(cell)), "model": name})
            _free()
        del base
    return Report(settings=_settings(preset, liger, left_out), rows=rows)


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
        "peak GB": shown("peak_bytes", ".1f", 1e9),
    }


def _plan(preset: Preset, methods: Mapping[str, Prepare]) -> list[Group]:
    named = [Run({"method": name}, prepare) for name, prepare in methods.items()]
    upper, ablation = (
        [Run({"method": "s2ft", "variant": name}, prepare) for name, prepare in variants.items()]
        for variants in (UPPER_HALF, ABLATION)
    )
    if not preset.take_turns:
        return [Group([run], preset.cells) for run in (*named, *upper)]
    groups = [Group([*named, *upper], preset.cells)]
    if preset.ablation:
        floor = [run for run in named if run.labels["method"] == "floor"]
        usual = [Run({"method": name, "variant": "fp32, autocast"}, prepare) for name, prepare in AS_TRAINED.items()]
        groups.append(Group([*floor, *usual, *ablation], preset.cells[:1], frozenset({"floor"})))
    return groups


def _bench_group(preset: Preset, base: PreTrainedModel, group: Group, bar: _Bar) -> Iterator[tuple[Cell, Row]]:
    alone = len(group.runs) == 1
    with ExitStack() as stack:
        contestants = [_enter(stack, run, base if alone else copy.deepcopy(base), preset.share) for run in group.runs]
        for cell in group.cells:
            ids = torch.randint(base.config.vocab_size, (cell.batch_size, cell.seq_len), device=base.device)
            taken = _take_turns(contestants, ids, cell, bar)
            peak = torch.cuda.max_memory_allocated() if alone and base.device.type == "cuda" else None
            for run, contestant, times in zip(group.runs, contestants, taken, strict=True):
                yield cell, {**run.labels, **_row(cell, contestant, times, ids, peak)}


def _enter(stack: ExitStack, run: Run, base: PreTrainedModel, share: float) -> Contestant | None:
    """The contestant, until `stack` closes; None if there is too little memory to set it up."""
    try:
        contestant = stack.enter_context(run.prepare(base, round(share * base.num_parameters())))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        contestant = None
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
        bar.add(len(contestants) * _tokens(cell))
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
        nothing = dict.fromkeys(("floor_ratio", "saved_bytes", "peak_bytes"))
        return {**row, **no_spread("step_ms"), **nothing, "out_of_memory": True}
    row |= {**spread(times, "step_ms"), "floor_ratio": None}
    saved = saved_bytes(lambda: contestant.body(ids), own_tensors(contestant.model))
    return {**row, "saved_bytes": saved, "peak_bytes": peak}


def _ratio(own: float | None, floor: float | None) -> float | None:
    return None if own is None or floor is None else own / floor


def _base(shape: Mapping[str, int], device: str, liger: bool) -> PreTrainedModel:
    """A frozen bf16 Llama with random weights."""
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=torch.bfloat16)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(model=base)
    return base.requires_grad_(False).train()


def _installed(methods: Mapping[str, Prepare]) -> tuple[dict[str, Prepare], dict[str, str]]:
    """The methods whose packages are there, and why the others are left out."""
    left_out = {name: problem for name in methods if name in METHODS for problem in gathered(METHODS[name].check)}
    return {name: prepare for name, prepare in methods.items() if name not in left_out}, left_out


def _check_machine(preset: Preset, liger: bool) -> None:
    gpu = torch.cuda.is_available()
    problems = []
    if preset.device == "cuda" and not gpu:
        problems.append(f"the models {', '.join(preset.models)} need a CUDA GPU, and there is none; take preset=cpu")
    if liger and preset.device != "cuda":
        problems.append("liger=True needs a preset for GPUs, such as 7b: Liger's kernels do not run on a CPU")
    if liger and find_spec("liger_kernel") is None:
        problems.append("liger=True needs the package liger-kernel; install it with: pip install 's2ft[liger]'")
    raise_together(problems)


def _settings(preset: Preset, liger: bool, left_out: dict[str, str]) -> Row:
    defaults = TrainOptions.model_fields
    return {
        **asdict(preset),
        "main": asdict(preset.cells[0]),
        "liger": liger,
        "left_out": left_out,
        "loss": "next token; saved_bytes without the head",
        "dtypes": "weights, gradients and optimizer states bf16; deltas of S²FT and their states fp32; no dropout; in the "
        "variants fp32, autocast: what is trained and its states fp32, computed in bf16",
        "optimizer": "torch's fused AdamW; galore: galore-torch's AdamW, its SVD every 200 steps falls in the warm-up",
        "lora": "on all linear layers; the rank that trains as many parameters, dora likewise",
        "galore_rank": defaults["galore_rank"].default,
        "lisa": {"layers": defaults["lisa_layers"].default, "interval": defaults["lisa_interval"].default},
    }


def _tokens(cell: Cell) -> int:
    return cell.batch_size * cell.seq_len


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
