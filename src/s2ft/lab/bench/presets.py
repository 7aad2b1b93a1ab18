"""What the training benchmark measures: a preset's models and sizes, and the options that change them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import TypeVar

import torch

from s2ft.common.errors import gathered, raise_together
from s2ft.finetune.methods import METHODS
from s2ft.format.config import S2FTConfig
from s2ft.lab.bench.bases import Source, shell
from s2ft.lab.bench.report import model_label
from s2ft.lab.registry import TrainingDtype
from s2ft.lab.shapes import EXPERTS, LLAMA2_7B, LLAMA3_8B, QWEN3_30B_A3B_8_BLOCKS, SMALL
from s2ft.runtime.lookup import check_folder, check_hub
from s2ft.runtime.models import positions
from s2ft.runtime.quantisation import QUANTISATIONS, check_quantisation
from s2ft.selection.select import select

Value = TypeVar("Value", int, float, str)

USUAL = 0.01  # the share of the parameters that is trained
SHORTEST = 2  # tokens: one is told from the other


@dataclass(frozen=True)
class Cell:
    """One size of batch, and how often it is measured."""

    batch_size: int
    seq_len: int
    rounds: int
    warm_up: int

    @property
    def tokens(self) -> int:
        """In a batch."""
        return self.batch_size * self.seq_len


@dataclass(frozen=True)
class Preset:
    """Models, sizes of batches, and whether the methods take turns."""

    models: Mapping[str, Source]  # by their names in the rows
    cells: Sequence[Cell]  # the first is the main one
    take_turns: bool
    device: str
    budgets: Sequence[float] = (USUAL,)  # of S²FT, a row for each
    dtype: str = "auto"
    methods: Sequence[str] | None = None  # None: all, and S²FT on the upper half
    ablation: bool = False  # variants of S²FT and of the others, at the main cell
    experts: bool = False  # S²FT and LoRA train the experts' down alone
    quantize: str | None = None  # how the frozen base is quantised

    @property
    def budget(self) -> float:
        """The share that all methods train which have a choice."""
        return USUAL if USUAL in self.budgets else self.budgets[0]

    @property
    def other_budgets(self) -> list[float]:
        """Those that S²FT alone trains."""
        return [budget for budget in self.budgets if budget != self.budget]


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
    "moe": Preset(
        models={"qwen3-moe-4-blocks": EXPERTS},
        cells=[Cell(2, 256, 9, 2), Cell(1, 128, 3, 1)],
        take_turns=True,
        device="cpu",
        dtype="fp32",
        experts=True,
    ),
    "moe-gpu": Preset(
        models={"qwen3-30b-a3b-8-blocks": QWEN3_30B_A3B_8_BLOCKS},
        cells=[Cell(batch, 1024, 10, 3) for batch in (1, 4)],
        take_turns=False,
        device="cuda",
        experts=True,
    ),
}


def usual_preset(model: str | None) -> Preset:
    """`cpu`; for a model of the user's on the GPU, where there is one."""
    return PRESETS["7b" if model is not None and torch.cuda.is_available() else "cpu"]


def adjusted(
    preset: Preset, model: str | None, length: str | None, batch: str | None, methods: str | None, budget: str | None
) -> Preset:
    """The preset with what is asked for: another model, other sizes, some of the methods, other budgets.

    Of length and batch, the one that is not given is the main cell's. A model or methods that were asked for are measured as
    they are, without the ablation.

    Raises:
        S2FTError: with all values that cannot be read.
    """
    main = preset.cells[0]
    problems: list[str] = []
    lengths = _read("length", length, int, lambda n: n >= SHORTEST, f"whole numbers from {SHORTEST}", problems)
    batches = _read("batch", batch, int, lambda n: n >= 1, "whole numbers from 1", problems)
    budgets = _read(
        "budget", budget, float, lambda b: 0 < b <= 1, "shares of the parameters, above 0 up to 1", problems
    )
    names = _read("methods", methods, str, bool, "names of methods", problems)
    raise_together(problems)
    if lengths or batches:
        preset = replace(preset, cells=_cells(preset, lengths or [main.seq_len], batches or [main.batch_size]))
    if model is not None:
        preset = replace(preset, models={model_label(model): model}, ablation=False)
    if names:
        preset = replace(preset, methods=names, ablation=False)
    return replace(preset, budgets=budgets or preset.budgets)


