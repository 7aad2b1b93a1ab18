"""`S2FTConfig`: what to train, as a PEFT configuration.

    ratios | budget  →  how much        strategy, subset, seed  →  which        layers, avoid  →  where

A config is *open* as the user writes it, and *resolved* once `slices` names the chosen channels of every module. The resolved
config is saved beside the deltas.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from s2ft.format.config_file import read_fields, readable
from s2ft.format.registration import peft_type, register_config
from s2ft.format.saved import HOW_TO_LOAD, SavedConfig
from s2ft.format.terms import METHOD
from s2ft.format.unknown import explain_unknown

FILLED_IN = ("slices", "base_digest", "target_modules", "strategy")  # by a model, where the user leaves them open


@explain_unknown
@dataclass
class S2FTConfig(SavedConfig, PeftConfig):
    """Configuration of structured sparse fine-tuning.

    Args:
        ratios: Fraction of the heads or channels to train, in (0, 1]: one number for all targets, or one per projection
            (`{"o_proj": 0.05, "down_proj": 0.02}`). Heads are counted for q and o, key-value groups for k and v,
            FFN channels for gate, up and down, input channels for `out_proj`. Give `ratios` or `budget`, not both.
        budget: Fraction of the model's parameters to train, split evenly over the targets, but with a head of attention in
            every block where a tenth is left for the rest. What no slice can be taken from (a vision tower) does not count,
            and stacked experts have a budget of their own, the same share of them. The default is 0.01 on `o_proj` and
            `down_proj`, where the paper's allocation study (fig. 4) puts it, and on the `out_proj` of mixers (Mamba).
        strategy: `random`, or a score to rank by: `weight`, `activation`, `product`, `gradient`, `lift` or `saliency` (see
            `s2ft.format.terms.STRATEGIES`). All but random, weight and lift need data: see `s2ft.select`, which takes a
            score of your own, too, and then fills in `own`. None is filled in: `random`, as in the paper (docs/choosing.md
            has the figures). Two adapters by one score, or one seed, have the same channels: to fuse them, give the second
            `avoid`, or each a `seed`.
        subset: Whether the `largest` or the `smallest` scores are trained.
        seed: Seed of the random strategy. None draws one from torch's global generator, so `torch.manual_seed` repeats it, and
            trainers that set it draw the same one each time; what was drawn is saved. Where processes train together, all have
            to choose at once: the first one's seed is taken.
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

    A rate that suits AdamW is `s2ft.learning_rate`: 0.3 × √(examples a step / 16, at most 1) / √(channels of a slice × steps),
    some 1e-3 to 5e-3 for a short run, a hundred times what TRL takes by default (docs/choosing.md).

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

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = peft_type()
        self._filled_in: list[str] = []  # the fields that the user left open and a model has filled in since
        self._adopted = False  # whether its channels are those of a file that was loaded since
        self.settle()

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
    def of_fields(cls, found: Mapping[str, Any]) -> S2FTConfig:
        """A config of what a file holds; fields that are not known are left out (PEFT's way)."""
        config: S2FTConfig = cls.from_peft_type(**cls.check_kwargs(**found))
        return config

    @classmethod
    def of(cls, saved: SavedConfig) -> S2FTConfig:
        """The same config as one of PEFT's."""
        return cls(**{one.name: getattr(saved, one.name) for one in fields(saved)})

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """The fields of a config file that this version knows (PEFT's hook, for files here and on the Hub)."""
        return kwargs if is_foreign(kwargs) else readable(kwargs, [one.name for one in fields(cls)])

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As in PEFT; with the checksums of the tensors that are saved beside, and the same bytes in every process."""
        self.make_final()
        super(SavedConfig, self.in_order()).save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")  # PEFT has written it, without a word on this method
        if card.is_file() and "import s2ft" not in (text := card.read_text(encoding="utf-8", errors="replace")):
            card.write_text(f"{text.rstrip()}\n\n## How to load\n\n{HOW_TO_LOAD}\n", encoding="utf-8")

    def left_open(self, name: str) -> bool:
        """Whether the user left a field open that a model has filled in since."""
        return name in self._filled_in

    @property
    def is_resolved(self) -> bool:
        """Whether the channels are chosen."""
        return self.slices is not None

    def adopt(self, slices: Mapping[str, str]) -> None:
        """Takes the channels of a file: another adapter by this config has these, too."""
        self.slices, self._adopted = {**(self.slices or {}), **slices}, True
        if self.strategy == "random":
            self.seed = None  # which drew other channels

    def reopened(self) -> S2FTConfig:
        """A copy as the user wrote it, except that a drawn seed stays, and channels that came from a file."""
        open_again: dict[str, Any] = {} if self._adopted else dict.fromkeys(self._filled_in)
        return replace(self, **open_again)

    def filled_in(self, resolved: S2FTConfig) -> S2FTConfig:
        """Takes over the choices of `resolved` into this object, which PEFT goes on to write into, and returns it.

        If a model holds it already, a copy is returned, with the choices of `resolved`.
        """
        if self._filled_in or self._adopted:
            open_before, held = self.reopened(), replace(resolved)
            held._filled_in = [name for name in FILLED_IN if getattr(open_before, name) is None]  # noqa: SLF001 - its own class
            return held
        self.seed = resolved.seed
        for name in FILLED_IN:
            if getattr(self, name) is None:
                self._filled_in.append(name)
                setattr(self, name, getattr(resolved, name))
        return self


def is_foreign(found: Mapping[str, Any]) -> bool:
    """Whether a config is of another method that PEFT knows."""
    method = found.get("peft_type")
    return isinstance(method, str) and method != METHOD and method in PEFT_TYPE_TO_CONFIG_MAPPING


register_config(S2FTConfig)
