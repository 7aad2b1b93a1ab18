"""The methods that `s2ft train` knows: S²FT and those that it is compared with, each with all that sets it apart.

    method          trains                                      from            leaves
    s2ft            slices of chosen channels                   s2ft            an adapter
    lora, dora      low-rank factors (dora: and magnitudes)     PEFT            an adapter
    full            every weight                                transformers    a model
    galore          every weight, moments projected             galore-torch    a model
    lisa            every weight, a few blocks at a time        `lisa.py`       a model
    paca            random columns of every linear layer        `paca.py`       an adapter of S²FT
    peft:NAME       whatever PEFT's NAME trains                 PEFT            an adapter

To add a method, write a subclass of `Method` (and of `Options`, if it has options of its own) and enter it in `METHODS`.
`--method` and its help, the options that other methods refuse, the paper's learning rate, checkpoints, cards and the training
benchmark read it from there.

The command line's help reads this file, so what is slow to import (torch, PEFT, transformers) is imported where it is used.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from s2ft.finetune.method import ADAMW, Method
from s2ft.finetune.peft_methods import PREFIX, PeftMethod
from s2ft.finetune.values import Avoided, ConfigKeys, Layers, Options, Positive, Ratios, Targets
from s2ft.format.terms import ALLOCATIONS, PROJECTIONS, STRATEGIES, SUBSETS

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, TrainerCallback

    from s2ft.finetune.channels import Examples
    from s2ft.finetune.options import TrainOptions
    from s2ft.format.config import S2FTConfig


class S2FTOptions(Options):
    """What S²FT trains: the options that go into an `S2FTConfig`, under the same names."""

    ratios: Ratios = Field(
        None,
        description=f"Fraction of heads or channels to train: a number, or one for each of {', '.join(PROJECTIONS)}",
    )
    budget: float | None = Field(
        None, description="Instead of ratios: fraction of the model's parameters; 0.01 if neither"
    )
    strategy: str | None = Field(None, description=f"How they are chosen: {', '.join(STRATEGIES)}; random unless given")
    subset: str = Field("largest", description=f"Which scores are trained: {', '.join(SUBSETS)}")
    seed: int | None = Field(None, description="Seed of the random strategy; from the data's digest unless given")
    allocation: str = Field("uniform", description=f"How the layers share: {', '.join(ALLOCATIONS)}")
    layers: Layers = Field(None, description="Blocks to train: 3, 1,2,5, 8-15, first:4 or last:50%; all unless given")
    avoid: Avoided = Field(None, description="Adapters whose channels are not to be chosen: folders or Hub names")
    target_modules: Targets = Field(
        None,
        description="Modules to train a slice of, as in PEFT; by default what ratios names, else o_proj, out_proj, down_proj",
    )

    def s2ft_config(self, seed: int | None = None, task_type: str = "CAUSAL_LM") -> S2FTConfig:
        """The method's configuration, with `seed` where none was given, for PEFT's `task_type`.

        Raises:
            S2FTError: with everything that the method does not allow.
        """
        from s2ft.format.config import S2FTConfig

        values = {name: getattr(self, name) for name in S2FTOptions.model_fields}
        if self.seed is None and self.strategy in (None, "random"):
            values["seed"] = seed
        return S2FTConfig(**values, task_type=task_type)


class LoraOptions(Options):
    """Options of LoRA and DoRA; both take `target_modules` too."""

    lora_rank: Positive = Field(32, description="Rank of lora and dora")
    lora_alpha: Positive = Field(64, description="Scale of lora and dora, divided by the rank")


class GaloreOptions(Options):
    """Options of GaLore."""

    galore_rank: Positive = Field(128, description="Rank that galore projects gradients to")


class LisaOptions(Options):
    """Options of LISA."""

    lisa_layers: Positive = Field(2, description="Blocks that lisa trains at a time")
    lisa_interval: Positive = Field(20, description="Steps before lisa draws other blocks")


class PacaOptions(Options):
    """Options of PaCA."""

    paca_rank: Positive = Field(32, description="Columns of each linear layer that paca trains")


class PeftOptions(Options):
    """Options of PEFT's own methods."""

    peft_config: ConfigKeys = Field(
        None,
        description="Keys of the config of method=peft:NAME, as key=value,... or, nested, as YAML: {r: 8, bias: all}",
    )


class MethodOptions(PeftOptions, PacaOptions, LisaOptions, GaloreOptions, LoraOptions, S2FTOptions):
    """The options of all methods; the help lists them from the last class to the first."""


class S2FT(Method):
    """S²FT (arXiv 2412.06289): slices of heads and channels."""

    title = "S²FT"
    learning_rate = 2e-4
    ours = True
    options = frozenset({*S2FTOptions.model_fields, "calibration", "layout"}) | ADAMW

    def peft_config(self, options: TrainOptions, model: PreTrainedModel, examples: Examples | None) -> PeftConfig:
        """The config with the channels that were chosen."""
        from s2ft.finetune.channels import choose_channels

        return choose_channels(options, model, examples)

    def of_size(self, model: PreTrainedModel, parameters: int, given: TrainOptions | None = None) -> dict[str, Any]:
        """A budget."""
        return {"budget": parameters / model.num_parameters()}


