"""The config of an adapter as its file has it: read, checked and written without PEFT, whose import takes seconds.

adapter_config.json  ─→  SavedConfig                    inspected, fused
─→  S2FTConfig (format/config.py)  the same fields as one of PEFT's configs
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from s2ft.common.errors import S2FTError, first_line, raise_together
from s2ft.common.reading import shown
from s2ft.format.checksum import Noted
from s2ft.format.choice import choice_problems, pattern_problems
from s2ft.format.config_file import (
    FORMAT_VERSION,
    check_method,
    kind_problems,
    name_problems,
    read_fields,
    readable,
    version_problem,
)
from s2ft.format.folder import CONFIG_FILE, WEIGHTS_FILE
from s2ft.format.terms import ALLOCATIONS, METHOD, STRATEGIES, SUBSETS, TASK_TYPES, TOWERS
from s2ft.format.validation import check_adapter

HOW_TO_LOAD = (
    "An adapter of the method S2FT: `pip install s2ft`, and `import s2ft` before PEFT or transformers load it."
)


@dataclass
class SavedConfig:
    """The fields of an adapter's config. What each means: `S2FTConfig`."""

    # Those of every PEFT config
    task_type: Any = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    # S²FT's
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
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            known = ", ".join(TASK_TYPES)
            raise S2FTError(f"Invalid task type: {shown(self.task_type)}. Must be one of: {known}")  # as PEFT says it
        self.settle()

    def settle(self) -> None:
        """Brings fields that may be written in several ways into one; raises `S2FTError` with every problem at once."""
        self._noted = Noted()
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
    def from_folder(cls, folder: Path, found: Mapping[str, Any] | None = None) -> Self:
        """The config of an adapter of this method in a local folder, checked together with its weights.

        Args:
            found: What its file holds, if that has been read already.

        Raises:
            S2FTError: if the adapter is another method's, a file is damaged or of a newer format, the weights are not those of
                the config, or hold more than it declares.
        """
        found = read_fields(folder) if found is None else found
        check_method(folder, found)
        try:
            config = cls.of_fields(found)
            problems = [*kind_problems(config), *name_problems(config)]
        except S2FTError as error:
            problems = error.problems
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            problems = [first_line(error)]
        raise_together(f"{folder / CONFIG_FILE}: {problem}" for problem in problems)
        if (folder / WEIGHTS_FILE).exists():
            check_adapter(folder, config)
        return config

    @classmethod
    def of_fields(cls, found: Mapping[str, Any]) -> Self:
        """A config of what a file holds; fields that are not known are left out."""
        names = [one.name for one in fields(cls)]
        known = readable(found, [*names, "peft_type"])
        return cls(**{name: value for name, value in known.items() if name in names})

    def note(self, tensors: Mapping[str, Tensor]) -> None:
        """Remembers what is about to be saved beside the config, for its checksums."""
        self._noted = Noted.of(tensors)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the config as PEFT would, with the checksums of the tensors that are saved beside."""
        self.make_final()
        values = asdict(self.in_order()) | {"peft_type": METHOD, "peft_version": self.peft_version or version("peft")}
        text = json.dumps(values, indent=2, sort_keys=True)
        Path(save_directory, CONFIG_FILE).write_text(text, encoding="utf-8")

    def make_final(self) -> None:
        """Fills in what is known when the config is saved."""
        self.checksums, self._noted = self._noted.checksums(), Noted()  # none for a config that is saved by itself
        self.how_to_load, self.format_version = HOW_TO_LOAD, FORMAT_VERSION

    def in_order(self) -> Self:
        """A copy with sorted lists for sets, whose order would differ from process to process."""
        ordered = copy(self)
        for item in fields(self):
            if isinstance(value := getattr(self, item.name), set):
                setattr(ordered, item.name, sorted(value))
        return ordered


def _layer_list_problems(config: SavedConfig) -> Iterator[str]:
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
