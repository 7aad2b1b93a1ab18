"""`S2FTConfig`: what to train, as a PEFT configuration.

    ratios | budget  →  how much        strategy, subset, seed  →  which        layers, avoid  →  where

A config is *open* as the user writes it, and *resolved* once `slices` names the chosen channels of every module. The resolved
config is saved beside the deltas.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.format.checksum import Noted
from s2ft.format.choice import choice_problems, pattern_problems
from s2ft.format.config_file import (
    FORMAT_VERSION,
    check_method,
    is_foreign,
    kind_problems,
    name_problems,
    read_fields,
    readable,
    version_problem,
)
from s2ft.format.registration import peft_type, register_config
from s2ft.format.terms import ALLOCATIONS, STRATEGIES, SUBSETS, TOWERS
from s2ft.format.unknown import explain_unknown
from s2ft.format.validation import check_adapter

HOW_TO_LOAD = (
    "An adapter of the method S2FT: `pip install s2ft`, and `import s2ft` before PEFT or transformers load it."
)


@explain_unknown
@dataclass
class S2FTConfig(PeftConfig):
    """Configuration of structured sparse fine-tuning.

    Args:
        ratios: Fraction of the heads or channels to train, in (0, 1]: one number for all targets, or one per projection
            (`{"o_proj": 0.05, "down_proj": 0.02}`). Heads are counted for q and o, key-value groups for k and v,
            FFN channels for gate, up and down, input channels for `out_proj`. Give `ratios` or `budget`, not both.
        budget: Fraction of the model's parameters to train, split evenly over the targets; what no slice can be taken
            from (a vision tower) does not count, and stacked experts have a budget of their own, the same share of
            them. The default is 0.01 on `o_proj` and `down_proj`, where the paper's allocation study (fig. 4) puts it,
            and on the `out_proj` of mixers (Mamba).
        strategy: `random`, or a score to rank by: `weight`, `activation`, `product`, `gradient`, `lift` or `saliency` (see
            `s2ft.format.terms.STRATEGIES`). All but random, weight and lift need data: see `s2ft.select`, which takes a
            score of your own, too, and then fills in `own`. None is filled in: `weight`, which was at least as good as random
            channels wherever the two were compared (docs/training.md); `random` with a `seed`, or where a weight cannot be
            read (quantised, sharded). Two adapters by weight have the same channels: to fuse them, give the second `avoid` or
            a `seed`.
        subset: Whether the `largest` or the `smallest` scores are trained.
        seed: Seed of the random strategy. None draws one from torch's global generator; the drawn seed is saved.
        allocation: `uniform` gives every layer, and every expert of a layer, the same share (the paper's choice); `global`
            ranks over the whole model.
        layers: The blocks to train: an index, a list of them, a range `"8-15"`, `"last:50%"` or `"first:4"`.
        avoid: Adapters whose channels are not to be chosen: names on the same model, folders, or Hub names.
        targets: Of a model of several parts, the one that is trained: `language` (unless `target_modules` names others),
            `vision`, `audio`, or `all`.
        target_modules: As in every PEFT method. A projection of a known structure is sliced by its heads or channels;
            any other linear layer by its input channels. None targets the projections that `ratios` names, else o and
            down, and the last layer of mixers that are no attention (`out_proj`).
        target_parameters: As in PEFT, parameters of stacked experts (`mlp.experts.down_proj`, of one expert
            `mlp.experts.3.down_proj`); they join `target_modules`, where they may be named as well.
        exclude_modules: As in LoRA, like the next four.
        layers_to_transform: Indices of the blocks that `target_modules` is looked for in.
        layers_pattern: The name of the list of blocks, where it is an unusual one.
        modules_to_save: Modules that are trained and saved whole.
        trainable_token_indices: Rows of the embedding that are trained.
        init_weights: False draws random deltas, so that a fresh adapter already changes the output.
        slices: Filled in on use: module path → its trained slice, such as `"in 3,17,40-41"` (see
            `s2ft.selection.select`).
        base_digest: Filled in on use: module path → digest of the base weights that the slice changes.
        how_to_load: Filled in: for those who open the adapter's files without knowing the method.
        checksums: Filled in on saving: name → checksum of each tensor in the weight file (see `s2ft.format.checksum`).
        format_version: Filled in on saving: the version of the file format (see `s2ft.format.config_file`).

    A rate that suits AdamW is 0.3 / √(channels of a slice × steps), some 1e-3 to 5e-3 for a short run: more than a LoRA wants,
    and a hundred times what TRL takes by default (docs/training.md).

    Raises:
        S2FTError: with every problem of the given values at once.

    Example:
        >>> S2FTConfig(ratios={"o_proj": 0.05, "down_proj": 0.02}, seed=7).seed
        7
        >>> S2FTConfig(ratios=1.5)
        Traceback (most recent call last):
            ...
        s2ft.common.errors.S2FTError: ratios=1.5 is outside (0, 1]
    """

    ratios: float | dict[str, float] | None = field(default=None, metadata={"help": "Fraction of heads or channels"})
    budget: float | None = field(default=None, metadata={"help": "Fraction of the model's parameters"})
    strategy: str | None = field(default=None, metadata={"help": " | ".join(STRATEGIES)})
    subset: str = field(default="largest", metadata={"help": " | ".join(SUBSETS)})
    seed: int | None = field(default=None, metadata={"help": "Seed of the random strategy"})
    allocation: str = field(default="uniform", metadata={"help": " | ".join(ALLOCATIONS)})
    layers: int | str | list[int] | None = field(default=None, metadata={"help": "Blocks to train"})
    avoid: list[str] | None = field(default=None, metadata={"help": "Adapters whose channels are not to be chosen"})
    targets: str | None = field(default=None, metadata={"help": " | ".join(TOWERS)})
    target_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to train a slice of"}
    )
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Parameters of experts to train"})
    exclude_modules: list[str] | set[str] | str | None = field(
        default=None, metadata={"help": "Modules to leave alone"}
    )
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Layer indices to train"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train and save whole"})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Embedding rows to train"}
    )
    init_weights: bool = field(default=True, metadata={"help": "False draws random deltas"})
    slices: dict[str, str] | None = field(default=None, metadata={"help": "Filled in: the chosen channels"})
    base_digest: dict[str, str] | None = field(default=None, metadata={"help": "Filled in: digest of the base slices"})
    checksums: dict[str, str] | None = field(
        default=None, metadata={"help": "Filled in: checksums of the saved tensors"}
    )

    how_to_load: str = field(default=HOW_TO_LOAD, metadata={"help": "For those who find PEFT's KeyError: 'S2FT'"})
    format_version: str = field(default=FORMAT_VERSION, metadata={"help": "Filled in: version of the file format"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = peft_type()
        self._noted = Noted()
        self._filled_in: list[str] = []  # the fields that the user left open and a model has filled in since
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        self._join_parameters()
        self.avoid = [self.avoid] if isinstance(self.avoid, str) else self.avoid
        if isinstance(self.slices, dict) and self.slices and self.target_modules in (None, "", set()):
            self.target_modules = set(self.slices)  # PEFT refuses empty ones
        raise_together(self._problems())

    def _join_parameters(self) -> None:
        """PEFT's `target_parameters` join the modules: a parameter of experts is sliced and saved as a layer is."""
        if not self.target_parameters:
            return
        named = {self.target_parameters} if isinstance(self.target_parameters, str) else set(self.target_parameters)
        if isinstance(self.target_modules, str) and self.target_modules:
            raise S2FTError(
                f"target_parameters={sorted(named)} and target_modules={self.target_modules!r}, a pattern, are both given; "
                "give a list of modules beside parameters, or a pattern that names both"
            )
        self.target_modules, self.target_parameters = {*(self.target_modules or ()), *named}, None

    def _problems(self) -> Iterator[str]:
        yield from choice_problems(self)
        yield from _layer_list_problems(self)
        yield from pattern_problems("exclude_modules", self.exclude_modules)
        for name in ("slices", "base_digest", "checksums"):
            if not _is_text_by_module(getattr(self, name)):
                yield f"{name} is not a mapping from modules to text; it is filled in, not written by hand"
        yield from filter(None, [version_problem(self.format_version)])

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> S2FTConfig:
        """As in PEFT; an adapter in a local folder is checked as every reader checks it (`s2ft.format.validation`).

        Raises:
            S2FTError: if a file is damaged or of a newer format, the weights are not those of the config, or hold more than
                it declares.
        """
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        found = read_fields(folder) if folder.is_dir() else None  # else a name on the Hub
        if found is None or found.get("peft_type") is None or is_foreign(found):
            config: S2FTConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
            return config
        return cls.from_folder(folder, found)

    @classmethod
    def from_folder(cls, folder: Path, found: Mapping[str, Any] | None = None) -> S2FTConfig:
        """The config of an adapter of this method in a local folder, checked together with its weights.

        Args:
            found: What its file holds, if that has been read already.

        Raises:
            S2FTError: as `from_pretrained`, or if the adapter is another method's.
        """
        found = read_fields(folder) if found is None else found
        check_method(folder, found)
        try:
            config: S2FTConfig = cls.from_peft_type(**cls.check_kwargs(**found))
            problems = [*kind_problems(config), *name_problems(config)]
        except S2FTError as error:
            problems = error.problems
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            problems = [first_line(error)]
        raise_together(f"{folder / CONFIG_NAME}: {problem}" for problem in problems)
        if (folder / SAFETENSORS_WEIGHTS_NAME).exists():
            check_adapter(folder, config)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a config file that this version knows (PEFT's hook, for files here and on the Hub)."""
        return kwargs if is_foreign(kwargs) else readable(kwargs, [one.name for one in fields(cls)])

    def note(self, tensors: Mapping[str, Tensor]) -> None:
        """Remembers what is about to be saved beside the config, for its checksums."""
        self._noted = Noted.of(tensors)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; with the checksums of the tensors that are saved beside, and the same bytes in every process."""
        self.checksums, self._noted = self._noted.checksums(), Noted()  # none for a config that is saved by itself
        self.how_to_load, self.format_version = HOW_TO_LOAD, FORMAT_VERSION
        super(S2FTConfig, self._in_order()).save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")  # PEFT has written it, without a word on this method
        if card.is_file() and "import s2ft" not in (text := card.read_text(encoding="utf-8", errors="replace")):
            card.write_text(f"{text.rstrip()}\n\n## How to load\n\n{HOW_TO_LOAD}\n", encoding="utf-8")

    def _in_order(self) -> S2FTConfig:
        """A copy with sorted lists for sets, whose order would differ from process to process."""
        ordered = copy(self)
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), set):
                setattr(ordered, item.name, sorted(value))
        return ordered

    def left_open(self, name: str) -> bool:
        """Whether the user left a field open that a model has filled in since."""
        return name in self._filled_in

    @property
    def is_resolved(self) -> bool:
        """Whether the channels are chosen."""
        return self.slices is not None

    def reopened(self) -> S2FTConfig:
        """A copy as the user wrote it, except that a drawn seed stays."""
        open_again: dict[str, Any] = dict.fromkeys(self._filled_in)
        return replace(self, **open_again)

    def filled_in(self, resolved: S2FTConfig) -> S2FTConfig:
        """Takes over the choices of `resolved` into this object, which PEFT holds, and returns it.

        If it holds other choices already (it is in use on another base), `resolved` is returned instead.
        """
        if self._filled_in and (self.slices, self.base_digest) != (resolved.slices, resolved.base_digest):
            return resolved
        self.seed = resolved.seed
        for name in ("slices", "base_digest", "target_modules", "strategy"):
            if getattr(self, name) is None:
                self._filled_in.append(name)
                setattr(self, name, getattr(resolved, name))
        return self


def _layer_list_problems(config: S2FTConfig) -> Iterator[str]:
    if config.layers is not None and config.layers_to_transform is not None:
        given = f"layers={config.layers!r} and layers_to_transform={config.layers_to_transform!r}"
        yield f"{given} are both given; give one"
    if isinstance(config.target_modules, str):
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(config, name) is not None:
                yield f"{name} cannot be used when target_modules={config.target_modules!r} is a string (a pattern)"
    if config.layers_pattern and not config.layers_to_transform and config.layers_to_transform != 0:
        yield f"layers_pattern={config.layers_pattern!r} needs layers_to_transform"


def _is_text_by_module(value: Any) -> bool:
    return value is None or (
        isinstance(value, dict) and all(isinstance(item, str) for item in [*value, *value.values()])
    )


register_config(S2FTConfig)