class Lora(Method):
    """LoRA (arXiv 2106.09685)."""

    title = "LoRA"
    learning_rate = 5e-5
    options = frozenset({*LoraOptions.model_fields, "target_modules"}) | ADAMW
    autocast = True
    dora = False

    def peft_config(self, options: TrainOptions, model: PreTrainedModel, examples: Examples | None) -> PeftConfig:
        """PEFT's config, for targets that are linear layers."""
        from s2ft.finetune.lora import LORA_DROPOUT, check_targets, lora_config, lora_targets
        from s2ft.finetune.objectives import OBJECTIVES

        targets = lora_targets(model) if options.target_modules is None else options.target_modules
        config = lora_config(options.lora_rank, options.lora_alpha, LORA_DROPOUT, targets, dora=self.dora)
        config.task_type = OBJECTIVES[options.objective].task_type
        check_targets(config, model)
        return config

    def of_size(self, model: PreTrainedModel, parameters: int, given: TrainOptions | None = None) -> dict[str, Any]:
        """The nearest rank on all linear layers, or on those given; alpha is twice the rank, as in the paper."""
        from s2ft.finetune.lora import equal_rank

        targets = (given and given.target_modules) or "all-linear"
        rank = equal_rank(model, parameters, self.dora, targets)
        return {"lora_rank": rank, "lora_alpha": 2 * rank, "target_modules": targets}


class Dora(Lora):
    """DoRA: LoRA with a trained magnitude for each output (arXiv 2402.09353)."""

    title = "DoRA"
    dora = True


class Full(Method):
    """Every weight."""

    title = "full fine-tuning"
    learning_rate = 1e-5
    options = ADAMW
    leaves_model = True
    autocast = True


class Galore(Full):
    """Every weight, by an optimizer whose moments are projected (arXiv 2403.03507)."""

    title = "GaLore"
    foreseeable = False  # projections take time of their own, and moments less memory than Adam's
    options = frozenset(GaloreOptions.model_fields)  # it is an optimizer, and transformers gives it no weight decay

    def check(self) -> None:
        """Raises `S2FTError` without galore-torch."""
        from s2ft.finetune.galore import import_galore

        import_galore()

    def arguments(self, options: TrainOptions, model: PreTrainedModel) -> dict[str, Any]:
        """GaLore's optimizer, for the linear layers inside the blocks."""
        from s2ft.finetune.galore import galore_arguments

        return galore_arguments(model, options.galore_rank)

    def callbacks(self, options: TrainOptions, model: PreTrainedModel) -> list[TrainerCallback]:
        """Puts the projections of a checkpoint onto the device."""
        from s2ft.finetune.galore import PlaceProjections

        return [PlaceProjections()]

    def resuming(self) -> AbstractContextManager[Any]:
        """The optimizer's state holds projections as objects."""
        from s2ft.finetune.galore import readable_projections

        return readable_projections()


class Lisa(Full):
    """Every weight, a few blocks at a time (arXiv 2403.17919)."""

    title = "LISA"
    foreseeable = False  # before it starts, nothing is frozen yet
    options = frozenset(LisaOptions.model_fields) | ADAMW

    def callbacks(self, options: TrainOptions, model: PreTrainedModel) -> list[TrainerCallback]:
        """Freezes and thaws blocks."""
        from s2ft.finetune import lisa

        schedule = lisa.Lisa(options.lisa_layers, options.lisa_interval, options.train_seed)
        schedule.check(model)
        return [schedule]


class Paca(Method):
    """PaCA: columns of every linear layer, drawn at random (arXiv 2503.01905)."""

    title = "PaCA"
    learning_rate = 2e-4
    ours = True
    options = frozenset({*PacaOptions.model_fields, "seed", "layout"}) | ADAMW

    def peft_config(self, options: TrainOptions, model: PreTrainedModel, examples: Examples | None) -> PeftConfig:
        """A config of S²FT that names the columns."""
        from s2ft.finetune.channels import seed_of
        from s2ft.finetune.objectives import OBJECTIVES
        from s2ft.finetune.paca import paca_config

        seed = seed_of(examples) if options.seed is None else options.seed
        return paca_config(model, options.paca_rank, seed, OBJECTIVES[options.objective].task_type)

    def of_size(self, model: PreTrainedModel, parameters: int, given: TrainOptions | None = None) -> dict[str, Any]:
        """The nearest number of columns."""
        from s2ft.finetune.paca import equal_columns

        return {"paca_rank": equal_columns(model, parameters)}


METHODS: dict[str, Method] = {
    "s2ft": S2FT(),
    "full": Full(),
    "lora": Lora(),
    "dora": Dora(),
    "galore": Galore(),
    "lisa": Lisa(),
    "paca": Paca(),
}


def find_method(name: str) -> Method:
    """The method of this name, one of PEFT's own too.

    Raises:
        ValueError: if there is none.
    """
    if name in METHODS:
        return METHODS[name]
    if name.startswith(PREFIX):
        return PeftMethod(name.removeprefix(PREFIX))
    raise ValueError(f"unknown; choose from {', '.join(METHODS)}, or {PREFIX}NAME for any other of PEFT's methods")


def method_problem(name: str) -> str | None:
    """Why there is no method of this name; None if there is."""
    try:
        find_method(name)
    except ValueError as error:
        return str(error)
    return None


def foreign_options(method: str) -> set[str]:
    """The options that other methods take and this one does not.

    Example:
        >>> sorted(foreign_options("s2ft"))
        ['galore_rank', 'lisa_interval', 'lisa_layers', 'lora_alpha', 'lora_rank', 'paca_rank', 'peft_config']
    """
    known = set().union(*(other.options for other in METHODS.values()), PeftOptions.model_fields)
    return known - find_method(method).options