def quantised(preset: Preset, quantize: str | None) -> Preset:
    """The preset on a base that is quantised so, without the ablation."""
    return preset if quantize is None else replace(preset, quantize=quantize, ablation=False)


def check(preset: Preset, liger: bool, known: Collection[str]) -> None:
    """Raises `S2FTError` with all that cannot be measured; of models, the configuration alone is read."""
    problems = [*_machine_problems(preset, liger), *_method_problems(preset, known)]
    named = [source for source in preset.models.values() if isinstance(source, str)]
    problems += gathered(*(partial(check_model, name) for name in named))
    problems += [] if preset.quantize is None else list(_quantise_problems(preset))
    raise_together(problems)
    raise_together(_model_problems(preset, liger, "s2ft" in (known if preset.methods is None else preset.methods)))


def check_model(name: str) -> None:
    """Raises `S2FTError` if there is no such model, in a folder, in a GGUF file or on the Hub."""
    check_folder(name)
    check_hub(name)


def _read(
    name: str,
    text: str | None,
    kind: Callable[[str], Value],
    allowed: Callable[[Value], bool],
    wanted: str,
    problems: list[str],
) -> list[Value]:
    """The values between commas, each once; none if nothing is given, or if one is wrong, which is added to `problems`."""
    if text is None:
        return []
    try:
        values = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(allowed(value) for value in values):
        problems.append(f"{name}={text!r}: give {wanted}; several with commas between them")
        return []
    return list(dict.fromkeys(values))


def _cells(preset: Preset, lengths: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    """Every length at every batch; the first is measured as often as the preset's main cell, the others as its last."""
    main, other = preset.cells[0], preset.cells[-1]
    return [
        replace(main if number == 0 else other, batch_size=size, seq_len=length)
        for number, (size, length) in enumerate(itertools.product(batches, lengths))
    ]


def _machine_problems(preset: Preset, liger: bool) -> Iterator[str]:
    if preset.device == "cuda" and not torch.cuda.is_available():
        yield f"the models {', '.join(preset.models)} need a CUDA GPU, and there is none; take preset=cpu"
    if preset.dtype not in list(TrainingDtype):
        yield f"dtype={preset.dtype!r} is unknown; choose from {', '.join(TrainingDtype)}"
    if liger and preset.device != "cuda":
        yield "liger=True needs a preset for GPUs, such as 7b: Liger's kernels do not run on a CPU"
    if liger and find_spec("liger_kernel") is None:
        yield "liger=True needs the package liger-kernel; install it with: pip install 's2ft[liger]'"


def _quantise_problems(preset: Preset) -> Iterator[str]:
    if preset.quantize not in QUANTISATIONS:
        yield f"quantize={preset.quantize!r} is unknown; choose from {', '.join(QUANTISATIONS)}"
        return
    for name, source in preset.models.items():
        yield from gathered(partial(check_quantisation, preset.quantize, source if isinstance(source, str) else name))


def _method_problems(preset: Preset, known: Collection[str]) -> Iterator[str]:
    names = known if preset.methods is None else preset.methods
    unknown = [name for name in names if name not in known]
    if unknown:
        yield f"methods={','.join(names)!r}: unknown: {', '.join(unknown)}; choose from {', '.join(known)}"
    if preset.methods is not None:  # asked for by name
        for name in names:
            yield from gathered(METHODS[name].check) if name in METHODS else ()
    if preset.other_budgets and "s2ft" not in names:
        shares = ",".join(f"{budget:g}" for budget in preset.budgets)
        yield f"budget='{shares}': each but one is a row of S²FT's; add s2ft to methods, or give one"


def _model_problems(preset: Preset, liger: bool, with_slices: bool) -> Iterator[str]:
    longest = max(cell.seq_len for cell in preset.cells)
    for name, source in preset.models.items():
        model = shell(source)
        most = positions(model) or math.inf
        if longest > most:
            yield f"length={longest} is more than the {most} positions of {name}"
        if preset.experts and not any(path.endswith("experts.down_proj") for path, _ in model.named_parameters()):
            yield f"this preset trains stacked experts' down_proj, and {name} has none; take another preset"
        if liger and model.config.model_type != "llama":
            yield f"liger=True is for Llamas; {name} is a {model.config.model_type}"
        for budget in preset.budgets if with_slices else ():
            yield from gathered(partial(select, model, S2FTConfig(budget=budget, seed=0)))
